"""Flow matching: paths, training times, targets, losses and conversions. Pure functions of tensors that know no model.

Time runs from noise (t = 0) to data (t = 1), here and in the whole project:

    x_t = alpha(t) x1 + sigma(t) x0          x1: data, x0: standard normal noise
    u_t = alpha'(t) x1 + sigma'(t) x0        the velocity: what a velocity model regresses on, and the drift of the sampling ODE

A model sees x = x_t and estimates the mean of u_t, of x0 (noise prediction) or of -x0 / sigma (score prediction) given x. Given x, the two
equations are a linear system in (x1, x0), so one estimate gives all others. With the determinant W = alpha' sigma - alpha sigma' (1 on the
linear path, pi/2 on GVP; a sum of positive terms on each path, so nothing cancels):

    x1 = (sigma u - sigma' x) / W        x0 = (alpha' x - alpha u) / W        u = (alpha' x - W x0) / alpha        score = -x0 / sigma

Shapes: x, x1, x0 and predictions are (B, ...), usually latents (B, C, H, W); t is (B,), or 0-d for one time that all images share.
Names of options are accepted in any case, so that the values of official YAML files ("Linear", "GVP", "SBDM") work.

Source: SiT, arXiv:2401.08740, Sec. 2, with time reversed; LightningDiT, arXiv:2501.01423; golden numbers of the official transport/.
"""

import math

import torch
import torch.nn.functional as F

PATHS = ("linear", "gvp", "vp")
PREDICTIONS = ("velocity", "noise", "score")
WEIGHTS = ("none", "velocity", "likelihood")
DISTRIBUTIONS = ("uniform", "logit_normal")
DIFFUSION_FORMS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")

VP_BETA_MIN, VP_BETA_MAX = 0.1, 20.0  # Score SDE, arXiv:2011.13456, App. C


def check_choice(name, value, options):
    """`value` in lower case if it is one of `options`; else a ValueError that names the argument."""
    if isinstance(value, str) and value.lower() in options:
        return value.lower()
    raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(map(repr, options))}")


# Paths


def path_coefficients(t, path="linear"):
    """(alpha, sigma, alpha', sigma') at the times t, elementwise.

    linear: alpha = t, sigma = 1 - t.
    gvp:    alpha = sin(pi t / 2), sigma = cos(pi t / 2); alpha^2 + sigma^2 = 1.
    vp:     alpha = exp(-s^2 (beta_max - beta_min) / 4 - s beta_min / 2)  (s = 1 - t), sigma = sqrt(1 - alpha^2); alpha(0) = 0.0066.

    Args: t: any shape, floating point; half precision is raised to fp32.
    Returns: four tensors of the shape of t.
    Source: SiT, arXiv:2401.08740, Sec. 2; VP: Score SDE, arXiv:2011.13456, App. C.
    """
    path = check_choice("path", path, PATHS)
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    if path == "linear":
        return t, 1 - t, torch.ones_like(t), -torch.ones_like(t)
    if path == "gvp":
        angle = t * (math.pi / 2)
        alpha, sigma = torch.sin(angle), torch.cos(angle)
        return alpha, sigma, sigma * (math.pi / 2), alpha * (-math.pi / 2)
    s = 1 - t
    log_alpha = -0.25 * s**2 * (VP_BETA_MAX - VP_BETA_MIN) - 0.5 * s * VP_BETA_MIN
    rate = 0.5 * s * (VP_BETA_MAX - VP_BETA_MIN) + 0.5 * VP_BETA_MIN  # alpha' / alpha
    alpha = torch.exp(log_alpha)
    # expm1, because 1 - exp cancels near the data: in fp32 sigma^2 is off by 1 % at t = 1 - 1e-5, where VP training ends.
    sigma = torch.sqrt(-torch.expm1(2 * log_alpha))
    return alpha, sigma, alpha * rate, -(alpha**2) * rate / sigma


def interpolate(x1, x0, t, path="linear"):
    """(x_t, u_t): the point at time t between noise x0 and data x1, and the velocity there.

    Args: x1, x0: (B, ...), same shape. t: (B,) or 0-d.
    Returns: two tensors of the shape of x1, at least fp32.
    Raises: ValueError for an unknown path or shapes that differ.
    Source: SiT, arXiv:2401.08740, Sec. 2.
    """
    alpha, sigma, d_alpha, d_sigma = _coefficients_like(x1, t, path, x0=x0)
    return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0


def integration_interval(path="linear", prediction="velocity", *, mode="train", train_eps=None, sample_eps=None, diffusion_form="sigma",
                         last_step_size=0.0, reverse=False):
    """(t0, t1): the times that training draws from, or that sampling integrates over, clear of the singular ends.

    Velocity on linear and GVP is regular on all of [0, 1]. Noise and score predictions divide by alpha(0) = 0, scores, VP and every SDE by
    sigma(1) = 0.

    Args:
        mode: "train", "ode" or "sde".
        train_eps, sample_eps: distance kept from a singular end; None: 1e-5 and 1e-3 for VP, 1e-3 and 1e-3 for noise and score prediction,
            else 0. (The official defaults end as None there, and sampling fails.)
        diffusion_form, last_step_size: of the SDE. SBDM diffusion is infinite at alpha(0) = 0, so there the default of sample_eps is 1e-3
            also for velocity. A last_step_size above 0 leaves [1 - last_step_size, 1] to the sampler's last step.
        reverse: (t1, t0), to integrate from data to noise.
    Raises: ValueError for an unknown option or an epsilon outside [0, 0.5).
    """
    path, prediction = check_choice("path", path, PATHS), check_choice("prediction", prediction, PREDICTIONS)
    mode = check_choice("mode", mode, ("train", "ode", "sde"))
    sbdm = mode == "sde" and check_choice("diffusion_form", diffusion_form, DIFFUSION_FORMS) == "sbdm"
    regular = path != "vp" and prediction == "velocity"
    if mode == "train":
        name, eps, default = "train_eps", train_eps, 1e-5 if path == "vp" else 1e-3
    else:
        name, eps, default = "sample_eps", sample_eps, 1e-3
    if eps is None:
        eps = 0.0 if regular and not sbdm else default
    if not 0 <= eps < 0.5:
        raise ValueError(f"{name}: got {eps!r}, expected a number in [0, 0.5)")
    if not 0 <= last_step_size < 1:
        raise ValueError(f"last_step_size: got {last_step_size!r}, expected a number in [0, 1)")
    t0, t1 = 0.0, 1.0
    if path != "vp" and (prediction != "velocity" or sbdm):
        t0 = eps
    if not regular or mode == "sde":
        t1 = 1 - (last_step_size if mode == "sde" and last_step_size > 0 else eps)
    return (t1, t0) if reverse else (t0, t1)


# Training


def shift_time(t, shift=None):
    """t' = shift t / (1 + (shift - 1) t): keeps 0 and 1, and moves the times between towards noise for shift < 1. None or 0: no shift.

    Source: SD3, arXiv:2403.03206, Sec. 5.3.2, whose time runs the other way: its shift is the inverse of ours.
    """
    if shift is None or shift == 0:
        return t
    if not 0 < shift < math.inf:
        raise ValueError(f"shift: got {shift!r}, expected a positive number, or None for no shift")
    return shift * t / (1 + (shift - 1) * t)


def sample_timesteps(n, *, distribution="logit_normal", mean=0.0, std=1.0, shift=1.0, low=0.0, high=1.0, generator=None, device=None):
    """n training times: u ~ uniform, or u = sigmoid(mean + std * normal); then u' = shift_time(u, shift); then t = low + (high - low) u'.

    Drawn on the generator's device (without a generator, on `device` from its default one), so no host draw or copy holds up a GPU.

    Returns: (n,) fp32 in [low, high].
    Raises: ValueError for an unknown distribution, a negative n, std or shift, a range outside [0, 1], or a device not the generator's.
    Source: logit-normal: SD3, arXiv:2403.03206, Sec. 3.1; the paper's setting (mean 0, std 1, shift 1): LightningDiT, arXiv:2501.01423.
    """
    distribution = check_choice("distribution", distribution, DISTRIBUTIONS)
    if n < 0:
        raise ValueError(f"n: got {n}, expected a number >= 0")
    if std < 0:
        raise ValueError(f"std: got {std}, expected a number >= 0")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"low, high: got {low}, {high}, expected 0 <= low <= high <= 1")
    if generator is not None:
        if device is not None and torch.device(device).type != generator.device.type:
            raise ValueError(f"device: got {device}, expected the generator's, {generator.device}")
        device = generator.device
    if distribution == "uniform":
        u = torch.rand(n, generator=generator, device=device, dtype=torch.float32)
    else:
        u = torch.sigmoid(mean + std * torch.randn(n, generator=generator, device=device, dtype=torch.float32))
    return low + (high - low) * shift_time(u, shift)


def timestep_distribution_at(step, distribution="logit_normal", switch_step=None, switch_to="uniform"):
    """The distribution of training times at a step: `distribution` before switch_step, `switch_to` from it on.

    The official 800-epoch recipe switches from logit-normal to uniform at step 600,000.
    """
    distribution, switch_to = check_choice("distribution", distribution, DISTRIBUTIONS), check_choice("switch_to", switch_to, DISTRIBUTIONS)
    return distribution if switch_step is None or step < switch_step else switch_to


def model_guidance(conditional, unconditional, t, scale, interval=(0.0, 1.0), dropped=None):
    """w (v(x, t, y) - v(x, t, null)): what model guidance adds to the velocity u_t that a model learns, a constant to its gradient.

    A model trained so is sampled without guidance, in one pass a step. The v are its own, of its average weights, and the null label keeps
    its plain target; so the model approaches the fixed point of v_y = u_y + w (v_y - u_null), u_y and u_null being the plain velocities:

        v_y = u_null + (u_y - u_null) / (1 - w)

    That is classifier-free guidance of the scale 1 / (1 - w): 1.82 for the authors' w = 0.45. An error of v_y comes back times w from each
    round, so there is a fixed point to approach for w < 1 only.

    Args:
        conditional, unconditional: (B, C, ...), v for the label and for the null label. t: (B,).
        scale: w, in [0, 1). interval: it acts for low <= t <= high.
        dropped: (B,) bool, images that are trained on the null label, for which it is 0.
    Returns: (B, C, ...), fp32 (fp64 for fp64 inputs), detached.
    Raises: ValueError for a scale or an interval out of range, or shapes that differ.
    Source: Diffusion Models without Classifier-free Guidance, arXiv:2502.12154. Sign, average weights in both terms, w = 0.45 (there:
        scale 1.45), plain null targets and the interval (0.25, 1), their time below 0.75, are read from its code (tzco/Diffusion-wo-CFG,
        train.py, in the copy Peterande/Diffusion-wo-CFG), not from its text. The fixed point is our derivation, the cosine loss our choice.
    """
    low, high = interval
    if not 0 <= scale < 1:
        raise ValueError(f"scale: got {scale!r}, expected a number in [0, 1): from 1 on there is no fixed point to approach")
    if not 0 <= low <= high <= 1:
        raise ValueError(f"interval: got {interval!r}, expected 0 <= low <= high <= 1")
    if unconditional.shape != conditional.shape or t.shape != conditional.shape[:1]:
        raise ValueError(f"unconditional, t: got shapes {tuple(unconditional.shape)} and {tuple(t.shape)}, expected "
                         f"{tuple(conditional.shape)} and ({len(conditional)},)")
    dtype = torch.promote_types(conditional.dtype, torch.float32)
    acts = (low <= t) & (t <= high)
    acts = acts if dropped is None else acts & ~dropped
    weight = (scale * acts.to(dtype)).reshape(-1, *[1] * (conditional.dim() - 1))
    return (weight * (conditional.to(dtype) - unconditional.to(dtype))).detach()


def losses(output, x1, x0, t, *, path="linear", prediction="velocity", weight="none", cosine=False, guidance=None):
    """Per-image loss terms of a model's output at x_t, in fp32 (fp64 for fp64 outputs). The training loss is the sum of their means.

    velocity: mse = |output - u_t|^2.
    noise:    mse = w |output - x0|^2.
    score:    mse = w |sigma output + x0|^2.
    w:        "none" 1; "velocity" (W / alpha)^2, which makes it the error of the implied velocity; "likelihood" W / (alpha sigma). Velocity
              losses are never weighted, as in the official code.
    cosine:   cos = mean over positions of 1 - cos(output, u_t) over channels; velocity prediction only.
    guidance: u_t + guidance takes the place of u_t, see model_guidance; velocity prediction only.

    Args: output, x1, x0: (B, C, ...), same shape, and so guidance. t: (B,) or 0-d.
    Returns: {"mse": (B,)} and, with cosine, "cos": (B,); mean over everything but the batch.
    Raises: ValueError for an unknown option, shapes that differ, or cosine or guidance with another prediction.
    Source: SiT, arXiv:2401.08740, Sec. 2 and 3 (weights); cosine: LightningDiT, arXiv:2501.01423, after FasterDiT, arXiv:2410.10356.
    """
    prediction, weight = check_choice("prediction", prediction, PREDICTIONS), check_choice("weight", weight, WEIGHTS)
    if cosine and prediction != "velocity":
        raise ValueError(f"cosine: got True with prediction {prediction!r}, expected False (it is defined on velocities)")
    if guidance is not None and prediction != "velocity":
        raise ValueError(f"guidance: got a tensor with prediction {prediction!r}, expected None (it is defined on velocities)")
    dtype = torch.promote_types(output.dtype, torch.float32)
    output, x1, x0 = output.to(dtype), x1.to(dtype), x0.to(dtype)
    given = {} if guidance is None else dict(guidance=guidance)
    alpha, sigma, d_alpha, d_sigma = _coefficients_like(output, t, path, x1=x1, x0=x0, **given)
    if prediction == "velocity":
        target = d_alpha * x1 + d_sigma * x0
        target = target if guidance is None else target + guidance
        terms = {"mse": _mean_per_image((output - target) ** 2)}
        if cosine:
            terms["cos"] = _mean_per_image(1 - F.cosine_similarity(output, target, dim=1))
        return terms
    error = output - x0 if prediction == "noise" else sigma * output + x0
    W = d_alpha * sigma - alpha * d_sigma
    factor = {"none": 1.0, "velocity": (W / alpha) ** 2, "likelihood": W / (alpha * sigma)}[weight]
    return {"mse": _mean_per_image(factor * error**2)}


# Conversions: from a model's output at (x, t) to any estimate, shape of x, at least fp32. Singular where the formulas above divide by 0.


def velocity_from(output, x, t, path="linear", prediction="velocity"):
    """The velocity, drift of the probability-flow ODE: (alpha' x - W x0) / alpha. Source: SiT, arXiv:2401.08740, Sec. 2."""
    if check_choice("prediction", prediction, PREDICTIONS) == "velocity":
        return output
    alpha, sigma, d_alpha, d_sigma = _coefficients_like(x, t, path, output=output)
    W = d_alpha * sigma - alpha * d_sigma
    return (d_alpha * x - W * noise_from(output, x, t, path, prediction)) / alpha


def noise_from(output, x, t, path="linear", prediction="velocity"):
    """The noise x0: (alpha' x - alpha u) / W from a velocity, -sigma s from a score. Source: SiT, arXiv:2401.08740, Sec. 2."""
    prediction = check_choice("prediction", prediction, PREDICTIONS)
    if prediction == "noise":
        return output
    alpha, sigma, d_alpha, d_sigma = _coefficients_like(x, t, path, output=output)
    if prediction == "score":
        return -sigma * output
    return (d_alpha * x - alpha * output) / (d_alpha * sigma - alpha * d_sigma)


def score_from(output, x, t, path="linear", prediction="velocity"):
    """The score, gradient of log p_t at x: -x0 / sigma. Source: SiT, arXiv:2401.08740, Sec. 2."""
    if check_choice("prediction", prediction, PREDICTIONS) == "score":
        return output
    sigma = _coefficients_like(x, t, path, output=output)[1]
    return noise_from(output, x, t, path, prediction) / -sigma


def data_from(output, x, t, path="linear", prediction="velocity"):
    """The clean data x1: (sigma u - sigma' x) / W from a velocity, else (x - sigma x0) / alpha, Tweedie's formula."""
    alpha, sigma, d_alpha, d_sigma = _coefficients_like(x, t, path, output=output)
    if check_choice("prediction", prediction, PREDICTIONS) == "velocity":
        return (sigma * output - d_sigma * x) / (d_alpha * sigma - alpha * d_sigma)
    return (x - sigma * noise_from(output, x, t, path, prediction)) / alpha


def diffusion(t, form="sigma", norm=1.0, path="linear"):
    """The diffusion D(t) of the sampling SDE  dx = (u + D score) dt + sqrt(2 D) dw, elementwise. Any D >= 0 keeps the marginals p_t.

    constant:   norm.                        sbdm:   norm sigma W / alpha, that of the path's own noising SDE; infinite at alpha = 0.
    sigma:      norm sigma.                  linear: norm (1 - t).
    decreasing: (norm cos(pi t) + 1)^2 / 4.  increasing-decreasing: norm sin(pi t)^2.

    Raises: ValueError for an unknown form or path, or norm < 0.
    Source: SiT, arXiv:2401.08740, Sec. 2, where 2 D is written w_t.
    """
    form = check_choice("form", form, DIFFUSION_FORMS)
    if not norm >= 0:
        raise ValueError(f"norm: got {norm!r}, expected a number >= 0")
    alpha, sigma, d_alpha, d_sigma = path_coefficients(t, path)
    t = t.to(alpha.dtype)
    if form == "constant":
        return torch.full_like(t, norm)
    if form == "sbdm":
        return norm * sigma * (d_alpha * sigma - alpha * d_sigma) / alpha
    if form == "sigma":
        return norm * sigma
    if form == "linear":
        return norm * (1 - t)
    if form == "decreasing":
        return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
    return norm * torch.sin(math.pi * t) ** 2


def _coefficients_like(x, t, path, **others):
    """path_coefficients of t, shaped to broadcast over x; checks that t and the tensors in `others` fit x."""
    if t.dim() > 1 or (t.dim() == 1 and t.shape[0] != x.shape[0]):
        raise ValueError(f"t: got shape {tuple(t.shape)}, expected ({x.shape[0]},) or ()")
    for name, other in others.items():
        if other.shape != x.shape:
            raise ValueError(f"{name}: got shape {tuple(other.shape)}, expected {tuple(x.shape)}")
    return path_coefficients(t.reshape(-1, *[1] * (x.dim() - 1)) if t.dim() else t, path)


def _mean_per_image(x):
    return x.flatten(1).mean(1)
