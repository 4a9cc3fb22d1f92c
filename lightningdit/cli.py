"""The `lightningdit` command: using a trained model.

    lightningdit sample --checkpoint runs/digits --classes 3,7 --seed 0 --num 16 --out grid.png
    lightningdit export --checkpoint runs/digits --out digits.pt
    lightningdit export-tokenizer --tokenizer vavae.pt --statistics latents_stats.pt --out vavae
    lightningdit evaluate tokenizer --tokenizer digits
    lightningdit evaluate samples --images samples.npz --reference VIRTUAL_imagenet256_labeled.npz
    lightningdit latents map STORE --out map.png; also: latents verify, export, import
    lightningdit replay --incident runs/xl/incidents/step_0000123.safetensors
"""
import json
import sys
from pathlib import Path
from typing import Annotated, Any, Union

import torch
import tyro

from . import config as configuration
from . import latent_tools
from .checkpoint import NAME, CheckpointError, latest_checkpoint, load_weights, save_weights
from .config import DiTConfig
from .distributed import pick_device
from .evaluation import evaluate_samples, evaluate_tokenizer
from .log import image_grid, save_png
from .model import LightningDiT
from .replay import replay
from .sampler import sample_images
from .tokenizer.vavae import Tokenizer, load_tokenizer


def sample(
    checkpoint: str,
    classes: str = "",
    seed: int = 0,
    num: int = 16,
    out: str = "samples.png",
    guidance_scale: float | None = None,
    num_steps: int | None = None,
    shift: float | None = None,
    method: str | None = None,
    device: str = "auto",
    config: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Draws a grid of images. Image i depends on its seed (seed + i) and class only, whatever else is drawn with it.

    Args:
        checkpoint: a run directory or one of its checkpoints; or official weights (.pt, .safetensors) with --config and --tokenizer.
        classes: class numbers or names, separated by commas, drawn in turn; empty: all of them.
        seed: seed of the first image; the next has the next.
        num: number of images.
        out: PNG file to write.
        guidance_scale: as the next three, instead of what the run's configuration says.
        num_steps: intervals of the time grid.
        shift: time shift.
        method: euler, heun, midpoint, dopri5, sde_euler or sde_heun.
        device: auto, cpu or cuda.
        config: a recipe, where the checkpoint is not a run.
        tokenizer: a tokenizer file, a folder of diffusers, or "digits", where the checkpoint is not a run.
    """
    configuration.require(num > 0, "num", num, "a positive number of images")
    device = pick_device(device)
    settings, model, decoder, names = load_run(checkpoint, config, tokenizer, device)
    changes = dict(guidance_scale=guidance_scale, num_steps=num_steps, shift=shift, method=method)
    for name, value in changes.items():
        if value is not None:
            setattr(settings.sample, name, value)
    settings.sample.validate()
    chosen = parse_classes(classes, settings.data.num_classes, names)
    labels = torch.tensor(chosen)[torch.arange(num) % len(chosen)]
    with torch.autocast(device.type, torch.bfloat16, enabled=settings.use_bf16(device)):
        images = sample_images(model, decoder, labels=labels, seeds=range(seed, seed + num), device=device, progress=True,
                               **settings.sampling_arguments())
    save_png(image_grid(images, columns=len(chosen) if 1 < len(chosen) <= 16 else None), out)
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


def load_run(path, recipe=None, tokenizer=None, device="cpu"):
    """(config, EMA model in evaluation mode, tokenizer, class names or None) of a run, a checkpoint of it, or of weights with a recipe.

    Raises: ValueError or FileNotFoundError that says what is missing; ValueError when the tokenizer is not the one of the training.
    """
    path = Path(path)
    run = path.parent.parent if path.is_dir() and NAME.match(path.name) else path
    trained_on = names = None
    if run.is_dir():
        settings = configuration.load(DiTConfig, recipe or run / "config.yaml")
        if path == run:
            found = latest_checkpoint(run, warn=lambda text: print(text, file=sys.stderr))
            if found is None:
                raise CheckpointError(f"checkpoint: {run} holds no undamaged checkpoint yet")
            path = found[0]
        state = json.loads((path / "state.json").read_text())
        trained_on, names = state["tokenizer"], state["classes"]
        tokenizer = tokenizer or run / "tokenizer.safetensors"
    elif recipe is None or tokenizer is None:
        if not path.exists():
            raise CheckpointError(f"checkpoint: no run and no file {path}")
        raise configuration.ConfigError(f"checkpoint: {path} is not a run directory, so --config and --tokenizer are needed too")
    else:
        settings = configuration.load(DiTConfig, recipe)
        if settings.data.num_classes is None:
            raise configuration.ConfigError(f"data.num_classes: got None, expected a number in {recipe}")
    decoder = Tokenizer.load(tokenizer, device)
    if trained_on is not None and decoder.sha256 != trained_on:
        raise configuration.ConfigError(f"tokenizer: {tokenizer} has SHA-256 {decoder.sha256}, but the model was trained on latents of "
                                        f"{trained_on}")
    model = LightningDiT(**settings.model_arguments()).to(device).eval()
    model.load_weights(load_weights(path, "ema"))
    return settings, model, decoder, names


def parse_classes(text, num_classes, names):
    """Class numbers from "3,7" or from names, "" meaning all. Raises: ValueError for one that is not a class of the model."""
    chosen = []
    for item in filter(None, (item.strip() for item in text.split(","))):
        if names and item in names:
            chosen.append(names.index(item))
        elif item.isdecimal() and int(item) < num_classes:
            chosen.append(int(item))
        else:
            expected = f"numbers 0 to {num_classes - 1}" + (" or class names" if names else "")
            raise configuration.ConfigError(f"classes: got {item!r}, expected {expected}")
    return chosen or list(range(num_classes))


def union(commands):
    """The type that tyro reads as a choice of commands: {name: function, or (description, {name: function})}."""
    choices = []
    for name, command in commands.items():
        description = None
        if isinstance(command, tuple):
            description, command = command[0], union(command[1])
        choices.append(Annotated[Any, tyro.conf.subcommand(name, constructor=command, description=description)])
    return Union[tuple(choices)]  # noqa: UP007  made of a list


def main(argv=None):
    measures = dict(tokenizer=evaluate_tokenizer, samples=evaluate_samples)
    commands = {"sample": sample, "export": export, "export-tokenizer": export_tokenizer, "replay": replay,
                "evaluate": ("Measures a tokenizer or generated images.", measures),
                "latents": (latent_tools.__doc__, latent_tools.COMMANDS)}
    try:
        return tyro.cli(union(commands), args=argv, prog="lightningdit", description=__doc__)
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
