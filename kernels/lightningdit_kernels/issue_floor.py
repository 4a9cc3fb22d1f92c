"""Least time in which an H100 or H200 can issue the instructions of a Triton kernel.

    python -m lightningdit_kernels.issue_floor [--case "attention 256"] [--all] [--opcodes 12]

Another configuration, and one behind the prologue:

    ... --case "attention 256 forward" --tile 128,64 --warps 8 --stages 1 --maxnreg 128
    ... --case "attention 256 backward" --tile 128,64 --stages 2 --prepared

No GPU is needed. The launches of training are recorded by running the launchers
(lightningdit_kernels.traffic), each kernel is compiled for sm_90 and disassembled. Instructions in
a loop are multiplied by its trips, which the interpreter counts, and by the warps of the launch,
and spread evenly over 132 SMs x 4 schedulers at 1.755 GHz (--sms, --clock). Columns, in us:

memory the least bytes of the op at the measured rate of a copy, 4.3 TB/s: the memory floor of the
       whole op
issue  one warp instruction a cycle and scheduler, whatever it is: the issue floor
fma    FFMA, FMUL, FADD, packed 16-bit, IMAD: one a cycle; IMAD, of which half of the pipe is
       capable, one every 2 cycles
alu    compare, select, min and max, logic, shifts, integer add, conversion between floats: one
       every 2 cycles
mufu   exp2, rcp, rsqrt, lg2, conversion between float and integer: one every 8 cycles
lsu    loads, stores and shuffles, global, shared and local: one a cycle for all four schedulers
mma    tensor cores: HGMMA 64xNx16 takes N / 2 cycles of each of its four warps, HMMA 16816 takes 4
       (dense bf16: 4,096 FLOP a cycle and SM); tf32 takes twice that

What it means: no kernel can be faster than its largest column; one that overlaps well comes close
to the larger of that and its memory floor. Kernels of an op run one after another, so their floors
add up. "warps": how many an SM can hold; with 8 there is little to hide latency behind. "loops":
instructions of each loop, for all rows of a warp (with twice the warps a warp has half the rows).

What it does not mean: it is no estimate of time. Left out are latency, barriers, dependences, bank
conflicts, the 4 passes of a 16-byte access through the LSU, the last wave, launches, L2 and DRAM.
Both sides of a branch count as executed (there are few, and short); so do loops without a load, a
store or a product, such as the search for a block's number, as one pass. Kernels that add up
partial results (kind "small" in the audit) and PyTorch's own are left out: they issue almost
nothing, and the compiler unrolls their loops.

"check" is what the machine code is counted to do over what the interpreter saw: FLOP of matrix
products if there are any, otherwise bytes stored, both with padding and masked elements. 1.00 is
right; stores count all lanes, up to 2.00 where several threads hold one value. Outside of CHECK the
loops were not understood, and that is an error; kernels that are told to store less than a warp's
width at a time are not checked.
"""

import argparse
import collections
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightningdit_kernels import traffic
from lightningdit_kernels.machine_code import (
    OPS,
    WARPS,
    Code,
    Sass,
    access_bytes,
    compile_case,
    load_module,
    occupancy,
)

ARCH = 90
SMS, SCHEDULERS, CLOCK_GHZ = 132, 4, 1.755
COPY_TB_S = 4.3  # read + written by a copy on the device, measured on an H200
CHECK = (0.9, 2.1)
COLUMNS = ("issue", "fma", "alu", "mufu", "lsu", "mma")
FMA = frozenset("FFMA FMUL FADD HFMA2 HADD2 HMUL2 HSETP2 HMNMX2".split())
ALU = frozenset(
    "FMNMX FSETP FSET FSEL SEL F2FP I2FP IADD3 IADD LOP3 PLOP3 SHF SGXT BMSK PRMT ISETP LEA MOV "
    "P2R R2P CS2R VIADD VIADDMNMX VIMNMX IMNMX IABS VABSDIFF".split()
)
MUFU = frozenset("MUFU F2F F2I I2F FRND POPC FLO BREV".split())
GLOBAL = frozenset("LDG STG LDGSTS UTMALDG UTMASTG UBLKCP".split())
LSU = frozenset("LDG STG LDS STS LDSM STSM LDGSTS LDL STL LD ST SHFL ATOM ATOMG ATOMS RED".split())
MMA = frozenset(("HGMMA", "HMMA"))


def name_of(opcode: str) -> str:
    """An opcode without its modifiers."""
    return opcode.partition(".")[0]


def loops_of(sass: Sass) -> list[tuple[int, int]]:
    """The loops that touch memory or multiply matrices; the others wait, end the program, or look
    for a number.
    """
    busy = GLOBAL | MMA | {"LDS", "STS", "LDSM"}
    return [
        (head, end)
        for head, end in sass.loops
        if any(name_of(op) in busy for op in sass.opcodes[head : end + 1])
    ]


def count(sass: Sass, trips: Sequence[float]) -> collections.Counter:
    """How often one warp executes each opcode.

    Args:
        trips: a program's passes through each loop, in all, in the order of the code. A loop inside
            another has those of all passes of the outer one.
    Raises: ValueError if the code has another number of loops.
    """
    loops = loops_of(sass)
    if len(loops) != len(trips):
        trips = [number for number in trips if number != 1]  # a single trip leaves no loop
    if len(loops) != len(trips):
        lengths = [end - head + 1 for head, end in loops]
        found = f"found loops of {lengths} instructions, expected {len(trips)}"
        raise ValueError(f"{found}: one was unrolled or split")
    weights = [1.0] * len(sass.opcodes)
    # An inner loop comes after the one around it.
    for (head, end), number in zip(loops, trips, strict=True):
        weights[head : end + 1] = [number] * (end + 1 - head)
    counts = collections.Counter()
    for opcode, weight in zip(sass.opcodes, weights, strict=True):
        if opcode != "NOP":  # alignment behind the end
            counts[opcode] += weight
    return counts


def mma_flop(opcode: str) -> int:
    """FLOP of one warp's instruction, a quarter of a warpgroup's: HGMMA.64x64x16, HMMA.16816."""
    if wide := re.search(r"\.(\d+)x(\d+)x(\d+)", opcode):
        m, n, k = map(int, wide.groups())
        return 2 * m * n * k // 4
    if narrow := re.search(r"\.16(8)(4|8|16)\b", opcode):
        return 2 * 16 * 8 * int(narrow[2])
    raise ValueError(f"{opcode}: expected a shape such as .64x64x16 or .16816")


def mma_cycles(opcode: str) -> float:
    """Cycles for which it keeps its tensor core busy: 1,024 FLOP of 16-bit operands a cycle, 512 of
    tf32.
    """
    return mma_flop(opcode) / (512 if "TF32" in opcode else 1024)


def stored_bytes(opcode: str) -> int:
    """Bytes that a warp writes to global memory with all lanes on."""
    return 32 * access_bytes(opcode) if name_of(opcode) == "STG" else 0


def floors(
    counts: collections.Counter, warps: float, sms: int = SMS, clock_ghz: float = CLOCK_GHZ
) -> dict[str, float]:
    """us by column, for that many warps in all."""
    cycles = collections.Counter(issue=counts.total())
    for opcode, number in counts.items():
        name = name_of(opcode)
        if name in FMA or name == "IMAD":
            cycles["fma"] += number
            cycles["imad"] += 2 * number if name == "IMAD" else 0
        elif name in MMA:
            cycles["mma"] += mma_cycles(opcode) * number
        for pipe, names, each in (("alu", ALU, 2), ("mufu", MUFU, 8), ("lsu", LSU, SCHEDULERS)):
            cycles[pipe] += each * number if name in names else 0
    cycles["fma"] = max(cycles["fma"], cycles["imad"])
    return {
        column: cycles[column] * warps / (SCHEDULERS * sms) / (clock_ghz * 1e3)
        for column in COLUMNS
    }


def memory_us(least: int) -> float:
    """Time of a copy that moves so many bytes."""
    return least / COPY_TB_S / 1e6


@dataclass(frozen=True)
class Floor:
    """Of one launch: us by column, instructions of a warp, the check (None: nothing to check)."""

    us: dict[str, float]
    counts: collections.Counter
    check: float | None


def floor_of(
    launch: traffic.Launch, code: Code, sass: Sass, sms: int = SMS, clock_ghz: float = CLOCK_GHZ
) -> Floor:
    """The floors of a launch, given its machine code.

    Raises: ValueError if the loops of the code do not match those of the kernel, or the check lies
        outside of CHECK.
    """
    counts = count(sass, launch.trips)
    warps = launch.programs * code.warps
    check = None
    if launch.flop:
        check = sum(n * mma_flop(op) for op, n in counts.items() if name_of(op) in MMA)
        check *= warps / launch.flop
    elif launch.stored >= warps * 32 * 2:
        check = sum(n * stored_bytes(op) for op, n in counts.items()) * warps / launch.stored
    if check is not None and not CHECK[0] <= check <= CHECK[1]:
        found = f"the machine code does {check:.2f} times what the interpreter counted"
        raise ValueError(f"{found}, expected {CHECK[0]} to {CHECK[1]}")
    return Floor(floors(counts, warps, sms, clock_ghz), counts, check)


def compile_launch(op: str, launch: traffic.Launch, **options: int) -> tuple[Code, Sass]:
    """What a launch runs, compiled as triton would on the device."""
    case = dict(
        kernel=getattr(load_module(op), launch.kernel), divisible=launch.divisible, **launch.options
    )
    return compile_case(
        case | dict(signature=launch.signature, constexprs=launch.constexprs), ARCH, **options
    )


def title_of(measurement: traffic.Measurement, launch: traffic.Launch) -> str:
    """Workload, kernel and configuration."""
    blocks = ",".join(map(str, launch.blocks.values()))
    setting = f"{launch.options['num_warps']} warps {launch.options['num_stages']} stages"
    prepared = " prepared" if launch.constexprs.get("PREPARED") else ""
    return (
        " ".join(
            filter(None, (f"{measurement.workload}:", launch.kernel.strip("_"), blocks, setting))
        )
        + prepared
    )


def measured(futures: Sequence, workload: str) -> list[traffic.Measurement]:
    """Results until the table has no further configuration."""
    results = []
    for future in futures:
        try:
            results.append(future.result())
        except IndexError:
            break
    if not results:
        raise ValueError(f"{workload}: nothing was launched")
    return results


def report(measurement: traffic.Measurement, options: argparse.Namespace) -> list[tuple[str, ...]]:
    """Lines of the table: one for each launch, and the sum of all."""
    rows, total, limits = (
        [],
        collections.Counter(),
        {"maxnreg": options.maxnreg} if options.maxnreg else {},
    )
    for launch in measurement.launches:
        if launch.small:
            continue
        code, sass = compile_launch(measurement.op, launch, **limits)
        floor = floor_of(launch, code, sass, options.sms, options.clock)
        total.update(floor.us)
        resident = round(occupancy(code, ARCH)[0] * WARPS)
        numbers = (
            code.registers,
            code.local_stores,
            f"{code.shared / 1024:.1f}",
            resident,
            round(floor.counts.total()),
        )
        check = "-" if floor.check is None else f"{floor.check:.2f}"
        lengths = ",".join(str(end - head + 1) for head, end in loops_of(sass))
        times = _times(floor.us)
        rows.append((title_of(measurement, launch), *map(str, numbers), "", *times, check, lengths))
        if options.opcodes:
            most = ", ".join(
                f"{opcode} {number:.0f}"
                for opcode, number in floor.counts.most_common(options.opcodes)
            )
            rows.append((f"    {most}", *[""] * 14))
    memory = f"{memory_us(measurement.least):.1f}"
    return [*rows, (f"{measurement.workload}: all", *[""] * 5, memory, *_times(total), "", "")]


def _times(us: dict[str, float]) -> list[str]:
    return [f"{us[column]:.1f}" for column in COLUMNS]


HEADER = (
    "kernel",
    "regs",
    "spills",
    "KiB",
    "warps",
    "a warp",
    "memory",
    *COLUMNS,
    "check",
    "loops",
)


def main(arguments: list[str] | None = None) -> int:
    name = "python -m lightningdit_kernels.issue_floor"
    parser = argparse.ArgumentParser(prog=name, description=__doc__.splitlines()[0])
    traffic.add_arguments(parser)
    parser.add_argument(
        "--all",
        action="store_true",
        help="every configuration of the sm_90 tables, the choice first",
    )
    parser.add_argument(
        "--maxnreg", type=int, help="limit of registers a thread, of every kernel that is compiled"
    )
    parser.add_argument(
        "--opcodes",
        type=int,
        default=0,
        metavar="K",
        help="also the K most frequent opcodes of a warp",
    )
    parser.add_argument("--sms", type=int, default=SMS, help="multiprocessors (132)")
    parser.add_argument("--clock", type=float, default=CLOCK_GHZ, help="GHz (1.755)")
    options = parser.parse_args(arguments)
    sizes, changes = traffic.check_arguments(parser, options)
    limits = (
        ("maxnreg", options.maxnreg, 24),
        ("opcodes", options.opcodes, 0),
        ("sms", options.sms, 1),
    )
    for flag, value, least in limits:
        if value is not None and value < least:
            parser.error(f"--{flag} is {value}, expected at least {least}")
    if not options.clock > 0:
        parser.error(f"--clock is {options.clock}, expected more than 0")
    rows = [HEADER]
    with traffic.pool(2) as workers:
        chosen = traffic.choose(parser, options, traffic.listed_names(workers, options.op or OPS))
        candidates = range(8 if options.all else 1)
        jobs = [
            [
                workers.submit(
                    traffic.measure_named, op, case, replace(changes, candidate=at), **sizes
                )
                for at in candidates
            ]
            for op, case in chosen
        ]
        for futures, (_, case) in zip(jobs, chosen, strict=True):
            for measurement in measured(futures, case):
                rows += report(measurement, options)
    traffic.print_rows(rows, text_columns=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
