"""A trained model, loaded for use: weights, tokenizer, configuration and class names of a run."""
import json
import sys
from pathlib import Path

import torch

from .checkpoint import NAME, CheckpointError, latest_checkpoint, load_weights
from .config import ConfigError, DiTConfig, begun_precision, load, require
from .distributed import bf16_units
from .model import LightningDiT
from .tokenizer.vavae import Tokenizer


def load_run(path, recipe=None, tokenizer=None, device="cpu"):
    """(config, EMA model in evaluation mode, tokenizer, class names or None) of a run, a checkpoint of it, or of weights with a recipe.

    Raises: ValueError or FileNotFoundError that says what is missing; ValueError when the tokenizer is not the one of the training.
    """
    path, device = Path(path), torch.device(device)
    run = path.parent.parent if path.is_dir() and NAME.match(path.name) else path
    trained_on = names = None
    if run.is_dir():
        settings = load(DiTConfig, recipe or run / "config.yaml")
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
        raise ConfigError(f"checkpoint: {path} is not a run directory, so --config and --tokenizer are needed too")
    else:
        settings = load(DiTConfig, recipe)
        if settings.data.num_classes is None:
            raise ConfigError(f"data.num_classes: got None, expected a number in {recipe}")
    decoder = Tokenizer.load(tokenizer, device)
    if trained_on is not None and decoder.sha256 != trained_on:
        raise ConfigError(f"tokenizer: {tokenizer} has SHA-256 {decoder.sha256}, but the model was trained on latents of "
                                        f"{trained_on}")
    if run.is_dir():
        settings.precision = begun_precision(settings, device)
    if settings.precision in ("bf16", "fp8") and not bf16_units(device):
        settings.precision = "fp32"
        print(f"{path}: fp32 here, since this {device.type} would emulate bf16; --precision bf16 does", file=sys.stderr)
    model = LightningDiT(**settings.model_arguments()).to(device).eval()
    model.load_weights(load_weights(path, "ema"))
    return settings, model, decoder, names


def load_guide(path, settings, decoder, tokenizer, device):
    """The EMA model of a run that guides another one (autoguidance). Raises: ValueError if it speaks of other latents or outputs."""
    theirs, model, own_decoder, _ = load_run(path, None, tokenizer, device)
    for name, got, expected in (("tokenizer", own_decoder.sha256, decoder.sha256),
                                ("data.num_classes", theirs.data.num_classes, settings.data.num_classes),
                                ("flow.path", theirs.flow.path, settings.flow.path),
                                ("flow.prediction", theirs.flow.prediction, settings.flow.prediction)):
        require(got == expected, f"guide: {name} of {path}", got, f"{expected} as of the checkpoint")
    return model


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
            raise ConfigError(f"classes: got {item!r}, expected {expected}")
    return chosen or list(range(num_classes))
