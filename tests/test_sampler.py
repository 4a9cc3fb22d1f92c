"""Solvers, guidance and randomness: against the official numbers, closed forms on Gaussian data, and each other."""

import math
import sys

import pytest
import torch

from lightningdit import flow, sampler
from lightningdit.model import LightningDiT

OFFICIAL_METHODS = {"heun2": "heun"}
SHAPE = (4, 2, 2)


def relative_error(ours, truth):
    return float((ours - truth).abs().max() / truth.abs().max())


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The official numbers


def golden_model(weight):
    return lambda x, t: torch.einsum("oc,bchw->bohw", weight, x) * (1 + t)


def seeded_noise(like):
    torch.manual_seed(1234)
    return lambda: torch.randn(like.shape)


def test_official_time_grids_bitwise(golden):
    tensors, _ = golden("samplers")
    shifts = [name.removeprefix("timesteps.250.") for name in tensors if name.startswith("timesteps.")]
    assert len(shifts) == 4
    for shift in shifts:
        assert torch.equal(sampler.time_grid(249, float(shift)), tensors[f"timesteps.250.{shift}"])
    assert torch.equal(sampler.time_grid(249), tensors["timesteps.250.1.0"])


def test_official_odes_on_the_linear_path(golden):
    tensors, _ = golden("samplers")
    predict, z = golden_model(tensors["model_weight"]), tensors["z"]
    errors = {}
    for name in (name.removesuffix(".final") for name in tensors if name.endswith(".final")):
        _, method, N, shift = name.split(".", 3)
        grid, seen = sampler.time_grid(int(N) - 1, float(shift)), []
        method = OFFICIAL_METHODS.get(method, method)
        final = sampler.integrate_ode(predict, z, grid, method=method, callback=lambda i, t, x, seen=seen: seen.append((i, t, x)))
        assert [(i, t) for i, t, _ in seen] == list(enumerate(grid[1:].tolist()))
        errors[name] = max(relative_error(final, tensors[f"{name}.final"]), relative_error(seen[0][2], tensors[f"{name}.step1"]))
        assert torch.equal(final, sampler.integrate_ode(predict, z, grid, method=method))
    assert len(errors) == 6 and {name: error for name, error in errors.items() if not error <= 1e-6} == {}


def test_official_sde_numbers_are_nan_and_sample_refuses_what_made_them(golden):
    """SBDM diffusion from t = 0 on the linear path: infinite, so every stored number is NaN. Finite ones are in the next test."""
    tensors, _ = golden("samplers")
    predict, z = golden_model(tensors["model_weight"]), tensors["z"]
    for name in (name for name in tensors if name.startswith("sde.")):
        assert tensors[name].isnan().all()
        _, method, last_step, N, _ = name.split(".")
        grid = sampler.time_grid(int(N) - 1, None, 0.0, 1.0 if last_step == "None" else 0.96)
        settings = dict(method=f"sde_{method}", form="SBDM", last_step=None if last_step == "None" else last_step)
        assert sampler.integrate_sde(predict, z, grid, seeded_noise(z), **settings).isnan().all()
    settings = dict(labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=2, num_steps=5, method="sde_euler", diffusion_form="SBDM")
    with pytest.raises(ValueError, match="sample_eps: got 0, expected a number > 0: on path 'linear'.*diffusion_form 'SBDM'"):
        sampler.sample(toy_model, sample_eps=0.0, **settings)
    assert sampler.sample(toy_model, **settings).isfinite().all()  # its default starts at 1e-3


def test_official_solvers_on_every_path_and_prediction(golden):
    tensors, _ = golden("solvers")
    predict, z = golden_model(tensors.pop("model_weight")), tensors.pop("z")
    errors = {}
    for name, truth in tensors.items():
        kind, path, prediction, *rest = name.split("/")
        eps = 0.0 if prediction == "velocity" and path != "VP" else 1e-3
        if kind == "ode":
            method, shift, N = rest
            grid = sampler.time_grid(int(N) - 1, float(shift), *flow.integration_interval(path, prediction, mode="ode", sample_eps=eps))
            ours = sampler.integrate_ode(predict, z, grid, method=OFFICIAL_METHODS.get(method, method), path=path, prediction=prediction)
        else:
            form, norm, method, last_step, last_step_size, N = rest
            form, last_step = form.replace("inccreasing", "increasing"), None if last_step == "None" else last_step
            t0, t1 = flow.integration_interval(path, prediction, mode="sde", sample_eps=eps, diffusion_form=form,
                                               last_step_size=float(last_step_size) if last_step else 0.0)
            grid = sampler.time_grid(int(N) - 1, None, t0, t1)
            ours = sampler.integrate_sde(predict, z, grid, seeded_noise(z), method=f"sde_{method}", path=path, prediction=prediction,
                                         form=form, norm=float(norm), last_step=last_step, last_step_size=float(last_step_size))
        errors[name] = relative_error(ours, truth)
    assert len(errors) == 61 and {name: error for name, error in errors.items() if not error <= 2e-6} == {}


@pytest.mark.parametrize("name", ["lightning", "lightning_head72", "qknorm", "plain_dit", "no_shift", "learn_sigma_patch2"])
def test_official_guided_outputs(golden, name):
    tensors, meta = golden(f"dit_{name}")
    model = LightningDiT(**meta["config"]).eval()
    model.load_state_dict({key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")})
    null, B = meta["config"]["num_classes"], len(tensors["cfg_y"]) // 2
    x, labels = tensors["cfg_z"][:B], tensors["cfg_y"][:B]
    assert torch.equal(tensors["cfg_y"][B:], torch.full((B,), null))
    with torch.no_grad():
        for t, side in ((0.05, "below"), (0.5, "above")):
            for low, interval in ((0.0, "nointerval"), (meta["cfg_interval_start"], "interval")):
                guided = sampler.GuidedModel(model, labels, null, scale=meta["cfg_scale"], interval=(low, 1.0), channels=3)(x, t)
                truth = tensors[f"cfg_{interval}_{side}"]
                assert relative_error(guided, truth[:B]) < 1e-5
                # The official lower half repeats the guided channels and keeps the unconditional output in the others.
                uncond = model(x, torch.full((B,), t), torch.full((B,), null))
                assert relative_error(torch.cat([guided[:, :3], uncond[:, 3:]], dim=1), truth[B:]) < 1e-5


# Closed forms: data ~ N(mean, std^2) in every channel


class Gaussian:
    """The perfect model of data N(mean(label), std^2), its trajectories, and a count of the rows it was asked for."""

    def __init__(self, path="linear", prediction="velocity", std=0.5):
        self.path, self.prediction, self.std, self.rows, self.times, self.inputs = path, prediction, std, [], [], []

    def mean(self, y):
        return 0.5 * y.to(torch.float64).view(-1, 1, 1, 1) - 1

    def moments(self, t, y):
        """Mean and standard deviation of x_t."""
        alpha, sigma, *_ = flow.path_coefficients(torch.as_tensor(t, dtype=torch.float64), self.path)
        return alpha * self.mean(y), torch.sqrt(alpha**2 * self.std**2 + sigma**2)

    def __call__(self, x, t, y):
        self.rows.append(len(x))
        self.times.append(float(t[0]))
        self.inputs.append((x.dtype, t.dtype, t.shape))
        t = t.double().view(-1, 1, 1, 1)
        if self.path == "vp":
            t = t.clamp(max=1 - 1e-6)  # dopri5 looks beyond t = 1, where sigma is not real
        alpha, sigma, d_alpha, d_sigma = flow.path_coefficients(t, self.path)
        centred = (x - alpha * self.mean(y)) / (alpha**2 * self.std**2 + sigma**2)
        noise, data = sigma * centred, self.mean(y) + alpha * self.std**2 * centred
        return {"velocity": d_alpha * data + d_sigma * noise, "noise": noise, "score": -centred}[self.prediction].to(x.dtype)

    def transport(self, x, t0, t1, y):
        """Where the probability-flow ODE takes x from t0 to t1."""
        (mean0, std0), (mean1, std1) = self.moments(t0, y), self.moments(t1, y)
        return mean1 + std1 * (x - mean0) / std0


def toy_model(x, t, y):
    return torch.sin(x + y.view(-1, 1, 1, 1)) * (1 - t.view(-1, 1, 1, 1))


@pytest.mark.parametrize("path", flow.PATHS)
@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2)])
@pytest.mark.parametrize("shift", [None, 0.3])
def test_order_of_convergence(path, method, order, shift):
    model, y = Gaussian(path), torch.zeros(2)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(num_steps):
        grid = flow.shift_time(torch.linspace(0, 0.8, num_steps + 1, dtype=torch.float64), shift)
        final = sampler.integrate_ode(lambda x, t: model(x, torch.tensor([t], dtype=torch.float64), y), x, grid, method=method, path=path)
        return float((final - model.transport(x, 0.0, float(grid[-1]), y)).abs().max())

    # On the linear path the spread of Gaussian samples is the root of a quadratic in t, on which the midpoint rule gains an order.
    order += (method, path) == ("midpoint", "linear")
    assert math.log2(error(200) / error(400)) == pytest.approx(order, abs=0.1)


def test_autoguidance_and_rescaling():
    x, y = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2])
    strong, weak = Gaussian(), Gaussian(std=1.5)
    times = torch.full((3,), 0.4)
    cond, bad, null = strong(x, times, y), weak(x, times, y), strong(x, times, torch.full_like(y, 5))
    strong.rows.clear(), weak.rows.clear()
    got = sampler.GuidedModel(strong, y, 5, scale=2.5, guide=weak, interval=(0.3, 0.5))
    assert torch.allclose(got(x, 0.4), bad + 2.5 * (cond - bad)) and (strong.rows, weak.rows) == ([3], [3])
    assert torch.equal(got(x, 0.6), strong(x, torch.full((3,), 0.6), y)) and weak.rows == [3]  # the guide sleeps outside the interval

    plain = null + 4.0 * (cond - null)
    full, half = (sampler.GuidedModel(strong, y, 5, scale=4.0, channels=2, rescale=phi)(x, 0.4) for phi in (1.0, 0.5))
    assert torch.allclose(full[:, :2].flatten(1).std(1), cond[:, :2].flatten(1).std(1))
    assert torch.allclose(half[:, :2], 0.5 * (full[:, :2] + plain[:, :2])) and torch.equal(full[:, 2:], cond[:, 2:])
    settings = dict(labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, num_steps=4, guidance_scale=2.0)
    assert not torch.equal(sampler.sample(strong, guide=weak, **settings), sampler.sample(strong, **settings))


@pytest.mark.parametrize("path", flow.PATHS)
def test_multistep_methods_are_of_second_order(path):
    """From t = 0.2 to 0.9: at t = 0 the logarithm is infinite, which hides the order."""
    model, y = Gaussian(path), torch.zeros(2)
    x = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def error(method, num_steps):
        grid, start = torch.linspace(0.2, 0.9, num_steps + 1, dtype=torch.float64), len(model.rows)
        final = sampler.integrate_ode(lambda x, t: model(x, torch.tensor([t], dtype=torch.float64), y), x, grid, method=method, path=path)
        assert len(model.rows) - start == num_steps  # one evaluation a step
        return float((final - model.transport(x, 0.2, 0.9, y)).abs().max())

    for method in ("ab2", "dpmpp_2m", "unipc"):
        order = 3 if method == "unipc" else 2  # its corrector gains one
        assert math.log2(error(method, 200) / error(method, 400)) == pytest.approx(order, abs=0.35), method
    if path != "vp":  # on which the errors of the steps nearly cancel between these two times
        assert error("unipc", 50) < error("dpmpp_2m", 50) < 0.25 * error("euler", 50)


@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
def test_few_steps_of_a_multistep_method_beat_as_many_of_euler(prediction):
    model, labels, seeds = Gaussian("linear", prediction), [0, 3, 1, 2], [5, 6, 7, 8]
    t0, t1 = flow.integration_interval("linear", prediction, mode="ode")
    settings = dict(latent_shape=SHAPE, num_classes=3, num_steps=12, shift=0.5, prediction=prediction, dtype=torch.float64)
    truth = model.transport(sampler.initial_noise(seeds, SHAPE, dtype=torch.float64), t0, t1, torch.tensor(labels))
    errors = {method: relative_error(sampler.sample(model, labels=labels, seeds=seeds, method=method, **settings), truth)
              for method in ("euler", "ab2", "dpmpp_2m", "unipc")}
    assert max(errors.values()) == errors["euler"] and errors["ab2"] < 0.6 * errors["euler"], errors


@pytest.mark.parametrize(("h", "r"), [(0.5, -0.7), (2.0, -1.5), (0.1, -1.0), (1.3, -math.inf)])
def test_corrector_weights_integrate_polynomials_exactly(h, r):
    """The integral of e^{l - h} (1, l, l^2) over (0, h) against m through its values at r h, 0 and h."""
    l = torch.linspace(0, h, 200_001, dtype=torch.float64)  # noqa: E741
    a1, a2 = sampler._corrector_weights(h, r)
    for power in (1,) if math.isinf(r) else (1, 2):
        exact = torch.trapezoid(torch.exp(l - h) * l**power, l)
        got = -math.expm1(-h) * ((0 if math.isinf(r) else a1 / r * (r * h) ** power) + a2 * h**power)
        assert got == pytest.approx(float(exact), rel=1e-8)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_inversion_and_likelihood_of_a_gaussian(path):
    """x1 ~ N(mean(y), std^2) in every channel: its density, and the noise of every sample, are known."""
    model, labels = Gaussian(path), [0, 3, 1]
    latents = torch.tensor([-1.2, 0.4, 0.0], dtype=torch.float64).view(3, 1, 1, 1) + 0.3 * torch.randn(
        3, *SHAPE, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    arguments = dict(labels=labels, num_classes=3, path=path)
    noise = sampler.invert(model, latents, **arguments)
    assert relative_error(noise, model.transport(latents, 1.0, 0.0, torch.tensor(labels))) < 1e-4
    again = sampler.integrate_ode(sampler.GuidedModel(model, torch.tensor(labels), 3), noise, sampler.time_grid(249, 0.3), method="heun",
                                  path=path)
    assert relative_error(again, latents) < 1e-4

    truth = torch.distributions.Normal(model.mean(torch.tensor(labels)), 0.5).log_prob(latents).flatten(1).sum(1)
    seeds = [1, 2, 3]
    got = sampler.log_likelihood(model, latents, seeds=seeds, **arguments, atol=1e-7, rtol=1e-7)
    assert got.dtype == torch.float64 and torch.allclose(got, truth, rtol=1e-4)  # a diagonal Jacobian: every sign vector is exact
    alone = sampler.log_likelihood(model, latents[1:2], seeds=[2], labels=[3], num_classes=3, path=path, atol=1e-7, rtol=1e-7)
    assert alone.item() == pytest.approx(got[1].item(), abs=1e-3)


def test_likelihood_averages_probes_of_a_jacobian_that_is_not_diagonal():
    """v = A x on 4 channels at one position: x1 = exp(A) x0, so log p is Gaussian and the integral of the divergence is trace(A)."""
    A = torch.tensor([[0.2, 1.5, 0, 0], [-0.5, 0.1, 0, 0.3], [0, 0.8, -0.3, 0], [0.4, 0, 0, 0.1]], dtype=torch.float64)

    def model(x, t, y):
        return torch.einsum("oc,bchw->bohw", A.to(x.dtype), x)

    x1 = torch.randn(2, 4, 1, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    transform = torch.matrix_exp(A)
    truth = torch.distributions.MultivariateNormal(torch.zeros(4, dtype=torch.float64), transform @ transform.T).log_prob(x1.flatten(1))
    few, many = (sampler.log_likelihood(model, x1, labels=[0, 0], seeds=[4, 5], num_classes=1, probes=probes, atol=1e-7, rtol=1e-7)
                 for probes in (1, 400))
    assert (many - truth).abs().max() < 0.15 < (few - truth).abs().max()  # standard deviation of one probe: 1.8


@pytest.mark.parametrize("change", [dict(labels=[0]), dict(latents=torch.zeros(2, 3)), dict(method="unipc"), dict(labels=[0, 9])])
def test_inversion_names_what_it_refuses(change):
    arguments = dict(latents=torch.zeros(2, *SHAPE), labels=[0, 1], num_classes=3) | change
    name = next(iter(change))
    with pytest.raises(ValueError, match=f"^{name}: got"):
        sampler.invert(toy_model, **arguments)


@pytest.mark.parametrize("path", flow.PATHS)
@pytest.mark.parametrize("prediction", flow.PREDICTIONS)
@pytest.mark.parametrize("method", ["heun", "midpoint", "dopri5"])
def test_sample_follows_the_flow_from_its_noise(path, prediction, method):
    model, labels, seeds = Gaussian(path, prediction), [0, 3, 1, 2], [5, 6, 7, 8]
    t0, t1 = flow.integration_interval(path, prediction, mode="ode")
    settings = dict(latent_shape=SHAPE, num_classes=3, num_steps=400, shift=None, path=path, prediction=prediction, rtol=1e-6)
    latents = sampler.sample(model, labels=labels, seeds=seeds, method=method, **settings)
    truth = model.transport(sampler.initial_noise(seeds, SHAPE).double(), t0, t1, torch.tensor(labels))
    assert latents.dtype == torch.float32
    # dopri5's last step looks beyond t = 1, where the clamped closed form of VP has a kink: 7e-5 there, 6e-6 elsewhere.
    assert relative_error(latents, truth) < (2e-4 if method == "dopri5" else 3e-5)


def test_integration_back_to_the_noise():
    model, y = Gaussian("gvp"), torch.zeros(2)
    predict = lambda x, t: model(x, torch.tensor([t]), y)  # noqa: E731
    x0 = sampler.initial_noise([0, 1], SHAPE)
    with pytest.raises(ValueError, match="grid: got times from 1.0 to 0.0, expected increasing times for this method"):
        sampler.integrate_ode(predict, x0, sampler.time_grid(5, None, 1.0, 0.0), method="unipc", path="gvp")
    for method in (name for name in sampler.ODE_METHODS if name not in ("dpmpp_2m", "unipc")):
        x1 = sampler.integrate_ode(predict, x0, sampler.time_grid(200), method=method, path="gvp", rtol=1e-6)
        back = sampler.integrate_ode(predict, x1, sampler.time_grid(200, None, 1.0, 0.0), method=method, path="gvp", rtol=1e-6)
        assert relative_error(back, x0) < (0.02 if method == "euler" else 5e-4)
        assert relative_error(x1, x0) > 0.1


@pytest.mark.parametrize(
    ("path", "prediction", "form", "norm", "method", "last_step"),
    [
        ("linear", "velocity", "sigma", 1.0, "sde_euler", "mean"),
        ("linear", "velocity", "sigma", 3.0, "sde_heun", None),
        ("linear", "velocity", "constant", 0.5, "sde_euler", "euler"),
        ("linear", "velocity", "increasing-decreasing", 2.0, "sde_heun", "mean"),
        ("linear", "noise", "decreasing", 1.0, "sde_heun", "mean"),
        ("gvp", "velocity", "linear", 1.0, "sde_heun", None),
        ("gvp", "score", "sigma", 1.0, "sde_heun", "mean"),
        ("vp", "velocity", "sbdm", 1.0, "sde_heun", "euler"),
        ("vp", "noise", "sigma", 1.0, "sde_euler", "mean"),
    ],
)
def test_sde_draws_from_the_data(path, prediction, form, norm, method, last_step):
    """20,000 samples: the standard error is 0.5 % of the standard deviation, the solver's bias at 200 steps less than 2 %."""
    torch.manual_seed(0)
    model, y, n = Gaussian(path, prediction), torch.zeros(1), 20_000
    size = 0.005 if last_step else 0.0
    t0, t1 = flow.integration_interval(path, prediction, mode="sde", diffusion_form=form, last_step_size=size,
                                       sample_eps=5e-3 if prediction != "velocity" else None)
    mean, std = model.moments(t0, y)
    x = mean + std * torch.randn(n, 1, 1, 1, dtype=torch.float64)
    final = sampler.integrate_sde(lambda x, t: model(x, torch.tensor([t]), y), x, sampler.time_grid(200, None, t0, t1),
                                  lambda: torch.randn_like(x), method=method, path=path, prediction=prediction, form=form, norm=norm,
                                  last_step=last_step, last_step_size=size)
    mean, std = model.moments(t1 + size, y)
    assert float(final.mean()) == pytest.approx(float(mean), abs=0.02)
    assert float(final.std()) == pytest.approx(float(std), rel=0.04)
    # The noise mattered: the flow alone would keep every sample at its quantile.
    assert float(torch.corrcoef(torch.stack([final.flatten(), x.flatten()]))[0, 1]) < 0.9


def test_tweedie_is_the_mean_of_the_data():
    model, y = Gaussian(), torch.zeros(1)
    x = torch.randn(5, *SHAPE, dtype=torch.float64)
    grid = torch.tensor([0.5, 0.6], dtype=torch.float64)
    settings = dict(method="sde_euler", norm=0.0)
    predict = lambda x, t: model(x, torch.tensor([t]).double(), y)  # noqa: E731
    before = sampler.integrate_sde(predict, x, grid, lambda: torch.zeros_like(x), last_step=None, **settings)
    tweedie = sampler.integrate_sde(predict, x, grid, lambda: torch.zeros_like(x), last_step="tweedie", **settings)
    mean, std = model.moments(0.6, y)
    torch.testing.assert_close(tweedie, model.mean(y) + 0.6 * model.std**2 / std**2 * (before - mean))


def test_steps_are_counted_in_evaluations():
    settings = dict(labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, num_steps=10)
    for method, last_step, expected in [("euler", None, 10), ("heun", None, 20), ("midpoint", None, 20), ("sde_euler", "mean", 11),
                                        ("sde_euler", None, 10), ("sde_heun", "tweedie", 21)]:
        model = Gaussian()
        sampler.sample(model, method=method, last_step=last_step, **settings)
        assert len(model.times) == expected
    model = Gaussian()
    sampler.sample(model, shift=0.3, **settings)
    assert model.times == sampler.time_grid(10, 0.3)[:-1].tolist()


def test_shift_of_an_sde_keeps_its_ends():
    model = Gaussian()
    sampler.sample(model, labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, num_steps=4, method="sde_euler", shift=0.3,
                   last_step_size=0.1)
    truth = 0.9 * sampler.time_grid(4, 0.3)
    assert model.times == pytest.approx(truth.tolist())


# Guidance


def both_passes(model, y, null, scale, interval, channels):
    """Guidance as the definition has it: both outputs at every time."""

    def predict(x, t):
        time = torch.full((len(x),), t)
        cond, uncond = model(x, time, y), model(x, time, torch.full_like(y, null))
        if scale == 1 or not interval[0] <= torch.tensor(t).item() <= interval[1]:
            return cond
        mixed = uncond + scale * (cond - uncond)
        return mixed if channels is None else torch.cat([mixed[:, :channels], cond[:, channels:]], dim=1)

    return predict


@pytest.mark.parametrize("method", ["euler", "heun", "midpoint", "sde_euler", "dopri5"])
@pytest.mark.parametrize("channels", [None, 1, 4])
def test_skipping_the_unconditional_pass_changes_nothing(method, channels):
    model, y, interval = Gaussian(), torch.tensor([0, 2]), (0.2, 0.8)
    x, grid = sampler.initial_noise([0, 1], SHAPE), sampler.time_grid(40, 0.5, 0.0, 0.95)
    guided = sampler.GuidedModel(model, y, 3, scale=4.0, interval=interval, channels=channels)
    always = both_passes(Gaussian(), y, 3, 4.0, interval, channels)
    plain = sampler.GuidedModel(Gaussian(), y, 3)
    if method == "sde_euler":
        results = [sampler.integrate_sde(predict, x, grid, sampler.NoiseStream([2, 3], SHAPE)) for predict in (guided, always, plain)]
    else:
        results = [sampler.integrate_ode(predict, x, grid, method=method) for predict in (guided, always, plain)]
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-6)
    assert relative_error(results[2], results[0]) > 0.05
    assert [rows == 4 for rows in model.rows] == [0.2 <= t <= 0.8 for t in model.times]
    assert set(model.rows) == {2, 4}


def test_bounds_of_the_interval_are_inclusive_in_fp32():
    """0.7 as fp32 is below 0.7 as a Python float; the official comparison, in fp32, does not take it for smaller."""
    y, x = torch.tensor([0]), torch.zeros(1, *SHAPE)
    at = float(torch.tensor(0.7))
    assert at < 0.7
    for interval, t, rows in [((0.7, 1.0), at, 2), ((0.0, 0.7), at, 2), ((0.7, 1.0), at - 1e-7, 1), ((0.0, 0.7), at + 1e-7, 1),
                              ((0.0, 1.0), 0.0, 2), ((0.0, 1.0), 1.001, 2), ((0.3, 0.3), float(torch.tensor(0.3)), 2)]:
        model = Gaussian()
        sampler.GuidedModel(model, y, 3, scale=2.0, interval=interval)(x, t)
        assert model.rows == [rows], (interval, t)


def test_scale_one_never_asks_for_the_unconditional_output_and_scale_zero_is_it():
    y, x = torch.tensor([0, 1]), torch.randn(2, *SHAPE)
    model = Gaussian()
    conditional = sampler.GuidedModel(model, y, 3, scale=1.0)(x, 0.5)
    assert model.rows == [2] and torch.equal(conditional, model(x, torch.full((2,), 0.5), y))
    unconditional = sampler.GuidedModel(model, y, 3, scale=0.0)(x, 0.5)
    assert torch.equal(unconditional, model(x, torch.full((2,), 0.5), torch.tensor([3, 3])))


def test_types_that_the_model_gets():
    model = Gaussian()
    latents = sampler.sample(model, labels=[0, 1], seeds=[0, 1], latent_shape=SHAPE, num_classes=3, num_steps=3, guidance_scale=2.0,
                             guidance_interval=(0.3, 1.0), dtype=torch.bfloat16)
    rows = sampler.padded_rows(2, torch.device("cpu"))
    assert model.inputs[0] == (torch.bfloat16, torch.float32, (rows,))
    assert model.inputs[-1] == (torch.bfloat16, torch.float32, (2 * rows,))
    assert latents.dtype == torch.float32
    double = sampler.sample(model, labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, num_steps=3, dtype=torch.float64)
    assert double.dtype == torch.float64


# Randomness


def test_noise_depends_on_the_seed_alone():
    noise = sampler.initial_noise([3, 1, 2], (4, 8, 8))
    assert torch.equal(noise[1:2], sampler.initial_noise([1], (4, 8, 8)))
    assert torch.equal(noise, sampler.initial_noise(torch.tensor([3, 1, 2]), (4, 8, 8)))
    many = sampler.initial_noise(range(200), (4, 8, 8))
    assert abs(float(many.mean())) < 0.02 and float(many.std()) == pytest.approx(1, abs=0.02)
    assert float(torch.corrcoef(many.flatten(1)).fill_diagonal_(0).abs().max()) < 0.35  # 256 values: 5.5 standard errors
    stream, alone = sampler.NoiseStream([3, 1, 2], (4, 8, 8)), sampler.NoiseStream([1], (4, 8, 8))
    for _ in range(3):
        draw = stream()
        assert torch.equal(draw[1:2], alone())
    assert not torch.equal(draw, noise)


def random_transformer(**changes):
    torch.manual_seed(0)
    model = LightningDiT(**dict(input_size=4, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=5, use_swiglu=True,
                                use_rope=True, use_rmsnorm=True) | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("method", "changes"), [
    ("heun", {}), ("sde_euler", {}), ("euler", dict(patch_size=2)), ("euler", dict(input_size=6, patch_size=2)),
    ("euler", dict(hidden_size=384, depth=1, num_heads=6, wo_shift=True)),
    ("euler", dict(hidden_size=36, use_swiglu=False, use_rope=False, use_rmsnorm=False, batch_adaln=True))])
def test_an_image_is_bitwise_the_same_in_any_batch(one_thread, method, changes):
    """For batch sizes whose rows a CPU rounds alike (see filled_rows), in any order and company, guided in part of the interval.

    With 16 tokens an image, where nothing is filled up, with 4, where images are filled up to 4, and with 9, where they are to 16.
    """
    model = random_transformer(**changes)
    labels, seeds = [i % 6 for i in range(11)], [7 * i for i in range(11)]
    settings = dict(latent_shape=(4, *2 * [model.input_size]), num_classes=5, num_steps=6, method=method, guidance_scale=3.0,
                    guidance_interval=(0.3, 0.9))
    truth = sampler.sample(model, labels=labels, seeds=seeds, **settings)
    for batch_size in (1, 2, 3, 4, 5, 8, 10, 64):
        assert torch.equal(sampler.sample(model, labels=labels, seeds=seeds, batch_size=batch_size, **settings), truth)
    chosen = [9, 2, 4]
    some = sampler.sample(model, labels=[labels[i] for i in chosen], seeds=[seeds[i] for i in chosen], **settings)
    assert torch.equal(some, truth[chosen])
    assert not torch.equal(sampler.sample(model, labels=labels, seeds=[seed + 1 for seed in seeds], **settings), truth)


def test_all_batches_of_a_call_have_one_shape():
    model = Gaussian()
    settings = dict(latent_shape=SHAPE, num_classes=3, num_steps=2)
    sampler.sample(model, labels=[0] * 21, seeds=range(21), batch_size=16, **settings)
    assert model.rows == [16] * 4
    assert sampler.padded_rows(5, torch.device("cpu")) == 8 and sampler.padded_rows(5, torch.device("cuda")) == 5
    assert sampler.sample(model, labels=[], seeds=[], **settings).shape == (0, *SHAPE)


@pytest.mark.parametrize(("changes", "n", "images"), [({}, 4, 4), ({}, 1, 1), (dict(patch_size=2), 5, 8), (dict(input_size=3), 5, 16)])
def test_a_cpu_fills_up_tokens_and_not_images(changes, n, images):
    """Rows of the tokens' products are multiples of 16; adaLN's, one an image, are filled up alone."""
    model, tokens, conditions = random_transformer(depth=1, **changes), [], []
    model.blocks[0].attn.qkv.register_forward_hook(lambda layer, inputs, output: tokens.append(output.shape[:2]))
    model.blocks[0].adaLN_modulation.register_forward_hook(lambda layer, inputs, output: conditions.append(len(output)))
    settings = dict(labels=[1] * n, seeds=range(n), latent_shape=(4, *2 * [model.input_size]), num_classes=5, num_steps=2)
    drawn = sampler.sample(model, guidance_scale=2.0, guidance_interval=(0.4, 1.0), shift=None, **settings)
    count = model.pos_embed.shape[1]
    assert tokens == [(images, count), (2 * images, count)] and images * count % 16 == 0
    assert conditions == [16, -(-2 * images // 16) * 16]
    assert sampler.filled_rows(n, torch.device("cpu"), model, None) == images and sampler.filled_rows(n, torch.device("cuda"), model) == n
    assert sampler.filled_rows(n, torch.device("cpu"), model, lambda x, t, y: x) == sampler.padded_rows(n, torch.device("cpu"))

    def plain(x, t, y):  # not filled up by tokens, and adaLN's rows inside the model
        return model(x, t, y)

    torch.testing.assert_close(sampler.sample(plain, guidance_scale=2.0, guidance_interval=(0.4, 1.0), shift=None, **settings), drawn,
                               rtol=1e-4, atol=1e-5)


def test_dopri5_agrees_between_batches_to_its_tolerance():
    settings = dict(latent_shape=SHAPE, num_classes=3, num_steps=2, method="dopri5", rtol=1e-4)
    labels, seeds = [0, 1, 2, 3, 0, 1, 2, 3, 0], list(range(9))
    together = sampler.sample(Gaussian(), labels=labels, seeds=seeds, **settings)
    assert relative_error(sampler.sample(Gaussian(), labels=labels[8:], seeds=seeds[8:], **settings), together[8:]) < 1e-3


# Modes, failures, bad input


def test_training_mode_is_left_for_the_duration_and_restored():
    modes = []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.frozen, self.active = torch.nn.Dropout().eval(), torch.nn.Dropout()

        def forward(self, x, t, y):
            modes.extend([self.training, self.active.training, torch.is_grad_enabled()])
            if len(modes) > 6:
                raise KeyboardInterrupt
            return x

    model, settings = Model(), dict(labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3)
    sampler.sample(model, num_steps=2, **settings)
    assert not any(modes) and model.training and model.active.training and not model.frozen.training
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(model, num_steps=2, **settings)
    assert model.training and model.active.training and not model.frozen.training


def test_broken_images_are_reported():
    def model(x, t, y):
        return torch.where(y.view(-1, 1, 1, 1) == 2, math.nan, 1.0) * x

    with pytest.raises(RuntimeError, match="1 of 3 latents are not finite, the first of seed 11 and label 2"):
        sampler.sample(model, labels=[0, 2, 1], seeds=[10, 11, 12], latent_shape=SHAPE, num_classes=3, num_steps=2)


def test_dopri5_reports_a_model_that_breaks():
    with pytest.raises(RuntimeError, match="method 'dopri5': torchdiffeq stopped with"):
        sampler.sample(lambda x, t, y: x / 0, labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, method="dopri5")


def test_progress_bar(capsys):
    settings = dict(labels=[0] * 4, seeds=range(4), latent_shape=SHAPE, num_classes=3, num_steps=3)
    for method, total in (("euler", 6), ("dopri5", 2)):
        sampler.sample(toy_model, progress=True, method=method, batch_size=2, **settings)
        assert f"{total}/{total}" in capsys.readouterr().err
    sampler.sample(toy_model, **settings)
    assert capsys.readouterr().err == ""


def test_dopri5_names_the_package_it_lacks(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchdiffeq", None)
    with pytest.raises(ImportError, match="pip install torchdiffeq"):
        sampler.sample(toy_model, labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3, method="dopri5")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(labels=[0, 4]), r"labels: got 4, expected integers in \[0, 3\]"),
        (dict(labels=[-1, 0]), r"labels: got -1"),
        (dict(labels=[0.5, 1]), r"labels: got \[0.5, 1\], expected a sequence of integers"),
        (dict(labels=3), r"labels: got 3, expected a sequence"),
        (dict(labels=torch.zeros(2, 2, dtype=torch.long)), r"labels: got"),
        (dict(labels=[0]), r"labels, seeds: got lengths 1 and 2"),
        (dict(seeds=[0, 2**32]), r"seeds: got 4294967296, expected integers in \[0, 4294967295\]"),
        (dict(seeds=[-1, 0]), r"seeds: got -1"),
        (dict(latent_shape=(4, 4)), r"latent_shape: got \(4, 4\), expected \(C, H, W\)"),
        (dict(latent_shape=(4, 0, 4)), r"latent_shape: got \(4, 0, 4\)"),
        (dict(batch_size=0), r"batch_size: got 0"),
        (dict(num_steps=0), r"num_steps: got 0"),
        (dict(num_steps=-5), r"num_steps: got -5"),
        (dict(num_steps=2.5), r"num_steps: got 2.5"),
        (dict(method="rk4"), r"method: got 'rk4', expected one of 'euler', 'heun', 'midpoint', 'dopri5', 'ab2'"),
        (dict(path="cosine"), r"path: got 'cosine'"),
        (dict(prediction="data"), r"prediction: got 'data'"),
        (dict(shift=-0.3), r"shift: got -0.3"),
        (dict(shift=math.nan), r"shift: got nan"),
        (dict(guidance_scale=math.inf), r"guidance_scale: got inf"),
        (dict(guidance_interval=(0.6, 0.5)), r"guidance_interval: got 0.6, 0.5, expected low <= high"),
        (dict(guidance_channels=5), r"guidance_channels: got 5, expected at most the 4 channels"),
        (dict(guidance_channels=0), r"guidance_channels: got 0"),
        (dict(guidance_rescale=1.5), r"guidance_rescale: got 1.5, expected a number in \[0, 1\]"),
        (dict(prediction="noise", sample_eps=0.0), r"sample_eps: got 0, expected a number > 0: on path 'linear' with prediction 'noise'"),
        (dict(sample_eps=0.7, path="vp"), r"sample_eps: got 0.7"),
        (dict(method="sde_euler", diffusion_form="cubic"), r"diffusion_form: got 'cubic'"),
        (dict(method="sde_euler", diffusion_norm=-1.0), r"norm: got -1.0"),
        (dict(method="sde_euler", last_step="last"), r"last_step: got 'last', expected one of 'mean', 'tweedie', 'euler'"),
        (dict(method="sde_euler", last_step_size=0.0), r"last_step_size: got 0.0"),
        (dict(method="sde_euler", last_step_size=0.9995, diffusion_form="sbdm"), r"last_step_size: got 0.9995, expected less than 0.999"),
        (dict(method="sde_heun", last_step=None, diffusion_form="constant"), r"last_step: got None.*singular at t = 1"),
    ],
)
def test_bad_input_is_named_before_the_model_is_called(change, message):
    def model(x, t, y):
        raise AssertionError("the model was called")

    settings = dict(labels=[0, 1], seeds=[0, 1], latent_shape=SHAPE, num_classes=3) | change
    with pytest.raises(ValueError, match=message):
        sampler.sample(model, **settings)


def test_output_of_another_shape_is_named():
    with pytest.raises(ValueError, match=r"model: got an output of shape \(8, 8, 2, 2\), expected \(8, 4, 2, 2\)"):
        sampler.sample(lambda x, t, y: torch.cat([x, x], 1), labels=[0], seeds=[0], latent_shape=SHAPE, num_classes=3)


def test_sde_needs_increasing_times():
    with pytest.raises(ValueError, match="grid: got times from 1.0 to 0.0, expected increasing"):
        sampler.integrate_sde(lambda x, t: x, torch.zeros(1), sampler.time_grid(3, None, 1.0, 0.0), lambda: torch.zeros(1))


def test_decoding_is_left_out_of_autocast_and_batched():
    seen = []

    class Decoder:
        def decode_uint8(self, latents):
            seen.append((len(latents), torch.is_autocast_enabled("cpu")))
            return latents.mul(10).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    def model(x, t, y):
        return torch.zeros_like(x)

    arguments = dict(latent_shape=(2, 4, 4), num_classes=3, num_steps=2)
    with torch.autocast("cpu", torch.bfloat16):
        images = sampler.sample_images(model, Decoder(), labels=[0] * 10, seeds=range(10), batch_size=8, **arguments)
    assert seen == [(8, False), (8, False)] and images.shape == (10, 4, 4, 2)
    alone = sampler.sample_images(model, Decoder(), labels=[0], seeds=[9], **arguments)
    assert torch.equal(images[9], alone[0]) and not torch.equal(images[9], images[8])
