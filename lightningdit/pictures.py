"""Pictures of how a model generates: denoising strips, guidance sweeps, interpolations. What `lightningdit sample --show` draws.

Each function returns (rows, columns, H, W, C) uint8 images. `settings` are those of sampler.sample, without labels and seeds; the methods
are the ODE solvers with fixed steps, because these pictures follow one trajectory.
"""
import copy
import math

import torch
from torch import nn

from . import flow
from .sampler import ODE_METHODS, Diverged, GuidedModel, initial_noise, integrate_ode, padded_rows, sample_images, time_grid

METHODS = tuple(name for name in ODE_METHODS if name != "dopri5")


def denoising_strip(model, tokenizer, *, labels, seeds, columns=8, **settings):
    """For each image two rows, the state x_t and the data predicted from it, at evenly spaced evaluations from the first to the last.

    The last column of both rows is the finished image.
    Raises: ValueError that names the argument.
    """
    if columns < 2:
        raise ValueError(f"columns: got {columns}, expected at least 2")
    seen = []
    x0 = initial_noise(seeds, settings["latent_shape"], settings.get("device", "cpu"))
    final = solve(model, x0, labels, watch=lambda x, t, output: seen.append((x, t, output)), **settings)
    path, prediction = settings.get("path", "linear"), settings.get("prediction", "velocity")
    chosen = [seen[round(i * (len(seen) - 1) / max(columns - 2, 1))] for i in range(columns - 1)]
    states = [x for x, _, _ in chosen] + [final]
    data = [flow.data_from(output, x, torch.tensor(t), path, prediction) for x, t, output in chosen] + [final]
    rows = [decode(tokenizer, torch.stack([frame[i] for frame in frames])) for i in range(len(seeds)) for frames in (states, data)]
    return torch.stack(rows)


def guidance_sweep(model, tokenizer, *, labels, seeds, scales, **settings):
    """A row for each image, a column for each guidance scale."""
    columns = [sample_images(model, tokenizer, labels=labels, seeds=seeds, **settings | dict(guidance_scale=scale)) for scale in scales]
    return torch.stack(columns, dim=1)


def seed_interpolation(model, tokenizer, *, labels, seeds, columns=8, **settings):
    """Row i goes from the noise of seeds[i] to that of seeds[i] + 1, of the class labels[i]: on the arc between the two, since points of
    the straight line between them have too small a norm for normal noise."""
    device = settings.get("device", "cpu")
    a, b = (initial_noise([seed + step for seed in seeds], settings["latent_shape"], device) for step in (0, 1))
    rows = []
    for first, second, label in zip(a, b, labels, strict=True):
        noise = torch.stack([slerp(first, second, w) for w in _weights(columns)])
        rows.append(decode(tokenizer, solve(model, noise, [label] * columns, **settings)))
    return torch.stack(rows)


def class_interpolation(model, tokenizer, *, labels, seeds, columns=8, **settings):
    """Row i goes from class labels[i] to labels[i + 1], the last to the first: mixtures of their embeddings, the noise of seeds[i]."""
    table, rows = model.y_embedder.embedding_table.weight, []
    null = table[model.num_classes :] if len(table) > model.num_classes else table.new_zeros(1, table.shape[1])
    for i, seed in enumerate(seeds):
        first, second = table[labels[i]], table[labels[(i + 1) % len(labels)]]
        mixed = copy.copy(model)  # shares everything but the table of labels
        mixed._modules = dict(model._modules)
        mixed.y_embedder = copy.copy(model.y_embedder)
        mixed.y_embedder._modules = {}
        mixtures = torch.stack([torch.lerp(first, second, w) for w in _weights(columns)])
        mixed.y_embedder.embedding_table = nn.Embedding.from_pretrained(torch.cat([mixtures, null]).detach())
        noise = initial_noise([seed] * columns, settings["latent_shape"], settings.get("device", "cpu"))
        rows.append(decode(tokenizer, solve(mixed, noise, range(columns), **settings | dict(num_classes=columns))))
    return torch.stack(rows)


def slerp(a, b, weight):
    """Point between a and b on the arc around the origin, at `weight` of its angle; norms are interpolated too."""
    cosine = torch.dot(a.flatten(), b.flatten()) / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    if angle.sin() < 1e-4:
        return torch.lerp(a, b, weight)
    direction = (torch.sin((1 - weight) * angle) * a / a.norm() + torch.sin(weight * angle) * b / b.norm()) / torch.sin(angle)
    return direction * torch.lerp(a.norm(), b.norm(), weight)


def _weights(columns):
    if columns < 2:
        raise ValueError(f"columns: got {columns}, expected at least 2")
    return torch.linspace(0, 1, columns).tolist()


@torch.no_grad()
def solve(model, x0, labels, *, watch=None, num_classes, num_steps, latent_shape, method="euler", shift=0.3, guidance_scale=1.0,
           guidance_interval=(0.0, 1.0), guidance_channels=None, guidance_rescale=0.0, guide=None, path="linear", prediction="velocity",
           sample_eps=None, device="cpu", batch_size=None):
    """Latents of given noise x0 (n, C, H, W), in one batch; watch(x, t, output) sees every evaluation."""
    if method not in METHODS:
        raise ValueError(f"method: got {method!r}, expected one of {', '.join(METHODS)} for this picture")
    n = len(x0)
    filled = list(range(n)) + [n - 1] * (padded_rows(n, x0.device) - n)
    predict = GuidedModel(model, torch.tensor([list(labels)[i] for i in filled], device=device), num_classes, guidance_scale,
                          guidance_interval, guidance_channels, guidance_rescale, guide)
    grid = time_grid(num_steps, shift, *flow.integration_interval(path, prediction, mode="ode", sample_eps=sample_eps))

    def watched(x, t):
        output = predict(x, t)
        if watch is not None:
            watch(x[:n], t, output[:n])
        return output

    latents = integrate_ode(watched, x0[filled], grid, method=method, path=path, prediction=prediction)[:n]
    if not math.isfinite(float(latents.sum())):
        raise Diverged(f"a latent is not finite; the model or the guidance (scale {guidance_scale}) diverged")
    return latents


def decode(tokenizer, latents):
    """(n, H, W, C) uint8 images on the CPU, bitwise those of sampler.sample_images."""
    n = len(latents)
    filled = torch.cat([latents, latents[-1:].expand(padded_rows(n, latents.device) - n, -1, -1, -1)])
    with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):
        return tokenizer.decode_uint8(filled)[:n].cpu()
