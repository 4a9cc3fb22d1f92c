"""Paths, times, losses and conversions: against the official numbers, autograd, each other, and statistics."""

import math

import pytest
import torch

from lightningdit import flow

PATHS, PREDICTIONS = flow.PATHS, flow.PREDICTIONS
OFFICIAL_FORMS = {"inccreasing-decreasing": "increasing-decreasing"}


def relative_error(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


def points(path, n=6):
    """fp64 x1, x0, t, x_t, u_t away from the singular ends."""
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, n, 3, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.05, 0.95, n, dtype=torch.float64)
    return x1, x0, t, *flow.interpolate(x1, x0, t, path)


def outputs(path, prediction, x0, t, u):
    """What a perfect model of this prediction returns for single points."""
    sigma = flow.path_coefficients(t, path)[1].view(-1, 1, 1, 1)
    return {"velocity": u, "noise": x0, "score": -x0 / sigma}[prediction]


@pytest.mark.parametrize("path", ["Linear", "GVP", "VP"])
def test_every_official_number_of_the_path(golden, path):
    tensors, _ = golden("transport")
    x1, x0, t, weight = (tensors[name] for name in ("x1", "x0", "t", "model_weight"))
    expected = {name: value for name, value in tensors.items() if name.startswith(f"{path}.")}
    x_t, u_t = flow.interpolate(x1, x0, t, path)
    ours = {"xt": x_t, "ut": u_t}
    output = torch.einsum("oc,bchw->bohw", weight, expected[f"{path}.xt"]) * (1 + t.view(-1, 1, 1, 1))
    for form in ("constant", "SBDM", "sigma", "linear", "decreasing", "inccreasing-decreasing"):
        ours[f"diffusion.{form}"] = flow.diffusion(t, OFFICIAL_FORMS.get(form, form), 1.0, path).view(-1, 1, 1, 1)
    for prediction in PREDICTIONS:
        ours[f"{prediction}.drift"] = flow.velocity_from(output, expected[f"{path}.xt"], t, path, prediction)
        ours[f"{prediction}.score"] = flow.score_from(output, expected[f"{path}.xt"], t, path, prediction)
        eps = 0.0 if prediction == "velocity" and path != "VP" else 1e-3
        for mode in ("train", "ode", "sde"):
            interval = flow.integration_interval(path, prediction, mode=mode, train_eps=eps, sample_eps=eps, last_step_size=0.04)
            ours[f"{prediction}.interval_{mode}"] = torch.tensor(interval)
        for w in ("none", "velocity", "likelihood") if prediction != "velocity" else ("none",):
            terms = flow.losses(output, x1, x0, t, path=path, prediction=prediction, weight=w, cosine=prediction == "velocity")
            ours[f"{prediction}.{w}.loss"] = terms["mse"]
            if prediction == "velocity":
                ours[f"{prediction}.{w}.cos_loss"] = terms["cos"]
    assert {f"{path}.{name}" for name in ours} == set(expected)
    errors = {name: relative_error(value, expected[f"{path}.{name}"]) for name, value in ours.items()}
    # 5e-6 on VP only: at t = 0.99 the official sigma is itself off by 2e-6, see the next but one test.
    assert {name: error for name, error in errors.items() if not error <= (5e-6 if path == "VP" else 1e-6)} == {}


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_against_autograd(path):
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64, requires_grad=True)
    alpha, sigma, d_alpha, d_sigma = flow.path_coefficients(t, path)
    for value, derivative in ((alpha, d_alpha), (sigma, d_sigma)):
        (grad,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(derivative, grad, rtol=1e-9, atol=1e-12)
    ends = flow.path_coefficients(torch.tensor([0.0, 1.0], dtype=torch.float64), path)
    first = math.exp(-5.025) if path == "vp" else 0.0
    torch.testing.assert_close(ends[0], torch.tensor([first, 1.0], dtype=torch.float64), rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(ends[1], torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-4, atol=1e-9)


def test_vp_sigma_keeps_its_digits_near_the_data():
    t = torch.tensor([0.9, 0.99, 0.999, 1 - 1e-5])
    torch.testing.assert_close(flow.path_coefficients(t, "vp")[1].double(), flow.path_coefficients(t.double(), "vp")[1], rtol=5e-7, atol=0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_conversions_return_what_the_point_was_made_of(path, prediction):
    x1, x0, t, x_t, u_t = points(path)
    output = outputs(path, prediction, x0, t, u_t)
    close = dict(rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(flow.data_from(output, x_t, t, path, prediction), x1, **close)
    torch.testing.assert_close(flow.noise_from(output, x_t, t, path, prediction), x0, **close)
    torch.testing.assert_close(flow.velocity_from(output, x_t, t, path, prediction), u_t, **close)
    torch.testing.assert_close(flow.score_from(output, x_t, t, path, prediction), outputs(path, "score", x0, t, u_t), **close)
    one_time = [f(output[:1], x_t[:1], t[0], path, prediction) for f in (flow.data_from, flow.noise_from, flow.velocity_from)]
    torch.testing.assert_close(one_time, [x1[:1], x0[:1], u_t[:1]], **close)


@pytest.mark.parametrize("path", PATHS)
def test_score_is_the_gradient_of_the_log_density(path):
    mean, std, t = 0.7, 0.5, torch.tensor([0.2, 0.6], dtype=torch.float64)
    alpha, sigma, d_alpha, d_sigma = (c.view(-1, 1) for c in flow.path_coefficients(t, path))
    x = torch.tensor([[0.3, -1.0], [0.5, 2.0]], dtype=torch.float64, requires_grad=True)
    variance = alpha**2 * std**2 + sigma**2
    (truth,) = torch.autograd.grad((-0.5 * (x - alpha * mean) ** 2 / variance).sum(), x)
    data, noise = mean + alpha * std**2 / variance * (x - alpha * mean), sigma / variance * (x - alpha * mean)
    torch.testing.assert_close(flow.score_from(d_alpha * data + d_sigma * noise, x, t, path), truth)


@pytest.mark.parametrize(
    ("path", "prediction", "mode", "expected"),
    [
        ("linear", "velocity", "train", (0, 1)),
        ("gvp", "velocity", "ode", (0, 1)),
        ("linear", "velocity", "sde", (0, 1)),
        ("linear", "noise", "train", (1e-3, 1 - 1e-3)),
        ("gvp", "score", "ode", (1e-3, 1 - 1e-3)),
        ("vp", "velocity", "train", (0, 1 - 1e-5)),
        ("vp", "noise", "train", (0, 1 - 1e-5)),
        ("vp", "score", "ode", (0, 1 - 1e-3)),
        ("vp", "velocity", "sde", (0, 1 - 1e-3)),
    ],
)
def test_default_intervals(path, prediction, mode, expected):
    assert flow.integration_interval(path, prediction, mode=mode) == expected
    assert flow.integration_interval(path, prediction, mode=mode, reverse=True) == expected[::-1]


def test_interval_of_the_sde():
    assert flow.integration_interval("linear", "velocity", mode="sde", diffusion_form="SBDM", last_step_size=0.1) == (1e-3, 0.9)
    assert flow.integration_interval("linear", "velocity", mode="sde", diffusion_form="SBDM", sample_eps=0.0) == (0, 1)
    assert flow.integration_interval("vp", "velocity", mode="sde", diffusion_form="SBDM", last_step_size=0.1) == (0, 0.9)
    assert flow.integration_interval("gvp", "noise", mode="sde", sample_eps=0.01) == (0.01, 0.99)
    assert flow.integration_interval("linear", "noise", mode="ode", sample_eps=0.01, last_step_size=0.1) == (0.01, 0.99)


def distribution_distance(samples, cdf):
    """Kolmogorov-Smirnov statistic times sqrt(n): above 1.95 with probability 0.1 %."""
    ordered = samples.double().sort().values
    n = len(ordered)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    truth = cdf(ordered)
    return float(torch.maximum((steps[1:] - truth).max(), (truth - steps[:-1]).max())) * math.sqrt(n)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.6, 0.5), (1.0, 2.0)])
@pytest.mark.parametrize("shift", [1.0, 0.3, 3.0])
def test_logit_normal_times(mean, std, shift):
    low, high = 0.001, 0.9

    def cdf(t):
        u = flow.shift_time(((t - low) / (high - low)).clamp(1e-12, 1 - 1e-12), 1 / shift)
        return torch.special.ndtr((torch.logit(u) - mean) / std)

    settings = dict(mean=mean, std=std, shift=shift, low=low, high=high)
    t = flow.sample_timesteps(20_000, generator=torch.Generator().manual_seed(1), **settings)
    assert t.dtype == torch.float32 and t.shape == (20_000,) and low <= t.min() and t.max() <= high
    assert distribution_distance(t, cdf) < 1.95
    assert torch.equal(t, flow.sample_timesteps(20_000, generator=torch.Generator().manual_seed(1), **settings))
    assert not torch.equal(t, flow.sample_timesteps(20_000, generator=torch.Generator().manual_seed(2), **settings))
    uniform = flow.sample_timesteps(20_000, distribution="uniform", low=low, high=high, generator=torch.Generator().manual_seed(1))
    assert distribution_distance(uniform, cdf) > 5  # the test can tell
    assert distribution_distance(uniform, lambda t: (t - low) / (high - low)) < 1.95


def test_times_come_from_the_generators_device_and_may_be_none():
    assert flow.sample_timesteps(3, generator=torch.Generator(), device="cpu").device.type == "cpu"
    assert flow.sample_timesteps(0).shape == (0,)
    with pytest.raises(ValueError, match="device: got cuda"):
        flow.sample_timesteps(3, generator=torch.Generator(), device="cuda")


def test_schedule_switches_at_its_step():
    at = [flow.timestep_distribution_at(step, "logit_normal", 600_000) for step in (0, 599_999, 600_000, 800_000)]
    assert at == ["logit_normal", "logit_normal", "uniform", "uniform"]
    assert flow.timestep_distribution_at(10**9, "logit_normal") == "logit_normal"
    assert flow.timestep_distribution_at(5, "uniform", 5, "logit_normal") == "logit_normal"


def test_time_shift():
    t = torch.linspace(0, 1, 11, dtype=torch.float64)
    torch.testing.assert_close(flow.shift_time(t, 0.3), 0.3 * t / (1 - 0.7 * t))
    torch.testing.assert_close(flow.shift_time(flow.shift_time(t, 0.3), 1 / 0.3), t)
    torch.testing.assert_close(flow.shift_time(t, 0.3), 1 - flow.shift_time(1 - t, 1 / 0.3))  # SD3's clock
    assert flow.shift_time(t) is t and flow.shift_time(t, 0) is t


@pytest.mark.parametrize("path", PATHS)
def test_weights_of_the_loss(path):
    """The velocity weight turns errors of noise and score into that of the implied velocity; the likelihood weight is D_sbdm / sigma^2."""
    x1, x0, t, x_t, u_t = points(path)
    alpha, sigma, d_alpha, d_sigma = flow.path_coefficients(t, path)
    for prediction in ("noise", "score"):
        output = outputs(path, prediction, x0, t, u_t) + 0.1 * torch.sin(5 * x_t)
        plain, velocity, likelihood = (
            flow.losses(output, x1, x0, t, path=path, prediction=prediction, weight=w)["mse"] for w in flow.WEIGHTS
        )
        implied = flow.velocity_from(output, x_t, t, path, prediction)
        torch.testing.assert_close(velocity, flow.losses(implied, x1, x0, t, path=path)["mse"])
        torch.testing.assert_close(likelihood, plain * flow.diffusion(t, "sbdm", 1.0, path) / sigma**2)
        error = flow.noise_from(output, x_t, t, path, prediction) - x0
        torch.testing.assert_close(plain, (error**2).mean((1, 2, 3)))


def test_cosine_loss_is_about_direction_and_losses_are_fp32():
    x1, x0, t, _, u_t = points("linear")
    scale = torch.tensor([0.1, 1.0, 7.0, -1.0, -0.2, -30.0], dtype=torch.float64).view(-1, 1, 1, 1)
    terms = flow.losses(scale * u_t, x1, x0, t, cosine=True)
    torch.testing.assert_close(terms["cos"], torch.tensor([0.0, 0, 0, 2, 2, 2], dtype=torch.float64), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(terms["mse"], ((scale - 1) ** 2 * u_t**2).mean((1, 2, 3)))
    half = flow.losses(u_t.bfloat16(), x1.float(), x0.float(), t.float(), cosine=True)
    assert half["mse"].dtype == half["cos"].dtype == torch.float32 and 0 < half["mse"].max() < 1e-4


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_perfect_output_has_no_loss_and_gradients_reach_it(prediction):
    x1, x0, t, _, u_t = points("gvp")
    output = outputs("gvp", prediction, x0, t, u_t).clone().requires_grad_()
    terms = flow.losses(output, x1, x0, t, path="gvp", prediction=prediction, weight="velocity")
    assert set(terms) == {"mse"} and terms["mse"].max() < 1e-28
    (grad,) = torch.autograd.grad(flow.losses(output + 1, x1, x0, t, path="gvp", prediction=prediction)["mse"].sum(), output)
    assert (grad > 0).all()


@pytest.mark.parametrize("norm", [0.0, 0.6, 1.0, 3.0])
def test_diffusion_forms(norm):
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    cos = torch.cos(math.pi * t)
    expected = {
        "constant": torch.full_like(t, norm),
        "sigma": norm * torch.cos(math.pi / 2 * t),
        "linear": norm * (1 - t),
        "decreasing": (norm * cos + 1) ** 2 / 4,
        "increasing-decreasing": norm * (1 - cos**2),
        "sbdm": norm * math.pi / 2 / torch.tan(math.pi / 2 * t),
    }
    assert set(expected) == set(flow.DIFFUSION_FORMS)
    for form, value in expected.items():
        torch.testing.assert_close(flow.diffusion(t, form, norm, "gvp"), value)
    torch.testing.assert_close(flow.diffusion(t, "sbdm", norm, "vp"), norm * (0.1 + (1 - t) * 19.9) / 2)
    torch.testing.assert_close(flow.diffusion(t, "sbdm", norm, "linear"), norm * (1 - t) / t)


def test_names_of_official_configurations_are_accepted():
    x1, x0, t, x_t, _ = points("gvp")
    assert torch.equal(flow.interpolate(x1, x0, t, "GVP")[0], x_t)
    assert flow.integration_interval("Linear", "velocity", mode="ODE") == (0, 1)
    assert torch.equal(flow.diffusion(t, "SBDM"), flow.diffusion(t, "sbdm"))


x = torch.zeros(2, 3, 4, 4)
time = torch.zeros(2)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: flow.path_coefficients(time, "cosine"), r"path: got 'cosine', expected one of 'linear', 'gvp', 'vp'"),
        (lambda: flow.interpolate(x, x[:, :2], time), r"x0: got shape \(2, 2, 4, 4\), expected \(2, 3, 4, 4\)"),
        (lambda: flow.interpolate(x, x, torch.zeros(3)), r"t: got shape \(3,\), expected \(2,\) or \(\)"),
        (lambda: flow.interpolate(x, x, torch.zeros(2, 1)), r"t: got shape \(2, 1\)"),
        (lambda: flow.losses(x, x, x, time, prediction="data"), r"prediction: got 'data'"),
        (lambda: flow.losses(x, x, x, time, prediction="noise", weight="snr"), r"weight: got 'snr'"),
        (lambda: flow.losses(x, x, x, time, prediction="noise", cosine=True), r"cosine: got True with prediction 'noise'"),
        (lambda: flow.losses(x[:, :2], x, x, time), r"x1: got shape \(2, 3, 4, 4\), expected \(2, 2, 4, 4\)"),
        (lambda: flow.score_from(x[:, :2], x, time), r"output: got shape \(2, 2, 4, 4\)"),
        (lambda: flow.data_from(x, x, time, "linear", "x0"), r"prediction: got 'x0'"),
        (lambda: flow.diffusion(time, "quadratic"), r"form: got 'quadratic'"),
        (lambda: flow.diffusion(time, "sigma", -1.0), r"norm: got -1.0, expected a number >= 0"),
        (lambda: flow.integration_interval(mode="eval"), r"mode: got 'eval'"),
        (lambda: flow.integration_interval("vp", train_eps=0.5), r"train_eps: got 0.5"),
        (lambda: flow.integration_interval("vp", mode="ode", sample_eps=-1e-3), r"sample_eps: got -0.001"),
        (lambda: flow.integration_interval(mode="sde", last_step_size=1.0), r"last_step_size: got 1.0"),
        (lambda: flow.integration_interval(None), r"path: got None"),
        (lambda: flow.sample_timesteps(-1), r"n: got -1"),
        (lambda: flow.sample_timesteps(2, distribution="beta"), r"distribution: got 'beta'"),
        (lambda: flow.sample_timesteps(2, std=-1.0), r"std: got -1.0"),
        (lambda: flow.sample_timesteps(2, shift=-1.0), r"shift: got -1.0"),
        (lambda: flow.sample_timesteps(2, low=0.6, high=0.5), r"low, high: got 0.6, 0.5"),
        (lambda: flow.timestep_distribution_at(0, switch_to="none"), r"switch_to: got 'none'"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
