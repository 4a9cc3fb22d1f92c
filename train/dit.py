"""Trains a LightningDiT on the latents of a folder of images, or of the bundled digits, and shows what it draws.

    python train/dit.py --compile                                   # the embedded default: handwritten digits, minutes on a CPU
    python train/dit.py --data.path photos --config my_recipe.yaml  # own images: one folder a class
    python train/dit.py --data.path STORE --config my_recipe.yaml   # latents that train/encode.py made
    python train/dit.py --config train/configs/lightningdit_xl_64ep.yaml --dry-run

The same command run again resumes. B global batch, C latent channels, S latent positions a side.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path

# Before torch loads OpenMP: its threads give the core up after some microseconds of waiting for each other instead of milliseconds. On
# two cores shared with other programs the digits train 4 times faster so (87 -> 316 images/s), alone 7 % slower (1731 -> 1613):
# bench/results/spin_cpu.json.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from lightningdit import checkpoint, flow, images, latents, metrics, optim, sampler
from lightningdit.config import ConfigError, DiTConfig, differences, load, parse, require, save
from lightningdit.distributed import check_compiler, generator_for, pick_device, world
from lightningdit.log import RunLog, image_grid, plot_losses, save_png, write_environment
from lightningdit.model import LightningDiT, forward_flops, training_memory
from lightningdit.tokenizer.vavae import Tokenizer

RECIPE = Path(__file__).parent / "configs" / "digits.yaml"
# What may change between a run and its resumption; anything else would make it another run.
MAY_CHANGE = (
    "run", "steps", "micro_batch", "compile", "device", "log_every", "checkpoint_every", "keep_checkpoints", "sample_every", "sample_num",
    "validate_every", "final_samples", "sample", "data.path", "data.cache", "data.workers", "data.decoder", "data.num_images",
    "data.resident", "tokenizer.path",
)


def main(argv):
    dry_run = "--dry-run" in argv
    config = parse(DiTConfig, [a for a in argv if a != "--dry-run"], recipe=RECIPE, description=__doc__)
    require(world()[1] == 1, "WORLD_SIZE", world()[1], "1: training runs as one process for now")
    device = pick_device(config.device)
    if config.compile and not dry_run:
        check_compiler(device)
    if dry_run:
        return print_plan(config, device)

    # Data: images -> store of posterior moments of latents, once.
    tokenizer = load_tokenizer(config, device)
    run = open_run(config, tokenizer, device)
    train_set, val_set = load_latents(config, tokenizer, device)
    save(config, run / "config.yaml")

    # Model, optimizer, average; then the newest checkpoint over them.
    torch.manual_seed(config.seed)
    model = LightningDiT(**config.model_arguments()).to(device)
    if config.init is not None:
        model.load_weights(checkpoint.load_weights(config.init))
    average = optim.EMA(model, config.optim.ema, config.optim.ema_warmup)
    optimizer = optim.build_optimizer(model, config.optim.lr, config.optim.betas, config.optim.eps, config.optim.weight_decay)
    facts = dict(seed=config.seed, batch_size=config.batch_size, model=config.model_arguments(), classes=train_set.classes,
                 tokenizer=tokenizer.sha256, data=train_set.plan["data"], image_size=config.data.image_size)
    start = saved = resume(run, model, average.model, optimizer, facts)
    if config.compile:
        for block in model.blocks:  # one block's graph serves all of them: compile time does not grow with depth
            block.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.use_bf16(device))

    log = RunLog(run, start, config.steps, config.log_every, config.batch_size, forward_flops(model))
    log.say(f"{run}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(train_set)} images, "
            f"{len(train_set.classes)} classes, {device}, {'bf16' if config.use_bf16(device) else 'fp32'}"
            f"{', compiled' if config.compile else ''}, {f'resuming at step {start}' if start else 'from the beginning'}")
    model.train()
    loader = latents.Loader(train_set, config.batch_size, seed=config.seed, start=start, flip=config.data.flip, device=device)
    with interruption() as interrupted, contextlib.closing(log), contextlib.closing(loader):
        for done in range(start + 1, config.steps + 1):  # updates done at the end of the iteration
            x1, x0, t, y, drop = draw_batch(config, tokenizer, *next(loader), done - 1, device)
            lr = set_lr(optimizer, done - 1, config)
            values = {}
            for part in micro_batches(config):
                terms = flow_losses(config, model, autocast, x1[part], x0[part], t[part], y[part], drop[part])
                terms = {name: term.sum() / config.batch_size for name, term in terms.items()}
                terms["loss"] = sum(terms.values())
                terms["loss"].backward()
                values = {name: values.get(name, 0) + term.detach() for name, term in terms.items()}
            values["grad_norm"] = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            if config.optim.clip_grad_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), config.optim.clip_grad_norm, values["grad_norm"])
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            average.update(done - 1)
            log.step(done, lr, values)

            end = done == config.steps
            stop = end or interrupted()
            if done % config.log_every == 0 or done % config.checkpoint_every == 0 or stop:
                log.stop_if_not_finite(done, saved, "A lower optim.lr, optim.clip_grad_norm or model.use_qknorm helps against it")
            if val_set is not None and (done % config.validate_every == 0 or end):
                log.event(done, **validate(config, average.model, tokenizer, val_set, autocast, device))
            if done % config.sample_every == 0 or end:
                log.image(done, "samples", save_samples(config, average.model, tokenizer, grid_path(run, done), autocast, device))
                plot_losses(run)
            if done % config.checkpoint_every == 0 or stop:
                saved = save_state(log, run, done, saved, config.keep_checkpoints, model, average.model, optimizer, facts, stop)
            if stop and not end:
                log.say(f"interrupted: step {done} is saved in {run}; the same command goes on from there")
                return 130

    print(f"grid of samples   {grid_path(run, config.steps)}\nloss curve        {run / 'loss.png'}")
    if config.data.path is None and config.final_samples:
        score_digits(config, average.model, tokenizer, autocast, device)
    return 0


def load_tokenizer(config, device):
    if config.tokenizer.path is None:
        raise ConfigError("tokenizer.path: got None, expected 'digits' (bundled) or a tokenizer file; train/vavae.py makes one")
    tokenizer = Tokenizer.load(config.tokenizer.path, device)
    for name, got in (("downsample", tokenizer.downsample), ("latent_channels", tokenizer.latent_channels)):
        require(got == getattr(config.tokenizer, name), f"tokenizer.{name}", getattr(config.tokenizer, name),
                f"{got}, which the file {config.tokenizer.path} has")
    return tokenizer


def load_latents(config, tokenizer, device):
    """(training set, held-out set or None): a store, or images encoded to one in the cache, once for each data set and tokenizer."""
    data, path = config.data, config.data.path
    if not latents.is_store(path):
        batches = images.open_batches(data, config.sample.batch_size, tokenizer.image_channels, device)
        path = latents.cache_path(data.cache or Path(config.run) / "latents", tokenizer, batches, data.flip)
        latents.encode(tokenizer, batches, path, flip=data.flip)
    store = latents.LatentStore(path)
    store.check_tokenizer(tokenizer)
    require(store.shape[1] == config.latent_size, "data.image_size", data.image_size,
            f"{store.shape[1] * tokenizer.downsample}, of which {path} has latents")
    data.num_classes = data.num_classes or len(store.classes)
    require(len(store.classes) <= data.num_classes, "data.num_classes", data.num_classes,
            f"at least {len(store.classes)}, the classes of the data")
    return store.resident(data.resident, device).split(data.val_fraction, generator_for(config.seed, "validation split"))


def open_run(config, tokenizer, device):
    """Makes the run directory, or checks that the one there belongs to this configuration and tokenizer."""
    run = Path(config.run)
    if (run / "config.yaml").is_file():
        before = load(DiTConfig, run / "config.yaml")
        config.data.num_classes = config.data.num_classes or before.data.num_classes
        if changes := differences(before, config, ignore=MAY_CHANGE):
            raise ConfigError(f"run: {run} holds a run of another configuration; choose another --run, or undo\n  " + "\n  ".join(changes))
        trained_on = Tokenizer.load(run / "tokenizer.safetensors").sha256
        require(tokenizer.sha256 == trained_on, "tokenizer.path", f"{config.tokenizer.path}, SHA-256 {tokenizer.sha256[:16]}...",
                f"the tokenizer that {run} was begun with, SHA-256 {trained_on[:16]}...")
    else:
        run.mkdir(parents=True, exist_ok=True)
        tokenizer.save(run / "tokenizer.safetensors")  # the run alone is enough to sample from
    write_environment(run, device)
    return run


def resume(run, model, average, optimizer, facts):
    """Loads the newest undamaged checkpoint; returns the number of updates done, 0 without one."""
    found = checkpoint.latest_checkpoint(run)
    if found is None:
        return 0
    path, state = found
    checkpoint.load_into(path, "model", model.state_dict())
    checkpoint.load_into(path, "ema", average.state_dict())
    checkpoint.load_trainer(path, model, optimizer)
    if state["data"] != facts["data"]:
        print(f"warning: the images have changed since {path} was saved, and with them the order of the data")
    return state["step"]


def save_state(log, run, step, saved, keep, model, average, optimizer, facts, last):
    """Saves a checkpoint and returns its step. A failed save is told and, unless it is the last, survived: the one before is whole."""
    tensors = dict(model=model.state_dict(), ema=average.state_dict(), trainer=checkpoint.trainer_tensors(model, optimizer))
    try:
        checkpoint.save_checkpoint(run, step, tensors, facts, keep)
        return step
    except OSError as error:
        before = f"the checkpoint of step {saved} is whole" if saved else "there is no earlier checkpoint"
        text = f"could not save step {step}: {error}; {before}"
        if last:
            raise SystemExit(f"error: {text}") from None
        log.event(step, error=text)
        log.say(f"warning: {text}; training goes on")
        return saved


def draw_batch(config, tokenizer, moments, y, step, device):
    """The inputs of update `step` (0-based): normalised latents x1, noise x0 (B, C, S, S), times t, labels y, label dropout (B,).

    Drawn for the whole global batch from (seed, step) alone.
    """
    B, settings = config.batch_size, config.flow
    generator = generator_for(config.seed, "noise", step, device=device)
    shape = (B, config.tokenizer.latent_channels, config.latent_size, config.latent_size)
    raw = latents.draw(moments, torch.randn(shape, generator=generator, device=device))
    x0 = torch.randn(shape, generator=generator, device=device)
    low, high = flow.integration_interval(settings.path, settings.prediction, mode="train", train_eps=settings.train_eps)
    t = flow.sample_timesteps(B, distribution=flow.timestep_distribution_at(step, settings.time, settings.time_switch_step),
                              mean=settings.time_mean, std=settings.time_std, shift=settings.time_shift, low=low, high=high,
                              generator=generator)
    drop = torch.rand(B, generator=generator, device=device) < config.model.class_dropout_prob
    return tokenizer.normalise(raw), x0, t, y, drop


def set_lr(optimizer, step, config):
    lr = optim.lr_at(step, lr=config.optim.lr, steps=config.steps, warmup=config.optim.warmup, schedule=config.optim.schedule,
                     final_lr_fraction=config.optim.final_lr_fraction)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def micro_batches(config):
    """Slices of the global batch, each one forward and backward pass."""
    micro = config.micro_batch or config.batch_size
    return [slice(start, start + micro) for start in range(0, config.batch_size, micro)]


def flow_losses(config, model, autocast, x1, x0, t, y, drop):
    """Per-image loss terms {"mse": (B,), "cos": (B,)} in fp32; the training loss is the sum of their means."""
    settings = config.flow
    x_t, _ = flow.interpolate(x1, x0, t, settings.path)
    with autocast:
        prediction = model(x_t, t, y, drop)
    return flow.losses(prediction, x1, x0, t, path=settings.path, prediction=settings.prediction, weight=settings.loss_weight,
                       cosine=settings.cosine_loss)


@torch.no_grad()
def validate(config, model, tokenizer, val_set, autocast, device, most=2048):
    """Mean losses of the EMA weights on held-out images at fixed (t, noise) pairs, t uniform, so that curves of recipes compare."""
    totals, count = {}, min(most, len(val_set))
    for start in range(0, count, config.sample.batch_size):
        indices = torch.arange(start, min(start + config.sample.batch_size, count))
        generator = generator_for("validation", start)
        shape = (len(indices), config.tokenizer.latent_channels, config.latent_size, config.latent_size)
        raw, y = latents.draw(val_set.gather(indices).to(device), torch.zeros(shape, device=device)), val_set.labels[indices].to(device)
        x0 = torch.randn(shape, generator=generator).to(device)
        t = torch.rand(len(indices), generator=generator).clamp(1e-3, 1 - 1e-3).to(device)
        keep_labels = torch.zeros_like(y, dtype=torch.bool)
        for name, term in flow_losses(config, model, autocast, tokenizer.normalise(raw), x0, t, y, keep_labels).items():
            totals[f"val_{name}"] = totals.get(f"val_{name}", 0) + term.sum()
    return {name: float(total) / count for name, total in totals.items()}


def draw_images(config, model, tokenizer, labels, seeds, autocast, device):
    """(n, H, W, C) uint8 images of the given labels; image i depends on seeds[i] and labels[i] only."""
    with autocast:
        return sampler.sample_images(model, tokenizer, labels=labels, seeds=seeds, device=device, **config.sampling_arguments())


def grid_path(run, step):
    return run / "samples" / f"step_{step:07d}.png"


def save_samples(config, model, tokenizer, path, autocast, device):
    """Draws, saves and returns the grid of fixed seeds and labels: a column a class where there are few, else spread over all classes."""
    n, classes = config.sample_num, config.data.num_classes
    labels = torch.arange(n) % classes if classes <= n else torch.arange(n) * classes // n
    pixels = draw_images(config, model, tokenizer, labels, range(config.sample.seed, config.sample.seed + n), autocast, device)
    picture = image_grid(pixels, columns=classes if classes <= 16 else None)
    save_png(picture, path)
    return picture


def score_digits(config, model, tokenizer, autocast, device):
    """Prints how many generated digits an SVC trained on the real ones takes for the digit that was asked for."""
    labels = torch.arange(config.final_samples) % 10
    generated = draw_images(config, model, tokenizer, labels, range(10_000, 10_000 + config.final_samples), autocast, device)
    accuracy = metrics.classifier_accuracy(generated, labels, *images.digits())
    print(f"digits recognised {accuracy:.1%} of {config.final_samples} generated digits are classified as the digit asked for "
          "(SVC trained on the real ones)")


@contextlib.contextmanager
def interruption():
    """Turns the first Ctrl-C into a flag that is asked for after each step; a second one stops at once."""
    asked = []

    def handle(number, frame):
        asked.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


def print_plan(config, device):
    """--dry-run: what this configuration would cost, from shapes alone."""
    data = config.data
    if latents.is_store(data.path):
        index = latents.read_index(data.path)
        counted, classes = index["images"], index["plan"]["classes"]
    else:
        source = images.open_batches(data, 1, 3).source
        counted, classes = len(source), source.classes
    num_images, data.num_classes = data.num_images or counted, data.num_classes or len(classes)
    with torch.device("meta"):
        model = LightningDiT(**config.model_arguments())
    bf16, micro, flops = config.use_bf16(device), config.micro_batch or config.batch_size, forward_flops(model)
    memory = training_memory(model, micro, bf16)
    steps = num_images * (1 - data.val_fraction) / config.batch_size
    print(f"parameters        {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    print(f"tokens an image   {model.pos_embed.shape[1]}")
    print(f"FLOPs an image    {flops / 1e9:.2f} G forward, {3 * flops / 1e9:.2f} G in training")
    for name, size in memory.items():
        print(f"memory            {size / 2**30:9.3f} GiB  {name}")
    print(f"memory            {sum(memory.values()) / 2**30:9.3f} GiB  estimated in all, {'bf16' if bf16 else 'fp32'}")
    print(f"steps an epoch    {steps:.1f} of {config.batch_size} images; {config.steps} steps are {config.steps / steps:.1f} epochs")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C: the last checkpoint stands
        print("interrupted", file=sys.stderr)
        sys.exit(130)
