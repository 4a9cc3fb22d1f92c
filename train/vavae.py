"""Trains a tokenizer: a VA-VAE whose latents are aligned with the features of a frozen encoder.

    python train/vavae.py                                      # the digits that scikit-learn ships, minutes on a CPU; `make assets`
    python train/vavae.py --data.path photos --data.image-size 32 --data.channels 3           # own images: one folder a class, tar or zip
    torchrun --nproc-per-node 8 -- train/vavae.py --config train/configs/vavae_f16d32_dinov2.yaml --data.path imagenet
    python train/vavae.py --config train/configs/vavae_f16d32_dinov2.yaml --dry-run           # parameters, stages, memory

(a) The frozen encoder is a vision foundation model, or a small one that first learns the classes of the images. (b) The autoencoder learns
to reconstruct, with LPIPS, KL, the two margin losses against the encoder's features and a patch discriminator, in the stages that the
configuration lists. (c) The statistics of its latents are taken and saved with it: tokenizer.safetensors in the run directory.
The same command run again resumes. (The -- keeps torchrun from taking --run for its own --run-path.)

n images, B batch, C image channels, z latent channels, N tokens, F feature channels.
"""

import contextlib
import copy
import dataclasses
import sys
import time
from pathlib import Path

import torch

from lightningdit import checkpoint, metrics
from lightningdit import config as configuration
from lightningdit.config import VAVAEConfig, require
from lightningdit.distributed import (
    check_compiler,
    exit_code,
    generator_for,
    interruption,
    pick_device,
    process_group,
    seed_for,
    wait_for_all,
    world,
)
from lightningdit.images import digits, open_images, to_pixels
from lightningdit.log import RunLog, image_grid, principal_colours, save_png, write_environment
from lightningdit.optim import EMA, lr_at
from lightningdit.run import settle_precision
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.data import TokenizerImages
from lightningdit.tokenizer.foundation import SmallEncoder, load_encoder
from lightningdit.tokenizer.losses import LatentProjection, PatchDiscriminator, perceptual_loss
from lightningdit.tokenizer.training import CachedFeatures, Networks, activation_bytes, backward, train_classifier, update
from lightningdit.tokenizer.vavae import Tokenizer, latent_statistics

RECIPE = Path(__file__).parent / "configs" / "vavae_digits.yaml"
# What may change between a run and its resumption; anything else would make it another run.
MAY_CHANGE = (
    "run", "tokenizer_out", "encoder_out", "steps", "compile", "device", "log_every", "checkpoint_every", "keep_checkpoints",
    "sample_every", "sample_num", "statistics_images", "data.path", "data.val_path", "data.in_memory", "data.workers", "data.num_images",
    "encoder.weights", "encoder.cache", "loss.perceptual_weights",
    "precision",  # settle_precision has compared it
)


def main(argv):
    config = configuration.parse(VAVAEConfig, [a for a in argv if a != "--dry-run"], recipe=RECIPE, description=__doc__)
    device = pick_device(config.device)
    if "--dry-run" in argv:
        return print_plan(config, device)
    if config.compile:
        check_compiler(device)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    with process_group(device) as device:
        precision = settle_precision(config, device)
        if world()[0] == 0:
            print(precision)
        return train(config, device)


def train(config, device):
    since, (rank, ranks) = time.perf_counter(), world()
    images = {name: value for name, value in dataclasses.asdict(config.data).items() if name != "num_images"}
    data = TokenizerImages(**images, device=device, seed=config.seed, progress=rank == 0)
    stages = config.plan(len(data))
    run = open_run(config, device)
    encoder = frozen_encoder(config, data, run, device) if config.aligned else None
    features = CachedFeatures(encoder, len(data)) if config.encoder.cache else lambda pixels, _: encoder.features(pixels)
    nets = build_networks(config, encoder, device)
    average = EMA(nets.autoencoder, config.optim.ema, warmup=True) if config.optim.ema else None
    trained = nets.autoencoder if average is None else average.model
    optimizers = [torch.optim.Adam(module.parameters(), betas=config.optim.betas, fused=True) for _, module in nets.trained()]
    start = resume(run, nets, optimizers, average)
    if config.compile:
        nets.compile()

    steps, c, size = stages[-1].end, config.loss, config.batch_size
    log = RunLog(run, start, steps, config.log_every, size, 0, rank, config.keep_checkpoints)
    log.say(f"{run}: {nets}, {len(data)} images, {ranks} x {device}, {'bf16' if nets.bf16 else 'fp32'}"
            f"{', compiled' if config.compile else ''}, {f'resuming at step {start}' if start else 'from the beginning'}")
    with interruption() as interrupted, contextlib.closing(log):
        batches = data.batches(size, config.seed, start, rank, ranks)
        for done in range(start + 1, steps + 1):  # updates done at the end of the iteration
            images, _, indices = next(batches)  # this process's share of the batch
            stage = next(stage for stage in stages if done <= stage.end)
            if done == stage.start + 1 and len(stages) > 1:
                log.say(f"step {stage.start}: stage {stages.index(stage) + 1} of {len(stages)}, {stage}")
            pixels = to_pixels(images).to(device)
            noise = torch.randn((size, config.autoencoder.z_channels, config.grid, config.grid), device=device,
                                generator=generator_for(config.seed, "posterior", done - 1, device=device))[rank::ranks]
            values = backward(
                nets, pixels, noise, features(pixels, indices) if stage.vf_weight else None, micro_batch=config.micro_batch,
                adversarial=done > stage.disc_start, kl_weight=c.kl_weight, perceptual_weight=c.perceptual_weight,
                vf_weight=stage.vf_weight, adaptive_vf=c.adaptive_vf, cos_margin=stage.cos_margin, distmat_margin=stage.distmat_margin,
                disc_weight=c.disc_weight)
            lr = lr_at(done - 1, lr=stage.lr, steps=steps, warmup=config.optim.warmup, schedule=config.optim.schedule)
            for optimizer in optimizers:
                update(optimizer, lr)
            if average is not None:
                average.update(done - 1)
            log.step(done, lr, values)

            end = done == steps
            due = done % config.log_every == 0 or done % config.checkpoint_every == 0
            stopped_by = interrupted(done)
            stop = end or bool(stopped_by)
            if due or stop:
                log.stop_if_not_finite(done, "A lower optim.lr or a longer optim.warmup may help")
            if rank == 0 and (done % config.sample_every == 0 or end):
                pictures = draw(config, trained, encoder, data, device)
                for name, picture in pictures.items():
                    save_png(picture, run / "samples" / f"{name}_{done:07d}.png")
                    log.image(done, name, picture)
            if done % config.checkpoint_every == 0 or stop:
                ema = {} if average is None else dict(ema=trained.state_dict())
                log.checkpoint(done, nets.tensors(optimizers) | ema, {}, last=stop)
            if stop and not end:
                log.say(f"interrupted: step {done} is saved in {run}; the same command goes on from there")
                return exit_code(stopped_by)
        results = finish(config, trained, encoder, data, run, steps, log, device) if rank == 0 else ()
    for name, value in results:
        print(f"{name:30} {value}")
    if rank == 0:
        print(f"{'time':30} {time.perf_counter() - since:.0f} s")
    return 0


def open_run(config, device):
    """Makes the run directory, or checks that the one there belongs to this configuration."""
    run, (rank, ranks) = Path(config.run), world()
    require(config.batch_size % ranks == 0, "batch_size", config.batch_size, f"a multiple of the {ranks} processes")
    share = config.batch_size // ranks
    require(config.micro_batch is None or share % config.micro_batch == 0, "micro_batch", config.micro_batch,
            f"a divisor of the {share} images of one process")
    if (run / "config.yaml").is_file():
        before = configuration.load(VAVAEConfig, run / "config.yaml")
        if changes := configuration.differences(before, config, ignore=MAY_CHANGE):
            raise configuration.ConfigError(f"run: {run} holds a run of another configuration; choose another --run, or undo\n  "
                                            + "\n  ".join(changes))
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        write_environment(run, device)
        configuration.save(config, run / "config.yaml")
    wait_for_all()
    return run


def frozen_encoder(config, data, run, device):
    """The foundation model, or the small encoder of this run: trained by the first process, and only once."""
    c = config.encoder
    if c.name is not None:
        torch.manual_seed(seed_for(config.seed, "foundation"))  # for weights: random
        small = c.name == "digits" or c.name.endswith(".safetensors")
        options = {} if small else dict(weights=c.weights, normalisation=c.normalisation, layer=c.layer, compile=config.compile,
                                        dtype=torch.bfloat16 if config.use_bf16(device) else torch.float32)
        return load_encoder(c.name, image_size=config.data.image_size, grid=config.grid, device=device, **options)
    path = run / "encoder.safetensors"
    if world()[0] == 0 and not path.is_file():
        torch.manual_seed(seed_for(config.seed, "encoder"))
        encoder = SmallEncoder(config.data.channels, len(data.classes), config.autoencoder.downsample, c.width).to(device)
        state = run / "encoder_state.pt"  # a run of real images may be killed in here, too
        train_classifier(encoder, lambda start: data.batches(min(c.batch_size, len(data)), seed_for(config.seed, "encoder"), start),
                         steps=c.steps, lr=c.lr, translate=c.shift, seed=config.seed, log_every=config.log_every, state=state)
        for out in {path, Path(config.encoder_out or path)}:
            encoder.save(out, dict(data=config.data.path or "scikit-learn digits", images=len(data), seed=config.seed))
        state.unlink(missing_ok=True)
    wait_for_all()
    return SmallEncoder.load(path, device)


def build_networks(config, encoder, device):
    c = config.loss
    torch.manual_seed(seed_for(config.seed, "autoencoder"))
    autoencoder = AutoencoderKL(**config.autoencoder_arguments())
    projection = LatentProjection(config.autoencoder.z_channels, encoder.feature_channels) if encoder is not None else None
    torch.manual_seed(seed_for(config.seed, "discriminator"))
    discriminator = PatchDiscriminator(config.data.channels, c.disc_width, c.disc_layers) if c.disc_weight else None
    perceptual = perceptual_loss(c.perceptual_weights, c.perceptual_net, c.perceptual_random_weights) if c.perceptual_weight else None
    return Networks(autoencoder, projection, discriminator, perceptual, device=device, bf16=config.use_bf16(device),
                    channels_last=config.channels_last is not False)


def resume(run, nets, optimizers, average):
    """Loads the newest undamaged checkpoint; returns the number of updates done, 0 without one."""
    found = checkpoint.latest_checkpoint(run)
    if found is None:
        return 0
    path, state = found
    nets.restore(path, optimizers)
    if average is not None:
        average.model.load_state_dict(checkpoint.load_tensors(path, "ema"))
    return state["step"]


def finish(config, autoencoder, encoder, data, run, steps, log, device):
    """Statistics of the latents, the tokenizer's file, and what it does to the held-out images: [(name, value)] of all that."""
    raw = draw_latents(autoencoder, data.sample(config.statistics_images, eval_batch(config), config.seed), config.seed, device)
    tokenizer = Tokenizer(autoencoder, *latent_statistics(raw)).to(device)
    report = evaluate(config, tokenizer, encoder, data, device)
    log.event(steps, **report)
    about = dict(data=config.data.path or "scikit-learn digits", images=len(data), seed=config.seed, steps=steps)
    tokenizer.provenance = about | report
    path = Path(config.tokenizer_out or run / "tokenizer.safetensors")
    tokenizer.save(path)
    about = dict(tokenizer=path, pictures=run / "samples", latents=f"{tokenizer.downsample}x smaller, {tokenizer.latent_channels} channels")
    return [*about.items(), ("measured on", f"{len(data.held_out[1])} held-out images"), *report.items()]


def eval_batch(config):
    """Images a batch without gradients: 2**18 pixels, at most 256 images."""
    return max(1, min(256, 2**18 // config.data.image_size**2))


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # batches of other sizes than the training's
def encode(autoencoder, batches, device):
    """The posteriors of batches of uint8 images."""
    return [autoencoder.encode(to_pixels(batch).to(device)) for batch in batches]


def draw_latents(autoencoder, batches, seed, device):
    """One posterior sample an image: raw latents (n, z, h, w)."""
    generator = generator_for(seed, "statistics", device=device)
    return torch.cat([encode(autoencoder, [batch], device)[0].sample(generator).cpu() for batch in batches])


@torch.no_grad()
@torch.compiler.set_stance("force_eager")
def decode(config, tokenizer, normalised, device):
    return torch.cat([tokenizer.decode_uint8(batch.to(device)).cpu() for batch in normalised.split(eval_batch(config))])


def evaluate(config, tokenizer, encoder, data, device):
    """Reconstruction, latents and recognisability of the held-out images."""
    images, labels = data.held_out
    posteriors = encode(tokenizer, images.split(eval_batch(config)), device)
    normalised = torch.cat([tokenizer.normalise(p.mean).cpu() for p in posteriors])
    spread = torch.cat([(p.std / tokenizer.latent_std).cpu() for p in posteriors])
    reconstructions = decode(config, tokenizer, normalised, device)

    def rounded(values):
        return [round(value, 3) for value in values.tolist()]

    report = dict(psnr_db=round(metrics.psnr(images, reconstructions).mean().item(), 2), latent_mean=rounded(normalised.mean((0, 2, 3))),
                  latent_std=rounded(normalised.std((0, 2, 3))), posterior_std=rounded(spread.mean((0, 2, 3))))
    if isinstance(encoder, SmallEncoder) and data.same_classes:
        with torch.no_grad():
            predicted = torch.cat([encoder(to_pixels(batch).to(device)).argmax(1).cpu() for batch in images.split(eval_batch(config))])
        report["encoder_accuracy"] = round((predicted == labels).float().mean().item(), 4)
    if config.data.path is None:  # kernel regression on pixels suits digits only
        noise = torch.randn(normalised.shape, generator=generator_for(config.seed, "noise"))
        for name, pictures in dict(originals=images, reconstructions=reconstructions,
                                   latent_noise_03=decode(config, tokenizer, normalised + 0.3 * noise, device)).items():
            report[f"classifier_{name}"] = round(metrics.classifier_accuracy(pictures, labels, data.images, data.labels), 4)
    return report


def draw(config, autoencoder, encoder, data, device):
    """Pictures of held-out images, a column each. reconstructions: originals, reconstructions, and reconstructions from latents with noise
    of 0.3 standard deviations. latent_map: originals, then the first three principal components of encoder features and of latents."""
    images, labels = data.held_out
    images = images[labels.argsort(stable=True)[torch.linspace(0, len(labels) - 1, min(config.sample_num, len(labels))).long()]]
    raw = torch.cat([posterior.mean for posterior in encode(autoencoder, images.split(eval_batch(config)), device)]).cpu()
    tokenizer = Tokenizer(copy.deepcopy(autoencoder), *latent_statistics(raw))
    normalised = tokenizer.normalise(raw.to(device)).cpu()
    noise = torch.randn(normalised.shape, generator=generator_for(config.seed, "noise"))
    rows = torch.cat([images, decode(config, tokenizer, normalised, device), decode(config, tokenizer, normalised + 0.3 * noise, device)])
    maps = [normalised]
    if encoder is not None:
        features = [encoder.features(to_pixels(batch).to(device)).float().cpu() for batch in images.split(eval_batch(config))]
        maps.insert(0, torch.cat(features).mT.unflatten(2, normalised.shape[2:]))
    f = tokenizer.downsample
    colours = [principal_colours(x).repeat_interleave(f, 1).repeat_interleave(f, 2) for x in maps]
    return {name: image_grid(tiles, columns=len(images))
            for name, tiles in dict(reconstructions=rows, latent_map=torch.cat([images.expand(-1, -1, -1, 3), *colours])).items()}


def print_plan(config, device):
    """--dry-run: what this configuration would cost, from shapes alone."""
    data, c = config.data, config.loss
    images = len(open_images(data.path)) if data.path else data.num_images or len(digits()[1])
    images = int(images * (1 - (0 if data.val_path else data.val_fraction)))
    stages, an_epoch = config.plan(images), images / config.batch_size
    with torch.device("meta"):
        autoencoder = AutoencoderKL(**config.autoencoder_arguments())
        discriminator = PatchDiscriminator(data.channels, c.disc_width, c.disc_layers) if c.disc_weight else None
    perceptual = perceptual_loss(net=c.perceptual_net, random_weights=True) if c.perceptual_weight else None
    nets = Networks(autoencoder, None, discriminator, perceptual, device="meta", bf16=config.use_bf16(device))
    for name, module in dict(autoencoder=autoencoder, discriminator=discriminator, LPIPS=perceptual).items():
        if module is not None:
            print(f"parameters        {sum(p.numel() for p in module.parameters()) / 1e6:9.2f} M    {name}")
    print(f"latents           {config.grid} x {config.grid} of {config.autoencoder.z_channels} channels")
    print(f"steps an epoch    {an_epoch:.1f} of {config.batch_size} images")
    for number, s in enumerate(stages, 1):
        begins = f"discriminator from step {s.disc_start + 1}" if s.disc_start < s.end else "no discriminator"
        print(f"stage {number}           steps {s.start + 1} to {s.end}, {(s.end - s.start) / an_epoch:.1f} epochs: "
              f"vf_weight {s.vf_weight}, margins {s.cos_margin} / {s.distmat_margin}, lr {s.lr}, {begins}")
    micro = config.micro_batch or config.batch_size // world()[1]
    memory = {"weights, gradients, Adam": 16 * sum(p.numel() for _, module in nets.trained() for p in module.parameters()),
              "EMA": 4 * sum(p.numel() for p in autoencoder.parameters()) if config.optim.ema else 0}
    for name, size in activation_bytes(nets, data.image_size, data.channels).items():
        memory[f"activations of {micro} images, {name}"] = micro * size
    for name, size in memory.items():
        print(f"memory            {size / 2**30:9.3f} GiB  {name}")
    print(f"memory            {sum(memory.values()) / 2**30:9.3f} GiB  estimated in all, {'bf16' if nets.bf16 else 'fp32'}, "
          "without the frozen encoder")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:  # before the first step, or a second Ctrl-C: the last checkpoint stands
        print("interrupted", file=sys.stderr)
        sys.exit(130)
