"""What is chosen by measurement, on the device and for the shape at hand: tiles of the Triton kernels, who computes attention, and
whose fp32 products a CPU takes.

The candidates of a choice are ordered; the first is the starting guess. On the first call for a shape all are timed, and the choice is
kept below ~/.cache for this device, these versions of torch and triton and these kernels: one file a choice. Choices may differ from
machine to machine, and with them the last bits of results: a run that resumes on another card, or without that folder, may differ in them
from one that was never interrupted. With LIGHTNINGDIT_AUTOTUNE=0, and under torch.use_deterministic_algorithms(True), nothing is timed
and the starting guess is used, which depends on the code and the device alone. A process never changes a choice that it has used.

A graph that torch.compile keeps on disk has the choices of the process that compiled it, whatever the files say later. Processes whose
graphs are on disk take no part in an agreement: others, whose are not, wait once for GRACE_S.
"""

import concurrent.futures
import contextlib
import functools
import hashlib
import importlib.metadata
import json
import logging
import os
import platform
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

_log = logging.getLogger("lightningdit_kernels")
T = TypeVar("T")

# Passed with every launch, and by the audit. a * b + c is one instruction: triton's default up to 3.9, no longer from 3.10 on.
COMPILE_OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Config:
    """Block sizes by the name of their constexpr, and the launch options of triton."""

    blocks: dict[str, int]
    num_warps: int
    num_stages: int = 1

    def launch(self) -> Mapping[str, int | bool]:
        """Keyword arguments for `kernel[grid](..., **config.launch())`. The same object every time, to be read only."""
        return self._launch

    @functools.cached_property
    def _launch(self) -> Mapping[str, int | bool]:
        return {**self.blocks, "num_warps": self.num_warps, "num_stages": self.num_stages, **COMPILE_OPTIONS}

    def __str__(self) -> str:
        blocks = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{blocks} warps={self.num_warps} stages={self.num_stages}".strip()


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
    key: Sequence[object],
    bench: Callable[[Config], object] | None = None,
) -> Config:
    """The configuration with which to launch `op` on `device`.

    Args:
        op: name of the kernel, unique in the library.
        configs: the op's table. Architectures that it lacks use the nearest lower one that has this shape class.
        shape_class: second half of the table's keys.
        key: what a measurement depends on besides architecture and shape class (sizes, dtypes). Leave the batch out, or round it.
        bench: launches the kernel once with the configuration that it is given; every output is overwritten. None: never measure.
    Returns: the fastest configuration of the table's entry on CUDA; the first where nothing is timed, or where a launch takes less than
        MEASURABLE_MS, which says nothing about a GPU that is full.
    Raises: ValueError if the table has no entry for the shape class at or below the device's architecture.
    """
    arch = architecture(device)
    _, candidates = _rows.get((id(configs), arch, shape_class)) or _row(op, configs, arch, shape_class)
    if bench is None or len(candidates) == 1 or device.type != "cuda":
        return candidates[0]

    def times_ms():
        runs = {str(config): functools.partial(bench, config) for config in candidates}
        guess = next(iter(runs))
        alone = time_candidates(op, {guess: runs[guess]}, rounds=3)
        if alone and alone[guess] < MEASURABLE_MS:
            return {}
        try:
            times = time_candidates(op, runs)
        except torch.OutOfMemoryError as error:  # of another candidate than the guess, which has just run
            _log.warning("%s: not enough memory to time all configurations (%s); it uses the starting guess, %s", op, error, guess)
            torch.cuda.empty_cache()
            return {}
        if not times:
            raise RuntimeError(f"{op}: none of {len(candidates)} configurations fits on this device")
        return times

    return choose(op, candidates, device, (shape_class, *key), times_ms)


# By id, architecture and shape class: the table, which keeps its id as long as it is here, and its candidates. A search takes 3 us.
_rows: dict[tuple[int, int, str], tuple[Table, Sequence[Config]]] = {}


def _row(op, configs, arch, shape_class):
    usable = [known for known, name in configs if name == shape_class and known <= arch]
    if not usable:
        found = f"device has architecture sm_{arch} and the shape class is {shape_class!r}"
        raise ValueError(f"{op}: {found}, expected one of {sorted(configs)}")
    return _rows.setdefault((id(configs), arch, shape_class), (configs, configs[max(usable), shape_class]))


MEASURABLE_MS = 0.02  # a launch alone takes 0.005
DRAW = 0.02  # the starting guess is kept unless another candidate takes this share less: noise decides nothing
_chosen: dict[tuple, Any] = {}  # of this process


def choose(
    op: str,
    candidates: Sequence[T],
    device: torch.device,
    key: tuple[Hashable, ...],
    times_ms: Callable[[], dict[str, float]],
    untimed: str = "",
    draw: float | None = None,
) -> T:
    """The candidate that is fastest on `device`: as this process has chosen, or the file on disk says, or by measuring now.

    The processes of torch.distributed agree on it. Inside a CUDA graph capture nothing can be timed: there it is the choice on disk, else
    the starting guess, and the next call outside of one decides.

    Args:
        op: what is chosen for.
        candidates: at least one; their str() are their names, on disk too. The first is the starting guess.
        key: what the choice depends on besides the GPU and versions.
        times_ms: milliseconds by name. A candidate that it leaves out is not chosen; {}: nothing can be said, and the starting guess is
            used, which is not kept on disk.
        untimed: where nothing can be timed now, as in a capture; "" where something can.
        draw: the starting guess is kept unless another candidate takes this share less; None: DRAW.
    """
    place = op, key, device, id(process_group())
    if place in _chosen:
        return _chosen[place]
    names = [str(candidate) for candidate in candidates]
    where = dict(op=op, gpu=device_name(device), shape=" ".join(map(str, key)), versions=versions())
    if reason := unmeasured():
        name = names[0]
        warn_once(f"{op}: nothing is timed ({reason}); it uses the starting guess, {name}")
    elif untimed := untimed or _untimed(device):
        name = _stored(where, names) or names[0]
        warn_once(f"{op}: nothing can be timed inside {untimed}; it uses {name}")
        return candidates[names.index(name)]
    else:
        name = _agreed(where, names[0], lambda: _fastest(where, names, times_ms, DRAW if draw is None else draw))
    _chosen[place] = candidates[names.index(name) if name in names else 0]
    return _chosen[place]


def _untimed(device: torch.device) -> str:
    """Where nothing can be timed, or ""."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FUNCTIONAL) is not None:
        return "a trace of torch.compile"
    return "a CUDA graph capture" if device.type == "cuda" and torch.cuda.is_current_stream_capturing() else ""


def unmeasured() -> str:
    """Why nothing is timed in this process, or ""."""
    value = os.environ.get("LIGHTNINGDIT_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LIGHTNINGDIT_AUTOTUNE is {value!r}, expected 0 or 1")
    if value == "0":
        return "LIGHTNINGDIT_AUTOTUNE=0"
    # With warn_only, as in testing.poisoned_memory, nobody asks that another process or machine gives the same bits.
    if torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled():
        return "torch.use_deterministic_algorithms(True)"
    return ""


def _fastest(where: dict[str, str], names: Sequence[str], times_ms: Callable[[], dict[str, float]], draw: float) -> str:
    if kept := _stored(where, names):
        return kept
    begin = time.perf_counter()
    times = times_ms()
    if not times:
        return names[0]
    best = min(times, key=times.__getitem__)
    if times.get(names[0], float("inf")) * (1 - draw) <= times[best]:
        best = names[0]
    listed = ", ".join(f"{name} {time_ms:.4g} ms" for name, time_ms in times.items())
    seconds = time.perf_counter() - begin
    # A warning is the lowest level that Python shows where nobody configured logging, and these may be seconds of somebody's first step.
    level = logging.WARNING if seconds > 1 else logging.INFO
    _log.log(level, "%s, %s: %s is used; timed in %.1f s: %s", where["op"], where["shape"], best, seconds, listed)
    return _store(where | dict(choice=best, times_ms=times, date=time.strftime("%Y-%m-%d")), names)


GRACE_S = 10.0  # for which another process waits for rank 0 to begin: the first time, since rank 0 may have other shapes
GRACE_AGAIN_S = 0.5  # once it has waited in vain
PATIENCE_S = 300.0  # for which one waits for an answer: several compilations


# Of this process: how long it waits for rank 0 now, and within how many decisions it is: attention's has those of its tiles inside.
_waits: dict[str, Any] = dict(grace_s=None, deciding=0)


def process_group() -> object:
    return dist.GroupMember.WORLD if dist.is_available() else None


def _agreed(where: dict[str, str], guess: str, decide: Callable[[], str]) -> str:
    """decide() of one process for all of torch.distributed: of rank 0, or of another one where rank 0 has no need of this choice.

    A collective would hang where only some processes come here, as when rank 0 alone samples. Instead the first to put its claim into
    the group's store decides, and rank 0 has a start of GRACE_S, more than processes that do the same are apart. Every wait is bounded.
    """
    if process_group() is None or dist.get_world_size() == 1:
        return decide()
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    claim, answer = ("/".join(("lightningdit_kernels", *where.values(), what)) for what in ("claim", "choice"))
    try:
        if rank != 0 and not _waits["deciding"] and not _appears(store, claim, _waits["grace_s"] or GRACE_S):
            _waits["grace_s"] = GRACE_AGAIN_S
        claimed = store.compare_set(claim, "", str(rank)).decode() == str(rank)
    except (AttributeError, RuntimeError) as error:  # MPI has no store, and that of a fake group cannot compare
        warn_once(f"the processes do not agree on what is fastest: their group's store failed: {error}")
        return decide()
    if claimed:
        name = guess  # also if decide() fails: others need not wait
        _waits["deciding"] += 1
        try:
            name = decide()
        finally:
            _waits["deciding"] -= 1
            store.set(answer, name)
        return name
    if _appears(store, answer, PATIENCE_S):
        return store.get(answer).decode()
    late = f"rank {store.get(claim).decode()} has not decided within {PATIENCE_S:.0f} s"
    _log.warning("%s: %s; this process uses the starting guess, %s", where["op"], late, guess)
    return guess


def _appears(store, key: str, within_s: float) -> bool:
    """Whether the key is in the store within that time. store.wait() would keep the other threads of this process from the store."""
    end = time.monotonic() + within_s
    while not store.check([key]):
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def in_thread(work: Callable[[], T], device: torch.device) -> T:
    """work() on the caller's current stream, in a thread where nothing of the caller's is in force that belongs to a thread: fake tensors
    and the tracing of torch.compile, hooks on saved tensors, other dispatch modes, autocast, no_grad and inference_mode.
    """
    on_gpu = device.type == "cuda"
    stream = torch.cuda.current_stream(device) if on_gpu else None

    def run():
        with torch.cuda.stream(stream) if on_gpu else contextlib.nullcontext():  # makes the device the current one, too
            return work()

    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


LIMIT_S = 20.0  # of compilation in one choice: further candidates are left out
ROUNDS_S = 0.3  # of measurement in one choice, at least 5 rounds


def time_candidates(op: str, runs: Mapping[str, Callable[[], object]], rounds: int = 20) -> dict[str, float]:
    """The median milliseconds of each run(), measured in turns, so that a clock that rises or falls meets all alike.

    One that does not fit on the device is left out, with a line in the log.
    """
    begin, cycles, times = time.perf_counter(), {}, {}
    for name, run in runs.items():
        if cycles and time.perf_counter() - begin > LIMIT_S:
            _log.warning("%s: %s is left out: compiling the candidates before it took over %.0f s", op, name, LIMIT_S)
            continue
        try:
            for _ in range(3):
                run()  # compiles
        except Exception as error:
            if type(error).__name__ != "OutOfResources":  # triton's; importing it here would import triton
                raise
            _log.warning("%s: %s does not fit on this device: %s", op, name, error)
            continue
        cycles[name], times[name] = cycles_to_enqueue(run), []
    begin, late = time.perf_counter(), False
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > ROUNDS_S:
            break
        for name in times:
            time_ms, cycles[name], host_inside = event_ms(runs[name], cycles[name])
            times[name].append(time_ms)
            late |= host_inside
    if late:
        _log.warning("launches took longer than %s s to enqueue: the host's time may be in what was measured", LONGEST_SLEEP_S)
    return {name: statistics.median(taken) for name, taken in times.items()}


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
    """Where choices are kept: $XDG_CACHE_HOME/lightningdit/autotune, by default below ~/.cache; without a home, in the folder of
    temporary files.
    """
    if not (cache := os.environ.get("XDG_CACHE_HOME")):
        try:
            cache = Path.home() / ".cache"
        except RuntimeError:  # no HOME, and a user id that the system has no name for, as in containers
            cache = Path(tempfile.gettempdir()) / f"lightningdit-{os.getuid()}"
    return Path(cache) / "lightningdit" / "autotune"


@functools.cache
def sources_hash(pattern: str = "") -> str:
    """Of the modules of this package whose names match completely; "": of all."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if not pattern or re.fullmatch(pattern, path.stem):
            digest.update(path.read_bytes())
    return digest.hexdigest()


@functools.cache
def versions() -> str:
    """For which a choice holds: torch, triton, and a hash of the sources that are measured."""
    measured, triton = sources_hash(r".*_triton|attention|linear|tuning"), "absent"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        triton = importlib.metadata.version("triton")
    return f"torch {torch.__version__}, triton {triton}, kernels {measured[:8]}"


def cpu_name() -> str:
    """Of the processor, as the system knows it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def device_name(device: torch.device) -> str:
    """Of a GPU with its architecture; of a CPU as the system knows it."""
    if device.type == "cpu":
        return cpu_name()
    return f"{torch.cuda.get_device_name(device)} (sm_{architecture(device)})"


def choices() -> list[dict[str, Any]]:
    """All choices on disk: dict(op=, gpu=, shape=, versions=, choice=, times_ms={name: milliseconds}, date=) each, ordered."""
    found = [entry for path in cache_folder().glob("*.json") if (entry := _read(path)) is not None]
    return sorted(found, key=lambda entry: [entry[name] for name in _WHERE])


def choices_here() -> list[dict[str, Any]]:
    """Those of choices() that hold for a device and the versions of this machine."""
    devices = [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]
    names = {device_name(device) for device in devices}
    return [entry for entry in choices() if entry["gpu"] in names and entry["versions"] == versions()]


_WHERE = ("op", "gpu", "shape", "versions")


def _path(where: Mapping[str, Any]) -> Path:
    """One file a choice: processes that choose at the same time do not write the same file, unless they choose the same."""
    digest = hashlib.sha256(json.dumps([where[name] for name in _WHERE]).encode()).hexdigest()
    return cache_folder() / f"{where['op']}_{digest[:16]}.json"


def _read(path: Path) -> dict[str, Any] | None:
    """The file's choice; None without one, and, with a warning, where the file is damaged."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
        for name in (*_WHERE, "choice", "date"):
            if not isinstance(entry[name], str):
                raise ValueError(f"{name} is {entry[name]!r}, expected a string")
        if entry["choice"] not in entry["times_ms"] or not all(time_ms > 0 for time_ms in entry["times_ms"].values()):
            raise ValueError(f"times_ms is {entry['times_ms']!r}, expected positive numbers, {entry['choice']!r} among them")
        return entry
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        warn_once(f"autotune choice {path} is ignored: {type(error).__name__}: {error}")
        return None


def _stored(where: Mapping[str, str], names: Sequence[str]) -> str | None:
    """The choice on disk, if it is one that is still offered."""
    entry = _read(_path(where))
    same = entry is not None and entry["choice"] in names and all(entry[name] == where[name] for name in _WHERE)
    return entry["choice"] if same else None


def _store(entry: dict[str, Any], names: Sequence[str]) -> str:
    """Keeps a choice, in one step, so that a reader never sees half a file, and returns it; or the one that another process kept first."""
    path, partial = _path(entry), None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", dir=path.parent, suffix=".partial", delete=False) as file:
            partial = file.name
            json.dump(entry, file, indent=1)
        try:
            os.link(partial, path)  # fails where the file exists, as a rename would not
        except OSError:  # it exists, or there are no links on this file system
            if other := _stored(entry, names):
                return other
            os.replace(partial, path)
    except OSError as error:
        warn_once(f"the autotune choice for {entry['op']} is not kept: {error}")
    finally:
        if partial is not None:
            with contextlib.suppress(OSError):
                os.unlink(partial)
    return entry["choice"]


@functools.cache
def warn_once(message: str) -> None:
    _log.warning("%s", message)
