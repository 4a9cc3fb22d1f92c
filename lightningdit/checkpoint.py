"""Checkpoints that are complete or absent, and weights in the official layout.

A checkpoint is a folder `checkpoints/step_XXXXXXX` of safetensors files (model, ema, trainer) and state.json, which lists the size and
SHA-256 of each. It is written under a temporary name, flushed to the disk, and renamed: a killed or failed save leaves the previous
checkpoint whole. Nothing is ever unpickled except official .pt files, and those with weights_only=True.
"""
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

NAME = re.compile(r"step_(\d{7,})$")


class CheckpointError(ValueError):
    """A checkpoint or weight file that is missing, damaged or of another model."""


def save_checkpoint(run, step, tensors, state, keep=2):
    """Writes run/checkpoints/step_XXXXXXX atomically and removes all but the newest `keep`.

    Args:
        tensors: {"model": {name: tensor}, "ema": ..., "trainer": ...}, one safetensors file each.
        state: JSON values stored beside them.
    Returns: the checkpoint's path.
    Raises: OSError (full disk, read-only folder): the partial folder is removed, earlier checkpoints are untouched.
    """
    folder = Path(run) / "checkpoints"
    final, partial = folder / f"step_{step:07d}", folder / f".partial_step_{step:07d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        files = {}
        for name, group in tensors.items():
            path = partial / f"{name}.safetensors"
            _save_safetensors(group, path)
            files[path.name] = dict(size=path.stat().st_size, sha256=sha256(path))
        path = partial / "state.json"
        path.write_text(json.dumps(dict(step=step, files=files, **state), indent=1))
        _flush(path)
        _flush(partial)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        partial.rename(final)
        _flush(folder)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    for _, old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def list_checkpoints(run):
    """[(step, path)] of the complete checkpoints of a run, oldest first."""
    folder = Path(run) / "checkpoints"
    found = [(int(match[1]), path) for path in folder.iterdir() if (match := NAME.match(path.name))] if folder.is_dir() else []
    return sorted(found)


def check(path):
    """Reads state.json of a checkpoint and compares every file with its recorded size and checksum.

    Raises: CheckpointError that names the first damaged file.
    """
    path = Path(path)
    try:
        state = json.loads((path / "state.json").read_text())
        files = state["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path}: state.json is missing or damaged ({error})") from None
    for name, recorded in files:
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"checkpoint {path}: {name} is missing")
        if file.stat().st_size != recorded["size"]:
            raise CheckpointError(f"checkpoint {path}: {name} is truncated, got {file.stat().st_size} bytes, expected {recorded['size']}")
        if sha256(file) != recorded["sha256"]:
            raise CheckpointError(f"checkpoint {path}: {name} is damaged, its SHA-256 differs from the one recorded when it was saved")
    return state


def latest_checkpoint(run, warn=print):
    """(path, state) of the newest undamaged checkpoint of a run, or None. Each damaged one is named through `warn` and passed over."""
    for _, path in reversed(list_checkpoints(run)):
        try:
            return path, check(path)
        except CheckpointError as error:
            warn(f"warning: {error}; trying the one before")
    return None


def load_tensors(path, name):
    """The tensors of one file of a checkpoint, e.g. "model"."""
    return _load_safetensors(Path(path) / f"{name}.safetensors")


def trainer_tensors(model, optimizer):
    """Optimizer state by parameter name, and the state of PyTorch's own generators, as one dictionary of tensors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for parameter, values in optimizer.state.items():
        tensors |= {f"{key}.{names[parameter]}": value for key, value in values.items()}
    return tensors


def restore_trainer(model, optimizer, tensors):
    """Undoes trainer_tensors: fills the optimizer of `model` and sets PyTorch's generators.

    Raises: CheckpointError when the state is of another model.
    """
    tensors = dict(tensors)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        if name not in parameters or (kind != "step" and parameters[name].shape != value.shape):
            raise CheckpointError(f"optimizer state {key} {tuple(value.shape)} does not belong to this model")
        device = parameters[name].device
        optimizer.state[parameters[name]][kind] = value.to(device)


def load_weights(path, entry="ema"):
    """Model weights in the official layout from a run, a checkpoint folder, a .safetensors file or an official .pt file.

    Args:
        entry: "ema" or "model". A .pt file or checkpoint without that entry is an error; a bare state dict has no entries.
    Returns: state dict on the CPU, without the `module.` prefix that DistributedDataParallel leaves.
    Raises: CheckpointError for a missing, truncated or untrusted file.
    """
    path = Path(path)
    if path.is_dir():
        if not NAME.match(path.name):
            found = latest_checkpoint(path)
            if found is None:
                raise CheckpointError(f"checkpoint: {path} holds no undamaged checkpoint (looked for {path}/checkpoints/step_XXXXXXX)")
            path = found[0]
        check(path)
        return load_tensors(path, entry)
    state = read_file(path)
    if path.suffix != ".safetensors":
        if not isinstance(state, dict):
            raise CheckpointError(f"checkpoint {path}: got a {type(state).__name__}, "
                                  "expected a state dict, or a dictionary with 'ema' or 'model'")
        if "ema" in state or "model" in state:
            if entry not in state:
                raise CheckpointError(f"checkpoint {path}: no entry {entry!r}, expected one of {', '.join(map(str, state))}")
            state = state[entry]
    if not isinstance(state, dict) or not all(torch.is_tensor(value) for value in state.values()):
        raise CheckpointError(f"checkpoint {path}: its entry {entry!r} is not a state dict of tensors")
    return {key.removeprefix("module."): value for key, value in state.items()}


def read_file(path):
    """What a file of weights holds: the tensors of a .safetensors file, or whatever torch.load(weights_only=True) reads from another one.

    Raises: CheckpointError for a missing or damaged file, or one that would have to run code to be read.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint: no file or folder {path}")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises half a dozen types for damaged files, and UnpicklingError for what it refuses to run
        refusal = f"checkpoint {path}: torch.load(weights_only=True) refuses it"
        if foreign := _foreign_objects(path):
            raise CheckpointError(f"{refusal}: besides tensors it holds {', '.join(foreign)}, which only code from the file can rebuild. "
                                  "If you trust where it comes from, take its weights out once, in a Python of your own: state = "
                                  "torch.load(FILE, weights_only=False); torch.save(state['state_dict'], 'weights.pt')") from None
        raise CheckpointError(f"{refusal}: {(str(error).splitlines() or [type(error).__name__])[0]}") from None


def _foreign_objects(path):
    """Names of what the pickle in a PyTorch file wants to call and torch.load refuses to; nothing is run. [] for other files."""
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:  # not a PyTorch file at all
        return []


def save_weights(path, state, ema=None, metadata=None):
    """Writes weights in the official layout: .pt as {"model", "ema"}, .safetensors as the EMA weights (or the model's without them).

    The file appears under its name only when it is complete.
    """
    path = Path(path)
    if path.suffix not in (".pt", ".safetensors"):
        raise ValueError(f"path: got {str(path)!r}, expected a name that ends in .pt or .safetensors")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    try:
        if path.suffix == ".pt":
            torch.save({"model": state, "ema": state if ema is None else ema}, partial)
            _flush(partial)
        else:
            _save_safetensors(state if ema is None else ema, partial, metadata)
        partial.rename(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _load_safetensors(path):
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"checkpoint {path}: not a whole safetensors file ({error})") from None


def _save_safetensors(tensors, path, metadata=None):
    try:
        save_file({name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}, path, metadata)
    except SafetensorError as error:  # its writer reports a full disk or a size limit this way
        raise OSError(f"could not write {path}: {error}") from None
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)  # the writer makes files that only their owner can read
    _flush(path)


def _flush(path):
    """Waits until a file's bytes, or a folder's entries, are on the disk, so that a rename never outlives its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
