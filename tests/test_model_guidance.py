"""Model guidance: what it adds to the target, where the recursion ends, and that what is trained so needs no guidance in sampling."""
import contextlib
import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lightningdit import config as configuration
from lightningdit import flow, optim
from lightningdit.config import ConfigError, DiTConfig
from lightningdit.sampler import sample
from lightningdit.training import losses

MEANS, SPREAD = torch.tensor([-1.5, 1.5]), 0.5  # two classes of numbers, equally frequent


def draw(n, generator, dtype=torch.float32):
    """x1, x0 (n, 1, 1, 1), t, y, dropped (n,)."""
    y = torch.randint(2, (n,), generator=generator)
    noise = torch.randn(2, n, 1, 1, 1, generator=generator, dtype=dtype)
    x1 = MEANS.to(dtype)[y].view(-1, 1, 1, 1) + SPREAD * noise[0]
    return x1, noise[1], torch.rand(n, generator=generator, dtype=dtype), y, torch.rand(n, generator=generator) < 0.2


def velocities(x, t):
    """The plain velocities in closed form: (u_0, u_1), each given the class, and u_null; shape of x."""
    t = t.view(-1, 1, 1, 1)
    variance = t**2 * SPREAD**2 + (1 - t) ** 2
    given = [m + (t * SPREAD**2 - (1 - t)) / variance * (x - t * m) for m in MEANS.tolist()]
    probability = torch.sigmoid(t * (MEANS[1] - MEANS[0]) * x / variance)  # of class 1; the means are opposite
    return given[0], given[1], (1 - probability) * given[0] + probability * given[1]


@pytest.mark.parametrize("scale", [0.0, 0.3, 0.45])
def test_the_guided_velocity_is_the_minimiser(scale):
    """At the fixed point of the docstring the gradient of the loss vanishes in every direction tried, but for the noise of 200,000 images;
    the plain loss has another minimum."""
    n = 200_000
    x1, x0, t, y, dropped = draw(n, torch.Generator().manual_seed(0), torch.float64)
    x_t, _ = flow.interpolate(x1, x0, t)
    u0, u1, null = velocities(x_t, t)
    rows = y.view(-1, 1, 1, 1).bool()
    guided = null + (torch.where(rows, u1, u0) - null) / (1 - scale)
    guidance = flow.model_guidance(guided, null, t, scale, dropped=dropped)
    best = torch.where(dropped.view(-1, 1, 1, 1), null, guided)
    sign = torch.where(rows, 1.0, -1.0) * ~dropped.view(-1, 1, 1, 1)  # an output for the null label cannot depend on the class
    directions = torch.stack([torch.ones_like(x_t), x_t, sign, sign * t.view(-1, 1, 1, 1), torch.sin(2 * x_t)])

    def gradient(guidance):
        small = torch.zeros(len(directions), dtype=torch.float64, requires_grad=True)
        per_image = flow.losses(best + torch.einsum("k,knabc->nabc", small, directions), x1, x0, t, guidance=guidance)["mse"]
        (found,) = torch.autograd.grad(per_image.mean(), small)
        return found / (2 * directions.flatten(1).square().mean(1).sqrt() * per_image.detach().mean().sqrt() / n**0.5)

    assert (gradient(guidance).abs() < 4.5).all()  # standard errors
    assert (gradient(None).abs().max() > 20) == (scale > 0)


def test_the_recursion_ends_at_its_fixed_point():
    """Linear models at one time: an exact minimisation against the last round's own outputs brings their error down by w each time; and
    gradient steps against an average of the weights, as in training, arrive at the same place."""
    scale, generator = 0.45, torch.Generator().manual_seed(1)
    x1, x0, _, y, dropped = draw(4096, generator, torch.float64)
    t = torch.full((4096,), 0.6, dtype=torch.float64)
    x_t, u = flow.interpolate(x1, x0, t)
    features = torch.stack([torch.ones_like(t), x_t.flatten()], 1)
    groups = [~dropped & (y == 0), ~dropped & (y == 1), dropped]

    def fit(target):
        return torch.stack([torch.linalg.lstsq(features[rows], target.flatten()[rows, None]).solution[:, 0] for rows in groups])

    plain = fit(u)
    fixed = torch.cat([plain[2] + (plain[:2] - plain[2]) / (1 - scale), plain[2:]])

    def outputs(weights):  # for the label of each image, and for the null label
        return ((features * weights[y]).sum(1).view_as(x_t), (features @ weights[2]).view_as(x_t))

    weights, errors = plain, []
    for _ in range(4):
        weights = fit(u + flow.model_guidance(*outputs(weights), t, scale, dropped=dropped))
        errors.append((weights - fixed).norm())
    torch.testing.assert_close(torch.stack(errors[1:]) / torch.stack(errors[:-1]), torch.full((3,), scale, dtype=torch.float64))

    weights = torch.zeros(3, 2, dtype=torch.float64, requires_grad=True)
    average = torch.zeros(3, 2, dtype=torch.float64)
    for _ in range(1500):
        guidance = flow.model_guidance(*outputs(average), t, scale, dropped=dropped)
        output = torch.where(dropped.view(-1, 1, 1, 1), outputs(weights)[1], outputs(weights)[0])
        (gradient,) = torch.autograd.grad(flow.losses(output, x1, x0, t, guidance=guidance)["mse"].mean(), weights)
        weights = (weights - 0.5 * gradient).detach().requires_grad_()
        average.lerp_(weights.detach(), 0.1)
    torch.testing.assert_close(average, fixed, rtol=1e-3, atol=1e-3)


class Net(nn.Module):
    """A velocity of one number: model(x, t, y, drop_labels); label 2 is the null label."""

    def __init__(self):
        super().__init__()
        self.labels = nn.Embedding(3, 8)
        self.layers = nn.Sequential(nn.Linear(10, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 1))

    def forward(self, x, t, y, drop_labels=None):
        y = y if drop_labels is None else torch.where(drop_labels, 2, y)
        return self.layers(torch.cat([x.flatten(1), t[:, None], self.labels(y)], 1)).view_as(x)


def toy_config(**flow_settings):
    config = DiTConfig()
    config.data.num_classes, config.flow.cosine_loss = 2, False
    for name, value in flow_settings.items():
        setattr(config.flow, name, value)
    return config


def trained(config, steps=1000):
    torch.manual_seed(0)
    model, generator = Net(), torch.Generator().manual_seed(2)
    average, optimizer = optim.EMA(model, 0.98), torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(steps):
        guide = average.model if config.flow.guides(step) else None
        for group in optimizer.param_groups:
            group["lr"] = optim.lr_at(step, lr=3e-3, steps=steps, schedule="cosine")
        losses(config, model, contextlib.nullcontext(), *draw(256, generator), guide=guide)["mse"].mean().backward()
        optimizer.step(), optimizer.zero_grad()
        average.update(step)
    return average.model


def samples_of(model, scale, n=1000):
    options = dict(latent_shape=(1, 1, 1), num_classes=2, num_steps=40, shift=1.0, method="heun")
    return sample(model, labels=[1] * n, seeds=range(n), guidance_scale=scale, **options).flatten()


def test_sampled_without_guidance_it_draws_what_guidance_draws():
    """w = 0.5 learns what a plain model draws at scale 2, and the mean of its images is that of the closed form at scale 2."""
    plain, learnt = trained(toy_config()), trained(toy_config(model_guidance=0.5, model_guidance_start=200))

    def exact(x, t, y):
        u0, u1, null = velocities(x, t)
        return torch.where((y == 2).view(-1, 1, 1, 1), null, torch.where((y == 1).view(-1, 1, 1, 1), u1, u0))

    truth, guided, ours, unguided = samples_of(exact, 2.0), samples_of(plain, 2.0), samples_of(learnt, 1.0), samples_of(plain, 1.0)
    effect = truth.mean() - unguided.mean()
    assert effect > 0.3 and (truth.mean() - ours.mean()).abs() < 0.1 * effect
    # Image by image, from the same noise. The networks are small: the plain one's guided images are 0.12 away from the truth themselves.
    assert (ours - guided).abs().mean() < 0.2 * effect


def test_guidance_is_a_constant_and_acts_where_it_should():
    """On labelled images at times in the interval, from the start on; the others keep the plain loss bitwise. Its gradient is that of the
    loss alone, even if the guide is the model itself."""
    config = toy_config(model_guidance=0.4, model_guidance_start=3, model_guidance_interval=(0.25, 0.9))
    assert [config.flow.guides(step) for step in (0, 2, 3, 9)] == [False, False, True, True] and not toy_config().flow.guides(9)
    torch.manual_seed(0)
    model, batch = Net(), draw(64, torch.Generator().manual_seed(3))
    x1, x0, t, y, dropped = batch
    acts = (t >= 0.25) & (t <= 0.9) & ~dropped
    assert 10 < acts.sum() < 54
    plain, guided = (losses(config, model, contextlib.nullcontext(), *batch, guide=guide)["mse"] for guide in (None, model))
    assert torch.equal(plain != guided, acts)
    x_t, u = flow.interpolate(x1, x0, t)
    with torch.no_grad():
        difference = 0.4 * (model(x_t, t, y) - model(x_t, t, torch.full_like(y, 2)))
    target = u + difference * acts.view(-1, 1, 1, 1)
    by_hand = (copy.deepcopy(model), model)
    (by_hand[0](x_t, t, y, dropped) - target).square().mean().backward()
    guided.mean().backward()
    for ours, expected in zip(by_hand[1].parameters(), by_hand[0].parameters(), strict=True):
        torch.testing.assert_close(ours.grad, expected.grad)


def test_bad_input_is_named():
    v, t = torch.zeros(4, 2, 3, 3), torch.zeros(4)
    for arguments, message in (((v, v, t, 1.0), "scale: got 1.0"), ((v, v[:3], t, 0.5), "unconditional, t: got shapes"),
                               ((v, v, t[:3], 0.5), "unconditional, t"), ((v, v, t, 0.5, (0.5, 0.2)), "interval: got")):
        with pytest.raises(ValueError, match=message):
            flow.model_guidance(*arguments)
    with pytest.raises(ValueError, match="guidance: got shape"):
        flow.losses(v, v, v, t, guidance=v[:2])
    with pytest.raises(ValueError, match="guidance: got a tensor with prediction 'noise'"):
        flow.losses(v, v, v, t, prediction="noise", guidance=v)


@pytest.mark.parametrize("argv, message", [
    ("--flow.model-guidance 1", "flow.model_guidance: got 1.0, expected a number in [0, 1)"),
    ("--flow.model-guidance 0.4 --flow.prediction noise --flow.no-cosine-loss", "0 with flow.prediction = noise"),
    ("--flow.model-guidance 0.4 --model.class-dropout-prob 0", "model.class_dropout_prob: got 0.0, expected more than 0"),
    ("--flow.model-guidance 0.4 --flow.model-guidance-interval 0.5 0.1", "flow.model_guidance_interval"),
    ("--flow.model-guidance-start -1", "flow.model_guidance_start: got -1"),
])
def test_impossible_settings(argv, message):
    with pytest.raises(ConfigError) as error:
        configuration.parse(DiTConfig, argv.split())
    assert message in str(error.value)


def test_being_guided_twice_is_said(recwarn):
    config = configuration.parse(DiTConfig, "--flow.model-guidance 0.4 --data.num-classes 10".split())
    assert config.sampling_arguments()["guidance_scale"] == 1 and not recwarn
    config.sample.guidance_scale = 2.0
    with pytest.warns(UserWarning, match="sample.guidance_scale: got 2.0, expected 1: the model has learnt its guidance"):
        config.sampling_arguments()


def test_the_recipe_differs_from_that_of_64_epochs_in_guidance_only():
    folder = Path(__file__).parent.parent / "train" / "configs"
    plain, learnt = (configuration.load(DiTConfig, folder / f"lightningdit_xl_64ep{name}.yaml") for name in ("", "_mg"))
    changed = {line.partition(":")[0] for line in configuration.differences(plain, learnt)}
    assert changed == {"run", "flow.model_guidance", "flow.model_guidance_start", "flow.model_guidance_interval", "sample.guidance_scale",
                       "sample.guidance_interval", "sample.guidance_channels"}
    assert (learnt.flow.model_guidance, learnt.flow.model_guidance_start) == (0.45, 100_000 * 256 // learnt.batch_size)
    assert learnt.flow.model_guidance_interval == (0.25, 1.0) and learnt.sample.guidance_scale == 1
