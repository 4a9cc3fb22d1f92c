"""Which configuration a Triton kernel is launched with: a static table per op, or, where it is asked for, the fastest one measured.

A table maps (architecture, shape class) to configurations. The first of them is the static choice: no measurement, no start-up cost,
the same on every rank. With LIGHTNINGDIT_AUTOTUNE=1 all of them are timed once per shape and the choice is kept on disk. It may differ
from machine to machine, and with it the last bits of a sum whose order depends on block sizes.
"""

import contextlib
import functools
import importlib.metadata
import json
import logging
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

_log = logging.getLogger("lightningdit_kernels")

# Passed with every launch, and by the audit. a * b + c is one instruction: triton's default up to 3.9, no longer from 3.10 on.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of their constexpr, and the launch options of triton."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1

    def launch(self) -> dict[str, int | bool]:
        """Keyword arguments for `kernel[grid](..., **config.launch())`."""
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILE_OPTIONS}


Table = Mapping[tuple[int, str], Sequence[Config]]


@functools.cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    # Desktop Blackwell (12.x) has the matrix instructions and the 99 KiB of shared memory of 8.9, not those of 10.0.
    return 89 if major == 12 else 10 * major + minor


def architecture(device: torch.device) -> int:
    """Compute capability as triton writes it (80, 90, 100, ...). Of anything but a CUDA device, as under the interpreter, 90."""
    if device.type != "cuda":
        return 90
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def pick(
    op: str,
    configs: Table,
    device: torch.device,
    shape_class: str,
    key: Sequence[int | str],
    bench: Callable[[Config], object] | None = None,
) -> Config:
    """The configuration with which to launch `op` on `device`.

    Args:
        op: name of the kernel, unique in the library; the cache on disk is filed under it.
        configs: the op's table. Architectures that it lacks use the nearest lower one that has this shape class.
        shape_class: second half of the table's keys.
        key: what a measurement depends on besides architecture and shape class (sizes, dtypes). Leave the batch out, or round it.
        bench: launches the kernel once with the configuration that it is given, on buffers of its own. None: never measure.
    Returns: the first configuration of the table's entry; with LIGHTNINGDIT_AUTOTUNE=1 on CUDA the fastest.
    Raises: ValueError if the table has no entry for the shape class at or below the device's architecture.
    """
    arch = architecture(device)
    usable = [known for known, name in configs if name == shape_class and known <= arch]
    if not usable:
        found = f"device has architecture sm_{arch} and the shape class is {shape_class!r}"
        raise ValueError(f"{op}: {found}, expected one of {sorted(configs)}")
    candidates = configs[max(usable), shape_class]
    if bench is None or len(candidates) == 1 or device.type != "cuda" or not autotune_enabled():
        return candidates[0]
    return _fastest(op, candidates, arch, (shape_class, *map(str, key)), bench)


def autotune_enabled() -> bool:
    """LIGHTNINGDIT_AUTOTUNE: "1" for yes, "0", empty or absent for no."""
    value = os.environ.get("LIGHTNINGDIT_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LIGHTNINGDIT_AUTOTUNE is {value!r}, expected 0 or 1")
    return value == "1"


_chosen: dict[tuple, Config] = {}  # of this process: the file is read once per kernel and shape


def _fastest(op, candidates, arch, key, bench):
    name = "/".join((f"sm_{arch}", *key, f"triton {_triton_version()}"))
    if (op, name) not in _chosen:
        if torch.cuda.is_current_stream_capturing():
            return candidates[0]  # nothing can be timed inside a CUDA graph; the next call outside of one measures
        config = _stored(op, name, candidates)
        if config is None:
            config = _measure(op, name, candidates, bench)
            _store(op, name, config)
        _chosen[op, name] = config
    return _chosen[op, name]


def _measure(op: str, name: str, candidates: Sequence[Config], bench: Callable[[Config], object]) -> Config:
    """The candidate with the least median time. One that does not fit on the device is left out, with a line in the log."""
    times_ms = {}
    for index, config in enumerate(candidates):
        try:
            times_ms[index] = _time_ms(lambda config=config: bench(config))
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # triton's; importing it here would import triton
                raise
            _log.warning("%s: %s does not fit on this device: %s", op, config, error)
    if not times_ms:
        raise RuntimeError(f"{op}: none of {len(candidates)} configurations fits on this device")
    best = min(times_ms, key=times_ms.__getitem__)
    _log.info("%s %s: %s, %.4f ms (static choice: %s ms)", op, name, candidates[best], times_ms[best], times_ms.get(0))
    return candidates[best]


def _time_ms(run: Callable[[], object], rounds: int = 20) -> float:
    for _ in range(3):
        run()  # compiles
    cycles, times_ms, late = cycles_to_enqueue(run), [], False
    for _ in range(rounds):
        time_ms, cycles, host_inside = event_ms(run, cycles)
        times_ms.append(time_ms)
        late |= host_inside
    if late:
        _log.warning("launches took longer than %s s to enqueue: the host's time may be in what was measured", LONGEST_SLEEP_S)
    return statistics.median(times_ms)


HIGHEST_CLOCK_HZ = 3e9  # no GPU's is higher: a number of cycles lasts at least as long as at this clock
LONGEST_SLEEP_S = 0.05


def cycles_to_enqueue(run: Callable[[], object]) -> int:
    """GPU cycles that last longer than the host takes to enqueue run(), for event_ms: twice the longest of three tries."""
    taken = []
    for _ in range(3):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        run()
        taken.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return int(min(2 * max(taken) + 20e-6, LONGEST_SLEEP_S) * HIGHEST_CLOCK_HZ)


def event_ms(run: Callable[[], object], cycles: int) -> tuple[float, int, bool]:
    """(milliseconds that the GPU takes for what run() enqueues, cycles for the next call, whether the host's time may be in them).

    The GPU first spins for `cycles`: by the time it gets to the start event all is enqueued. On an idle GPU the event would be over
    before the first launch arrives, and the host's time would be in the figure. Where it was over before all was enqueued, run() is
    measured again with twice the cycles, up to LONGEST_SLEEP_S. Where it still was, as when run() itself waits for the GPU, that is told.
    """
    longest = int(LONGEST_SLEEP_S * HIGHEST_CLOCK_HZ)
    while True:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(cycles)
        start.record()
        run()
        end.record()
        late = start.query()
        end.synchronize()
        if not late or cycles >= longest:
            return start.elapsed_time(end), cycles, late
        cycles = min(2 * max(cycles, 1), longest)


def cache_folder() -> Path:
    """Where measured choices are kept, one JSON file per op: $XDG_CACHE_HOME/lightningdit/autotune, by default below ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightningdit" / "autotune"


@functools.cache
def _triton_version() -> str:
    return importlib.metadata.version("triton")


def _read(op: str) -> dict[str, dict]:
    path = cache_folder() / f"{op}.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"expected an object, got {type(content).__name__}")
        return content
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        _warn_once(f"autotune cache {path} is ignored: {error}")
        return {}


def _stored(op: str, name: str, candidates: Sequence[Config]) -> Config | None:
    entry = _read(op).get(name)
    return next((config for config in candidates if asdict(config) == entry), None)  # only what the table still offers


def _store(op: str, name: str, config: Config) -> None:
    """Adds one choice to the op's file in one rename, so that a reader never sees half a file."""
    content = _read(op) | {name: asdict(config)}
    folder = cache_folder()
    partial = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=folder, suffix=".partial", delete=False) as file:
            partial = file.name
            json.dump(content, file, indent=1)
        os.replace(partial, folder / f"{op}.json")
    except OSError as error:
        _warn_once(f"the autotune choice for {op} is not kept: {error}")
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning("%s", message)
