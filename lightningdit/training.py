"""What a step of train/dit.py is made of: its batch, its losses, and what is measured and drawn in between.

Random numbers are drawn for the whole global batch from (seed, step), and each process takes its slice: what is trained on does not depend
on the number of processes. B global batch, b of one process, C latent channels, S latent positions a side.
"""
import torch
import torch.distributed as dist

from . import flow, images, latents, metrics, optim, remote, sampler
from .config import ConfigError, require
from .distributed import generator_for, world
from .log import image_grid, save_png
from .tokenizer.vavae import Tokenizer


def open_tokenizer(config, device):
    """The tokenizer that the configuration names, checked against what it says of it."""
    if config.tokenizer.path is None:
        raise ConfigError("tokenizer.path: got None, expected 'digits' (bundled) or a tokenizer file; train/vavae.py makes one")
    tokenizer = Tokenizer.load(config.tokenizer.path, device)
    for name, got in (("downsample", tokenizer.downsample), ("latent_channels", tokenizer.latent_channels)):
        require(got == getattr(config.tokenizer, name), f"tokenizer.{name}", getattr(config.tokenizer, name),
                f"{got}, which the file {config.tokenizer.path} has")
    return tokenizer


def open_latents(config, tokenizer, device):
    """(training set, held-out set or None): a store, or images encoded to one in the cache, once for each data set and tokenizer.

    The processes share the encoding.
    """
    data, path = config.data, config.data.path
    if remote.is_url(path):
        path = remote.fetch_store(path, data.cache or f"{config.run}/latents", progress=world()[0] == 0)
    elif not latents.is_store(path):
        require(path is not None or data.image_size == 8, "data.image_size", data.image_size,
                "8 for the bundled digits; data.path names images of your own")
        batches = images.open_batches(data, config.sample.batch_size, tokenizer.image_channels, device)
        path = latents.cache_path(data.cache or f"{config.run}/latents", tokenizer, batches, data.flip)
        rank, size = world()
        latents.encode(tokenizer, batches, path, flip=data.flip, rank=rank, world=size)
    store = latents.LatentStore(path)
    store.check_tokenizer(tokenizer)
    require(store.shape[1] == config.latent_size, "data.image_size", data.image_size,
            f"{store.shape[1] * tokenizer.downsample}, of which {path} has latents")
    data.num_classes = data.num_classes or len(store.classes)
    require(len(store.classes) <= data.num_classes, "data.num_classes", data.num_classes,
            f"at least {len(store.classes)}, the classes of the data")
    return store.resident(data.resident, device).split(data.val_fraction, generator_for(config.seed, "validation split"))


def set_lr(optimizer, step, config, factor=1.0):
    """Sets and returns the learning rate of update `step` (0-based)."""
    settings = config.optim
    lr = factor * optim.lr_at(step, lr=settings.lr, steps=config.steps, warmup=settings.warmup, schedule=settings.schedule,
                              final_lr_fraction=settings.final_lr_fraction)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def share(n):
    """This process's slice of n rows."""
    rank, size = world()
    return slice(n * rank // size, n * (rank + 1) // size)


def draw_batch(config, tokenizer, moments, y, step, device, part):
    """The inputs of update `step` (0-based): {"x1": normalised latents, "x0": noise (b, C, S, S), "t": times, "y", "drop_labels" (b,)}.

    Args: moments, y: of the images of `part`, the slice of the global batch to draw.
    """
    B, settings = config.batch_size, config.flow
    generator = generator_for(config.seed, "noise", step, device=device)
    shape = (B, config.tokenizer.latent_channels, config.latent_size, config.latent_size)
    raw = latents.draw(moments, torch.randn(shape, generator=generator, device=device)[part])
    x0 = torch.randn(shape, generator=generator, device=device)[part]
    low, high = flow.integration_interval(settings.path, settings.prediction, mode="train", train_eps=settings.train_eps)
    t = flow.sample_timesteps(B, distribution=flow.timestep_distribution_at(step, settings.time, settings.time_switch_step),
                              mean=settings.time_mean, std=settings.time_std, shift=settings.time_shift, low=low, high=high,
                              generator=generator)[part]
    drop = torch.rand(B, generator=generator, device=device)[part] < config.model.class_dropout_prob
    return dict(x1=tokenizer.normalise(raw), x0=x0, t=t, y=y, drop_labels=drop)


def redraw_batch(config, tokenizer, store, step, device):
    """The whole global batch of update `step` (0-based) once more, for whoever wants to look at it: as draw_batch, and "indices" (B,)."""
    indices = latents.batch_indices(step, config.batch_size, len(store), config.seed)
    views = latents.batch_views(step, config.batch_size, len(store), store.views, config.seed) if config.data.flip else 0
    moments, y = store.gather(indices, views).to(device), store.labels[indices].to(device)
    return draw_batch(config, tokenizer, moments, y, step, device, slice(None)) | dict(indices=indices)


def micro_batches(config, batch):
    """The batch in parts, each one forward and backward pass of this process."""
    own = len(batch["t"])
    micro = min(config.micro_batch or own, own)
    return [{name: tensor[start : start + micro] for name, tensor in batch.items()} for start in range(0, own, micro)]


def losses(config, model, autocast, x1, x0, t, y, drop_labels, guide=None):
    """Per-image loss terms {"mse": (b,), "cos": (b,)} in fp32; the training loss is the sum of their means.

    Args: guide: the average weights' model, where model guidance acts: one pass of 2b rows more, without gradients.
    """
    settings, guidance = config.flow, None
    x_t, _ = flow.interpolate(x1, x0, t, settings.path)
    if guide is not None:
        with torch.no_grad(), autocast:
            both = guide(x_t.repeat(2, 1, 1, 1), t.repeat(2), torch.cat([y, torch.full_like(y, config.data.num_classes)]))
        guidance = flow.model_guidance(*both.chunk(2), t, settings.model_guidance, settings.model_guidance_interval, drop_labels)
    with autocast:
        prediction = model(x_t, t, y, drop_labels)
    return flow.losses(prediction, x1, x0, t, path=settings.path, prediction=settings.prediction, weight=settings.loss_weight,
                       cosine=settings.cosine_loss, guidance=guidance)


def over_processes(values):
    """{name: scalar} summed over the processes, by one small message."""
    if not dist.is_initialized():
        return values
    total = torch.stack(list(values.values()))
    dist.all_reduce(total)
    return dict(zip(values, total, strict=True))


@torch.no_grad()
def validate(config, model, tokenizer, val_set, autocast, device, most=2048):
    """Mean losses of the EMA weights on held-out images at fixed (t, noise) pairs, t uniform, so that curves of recipes compare."""
    count, size = min(most, len(val_set)), config.sample.batch_size
    starts, (rank, processes) = range(0, count, size), world()
    totals = {}
    for i in range(-(-len(starts) // processes)):  # as many passes on every process, which a sharded model needs
        mine = rank + i * processes < len(starts)
        start = starts[rank + i * processes] if mine else starts[0]
        indices = torch.arange(start, min(start + size, count))
        generator = generator_for("validation", start)
        shape = (len(indices), config.tokenizer.latent_channels, config.latent_size, config.latent_size)
        raw, y = latents.draw(val_set.gather(indices).to(device), torch.zeros(shape, device=device)), val_set.labels[indices].to(device)
        x0 = torch.randn(shape, generator=generator).to(device)
        t = torch.rand(len(indices), generator=generator).clamp(1e-3, 1 - 1e-3).to(device)
        keep_labels = torch.zeros_like(y, dtype=torch.bool)
        for name, term in losses(config, model, autocast, tokenizer.normalise(raw), x0, t, y, keep_labels).items():
            totals[f"val_{name}"] = totals.get(f"val_{name}", 0) + term.sum() * mine
    return {name: float(total) / count for name, total in over_processes(totals).items()}


def draw_images(config, model, tokenizer, labels, seeds, autocast, device):
    """(n, H, W, C) uint8 images of the given labels on every process, each of which draws its share of them.

    Image i depends on seeds[i] and labels[i] only.
    """
    rank, processes = world()
    rows = -(-len(labels) // processes)
    mine = [min(i, len(labels) - 1) for i in range(rank * rows, (rank + 1) * rows)]  # equally many each: a sharded model needs that
    with autocast:
        images = sampler.sample_images(model, tokenizer, labels=[int(labels[i]) for i in mine], seeds=[seeds[i] for i in mine],
                                       device=device, **config.sampling_arguments())
    if not dist.is_initialized():
        return images
    images = images.to(device)
    gathered = [torch.empty_like(images) for _ in range(processes)]
    dist.all_gather(gathered, images)
    return torch.cat(gathered)[: len(labels)].cpu()


def grid_path(run, step):
    return run / "samples" / f"step_{step:07d}.png"


def save_samples(config, model, tokenizer, path, autocast, device):
    """Draws, saves and returns the grid of fixed seeds and labels: a column a class where there are few, else spread over all classes."""
    n, classes = config.sample_num, config.data.num_classes
    labels = torch.arange(n) % classes if classes <= n else torch.arange(n) * classes // n
    pixels = draw_images(config, model, tokenizer, labels, range(config.sample.seed, config.sample.seed + n), autocast, device)
    picture = image_grid(pixels, columns=classes if classes <= 16 else None)
    if world()[0] == 0:
        save_png(picture, path)
    return picture


def score_digits(config, model, tokenizer, autocast, device):
    """Part of generated digits that a classifier trained on the real ones takes for the digit that was asked for."""
    labels = torch.arange(config.final_samples) % 10
    generated = draw_images(config, model, tokenizer, labels, range(10_000, 10_000 + config.final_samples), autocast, device)
    return metrics.classifier_accuracy(generated, labels, *images.digits())
