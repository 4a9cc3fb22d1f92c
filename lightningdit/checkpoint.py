"""Checkpoints that are complete or absent, and weights in the official layout.

A checkpoint is a folder `checkpoints/step_XXXXXXX` with a folder of safetensors files for each group of tensors (model, ema, trainer) and
state.json, which lists the size and SHA-256 of every file, and its own. The tensors lie as torch.distributed.checkpoint writes and reads
them: each process writes what it holds, and any number of processes, sharded in any way, reads it back. Everything goes under a temporary
name, is flushed to the disk, and renamed: a killed or failed save leaves the previous checkpoint whole. Nothing is ever unpickled except
official .pt files, and those with weights_only=True. With several processes the folder must be one that all of them see.
"""
import hashlib
import json
import os
import re
import shutil
import threading
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialised

from lightningdit.distributed import SAVING

NAME = re.compile(r"step_(\d{7,})$")

UNSHAPED = ("step", "exp_avg_scale", "exp_avg_sq_scale")  # optimizer state of another shape than its parameter


class CheckpointError(ValueError):
    """A checkpoint or weight file that is missing, damaged or of another model."""


class Saver:
    """Writes checkpoints of a run in the background, one at a time; training goes on while the disk works.

    Every process makes one and calls its methods in the same order. The newest `keep` checkpoints stay.
    """

    def __init__(self, run, keep=2):
        self.folder, self.keep = Path(run) / "checkpoints", keep
        # A group of its own: the collectives of a save must not meet those of the training step.
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.main = self.group is None or dist.get_rank() == 0
        self.thread = self.failure = self.saving = None

    def start(self, step, tensors, state):
        """Copies the tensors to host memory and begins to write run/checkpoints/step_XXXXXXX; waits for the save before, if there is one.

        Args:
            tensors: {"model": {name: tensor}, "ema": ..., "trainer": ...}; DTensors are written shard by shard.
            state: JSON values stored beside them, the same on every process.
        Raises: OSError if the save before failed.
        """
        self.wait()
        staged = {}
        for name, group in tensors.items():
            group = {key: tensor.detach().contiguous() for key, tensor in group.items()}
            if self.group is None:
                staged[name] = {key: tensor.to("cpu", copy=True) for key, tensor in group.items()}
            else:
                from torch.distributed.checkpoint.staging import BlockingAsyncStager

                staged[name] = BlockingAsyncStager(cache_staged_state_dict=False).stage(group)
        self.saving = step
        # A single process that fails still ends with the save whole. One of several must not wait for it: others may never come to that
        # save, since they wait for this process elsewhere, and only its end tells them.
        self.thread = threading.Thread(target=self._save, args=(step, staged, state), name=SAVING, daemon=self.group is not None)
        self.thread.start()

    def wait(self):
        """Returns when nothing is being saved: the step that was saved, or None.

        Raises: OSError (full disk, read-only folder), on every process: the partial folder is gone, earlier checkpoints are untouched.
        """
        if self.thread is None:
            return None
        self.thread.join()
        self.thread, failure, self.failure = None, self.failure, None
        if failure is not None:
            raise OSError(failure)
        return self.saving

    def _save(self, step, tensors, state):
        """In the thread. What fails on one process fails on all; only text crosses, since exceptions of a dead disk may not pickle."""
        final, partial = self.folder / f"step_{step:07d}", self.folder / f".partial_step_{step:07d}"
        try:
            self._together(lambda: _empty_folder(partial) if self.main else None)
            for name, group in tensors.items():
                self._together(lambda name=name, group=group: self._write(partial / name, group))
            mark = f"shard-{(dist.get_rank() if self.group else 0) + 1:05d}-"
            files = self._together(lambda: {str(path.relative_to(partial)): dict(size=path.stat().st_size, sha256=sha256(path))
                                            for path in sorted(partial.glob(f"*/{mark}*"))})
            self._together(lambda: self._finish(partial, final, step, {k: v for part in files for k, v in part.items()}, state)
                           if self.main else None)
        except OSError as error:
            self.failure = str(error)
            if self.main:
                shutil.rmtree(partial, ignore_errors=True)
        except BaseException as error:  # a process that died: the training step, too, is about to find out
            self.failure = f"{type(error).__name__}: {error}"

    def _write(self, folder, tensors):
        if self.group is None:  # the same bytes as below; importing that takes as long as training the digits for a hundred steps
            offsets = {key: dict(saved_offsets=[0] * tensor.ndim) for key, tensor in tensors.items()}
            about = dict(format="pt", DCP_VERSION="1.0", DCP_SHARDING_INFO=json.dumps(offsets))
            folder.mkdir()
            path = folder / "shard-00001-model-00001-of-00001.safetensors"
            with path.open("wb") as file:
                file.write(serialised(tensors, about))
            _flush(path)
            return
        import torch.distributed.checkpoint as dcp

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "assuming the intent is to save in a single process"
            try:
                dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(str(folder), save_distributed=True), process_group=self.group)
            except dcp.api.CheckpointException as error:
                raise OSError("; ".join(f"{type(e[0]).__name__}: {e[0]}" for e in error.failures.values())) from None

    def _finish(self, partial, final, step, files, state):
        path = partial / "state.json"
        content = dict(step=step, files=files, **state)
        path.write_text(json.dumps(content | dict(sha256=_digest(content)), indent=1))
        for folder in (path, *(p for p in partial.iterdir() if p.is_dir()), partial):
            _flush(folder)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        partial.rename(final)
        _flush(self.folder)
        for old in [path for done, path in list_checkpoints(self.folder.parent) if done <= step][: -self.keep]:  # later ones are damaged
            shutil.rmtree(old, ignore_errors=True)

    def _together(self, work):
        """Results of work() on all processes; OSError on all of them if it failed on one."""
        result = failure = None
        try:
            result = work()
        except (OSError, SafetensorError) as error:
            failure = f"{error}"
        if self.group is None:
            outcomes = [(result, failure)]
        else:
            outcomes = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(outcomes, (result, failure), group=self.group)
        if failures := [f for _, f in outcomes if f]:
            raise OSError("; ".join(dict.fromkeys(failures)))
        return [r for r, _ in outcomes]


def save_checkpoint(run, step, tensors, state, keep=2):
    """Writes run/checkpoints/step_XXXXXXX atomically and removes all but the newest `keep`; waits until it is on the disk.

    Args, errors: see Saver.
    Returns: the checkpoint's path.
    """
    saver = Saver(run, keep)
    saver.start(step, tensors, state)
    saver.wait()
    return saver.folder / f"step_{step:07d}"


def _empty_folder(path):
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)


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
        recorded = state.pop("sha256")
        if _digest(state) != recorded:
            raise ValueError("its SHA-256 differs from the one recorded in it")
        files = state["files"].items()
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise CheckpointError(f"checkpoint {path}: state.json is missing or damaged ({type(error).__name__}: {error})") from None
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
    """(path, state) of the newest undamaged checkpoint of a run, or None. Each damaged one is named through `warn` and passed over.

    With several processes the first one looks, and all take what it found.
    """
    found = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        for _, path in reversed(list_checkpoints(run)):
            try:
                found = path, check(path)
                break
            except CheckpointError as error:
                warn(f"warning: {error}; trying the one before")
    if dist.is_initialized():
        holder = [found]
        dist.broadcast_object_list(holder)
        found = holder[0]
    return found


def load_tensors(path, name):
    """All tensors of one group of a checkpoint, e.g. "model", whole and on the CPU, however many processes wrote them."""
    found = _sizes(path, name)
    tensors = {key: torch.empty(about.size, dtype=about.properties.dtype) for key, about in found.items()}
    _read(path, name, tensors, no_dist=True)
    return tensors


def load_into(path, name, tensors):
    """Fills the given tensors, which may be sharded, with those of the same name in one group of a checkpoint. Every process calls it.

    Raises: CheckpointError that lists the names or shapes that differ; nothing is changed then.
    """
    found = _sizes(path, name)
    problems = [f"missing {key}" for key in tensors if key not in found] + [f"unexpected {key}" for key in found if key not in tensors]
    problems += [f"misshaped {key}: got {tuple(found[key].size)}, expected {tuple(tensor.shape)}"
                 for key, tensor in tensors.items() if key in found and found[key].size != tensor.shape]
    if problems:
        raise CheckpointError(f"checkpoint {path}: {name} does not fit, {len(problems)} problems:\n  " + "\n  ".join(problems))
    _read(path, name, tensors, no_dist=not dist.is_initialized())


def _sizes(path, name):
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    try:
        return HuggingFaceStorageReader(str(Path(path) / name)).read_metadata().state_dict_metadata
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error})") from None


def _read(path, name, tensors, no_dist):
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(Path(path) / name)), no_dist=no_dist)
        except dcp.api.CheckpointException as error:
            raise CheckpointError(f"checkpoint {path}: {name} cannot be read ({error})") from None


def trainer_tensors(model, optimizer):
    """Optimizer state by parameter name, and the state of PyTorch's own generators, as one dictionary of tensors."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {"rng.cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    for parameter, values in optimizer.state.items():
        tensors |= {f"{key}.{names[parameter]}": value for key, value in values.items()}
    return tensors


def load_trainer(path, model, optimizer, others=None, group="trainer"):
    """Undoes trainer_tensors from that group of a checkpoint: fills the optimizer of `model` and sets PyTorch's generators.

    Args: others: {name: tensor} stored beside them, filled in place.
    Raises: CheckpointError when the state is of another model.
    """
    parameters, others, tensors = dict(model.named_parameters()), others or {}, {}
    device = getattr(optimizer, "state_device", None)  # None: that of the parameter
    for key, about in _sizes(path, group).items():
        kind, _, name = key.partition(".")
        if key in others:
            tensors[key] = others[key]
        elif kind == "rng":
            tensors[key] = torch.empty(about.size, dtype=about.properties.dtype)
        elif name not in parameters or (kind not in UNSHAPED and parameters[name].shape != about.size):
            raise CheckpointError(f"checkpoint {path}: optimizer state {key} {tuple(about.size)} does not belong to this model")
        elif kind in UNSHAPED:
            tensors[key] = torch.zeros(about.size, dtype=about.properties.dtype, device=device or parameters[name].device)
        else:  # sharded as its parameter is
            tensors[key] = torch.zeros_like(parameters[name], dtype=about.properties.dtype, device=device).detach()
    load_into(path, group, others | tensors)
    torch.set_rng_state(tensors.pop("rng.cpu"))
    cuda = tensors.pop("rng.cuda", None)
    if cuda is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(cuda)
    for key in tensors.keys() - others.keys():
        value, (kind, _, name) = tensors[key], key.partition(".")
        optimizer.state[parameters[name]][kind] = value


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
    if path.suffix == ".pt":
        save_whole(path, lambda partial: torch.save({"model": state, "ema": state if ema is None else ema}, partial))
    else:
        save_whole(path, lambda partial: _save_safetensors(state if ema is None else ema, partial, metadata))


def save_whole(path, write):
    """Calls write(partial), which writes a file under that name, and gives it the name `path` when it is on the disk."""
    path = Path(path)
    partial = path.with_name(f".partial_{path.name}")
    try:
        write(partial)
        _flush(partial)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_text(path, text):
    """Writes a small file: whatever happens, it is the old one or the new one. Raises: OSError that names it."""
    try:
        save_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise OSError(f"could not write {path}: {error}") from None


def _digest(content):
    """SHA-256 of JSON values, however they are spaced and ordered."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def sha256(path):
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def state_sha256(state):
    """Hash of named tensors, the same in whichever file they are kept."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


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


def _flush(path):
    """Waits until a file's bytes, or a folder's entries, are on the disk, so that a rename never outlives its contents."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
