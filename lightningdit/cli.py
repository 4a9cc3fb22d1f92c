"""The `lightningdit` command: using a trained model.

    lightningdit sample --checkpoint runs/digits --classes 3,7 --seed 0 --num 16 --out grid.png
    lightningdit sample --checkpoint runs/xl --num 50000 --out samples.npz
    torchrun --nproc-per-node 8 --no-python -- lightningdit sample --checkpoint runs/xl --num 50000 --out samples.npz
    lightningdit tune-guidance --checkpoint runs/digits --out runs/digits/tuning
    lightningdit demo --checkpoint runs/digits
    lightningdit export --checkpoint runs/digits --out digits.pt
    lightningdit export-tokenizer --tokenizer vavae.pt --statistics latents_stats.pt --out vavae
    lightningdit evaluate tokenizer --tokenizer digits
    lightningdit evaluate samples --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    lightningdit latents map STORE --out map.png; also: latents verify, export, import
    lightningdit replay --incident runs/xl/incidents/step_0000123.safetensors
"""
import sys
from typing import Annotated, Any, Literal, Union

import torch

from . import config as configuration
from . import latent_tools
from .checkpoint import load_weights, save_weights, state_sha256
from .demo import demo
from .distributed import check_compiler, pick_device, process_group, world
from .evaluation import evaluate_samples, evaluate_tokenizer
from .generation import generate, make_labels, output_format
from .log import image_grid, save_png
from .optional import optional
from .pictures import class_interpolation, denoising_strip, guidance_sweep, seed_interpolation
from .replay import replay
from .sampler import Prepared, sample_images
from .sampler import sample as draw
from .tokenizer.vavae import load_tokenizer
from .trained import load_guide, load_run, parse_classes
from .tuning import tune_guidance


def sample(
    checkpoint: str,
    classes: str = "",
    seed: int = 0,
    num: int = 16,
    out: str = "samples.png",
    format: str | None = None,
    labels: str = "balanced",
    show: Literal["images", "strip", "guidance", "seeds", "classes"] = "images",
    columns: int = 8,
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 5.0, 8.0),
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    guidance_channels: int | None = None,
    guidance_rescale: float | None = None,
    guide: str | None = None,
    num_steps: int | None = None,
    shift: float | None = None,
    method: str | None = None,
    batch_size: int | None = None,
    shard_size: int = 256,
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    compile: bool = False,
    device: str = "auto",
    config: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Draws images: a grid, or any number of them into files. Image i depends on seed + i and its class only, whatever else is drawn.

    Files are written in shards; the same command, killed or out of disk space, goes on where it stopped. Under torchrun all processes
    share the work, and the images are those of one process.

    Args:
        checkpoint: a run directory or one of its checkpoints; or official weights (.pt, .safetensors) with --config and --tokenizer.
        classes: class numbers or names, separated by commas; empty: all of them.
        seed: seed of the first image; the next has the next.
        num: number of images.
        out: a .png is a grid. An .npz (ADM's, with labels in arr_1) or .zip (PNG files and dataset.json) holds all images; any other name
            is a folder.
        format: of a folder: png, npz or zip, the last two one file a shard. Default: png.
        labels: balanced (the classes in turn), random (by the seed), or a file of them: .npy, or text with one number a line.
        show: of a grid: images; strip (of each image x_t and the data predicted from it, over time); guidance (each image at several
            scales); seeds (from one image's noise to that of the next seed); classes (from its class to that of the next image).
        columns: of strip, seeds and classes.
        scales: of guidance.
        guidance_scale: this and the next ones up to batch_size: instead of what the run's configuration says.
        guidance_interval: from and to which time guidance acts.
        guidance_channels: so many leading latent channels are guided; 0: all.
        guidance_rescale: 0 to 1, how far guided outputs get the standard deviation of the conditional ones.
        guide: autoguidance: a run, or a checkpoint of one, that takes the place of the unconditional output; smaller, or earlier.
        num_steps: intervals of the time grid.
        shift: time shift.
        method: euler, heun, midpoint, dopri5, ab2, dpmpp_2m, unipc, sde_euler or sde_heun.
        batch_size: images at once.
        shard_size: images a shard.
        precision: instead of the configuration's.
        compile: torch.compile; on CUDA with CUDA graphs. For files.
        device: auto, cpu or cuda.
        config: a recipe, where the checkpoint is not a run.
        tokenizer: a tokenizer file, a folder of diffusers, or "digits", where the checkpoint is not a run.
    """
    configuration.require(num > 0, "num", num, "a positive number of images")
    grid, (rank, ranks) = out.endswith(".png"), world()
    if grid:
        configuration.require(columns > 1, "columns", columns, "at least 2")
        configuration.require(format is None, "format", format, "none for a grid, or a folder, .npz or .zip for --out")
        configuration.require(ranks == 1, "out", out, f"a folder, .npz or .zip for {ranks} processes; one process draws a grid")
    else:
        configuration.require(show == "images", "show", show, f"images for {out}; pictures need an --out that ends in .png")
        output_format(out, format)
    with process_group(pick_device(device)) as device:
        if compile:
            check_compiler(device)
        settings, model, decoder, names = load_run(checkpoint, config, tokenizer, device)
        changes = dict(guidance_scale=guidance_scale, guidance_interval=guidance_interval, guidance_channels=guidance_channels or None,
                       guidance_rescale=guidance_rescale, num_steps=num_steps, shift=shift, method=method, batch_size=batch_size)
        for name, value in changes.items():
            if value is not None or name == "guidance_channels" and guidance_channels == 0:
                setattr(settings.sample, name, value)
        settings.precision = precision or settings.precision
        settings.sample.validate(), settings.validate()
        chosen = parse_classes(classes, settings.data.num_classes, names)
        drawn = make_labels(labels, num, chosen, seed)
        arguments = settings.sampling_arguments()
        weak = load_guide(guide, settings, decoder, tokenizer, device) if guide else None
        bf16 = settings.use_bf16(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            if grid:
                chosen_images = dict(labels=drawn.tolist(), seeds=range(seed, seed + num), device=device, guide=weak, **arguments)
                if show == "images":
                    images = sample_images(model, decoder, progress=True, **chosen_images)
                    row = len(chosen) if labels == "balanced" and 1 < len(chosen) <= 16 else None
                else:
                    draws = dict(strip=denoising_strip, seeds=seed_interpolation, classes=class_interpolation)
                    if show == "guidance":
                        images = guidance_sweep(model, decoder, scales=scales, **chosen_images)
                    else:
                        images = draws[show](model, decoder, columns=columns, **chosen_images)
                    row, images = images.shape[1], images.flatten(0, 1)
                save_png(image_grid(images, columns=row), out)
            else:
                plan = arguments | dict(checkpoint=state_sha256(model.state_dict()), guide=weak and state_sha256(weak.state_dict()),
                                        tokenizer=decoder.sha256, device=device.type, bf16=bf16, compile=compile)
                if device.type == "cpu":
                    del plan["batch_size"]  # elsewhere batches of other shapes round differently
                ready = dict(batch_size=arguments["batch_size"], num_steps=arguments["num_steps"], device=device, compile=compile,
                             autocast=torch.bfloat16 if bf16 else None, fixed_times=arguments["method"] != "dopri5")
                guided = arguments["guidance_scale"] != 1
                model = Prepared(model, drawn, settings.data.num_classes, guided=guided and not guide, **ready)
                weak = weak and Prepared(weak, drawn, settings.data.num_classes, guided=False, **ready)
                whole_batch = arguments | dict(device=device, guide=weak, batch_size=None)
                generate(lambda labels, seeds: draw(model, labels=labels, seeds=seeds, **whole_batch),
                         decoder.decode_uint8, out, drawn, seed=seed, plan=plan, format=format, batch_size=arguments["batch_size"],
                         shape=(settings.data.image_size, settings.data.image_size, decoder.image_channels), shard_size=shard_size,
                         device=device, rank=rank, world=ranks, progress=rank == 0)
    if rank == 0:
        listed = ", ".join(names[c] if names else str(c) for c in chosen[:20]) + (", ..." if len(chosen) > 20 else "")
        print(f"{num} images of classes {listed} in {out}")
    return 0


def export(checkpoint: str, out: str) -> int:
    """Writes the weights of a run as one file in the official layout.

    Args:
        checkpoint: a run directory or one of its checkpoints.
        out: a name in .pt ({"model", "ema"}, what the official code loads) or .safetensors (the EMA weights).
    """
    state, ema = (load_weights(checkpoint, entry) for entry in ("model", "ema"))
    save_weights(out, state, ema)
    print(f"{sum(tensor.numel() for tensor in ema.values()) / 1e6:.2f} M values in {out}")
    return 0


def export_tokenizer(tokenizer: str, out: str, preset: str | None = None, statistics: str | None = None) -> int:
    """Rewrites a tokenizer: for this library, or for diffusers.

    Args:
        tokenizer: "digits", a .safetensors file of this library, an official VA-VAE, LDM or MAR checkpoint, or a folder of diffusers.
        out: a name in .safetensors, for this library; any other is a folder that diffusers.AutoencoderKL.from_pretrained reads.
        preset: architecture of an official checkpoint, such as f16d32 or mar-f16d16; not given: what the weights' shapes say.
        statistics: a latents_stats.pt, or the number that latents are multiplied by; official checkpoints need it.
    """
    try:
        statistics = float(statistics) if statistics is not None else None
    except ValueError:
        pass  # a file
    loaded = load_tokenizer(tokenizer, preset=preset, statistics=statistics)
    (loaded.save if out.endswith(".safetensors") else loaded.save_diffusers)(out)
    print(f"latents {loaded.downsample}x smaller of {loaded.latent_channels} channels, SHA-256 {loaded.sha256}, in {out}")
    return 0


def union(commands):
    """The type that tyro reads as a choice of commands: {name: function, or (description, {name: function})}."""
    with optional("the command line"):
        import tyro

    choices = []
    for name, command in commands.items():
        description = None
        if isinstance(command, tuple):
            description, command = command[0], union(command[1])
        choices.append(Annotated[Any, tyro.conf.subcommand(name, constructor=command, description=description)])
    return Union[tuple(choices)]  # noqa: UP007  made of a list


COMMANDS = {
    "sample": sample, "tune-guidance": tune_guidance, "demo": demo, "replay": replay,
    "export": export, "export-tokenizer": export_tokenizer,
    "evaluate": ("Measures a tokenizer or generated images.", dict(tokenizer=evaluate_tokenizer, samples=evaluate_samples)),
    "latents": (latent_tools.__doc__, latent_tools.COMMANDS),
}


def main(argv=None):
    try:
        with optional("the command line"):
            import tyro

        return tyro.cli(union(COMMANDS), args=argv, prog="lightningdit", description=__doc__)
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
