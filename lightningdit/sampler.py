"""Sampling: from noise to latents. Time grids, ODE and SDE solvers, classifier-free guidance, noise per sample seed.

    latents = sample(model, labels=[207, 360], seeds=[0, 1], latent_shape=(32, 16, 16), num_classes=1000, guidance_scale=6.7)

`sample` is the way in. Below it, the solvers integrate any predict(x, t), which takes the state x (B, ...) and the time t, a Python
float, and returns the model's output. Times come from a grid on the host, so that no step waits for the device.

    noise = invert(model, latents, labels=...)                 # the same ODE, from data to noise
    nats = log_likelihood(model, latents, labels=..., seeds=...)

Steps are counted as intervals of the grid: num_steps = 249 is what the official code calls 250 steps, linspace(0, 1, 250). Euler and
the multistep methods (ab2, dpmpp_2m, unipc) evaluate the model once an interval, Heun and midpoint twice, dopri5 as often as its
tolerance asks; an SDE's last step is one more.

Image i depends on its seed, its label and the settings, not on the other images: its noise comes from a generator of its own, and
batches are filled up so that its arithmetic is the same (`filled_rows` says how far that holds). dopri5 is the exception: it chooses
its steps by the error of the whole batch, so images drawn in different batches agree to about rtol only.
"""

import contextlib
import math
import operator

import torch

from . import flow, graphs
from .flow import check_choice
from .optional import optional, progress_bar

ODE_METHODS = ("euler", "heun", "midpoint", "dopri5", "ab2", "dpmpp_2m", "unipc")
SDE_METHODS = ("sde_euler", "sde_heun")
LAST_STEPS = ("mean", "tweedie", "euler")
ROWS = 16  # of a matrix product on a CPU: multiples of it are rounded alike, see filled_rows


class Diverged(RuntimeError):
    """A latent came out non-finite: of the model, or of a guidance too strong for it."""


@torch.no_grad()
def sample(model, *, labels, seeds, latent_shape, num_classes, num_steps=249, method="euler", shift=0.3, guidance_scale=1.0,
           guidance_interval=(0.0, 1.0), guidance_channels=None, guidance_rescale=0.0, guide=None, path="linear",
           prediction="velocity", sample_eps=None, atol=1e-6, rtol=1e-3, diffusion_form="sigma", diffusion_norm=1.0, last_step="mean",
           last_step_size=0.04, device="cpu", dtype=torch.float32, batch_size=None, progress=False):
    """Draws one latent for each (label, seed).

    Args:
        model: model(x, t, y) -> (B, C, H, W), given x (B, C, H, W) in `dtype`, t (B,) fp32 and y (B,) int64. A module runs in
            evaluation mode and gets its mode back. Autocast, where wanted, is the caller's. Or a `Prepared` one, for many images.
        labels: n integers in [0, num_classes]; num_classes is the null label of unconditional sampling.
        seeds: n integers in [0, 2^32), see NoiseStream.
        latent_shape: (C, H, W).
        num_steps: intervals of the time grid; dopri5 has none.
        method: ODE "euler", "heun", "midpoint", "dopri5", and for few steps "ab2", "dpmpp_2m", "unipc", see integrate_ode; SDE
            "sde_euler" (Euler-Maruyama), "sde_heun".
        shift: of the time grid, see flow.shift_time; None, 0 or 1: none. The published numbers use 0.3.
        guidance_scale, guidance_interval, guidance_channels, guidance_rescale, guide: see GuidedModel. Scale 1 is no guidance.
        path, prediction, sample_eps: what the model was trained on, see flow.integration_interval.
        atol, rtol: of dopri5.
        diffusion_form, diffusion_norm, last_step, last_step_size: of the SDE, see flow.diffusion and integrate_sde.
        device, dtype: where the state lives, and the type in which the model gets it. The state is fp32 (fp64 if dtype is).
        batch_size: most images at a time; None: all. Guidance runs twice as many rows.
        progress: show a progress bar.
    Returns: (n, C, H, W) latents in the type of the state, normalised as those that the model was trained on.
    Raises: ValueError, before the model is called, that names the argument; ImportError if dopri5 lacks torchdiffeq;
        Diverged (a RuntimeError) if a latent comes out non-finite.
    """
    labels, seeds = _integers("labels", labels, num_classes), _integers("seeds", seeds, 2**32 - 1)
    n = len(seeds)
    if len(labels) != n:
        raise ValueError(f"labels, seeds: got lengths {len(labels)} and {n}, expected one seed for each label")
    if len(latent_shape) != 3 or min(latent_shape) < 1:
        raise ValueError(f"latent_shape: got {tuple(latent_shape)}, expected (C, H, W), each at least 1")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: got {batch_size}, expected a number of at least 1, or None for all at once")
    device, state_dtype = torch.device(device), torch.promote_types(dtype, torch.float32)
    guidance = dict(num_classes=num_classes, scale=guidance_scale, interval=guidance_interval, channels=guidance_channels,
                    rescale=guidance_rescale, guide=guide, dtype=dtype)
    GuidedModel(model, torch.empty(0, dtype=torch.long), **guidance).check_channels(latent_shape[0])
    method = check_choice("method", method, ODE_METHODS + SDE_METHODS)
    if method in SDE_METHODS:
        grid, options = _plan_sde(num_steps, shift, sample_eps, method=method, path=path, prediction=prediction, form=diffusion_form,
                                  norm=diffusion_norm, last_step=last_step, last_step_size=last_step_size)
    else:
        t0, t1 = flow.integration_interval(path, prediction, mode="ode", sample_eps=sample_eps)
        _check_start(t0, path, prediction)
        grid = time_grid(num_steps, shift, t0, t1)
        options = dict(method=method, path=path, prediction=prediction, atol=atol, rtol=rtol)

    latents = torch.empty(n, *latent_shape, dtype=state_dtype, device=device)
    batch_size = min(batch_size or n, n)
    starts = range(0, n, batch_size) if n else ()
    adaptive = method == "dopri5"  # would store the states that a callback asks for, so its bar moves once a batch
    bar = progress_bar(total=len(starts) * (1 if adaptive else num_steps), desc="sampling", disable=not progress)
    with _evaluation_mode(model), _evaluation_mode(guide), bar:
        callback = None if adaptive else lambda *_: bar.update()
        for start in starts:
            chosen = list(range(start, min(start + batch_size, n)))
            filled = chosen + chosen[-1:] * (filled_rows(batch_size, device, model, guide) - len(chosen))
            noise = NoiseStream([seeds[i] for i in filled], latent_shape, device, state_dtype)
            for each in (model, guide):
                if isinstance(each, Prepared):
                    each.begin([labels[i] for i in filled])
            predict = GuidedModel(model, torch.tensor([labels[i] for i in filled], device=device), **guidance)
            if method in SDE_METHODS:
                x = integrate_sde(predict, noise(), grid, noise, callback=callback, **options)
            else:
                x = integrate_ode(predict, noise(), grid, callback=callback, **options)
            latents[start : start + len(chosen)] = x[: len(chosen)]
            bar.update(adaptive)
    broken = (~torch.isfinite(latents).flatten(1).all(1)).nonzero().flatten().tolist() if n else []
    if broken:
        raise Diverged(f"sample: {len(broken)} of {n} latents are not finite, the first of seed {seeds[broken[0]]} and label "
                           f"{labels[broken[0]]}; the model or the guidance (scale {guidance_scale}) diverged")
    return latents


@torch.no_grad()
def sample_images(model, tokenizer, *, labels, seeds, batch_size=None, device="cpu", progress=False, **settings):
    """`sample`, then decoded: (n, H, W, C) uint8 images on the CPU. `settings` are the other arguments of `sample`.

    Decoding runs in batches of one shape too, so that image i is the same whatever it is drawn with; and outside autocast, because
    rounding to bf16 in the decoder shows in uint8 pixels.
    """
    latents = sample(model, labels=labels, seeds=seeds, batch_size=batch_size, device=device, progress=progress, **settings)
    n = len(latents)
    rows, images = min(batch_size or n, n), []
    for start in range(0, n, max(rows, 1)):
        part = latents[start : start + rows]
        filled = fill(part, padded_rows(rows, latents.device))
        with torch.autocast(latents.device.type, enabled=False):
            images.append(tokenizer.decode_uint8(filled)[: len(part)].cpu())
    return torch.cat(images)


@torch.no_grad()
def invert(model, latents, *, labels, num_classes, num_steps=249, method="heun", shift=0.3, path="linear", prediction="velocity",
           sample_eps=None, atol=1e-6, rtol=1e-3, dtype=torch.float32):
    """The noise x0 from which the ODE of `sample`, without guidance, makes these latents: solved from data to noise.

    Args:
        latents: (n, C, H, W), normalised, on the device of the model. labels: n integers in [0, num_classes].
        method: "euler", "heun", "midpoint", "dopri5" or "ab2". The others: see sample.
    Returns: (n, C, H, W) noise in fp32 (fp64 for fp64 latents). Solved forward along the same grid it gives the latents back, up to the
        error of the solver.
    Raises: ValueError that names the argument.
    """
    check_choice("method", method, [name for name in ODE_METHODS if name not in ("dpmpp_2m", "unipc")])
    x, predict, (t0, t1) = _from_data(model, latents, labels, num_classes, path, prediction, sample_eps, dtype)
    grid = time_grid(num_steps, shift, t0, t1).flip(0)
    with _evaluation_mode(model):
        return integrate_ode(predict, x, grid, method=method, path=path, prediction=prediction, atol=atol, rtol=rtol)


def log_likelihood(model, latents, *, labels, seeds, num_classes, probes=1, path="linear", prediction="velocity", sample_eps=None,
                   atol=1e-5, rtol=1e-5, dtype=torch.float32, progress=False):
    """Logarithm of the density, in nats, that the probability-flow ODE (without guidance) gives to each latent.

    log p(x1) = log N(x0) - integral over t of div v(x_t, t), solved from data to noise by dopri5. The divergence is Hutchinson's
    estimate, e^T (dv / dx) e with fixed signs e: unbiased, its spread falls with the square root of the number of probes.

    Args:
        latents: (n, C, H, W), normalised, on the device of the model. labels: n integers in [0, num_classes].
        seeds: n integers in [0, 2^32): of the signs. probes: sign vectors an image, each a backward pass through the model.
        path, prediction, sample_eps, atol, rtol, dtype: see sample. Where the path needs sample_eps > 0, the density is that of x at the
            ends of the interval.
    Returns: (n,) fp64 on the CPU. Divide by C H W log 2 for bits a dimension of normalised latents (not of pixels).
    Raises: ValueError that names the argument; ImportError without torchdiffeq; RuntimeError if no step is small enough.
    Source: FFJORD, arXiv:1810.01367; Score SDE, arXiv:2011.13456, Sec. 4.3; Hutchinson, 1990.
    """
    with optional("log_likelihood"):
        from torchdiffeq import odeint

    if not isinstance(probes, int) or probes < 1:
        raise ValueError(f"probes: got {probes!r}, expected an integer of at least 1")
    x, predict, (t0, t1) = _from_data(model, latents, labels, num_classes, path, prediction, sample_eps, dtype)
    seeds = _integers("seeds", seeds, 2**32 - 1)
    if len(seeds) != len(x):
        raise ValueError(f"seeds: got {len(seeds)}, expected one for each of {len(x)} latents")
    noise = NoiseStream(seeds, x.shape[1:], x.device, x.dtype)
    signs = [noise().sign() for _ in range(probes)]

    def derivative(t, state):
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            v = flow.velocity_from(predict(x, float(t)), x, t, path, prediction)
            pulled = [torch.autograd.grad(v, x, e, retain_graph=i + 1 < probes)[0] for i, e in enumerate(signs)]
        divergence = sum((e * p).flatten(1).sum(1) for e, p in zip(signs, pulled, strict=True)) / probes
        bar.update()
        return v.detach(), divergence

    with _evaluation_mode(model), progress_bar(desc="likelihood", unit="evaluation", disable=not progress) as bar:
        times = torch.tensor([t1, t0], dtype=x.dtype, device=x.device)
        noise, integral = (states[-1] for states in odeint(derivative, (x, x.new_zeros(len(x))), times, method="dopri5",
                                                           atol=atol, rtol=rtol, options=dict(step_t=times[-1:])))
    noise = noise.double().flatten(1)
    # integral is that from t1 down to t0, the negative of the one in the formula.
    return (-0.5 * noise.square().sum(1) - 0.5 * noise.shape[1] * math.log(2 * math.pi) + integral.double()).cpu()


def _from_data(model, latents, labels, num_classes, path, prediction, sample_eps, dtype):
    """(state, predict, interval) of the unguided ODE that starts at data."""
    if latents.dim() != 4 or not latents.is_floating_point():
        raise ValueError(f"latents: got {latents.dtype} of shape {tuple(latents.shape)}, expected floating point (n, C, H, W)")
    labels = _integers("labels", labels, num_classes)
    if len(labels) != len(latents):
        raise ValueError(f"labels: got {len(labels)}, expected one for each of {len(latents)} latents")
    predict = GuidedModel(model, torch.tensor(labels, dtype=torch.long, device=latents.device), num_classes, dtype=dtype)
    state = latents.to(torch.promote_types(torch.promote_types(dtype, latents.dtype), torch.float32))
    interval = flow.integration_interval(path, prediction, mode="ode", sample_eps=sample_eps)
    _check_start(interval[0], path, prediction)
    return state, predict, interval


def padded_rows(n, device):
    """Rows of a batch that hold n images, so that the arithmetic of one image does not depend on how many it is drawn with.

    All batches of a call have one shape; copies fill what is missing in the last. On the CPU, n is also rounded up to a multiple of
    8: matrix kernels round differently in rows left over by their tiles, and so do vector loops in elements left over. A LightningDiT's
    products have a row for each token, so its images are only filled up to a multiple of 16 tokens, see `filled_rows`. Batches of one
    shape agree exactly, batches of different shapes where the matrix library keeps to that: see `filled_rows`.
    """
    return round_up(n, 8) if device.type == "cpu" else n


def filled_rows(n, device, *models):
    """padded_rows for these models (None: no model): where all are LightningDiTs, n rounded up so that their tokens are a multiple of 16.

    adaLN's layers, which have a row an image, are filled up to 16 rows on their own (GuidedModel, Prepared). So 4 images of 16 tokens are
    4, not 8. MKL rounds rows alike for all multiples of 16 rows from 16 to 2,304 in fp32 with AVX-512 (widths 36 to 768), and rounded 8
    rows otherwise. With several threads it may split the sums of a product with long rows and few of them (1,024 inputs, 128 rows and
    2 threads; 2,048 and 256): there, and with kernels whose tiles have other heights (MKL's for AVX2 on Intel's processors: 24 rows),
    batches of different shapes agree to fp32 rounding. In bf16, with AMX, oneDNN rounds a row alike beside any number of rows where it has
    up to 768 inputs; of more inputs it may cut the sums otherwise, and batches of different shapes agree to bf16 rounding.
    """
    tokens = [model.pos_embed.shape[1] for model in map(_transformer, models) if model is not None]
    if device.type != "cpu" or len(tokens) < sum(model is not None for model in models):
        return padded_rows(n, device)
    return round_up(n, math.lcm(*(ROWS // math.gcd(ROWS, count) for count in tokens)))


def round_up(n, step):
    """The smallest multiple of `step` that holds n."""
    return math.ceil(n / step) * step


def _transformer(model):
    """The LightningDiT behind a model, whole on this process; or None."""
    model = model.model if isinstance(model, Prepared) else model
    return model if hasattr(model, "modulations") and not hasattr(model, "unshard") else None  # FSDP2 gathers weights in forward only


def fill(values, rows):
    """values (n, ...) with copies of the last up to `rows` of them."""
    return torch.cat([values, values[-1:].expand(rows - len(values), *values.shape[1:])])


def _plan_sde(num_steps, shift, sample_eps, **options):
    """Time grid and options of integrate_sde; refuses settings in which a singular end would turn images into NaN or noise."""
    path, prediction, form, norm = (options[name] for name in ("path", "prediction", "form", "norm"))
    last_step, last_step_size = _check_last_step(options["last_step"]), options["last_step_size"]
    if last_step is not None and not 0 < last_step_size < 1:
        raise ValueError(f"last_step_size: got {last_step_size!r}, expected a number in (0, 1)")
    t0, t1 = flow.integration_interval(path, prediction, mode="sde", sample_eps=sample_eps, diffusion_form=form,
                                       last_step_size=0.0 if last_step is None else last_step_size)
    if t0 >= t1:
        raise ValueError(f"last_step_size: got {last_step_size!r}, expected less than {1 - t0}, so that the SDE has an interval")
    _check_start(t0, path, prediction, form)
    end = torch.tensor(t1)
    if flow.path_coefficients(end, path)[1].abs() < 1e-6 < flow.diffusion(end, form, norm, path) and options["method"] == "sde_heun":
        raise ValueError(f"last_step: got None, expected one of {LAST_STEPS}, or sample_eps > 0: the score is singular at t = 1, where "
                         f"diffusion_form {form!r} with diffusion_norm {norm} does not vanish")
    # The shift acts between t0 and t1 and must not move them: the last step from t1 has a length of its own.
    return t0 + (t1 - t0) * time_grid(num_steps, shift), options


def _check_start(t0, path, prediction, form=None):
    if t0 == 0 and path.lower() != "vp" and (prediction.lower() != "velocity" or form is not None and form.lower() == "sbdm"):
        raise ValueError(f"sample_eps: got 0, expected a number > 0: on path {path!r} with prediction {prediction!r}"
                         + (f" and diffusion_form {form!r}" if form else "") + " the drift is infinite at t = 0")


def _check_last_step(last_step):
    return None if last_step is None else check_choice("last_step", last_step, LAST_STEPS)


@contextlib.contextmanager
def _evaluation_mode(model):
    """Evaluation mode (no label dropout) for the modules that were training, and for those only."""
    training = [module for module in model.modules() if module.training] if isinstance(model, torch.nn.Module) else []
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


# Noise


class NoiseStream:
    """Standard normal noise per sample seed: each call returns the next (n, *shape) draw.

    Every sample has a CPU generator of its own, so its noise is the same in any batch and on any device. The first call is the
    initial noise, the following ones are the increments of an SDE in step order.

    Args: seeds: n integers in [0, 2^32): PyTorch's CPU generator ignores higher bits, so that larger seeds would repeat images.
    Raises: ValueError for a seed out of range.
    """

    def __init__(self, seeds, shape, device="cpu", dtype=torch.float32):
        self.generators = [torch.Generator().manual_seed(seed) for seed in _integers("seeds", seeds, 2**32 - 1)]
        self.shape, self.device, self.dtype = tuple(shape), device, dtype

    def __call__(self):
        noise = torch.empty(len(self.generators), *self.shape)
        for row, generator in zip(noise, self.generators, strict=True):
            row.normal_(generator=generator)
        return noise.to(self.device, self.dtype)


def initial_noise(seeds, shape, device="cpu", dtype=torch.float32):
    """(n, *shape) standard normal noise x0 whose row i depends on seeds[i] only; drawn in fp32 on the CPU, see NoiseStream."""
    return NoiseStream(seeds, shape, device, dtype)()


def _integers(name, values, largest):
    """`values` as a list of Python integers in [0, largest]."""
    try:
        integers = [operator.index(value) for value in (values.tolist() if isinstance(values, torch.Tensor) else values)]
    except TypeError:
        raise ValueError(f"{name}: got {values!r}, expected a sequence of integers") from None
    for value in integers:
        if not 0 <= value <= largest:
            raise ValueError(f"{name}: got {value}, expected integers in [0, {largest}]")
    return integers


# Guidance


class GuidedModel:
    """predict(x, t) of a class-conditional model under guidance: weak + scale * (cond - weak).

    The weak output is the unconditional one (classifier-free guidance: one batch of 2 B rows gives both), or, with a guide, that of
    the guide for the same labels (autoguidance: a smaller model, or an earlier checkpoint). Outside the interval, low <= t <= high, the
    conditional output is used and nothing else is computed, likewise always with scale 1. Times and bounds are compared in fp32, as
    the official code does. A high of 1 or more is no bound, because adaptive solvers look beyond t = 1.

    Args:
        model: model(x, t, y) -> output of the shape of x.
        labels: (B,) int64, on the device of the state.
        num_classes: the null label.
        scale, interval: guidance scale, and (low, high).
        channels: number of leading channels to guide, the others keep the conditional output; None: all. The published numbers
            guide 3 of 32.
        rescale: in [0, 1]; how far the standard deviation of each image's guided channels is pulled back to that of the conditional
            output, against over-exposure at high scales. 0: not at all.
        guide: model(x, t, y) in the place of the unconditional output; None: classifier-free guidance.
        dtype: in which the model gets x; None: that of x. The guided output has the type of x.
    Raises: ValueError for a scale that is not finite, low > high, channels < 1 or rescale outside [0, 1]; on call, for channels > C
        or an output whose shape is not that of x.
    Source: classifier-free guidance, arXiv:2207.12598; interval, arXiv:2404.07724; autoguidance, arXiv:2406.02507; rescaling,
        arXiv:2305.08891, Sec. 3.4; three channels, the official forward_with_cfg.
    """

    def __init__(self, model, labels, num_classes, scale=1.0, interval=(0.0, 1.0), channels=None, rescale=0.0, guide=None, dtype=None):
        if not math.isfinite(scale):
            raise ValueError(f"guidance_scale: got {scale!r}, expected a finite number")
        low, high = interval
        if not low <= high:
            raise ValueError(f"guidance_interval: got {low}, {high}, expected low <= high")
        if channels is not None and channels < 1:
            raise ValueError(f"guidance_channels: got {channels}, expected a number of at least 1, or None for all")
        if not 0 <= rescale <= 1:
            raise ValueError(f"guidance_rescale: got {rescale!r}, expected a number in [0, 1]")
        self.model, self.guide, self.scale, self.channels, self.rescale, self.dtype = model, guide, scale, channels, rescale, dtype
        self.low, self.high = _fp32(low), math.inf if high >= 1 else _fp32(high)
        self.labels, self.both_labels = labels, torch.cat([labels, torch.full_like(labels, num_classes)])

    def check_channels(self, C):
        if self.channels is not None and self.channels > C:
            raise ValueError(f"guidance_channels: got {self.channels}, expected at most the {C} channels of the latents, or None for all")

    def __call__(self, x, t):
        self.check_channels(x.shape[1])
        if self.scale == 1 or not self.low <= t <= self.high:
            return self._run("model", self.model, x, t, self.labels)
        if self.guide is None:
            cond, weak = self._run("model", self.model, torch.cat([x, x]), t, self.both_labels).chunk(2)
        else:
            cond, weak = self._run("model", self.model, x, t, self.labels), self._run("guide", self.guide, x, t, self.labels)
        guided = slice(None, self.channels)
        mixed = weak[:, guided] + self.scale * (cond[:, guided] - weak[:, guided])
        if self.rescale:
            ratio = _deviation(cond[:, guided]) / _deviation(mixed).clamp(min=1e-12)
            mixed = mixed * (1 + self.rescale * (ratio - 1))
        return mixed if self.channels is None else torch.cat([mixed, cond[:, self.channels :]], dim=1)

    def _run(self, name, model, x, t, labels):
        x_model = x.to(self.dtype or x.dtype)
        if isinstance(model, Prepared):
            output = model(x_model, t, labels)
        elif x.device.type == "cpu" and _transformer(model) is not None:  # adaLN alone has a row an image: the tokens need no filling
            rows = round_up(len(x), ROWS)
            times = torch.full((rows,), t, dtype=torch.float32)
            output = model(x_model, times[: len(x)], labels, modulations=model.modulations(times, fill(labels, rows))[: len(x)])
        else:
            output = model(x_model, torch.full((len(x),), t, dtype=torch.float32, device=x.device), labels)
        if output.shape != x.shape:
            raise ValueError(f"{name}: got an output of shape {tuple(output.shape)}, expected {tuple(x.shape)}")
        return output.to(x.dtype)


class Prepared:
    """A LightningDiT made ready to draw many images; stands in the place of the model in `sample`, whose settings it must be told.

    - adaLN's layers run once for each distinct (t, label), not once a row: for all labels of the job where the table over all times stays
      under `table_bytes`, so that later batches only look up; else, step by step, for the labels of the batch. These layers
      then see other row counts than inside the model: outputs agree to the rounding of the type they run in. The row counts are the
      same in all batches of a job (multiples of 16), so an image still does not depend on its company.
    - With autocast to bf16 the linear layers' weights are rounded to bf16 once, not in each pass: same numbers, half the memory. The
      model that was given is changed.
    - compile: torch.compile, block by block. On CUDA each batch shape (inside and outside the guidance interval) also becomes one
      CUDA graph.

    Args:
        model: LightningDiT in evaluation mode, on `device`, not sharded.
        labels: all labels that the job will draw. num_classes: the null label, included if guided (by the unconditional output).
        batch_size, num_steps: as for `sample`. autocast: the type that the caller's autocast computes in, or None.
        fixed_times: False for dopri5, whose times never come again.
    """

    def __init__(self, model, labels, num_classes, *, batch_size, num_steps, guided, device="cpu", autocast=None, compile=False,
                 fixed_times=True, table_bytes=2**30):
        if not hasattr(model, "modulations"):
            raise ValueError(f"model: got {type(model).__name__}, expected a LightningDiT, whose modulations can be computed beforehand")
        self.model, self.device, self.graphs = model, torch.device(device), {}
        self.null = [num_classes] if guided else []
        distinct = sorted(set(_integers("labels", labels, num_classes)) | set(self.null))
        times = 2 * num_steps + 2  # of Heun and of midpoint, and an SDE's last step
        bytes_each = 2 if autocast is not None else 4
        values = sum(layer.adaLN_modulation[-1].out_features for layer in (*model.blocks, model.final_layer))
        self.whole_job = fixed_times and times * (len(distinct) + ROWS - 1) * values * bytes_each <= table_bytes
        self.rows = round_up(len(distinct) if self.whole_job else min(batch_size + 1, len(distinct)), ROWS)
        self.place = torch.zeros(num_classes + 1, dtype=torch.long, device=self.device)
        if self.whole_job:
            self._choose(distinct)
        if autocast is not None:
            for module in model.modules():
                if isinstance(module, torch.nn.Linear):
                    module.weight.data = module.weight.data.to(autocast)
        if compile:
            for block in model.blocks:
                block.compile(dynamic=False)
        self.use_graphs = compile and self.device.type == "cuda"

    def begin(self, labels):
        """Tells the labels of the batch that comes."""
        if not self.whole_job:
            self._choose(sorted(set(labels) | set(self.null)))

    def _choose(self, distinct):
        self.y = torch.tensor(distinct + distinct[-1:] * (self.rows - len(distinct)), device=self.device)
        self.place[self.y[: len(distinct)]] = torch.arange(len(distinct), device=self.device)
        self.table = {}

    def __call__(self, x, t, y):
        """x (B, C, H, W), t a Python float, y (B,) int64 -> (B, C, H, W)."""
        if t not in self.table:
            if not self.whole_job and len(self.table) > 1:  # Heun comes back to the last time only
                del self.table[next(iter(self.table))]
            self.table[t] = self.model.modulations(torch.full((self.rows,), t, device=self.device), self.y)
        modulations = self.table[t][self.place[y]]
        return self._replay(x, y, modulations) if self.use_graphs else self._run(x, y, modulations)

    def _run(self, x, y, modulations):
        return self.model(x, torch.empty(len(x), device=x.device), y, modulations=modulations)  # t is in the modulations

    def _replay(self, x, y, modulations):
        if len(x) not in self.graphs:
            inputs = tuple(tensor.clone() for tensor in (x, y, modulations))
            kind = x.device.type
            # Casts that autocast keeps must not live in a graph's memory.
            with torch.autocast(kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), cache_enabled=False):
                held = []
                graphs.warm_up(lambda: self._run(*inputs))
                graph = graphs.capture(lambda: held.append(self._run(*inputs)))
            self.graphs[len(x)] = graph, inputs, held[0]
        graph, inputs, output = self.graphs[len(x)]
        for kept, new in zip(inputs, (x, y, modulations), strict=True):
            kept.copy_(new)
        graph.replay()
        return output.clone()  # the next replay overwrites it, and a multistep solver still needs it


def _deviation(x):
    """Standard deviation of each image, (B, 1, ...)."""
    return x.flatten(1).std(1).reshape(-1, *[1] * (x.dim() - 1))


def _fp32(value):
    return float(torch.tensor(value, dtype=torch.float32))


# Solvers


def time_grid(num_steps, shift=None, t0=0.0, t1=1.0):
    """(num_steps + 1,) fp32 times on the CPU: flow.shift_time of equal intervals from t0 to t1, downwards if t0 > t1.

    As in the official code, the shift also moves ends other than 0 and 1.
    Raises: ValueError for num_steps < 1 or a negative shift.
    """
    if not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps!r}, expected an integer of at least 1")
    return flow.shift_time(torch.linspace(t0, t1, num_steps + 1, dtype=torch.float32), shift)


def integrate_ode(predict, x, grid, *, method="euler", path="linear", prediction="velocity", atol=1e-6, rtol=1e-3, callback=None):
    """Integrates dx/dt = v, the velocity, along the grid. Keeps one state, not the trajectory.

    euler:    x + h v(x, t).                       heun: x + h / 2 (k + v(x + h k, t + h)) with k = v(x, t).
    midpoint: x + h v(x + h / 2 k, t + h / 2).     dopri5: adaptive, by torchdiffeq, from the first to the last time of the grid; its
              last step may ask the model about times beyond the end, as in the official code.
    ab2:      Adams-Bashforth of second order in t: x + h (k + h / (2 h') (k - k')), k' and h' from the step before.
    dpmpp_2m: the same order, but in the logarithm of alpha / sigma, with the data prediction held linear: DPM-Solver++(2M).
    unipc:    dpmpp_2m, and each state is corrected once its evaluation is there: UniPC of second order, without another evaluation.

    The first step of the last three is of first order, and so are steps of dpmpp_2m and unipc that are more than twice as long in that
    logarithm as the one before, such as the last one to sigma = 0. Equal steps of t suit them on the linear path, less on gvp and vp.

    Args:
        predict: predict(x, t: float) -> the model's output, which flow.velocity_from converts.
        x: (B, ...) state at grid[0].
        grid: (num_steps + 1,) times on the CPU, increasing, or decreasing to go from data to noise (not dpmpp_2m and unipc).
        callback: callback(i, t, x) after step i, x being the state at t = grid[i + 1]. dopri5 interpolates these states and stores
            them all.
    Returns: (B, ...) state at grid[-1].
    Raises: ValueError for an unknown option; ImportError if dopri5 lacks torchdiffeq, RuntimeError if it finds no step small enough.
    Source: euler, heun2, midpoint and dopri5 of torchdiffeq; DPM-Solver++, arXiv:2211.01095, Alg. 2; UniPC, arXiv:2302.04867, Alg. 7
        and 8 with B(h) = exp(h) - 1.
    """
    method, path = check_choice("method", method, ODE_METHODS), check_choice("path", path, flow.PATHS)
    prediction = check_choice("prediction", prediction, flow.PREDICTIONS)

    def velocity(x, t):
        return flow.velocity_from(predict(x, t), x, torch.tensor(t, dtype=grid.dtype), path, prediction)

    if method == "dopri5":
        # Beyond t = 1, where the last step may look, sigma of VP is not real: there the step must end with the grid.
        return _dopri5(velocity, x, grid, atol, rtol, callback, overshoot=path != "vp" or prediction == "velocity")
    if method in ("dpmpp_2m", "unipc"):
        def data(x, t):
            return flow.data_from(predict(x, t), x, torch.tensor(t, dtype=grid.dtype), path, prediction)

        return _exponential_multistep(data, x, grid, path, correct=method == "unipc", callback=callback)
    steps, k_before = grid.diff(), None
    times, middles, steps = grid.tolist(), (grid[:-1] + 0.5 * steps).tolist(), steps.tolist()
    for i, h in enumerate(steps):
        k = velocity(x, times[i])
        if method == "heun":
            k = 0.5 * (k + velocity(x + h * k, times[i + 1]))
        elif method == "midpoint":
            k = velocity(x + 0.5 * h * k, middles[i])
        elif method == "ab2":
            k, k_before = k if k_before is None else k + 0.5 * h / steps[i - 1] * (k - k_before), k
        x = x + h * k
        if callback is not None:
            callback(i, times[i + 1], x)
    return x


def _exponential_multistep(data, x, grid, path, correct, callback):
    """Solvers in l = log(alpha / sigma), in which sigma exp(l) integrates the data prediction m: over a step h of l from s to t,

        x_t = sigma_t / sigma_s x_s + g (m_s + a_1 (m_r - m_s) / r + a_2 (m_t - m_s)),   g = alpha_t - alpha_s sigma_t / sigma_s,

    with m_r of the step before, r = (l_r - l_s) / h < 0. Predictor: a_1 = 1/2, a_2 = 0. Corrector: a solves the order conditions. At
    alpha = 0 and sigma = 0 l is infinite: such a step keeps m constant.
    """
    if not (grid.diff() > 0).all():
        raise ValueError(f"grid: got times from {float(grid[0])} to {float(grid[-1])}, expected increasing times for this method")
    times, (alpha, sigma, *_) = grid.tolist(), flow.path_coefficients(grid.double(), path)
    alpha, sigma = (torch.where(a < 1e-6, 0, a) for a in (alpha, sigma))  # the cosine of pi / 2 is 6e-17
    h = (alpha / sigma).log().diff().tolist()
    alpha, sigma = alpha.tolist(), sigma.tolist()
    start = m_before = m_before_that = None

    def step(i, x, m, slopes):
        g = alpha[i + 1] - alpha[i] * sigma[i + 1] / sigma[i]
        return sigma[i + 1] / sigma[i] * x + g * (m if slopes is None else m + slopes)

    for i in range(len(h)):
        m = data(x, times[i])
        if correct and i > 0 and math.isfinite(h[i - 1]):  # x was predicted by step i - 1, whose end is known better now
            r = -h[i - 2] / h[i - 1] if m_before_that is not None else -math.inf
            weights = _corrector_weights(h[i - 1], r)
            slopes = weights[1] * (m - m_before)
            if math.isfinite(r):
                slopes = slopes + weights[0] / r * (m_before_that - m_before)
            x = step(i - 1, start, m_before, slopes)
        start = x
        extrapolate = i > 0 and math.isfinite(h[i]) and h[i] <= 2 * h[i - 1]  # further than that a constant m is nearer
        x = step(i, x, m, 0.5 * h[i] / h[i - 1] * (m - m_before) if extrapolate else None)
        m_before, m_before_that = m, m_before
        if callback is not None:
            callback(i, times[i + 1], x)
    return x


def _corrector_weights(h, r):
    """(a_1, a_2) of the corrector, exact for m linear (r = -inf: no step before) or quadratic in l. Source: UniPC, arXiv:2302.04867."""
    e = math.expm1(-h)
    b1, b2 = -1 / h - 1 / e, 2 * (1 / h**2 + (1 / h - 0.5) / e)
    if not math.isfinite(r):
        return 0.0, b1
    a1 = (b1 - b2) / (1 - r)
    return a1, b1 - a1


def _dopri5(velocity, x, grid, atol, rtol, callback, overshoot):
    with optional("method 'dopri5'"):
        from torchdiffeq import odeint
    times = (grid if callback is not None else grid[[0, -1]]).to(x.device)
    try:
        states = odeint(lambda t, x: velocity(x, float(t)), x, times, method="dopri5", atol=atol, rtol=rtol,
                        options=None if overshoot else {"step_t": times[-1:]})
    except AssertionError as error:
        raise RuntimeError(f"method 'dopri5': torchdiffeq stopped with {str(error)[:100]!r}; the model's output is not finite, or atol and "
                           "rtol are too small for its precision") from error
    if callback is not None:
        for i, t in enumerate(grid[1:].tolist()):
            callback(i, t, states[i + 1])
    return states[-1]


def integrate_sde(predict, x, grid, noise, *, method="sde_euler", path="linear", prediction="velocity", form="sigma", norm=1.0,
                  last_step="mean", last_step_size=0.04, callback=None):
    """Integrates dx = f dt + sqrt(2 D) dw, f = v + D score, along the grid, then takes a last step without noise.

    sde_euler: x + h f(x, t) + sqrt(2 D(t) h) w.
    sde_heun:  x' = x + sqrt(2 D(t) h) w, then Heun's step with f from x'.
    last_step, from t = grid[-1]: None: x; "mean": x + last_step_size f; "euler": x + last_step_size v; "tweedie": flow.data_from.

    v and score are two views of one output, so f costs one evaluation of the model (the official code makes two). A setting that is
    singular at grid[0], such as SBDM diffusion at t = 0 on the linear path, gives NaN as in the official code; `sample` refuses it.

    Args:
        predict, x, callback: as for integrate_ode.
        grid: (num_steps + 1,) increasing times on the CPU.
        noise: noise() -> w, standard normal of the shape of x, called once a step.
        form, norm: of D, see flow.diffusion.
    Returns: (B, ...) state after the last step.
    Raises: ValueError for an unknown option or a grid that does not increase.
    Source: SiT, arXiv:2401.08740, Sec. 2; noise before Heun's step as in EDM, arXiv:2206.00364, Alg. 2.
    """
    method, path = check_choice("method", method, SDE_METHODS), check_choice("path", path, flow.PATHS)
    prediction, last_step = check_choice("prediction", prediction, flow.PREDICTIONS), _check_last_step(last_step)
    steps = grid.diff()
    if not (steps > 0).all():
        raise ValueError(f"grid: got times from {float(grid[0])} to {float(grid[-1])}, expected increasing times")
    times, steps = grid.tolist(), steps.tolist()

    def drift(x, t):
        output, at = predict(x, t), torch.tensor(t, dtype=grid.dtype)
        if flow.path_coefficients(at, path)[1] == 0:
            at = torch.nextafter(at, torch.zeros_like(at))  # D score is 0 * inf at sigma = 0; one ulp before, it is at its limit
        D = flow.diffusion(at, form, norm, path)
        return flow.velocity_from(output, x, at, path, prediction) + D * flow.score_from(output, x, at, path, prediction)

    for i, h in enumerate(steps):
        jump = torch.sqrt(2 * h * flow.diffusion(torch.tensor(times[i], dtype=grid.dtype), form, norm, path)) * noise()
        if method == "sde_euler":
            x = x + h * drift(x, times[i]) + jump
        else:
            x = x + jump
            k = drift(x, times[i])
            x = x + 0.5 * h * (k + drift(x + h * k, times[i + 1]))
        if callback is not None:
            callback(i, times[i + 1], x)
    if last_step is None:
        return x
    if last_step == "mean":
        return x + last_step_size * drift(x, times[-1])
    output, at = predict(x, times[-1]), torch.tensor(times[-1], dtype=grid.dtype)
    if last_step == "tweedie":
        return flow.data_from(output, x, at, path, prediction)
    return x + last_step_size * flow.velocity_from(output, x, at, path, prediction)
