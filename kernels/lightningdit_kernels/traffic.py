"""Counts the bytes that the Triton kernels load and store, against the least they must move.

    python -m lightningdit_kernels.traffic [--op norm] [--case "norm forward"] [--by-argument]

No GPU is needed: kernels run in triton's interpreter. Each <op>_triton.py lists what training
launches in workloads(). The launchers run as they are, at full size, on CPU tensors that nobody
fills, with the tables of sm_90. Of every launch the first programs are interpreted and counted, and
stand for the others. For each kernel is printed:

asked   bytes of the unmasked elements of all loads and stores: what the multiprocessors move.
L2      32-byte sectors that each load or store of a program touches, summed: what caches above L2
        cannot merge inside one instruction. Over about 5.5 TB/s (H100, H200) that is a second floor
        of time; L1 may do better.
DRAM    distinct sectors read, but for those that the launch has written before, plus distinct
        sectors written: what moves if L2 were infinite.
of least, L2/least    DRAM and L2 over the least bytes of the op: every input, saved tensor and
        result once (group norm: its inputs twice, for statistics come first).

PyTorch's own operators inside a launcher (sums of partial results, casts) are counted as inputs +
outputs, in a line "torch ...". A ratio above 1 for a complete op is traffic that could be saved.
--by-argument says how many bytes of each argument are loaded and stored. What the interpreter
cannot know: cache misses on reuse, bank conflicts, instructions.

A workload is a dict: name; launch, a function without arguments; reads, the tensors that the op
must read (listed as often as it must read them); optional programs, how many of a launch are
interpreted (PROGRAMS); optional whole, the kernels that run whole, because what they write is an
address to others. Results are counted once too.

The bytes of the first n programs stand for those of all by proportion, and the sectors of an
argument are capped by its size. That is exact for what programs divide among them, for what they
share, such as a weight, and for what groups of them share, such as the keys of a head; so the
ratios depend neither on n nor on the number of images or heads. If all programs share one part of
an argument and none reads the rest (the table of rotations), the rest is counted too.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import inspect
import math
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightningdit_kernels import interpreter
from lightningdit_kernels.machine_code import OPS, cases_of, load_module
from lightningdit_kernels.tuning import Config, architecture

ARCH = architecture(torch.device("cpu"))  # whose tables the launchers take here
SECTOR = 32
PROGRAMS = 4  # interpreted of one launch
SIZES = ("tokens", "images", "head_dim")  # keywords of workloads(), which an op may lack
TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: what it is compiled for, and what all its programs do.

    Args:
        kernel: name of the function in the op's module.
        case: the audit case that compiles it, None if there is none.
        small: of kind "small" in the audit: it sums partial results and issues almost nothing.
        signature, constexprs, divisible: as in an audit case.
        options: num_warps, num_stages.
        blocks: block sizes of the configuration.
        programs: of the whole launch.
        trips: passes of a program through each loop, in the order of the code.
        flop: of matrix products, padding included.
        stored: bytes of its stores, with masked elements.
        asked, l2, dram: bytes, as the module counts them.
        arguments: {("load" or "store", argument): bytes asked}.
    """

    kernel: str
    case: str | None
    small: bool
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
    options: dict[str, int]
    blocks: dict[str, int]
    programs: int
    trips: tuple[float, ...]
    flop: float
    stored: float
    asked: float
    l2: float
    dram: float
    arguments: dict[tuple[str, str], float]


@dataclass(frozen=True)
class Measurement:
    """All that one workload launched. least: bytes of inputs and results."""

    op: str
    workload: str
    least: int
    launches: tuple[Launch, ...]
    torch: dict[str, tuple[int, int]]  # PyTorch's operators: calls, bytes

    def ratio(self, name: str) -> float:
        """Bytes `name` ("dram" or "l2") of the kernels, and those of PyTorch's operators, over least."""
        operators = sum(size for _, size in self.torch.values())
        kernels = sum(getattr(launch, name) for launch in self.launches)
        return (kernels + operators) / self.least


class _Operand:
    """A tensor argument as addresses."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.begin, self.item = tensor.data_ptr(), tensor.element_size()
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        self.axes = sorted(((stride, size) for stride, size in pairs if size > 1), reverse=True)

    def __contains__(self, address: int) -> bool:
        offset = (address - self.begin) // self.item
        for stride, size in self.axes:
            index, offset = divmod(offset, stride) if stride else (0, offset)
            if not 0 <= index < size:
                return False
        return offset == 0

    def sectors(self) -> int:
        """How many sectors it lies in, at most."""
        dense = 1
        blocks = list(self.axes)
        while blocks and blocks[-1][0] == dense:
            dense *= blocks.pop()[1]
        length = dense * self.item
        number = math.prod(size for stride, size in blocks if stride)
        first = self.begin % SECTOR
        return number * -(-(first + length) // SECTOR)


class _Counter:
    """The observer: what happened in the launch under way, and the launches before."""

    def __init__(self, op: str) -> None:
        self.op, self.launches = op, []
        self.configs: list[Config] = []
        self.torch: dict[str, tuple[int, int]] = {}
        self.running = False
        self.limit, self.whole = PROGRAMS, ()
        self.cases = cases_of(op) if hasattr(load_module(op), "audit_cases") else []

    def begin(
        self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]
    ) -> int:
        self.running, self.kernel, self.programs = True, kernel, programs
        self.counted = programs if kernel.fn.__name__ in self.whole else min(programs, self.limit)
        self.spec = specification(kernel, arguments, options)
        tensors = {
            name: a for name, a in arguments.items() if isinstance(a, torch.Tensor) and a.numel()
        }
        self.operands = {name: _Operand(tensor) for name, tensor in tensors.items()}
        self.touched: dict[tuple[str, str], list[np.ndarray]] = collections.defaultdict(list)
        self.trips: dict[tuple, int] = {}
        self.totals, self.arguments = collections.Counter(), collections.Counter()
        return self.counted

    def access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        if kind == "store":
            self.totals["stored"] += addresses.size * size
        at = np.asarray(addresses)[
            np.broadcast_to(np.asarray(mask, dtype=bool), addresses.shape)
        ].astype(np.int64)
        if not at.size:
            return
        first, last = at // SECTOR, (at + size - 1) // SECTOR
        sectors = np.unique(first if np.array_equal(first, last) else np.concatenate([first, last]))
        name = self._argument(kind, int(at.min()), int(at.max()))
        self.arguments[kind, name] += at.size * size
        self.totals.update(asked=at.size * size, l2=sectors.size * SECTOR)
        if kind == "load" and ("store", name) in self.touched:  # what was written is in L2
            sectors = np.setdiff1d(sectors, np.concatenate(self.touched["store", name]))
        self.touched[kind, name].append(sectors)

    def _argument(self, kind: str, lowest: int, highest: int) -> str:
        for name, operand in self.operands.items():
            if lowest in operand and highest in operand:
                return name
        kernel = self.kernel.fn.__name__
        raise ValueError(f"{kernel}: {kind} outside of its arguments: {lowest:#x} to {highest:#x}")

    def product(self, m: int, n: int, k: int, passes: int) -> None:
        self.totals["flop"] += 2 * m * n * k * passes

    def loop(self, site: tuple, trips: int) -> None:
        self.trips[site] = self.trips.get(site, 0) + trips

    def end(self) -> None:
        self.running = False
        if not self.counted:
            return
        share = self.programs / self.counted
        sectors = 0.0
        for (_, name), parts in self.touched.items():
            touched = np.unique(np.concatenate(parts)).size
            sectors += min(touched * share, self.operands[name].sectors())
        kinds = {case["kind"] for case in self.cases if case["kernel"] is self.kernel}
        blocks = self.configs[-1].blocks if self.configs else {}
        launch = Launch(
            kernel=self.kernel.fn.__name__,
            case=case_of(self.cases, self.kernel, self.spec),
            small="small" in kinds,
            **self.spec,
            blocks={name: size for name, size in blocks.items() if name in self.spec["constexprs"]},
            programs=self.programs,
            trips=tuple(number / self.counted for number in self.trips.values()),
            **{name: self.totals[name] * share for name in ("flop", "stored", "asked", "l2")},
            dram=sectors * SECTOR,
            arguments={key: size * share for key, size in self.arguments.items()},
        )
        self.launches.append(launch)

    def operator(self, name: str, size: int) -> None:
        """One of PyTorch's operators, in a launcher."""
        calls, before = self.torch.get(name, (0, 0))
        self.torch[name] = (calls + 1, before + size)


def specification(
    kernel: Any, arguments: dict[str, Any], options: dict[str, Any]
) -> dict[str, Any]:
    """What a launch is compiled for: signature, constexprs, divisible and options of a Launch, as
    triton specialises.
    """
    declared = {
        name for name, kind in kernel.fn.__annotations__.items() if "constexpr" in str(kind)
    }
    general = kernel.kwargs.get("do_not_specialize") or ()
    constexprs, signature, divisible = {}, {}, []
    for name, value in arguments.items():
        free = name not in general
        if name in declared or value is None or (type(value) is int and value == 1 and free):
            constexprs[name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[name] = f"*{TYPES[value.dtype]}"
            whole = value.data_ptr() % 16 == 0
        else:
            signature[name] = (
                "fp32"
                if isinstance(value, float)
                else "i32"
                if -(2**31) <= value < 2**31
                else "i64"
            )
            whole = isinstance(value, int) and value % 16 == 0 and free
        if whole:
            divisible.append(name)
    launch = dict(num_warps=options.get("num_warps", 4), num_stages=options.get("num_stages", 3))
    return dict(
        signature=signature, constexprs=constexprs, divisible=tuple(divisible), options=launch
    )


def case_of(cases: Iterable[dict[str, Any]], kernel: Any, spec: dict[str, Any]) -> str | None:
    """Name of the audit case that compiles what a launch needs, by specification(); None if there
    is none.
    """
    return next((case["name"] for case in cases if _fits(case, kernel, spec)), None)


def _fits(case: dict[str, Any], kernel: Any, spec: dict[str, Any]) -> bool:
    """Whether the audit compiles for this case what a launch needs."""
    if case["kernel"] is not kernel or ARCH not in case.get("archs", (ARCH,)):
        return False
    if any(case[name] != value for name, value in spec["options"].items()):
        return False
    signature, constexprs = spec["signature"], spec["constexprs"]
    for name, kind in case["signature"].items():
        # triton makes a constexpr of an integer that is 1.
        is_one = constexprs.get(name) == 1
        if name not in case["constexprs"] and signature.get(name) != kind and not is_one:
            return False
    if not set(case["divisible"]) & signature.keys() <= set(spec["divisible"]):
        return False  # narrower loads than those of the case
    return all(constexprs.get(name, kernel) == value for name, value in case["constexprs"].items())


class _Operators(TorchDispatchMode):
    """Counts inputs and outputs of PyTorch's operators outside of kernels, except of those that
    only make views.
    """

    FREE = frozenset(
        "empty new_empty empty_like empty_strided new_empty_strided view _unsafe_view reshape "
        "flatten detach alias slice select transpose unsqueeze t expand as_strided split chunk "
        "unbind lift_fresh".split()
    )
    WRITE_ONLY = ("new_", "zeros", "ones", "full")

    def __init__(self, counter: _Counter) -> None:
        super().__init__()
        self.counter = counter

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, which takes seconds

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not self.counter.running and func.namespace == "aten" and name not in self.FREE:
            results = result if isinstance(result, tuple) else (result,)
            moved = nbytes(*(() if name.startswith(self.WRITE_ONLY) else args), *results)
            if moved:
                self.counter.operator(name, moved)
        return result


def nbytes(*values: Any) -> int:
    """Bytes of the tensors among the values."""
    return sum(
        value.numel() * value.element_size() for value in values if isinstance(value, torch.Tensor)
    )


@dataclass(frozen=True)
class Changes:
    """Another configuration than the launchers' static choice. None: as tabled.

    candidate: which of the table's configurations. blocks: sizes in the order of the table.
    prepared: attention behind the prologue, or not.
    """

    candidate: int = 0
    blocks: tuple[int, ...] | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    prepared: bool | None = None

    def apply(self, config: Config) -> Config:
        """The configuration with these changes. Raises: ValueError if it has another number of
        block sizes.
        """
        blocks = config.blocks
        if self.blocks is not None:
            if len(self.blocks) != len(blocks):
                tile, expected = ",".join(map(str, self.blocks)), ",".join(blocks)
                raise ValueError(f"tile is {tile}, expected {len(blocks)} sizes: {expected}")
            blocks = dict(zip(blocks, self.blocks, strict=True))
        return Config(
            blocks, self.num_warps or config.num_warps, self.num_stages or config.num_stages
        )


def _choice(pick: Callable, changes: Changes, counter: _Counter) -> Callable:
    """Takes the place of tuning.pick in a launcher's module."""

    def chosen(op, configs, device, shape_class, key, bench=None):
        config = pick(op, configs, device, shape_class, key)
        arch = max(known for known, name in configs if name == shape_class and known <= ARCH)
        candidates = configs[arch, shape_class]
        if changes.candidate < len(candidates):
            config = candidates[changes.candidate]
        elif bench is not None:
            raise IndexError(f"{op} has {len(candidates)} configurations")
        counter.configs.append(changes.apply(config))
        return counter.configs[-1]

    return chosen


def measure(op: str, workload: dict[str, Any], changes: Changes | None = None) -> Measurement:
    """Runs a workload and counts. For a process in which the interpreter is switched on.

    Raises: ValueError if a kernel reads or writes outside of its arguments; IndexError if there is
        no such candidate.
    """
    module, counter = load_module(op), _Counter(op)
    counter.limit, counter.whole = workload.get("programs", PROGRAMS), workload.get("whole", ())
    changes = changes or Changes()
    with contextlib.ExitStack() as stack:
        if hasattr(module, "pick"):
            choice = _choice(module.pick, changes, counter)
            stack.enter_context(mock.patch.object(module, "pick", choice))
        if hasattr(module, "_prepares") and changes.prepared is not None:
            way = mock.patch.object(module, "_prepares", lambda *_: changes.prepared)
            stack.enter_context(way)
        stack.enter_context(interpreter.observe(counter))
        stack.enter_context(_Operators(counter))
        results = workload["launch"]()
    results = results if isinstance(results, tuple) else (results,)
    least = nbytes(*workload["reads"], *results)
    return Measurement(op, workload["name"], least, tuple(counter.launches), counter.torch)


def workloads_of(op: str, **sizes: int) -> list[dict[str, Any]]:
    """workloads() of an op, or of a file named by a path ending in .py; none if it lists none.

    sizes: of SIZES; those that the op does not know are left out.
    """
    listed = getattr(load_module(op), "workloads", None)
    if listed is None:
        return []
    known = inspect.signature(listed).parameters
    return listed(**{name: size for name, size in sizes.items() if name in known})


def names_of(op: str) -> list[str]:
    """Names of the workloads of an op."""
    return [workload["name"] for workload in workloads_of(op)]


def measure_named(op: str, name: str, changes: Changes | None = None, **sizes: int) -> Measurement:
    """The workload of that name, measured."""
    workload = next(workload for workload in workloads_of(op, **sizes) if workload["name"] == name)
    return measure(op, workload, changes)


def prepare_process() -> None:
    """Initialises a process of a pool for measure_named."""
    torch.set_num_threads(1)
    interpreter.switch_on()


def pool(workers: int = 1) -> concurrent.futures.ProcessPoolExecutor:
    """Processes in which kernels are interpreted, each on one thread, whatever this one does."""
    return forked(workers, prepare_process)


def forked(workers: int, initializer: Callable[[], None]) -> concurrent.futures.ProcessPoolExecutor:
    """Processes forked from one that has imported torch, which takes seconds, but not triton, which
    interprets or compiles as the environment says when it is imported.

    All of them have the environment of this process as it was at the first call. A script that asks
    for them must not import kernels before its `if __name__ == "__main__"`: they import it, too.
    """
    # numpy reads it when it is imported, before any initializer runs.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])
    return concurrent.futures.ProcessPoolExecutor(
        workers, mp_context=context, initializer=initializer
    )


HEADER = ("workload", "kernel", "launches", "asked MB", "L2 MB", "DRAM MB", "of least", "L2/least")


def rows_of(measurement: Measurement, by_argument: bool = False) -> list[tuple[str, ...]]:
    """Lines of the table under HEADER: each kernel and operator, with by_argument each of its
    arguments, and the sum.
    """
    rows, kernels = [], collections.defaultdict(list)
    for launch in measurement.launches:
        kernels[launch.kernel.strip("_")].append(launch)
    everything = []
    for name, launches in kernels.items():
        sums = [sum(getattr(launch, key) for launch in launches) for key in ("asked", "l2", "dram")]
        everything.append((len(launches), *sums))
        rows.append(_row(measurement, name, *everything[-1]))
        if by_argument:
            rows += _argument_rows(launches)
    for name, (calls, size) in measurement.torch.items():
        everything.append((calls, size, size, size))
        rows.append(_row(measurement, f"torch {name}", *everything[-1]))
    return [*rows, _row(measurement, "ALL", *map(sum, zip(*everything, strict=True)))]


def _row(
    measurement: Measurement, name: str, launches: int, asked: float, l2: float, dram: float
) -> tuple[str, ...]:
    sizes = (f"{size / 1e6:.2f}" for size in (asked, l2, dram))
    least = measurement.least
    return (
        measurement.workload,
        name,
        str(launches),
        *sizes,
        f"{dram / least:.1%}",
        f"{l2 / least:.2f}",
    )


def _argument_rows(launches: Sequence[Launch]) -> list[tuple[str, ...]]:
    sums = collections.Counter()
    for launch in launches:
        sums.update(launch.arguments)
    return [
        ("", f"  {kind} {name}", "", f"{size / 1e6:.2f}", "", "", "", "")
        for (kind, name), size in sums.most_common()
    ]


def print_rows(rows: Sequence[Sequence[str]], text_columns: int = 2) -> None:
    """Columns of equal width, all but the first ones to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if at < text_columns else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What traffic and issue_floor are asked for in the same way."""
    parser.add_argument(
        "--op",
        action="append",
        metavar="OP",
        help=f"{', '.join(OPS)}, or a .py file; default: all ops",
    )
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="TEXT",
        help="workloads whose name contains it",
    )
    parser.add_argument(
        "--tokens", type=int, help="tokens of the batch, a multiple of 1,024 (32,768)"
    )
    parser.add_argument(
        "--images", type=int, help="images of group norm and of the alignment losses (8)"
    )
    parser.add_argument("--head-dim", type=int, help="of attention (72): a multiple of 8 up to 256")
    parser.add_argument("--tile", metavar="M,N", help="block sizes, in the order of the op's table")
    parser.add_argument("--warps", type=int, help="warps of a program: a power of two")
    parser.add_argument("--stages", type=int, help="stages of pipelined loops")
    parser.add_argument(
        "--prepared",
        action=argparse.BooleanOptionalAction,
        help="attention behind its prologue or not",
    )


def check_arguments(
    parser: argparse.ArgumentParser, options: argparse.Namespace
) -> tuple[dict[str, int], Changes]:
    """sizes and changes for measure_named; the parser's error, which ends the process, for what
    makes no sense.
    """
    for op in options.op or ():
        if op not in OPS and not (op.endswith(".py") and Path(op).is_file()):
            parser.error(f"--op is {op!r}, expected one of {', '.join(OPS)}, or a .py file")
    limits = (
        ("tokens", 1024, "a positive multiple of 1024", lambda n: n % 1024 == 0),
        ("images", 1, "at least 1", lambda n: True),
        ("head_dim", 8, "a multiple of 8 up to 256", lambda n: n % 8 == 0 and n <= 256),
        ("warps", 1, "a power of two up to 32", lambda n: n & (n - 1) == 0 and n <= 32),
        ("stages", 1, "at least 1", lambda n: True),
    )
    for name, least, expected, allowed in limits:
        value = getattr(options, name)
        if value is not None and not (value >= least and allowed(value)):
            parser.error(f"--{name.replace('_', '-')} is {value}, expected {expected}")
    blocks = None
    if options.tile is not None:
        parts = options.tile.split(",")
        if not all(
            part.isdecimal() and int(part) and int(part) & (int(part) - 1) == 0 for part in parts
        ):
            parser.error(
                f"--tile is {options.tile!r}, expected powers of two with commas between them"
            )
        blocks = tuple(map(int, parts))
    sizes = {name: getattr(options, name) for name in SIZES if getattr(options, name) is not None}
    return sizes, Changes(0, blocks, options.warps, options.stages, options.prepared)


def choose(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: dict[str, list[str]]
) -> list[tuple[str, str]]:
    """(op, workload) of what --case asks for; names: the workloads of each op."""
    every = [(op, name) for op, listed in names.items() for name in listed]
    for text in options.case:
        if not any(text in name for _, name in every):
            known = ", ".join(name for _, name in every)
            parser.error(f"--case is {text!r}, expected part of one of: {known}")
    return [
        (op, name)
        for op, name in every
        if not options.case or any(text in name for text in options.case)
    ]


def listed_names(workers: concurrent.futures.Executor, ops: Iterable[str]) -> dict[str, list[str]]:
    """Workloads by op, asked of a pool."""
    ops = list(ops)
    return dict(zip(ops, workers.map(names_of, ops), strict=True))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lightningdit_kernels.traffic", description=__doc__.splitlines()[0]
    )
    add_arguments(parser)
    parser.add_argument(
        "--by-argument",
        action="store_true",
        help="also how many bytes of each argument are asked for",
    )
    options = parser.parse_args(arguments)
    sizes, changes = check_arguments(parser, options)
    with pool(2) as workers:
        chosen = choose(parser, options, listed_names(workers, options.op or OPS))
        futures = [workers.submit(measure_named, op, name, changes, **sizes) for op, name in chosen]
        rows = [row for future in futures for row in rows_of(future.result(), options.by_argument)]
    print_rows([HEADER, *rows])
    return 0


if __name__ == "__main__":
    sys.exit(main())
