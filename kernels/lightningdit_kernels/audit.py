"""Compiles every Triton kernel for named GPUs, on a machine without one, and judges the machine code.

    python -m lightningdit_kernels.audit [--op norm] [--arch 90] [--write]

Each <op>_triton.py lists (kernel, configuration) pairs in audit_cases(). They are compiled by triton's own compiler, the cubin is
disassembled by the cuobjdump and nvdisasm that triton's wheel carries, and a table is printed. The audit fails

- on a spill: a stack frame, or loads (LDL) or stores (STL) of local memory;
- on fp64 arithmetic (a Python float that became a double) and on atomics (sums whose order is not fixed);
- on more shared memory than a block can have;
- on kind "attention" or "matmul" without HGMMA on sm_90, unless the case says hgmma=False and reason="...";
- on kind "memory" whose main global loads are not 16 bytes wide, unless the case says wide=False and reason="...";
- on growth of registers or shared memory against the committed table kernels/audit.json, which --write replaces.

A case is a dict: name; kernel; signature {argument: "*bf16", "i32", ...}; constexprs {argument: value}; divisible [arguments that are
multiples of 16]; num_warps; num_stages; kind "memory", "attention", "matmul" or "small"; optional archs, hgmma, wide, reason.
"""

import argparse
import collections
import concurrent.futures
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from lightningdit_kernels.tuning import COMPILE_OPTIONS

OPS = ("swiglu", "norm", "attention", "alignment", "groupnorm")
ARCHS = (80, 90, 100)
KINDS = ("memory", "attention", "matmul", "small")
TABLE = Path(__file__).resolve().parent.parent / "audit.json"  # in a checkout; an installed package has none
JOBS = 2  # compilers at work at once: one needs up to 1 GiB
REGISTER_SLACK = 8  # registers are allocated in eights: less is noise
SHARED_SLACK = 1024  # bytes

WARPS, BLOCKS, REGISTERS = 64, 32, 65536  # of a streaming multiprocessor; the same on these three (CUDA C++ Programming Guide, 21.1)
TENSOR_MEMORY = 512  # columns, on sm_100
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # of which a block may have all but 1 KiB


@dataclass(frozen=True)
class Code:
    """What came out of the compiler for one case on one architecture. Loads and stores are shares in [0, 1] of the bytes moved."""

    registers: int  # of one thread
    stack: int  # bytes of one thread
    local_loads: int
    local_stores: int
    shared: int  # bytes of one block
    warps: int  # of one block
    tensor_memory: int  # columns of one block, sm_100
    hgmma: int  # warpgroup MMA, sm_90
    hmma: int  # warp MMA
    other_mma: int  # tcgen05 on sm_100, and the MMAs of fp8, integers and fp64
    wide_loads: float | None  # share of global loads that are 16 bytes a thread or more; None: no global load
    wide_stores: float | None
    fp64: int
    atomics: int


_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*)$")
_LABEL = re.compile(r"^\s*(\.L_x_\w+):")


def read_sass(text: str) -> list[tuple[str, int]]:
    """(opcode, depth of the loops around it) of every instruction in the output of nvdisasm -c."""
    instructions, labels, backward = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif instruction := _INSTRUCTION.match(line):
            target = re.search(r"\.L_x_\w+", instruction[2])
            if instruction[1].startswith("BRA") and target and labels.get(target[0], len(instructions)) < len(instructions):
                backward.append((labels[target[0]], len(instructions)))
            instructions.append(instruction[1])
    loops = collections.defaultdict(int)  # several branches back to one head are one loop
    for head, end in backward:
        loops[head] = max(loops[head], end)
    return [(opcode, sum(head <= at <= end for head, end in loops.items())) for at, opcode in enumerate(instructions)]


def access_bytes(opcode: str) -> int:
    """Bytes that one thread moves with this load or store."""
    sizes = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
    return next((sizes[modifier] for modifier in opcode.split(".")[1:] if modifier in sizes), 4)


def wide_share(instructions: list[tuple[str, int]], opcodes: tuple[str, ...]) -> float | None:
    """Share of the bytes moved by these opcodes in accesses of 16 bytes or more. An access in a loop counts 16 times per level."""
    total = wide = 0
    for opcode, depth in instructions:
        if opcode.partition(".")[0] in opcodes:
            weight = 16 if opcode.startswith("U") else access_bytes(opcode)  # U: copied by the tensor memory accelerator
            weight *= 16**depth
            total += weight
            wide += weight * (opcode.startswith("U") or access_bytes(opcode) >= 16)
    return wide / total if total else None


def occupancy(code: Code, arch: int) -> tuple[float, str]:
    """Upper bound on resident warps as a share of what the multiprocessor can hold, and what sets it."""
    per_warp = -(-code.registers // 8) * 8 * 32
    bounds = {
        "registers": REGISTERS // per_warp // 4 * 4 // code.warps,  # warps get registers from one of four partitions
        "shared": SHARED[arch] // (code.shared + 1024),  # 1 KiB of every block is the system's
        "warps": WARPS // code.warps,
        "tensor memory": TENSOR_MEMORY // max(1, code.tensor_memory),
        "blocks": BLOCKS,
    }
    limit = min(bounds, key=lambda name: (bounds[name], name != "warps"))
    return bounds[limit] * code.warps / WARPS, limit


def describe(usage: str, sass: str, shared: int, warps: int, tensor_memory: int = 0) -> Code:
    """Code from the output of cuobjdump -res-usage and of nvdisasm -c."""
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    instructions = read_sass(sass)
    counts = collections.Counter(opcode.partition(".")[0] for opcode, _ in instructions)

    def count(pattern):
        return sum(number for opcode, number in counts.items() if re.fullmatch(pattern, opcode))

    loads, stores = ("LDG", "LDGSTS", "UTMALDG", "UBLKCP"), ("STG", "UTMASTG")
    return Code(
        registers=registers,
        stack=stack,
        local_loads=count("LDL"),
        local_stores=count("STL"),
        shared=shared,
        warps=warps,
        tensor_memory=tensor_memory,
        hgmma=count("HGMMA"),
        hmma=count("HMMA"),
        other_mma=count("(?!HGMMA|HMMA).*MMA"),
        wide_loads=wide_share(instructions, loads),
        wide_stores=wide_share(instructions, stores),
        fp64=count("D(ADD|MUL|FMA|SETP|MNMX)|MUFU64"),
        atomics=count("ATOM|ATOMG|RED|REDG"),
    )


def verdict(case: dict, arch: int, code: Code, before: dict | None = None) -> list[str]:
    """What is wrong with this code; [] if nothing. before: its row of the committed table."""
    faults = []
    if code.stack or code.local_loads or code.local_stores:
        faults.append(f"spills ({code.stack} B stack, {code.local_loads} LDL, {code.local_stores} STL)")
    if code.fp64:
        faults.append(f"{code.fp64} fp64 instructions")
    if code.atomics:
        faults.append(f"{code.atomics} atomics")
    if code.shared > SHARED[arch] - 1024:
        faults.append(f"{code.shared} B of shared memory, a block may have {SHARED[arch] - 1024}")
    if occupancy(code, arch)[0] == 0 and not faults:
        faults.append("no block fits on a multiprocessor")
    if case["kind"] in ("attention", "matmul") and arch == 90 and case.get("hgmma", True) and not code.hgmma:
        faults.append("no HGMMA")
    if case["kind"] == "memory" and case.get("wide", True) and (code.wide_loads or 0) < 0.5:
        faults.append("its main loads are narrower than 16 bytes" if code.wide_loads is not None else "no global loads")
    for name, slack in (("registers", REGISTER_SLACK), ("shared", SHARED_SLACK)):
        if before is not None and getattr(code, name) > before[name] + slack:
            faults.append(f"{name} grew from {before[name]} to {getattr(code, name)}")
    return faults


def cases_of(op: str) -> list[dict]:
    """audit_cases() of an op, or of a file that is named by a path ending in .py, checked."""
    if op.endswith(".py"):
        spec = importlib.util.spec_from_file_location(Path(op).stem, op)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(f"lightningdit_kernels.{op}_triton")
    cases = module.audit_cases()
    names = [case["name"] for case in cases]
    if len(set(names)) != len(names):
        raise ValueError(f"{op}: {max(names, key=names.count)} is the name of several cases")
    for case in cases:
        _check(op, case)
    return cases


def _check(op, case):
    name, arguments = f"{op}: {case['name']}", case["kernel"].arg_names
    given = case["signature"].keys() | case["constexprs"].keys()
    if given != set(arguments):
        missing, unknown = sorted(set(arguments) - given), sorted(given - set(arguments))
        raise ValueError(f"{name}: signature and constexprs lack {missing} and have {unknown} too much")
    without = [arg for arg, kind in case["signature"].items() if kind == "constexpr" and arg not in case["constexprs"]]
    if without or not set(case["divisible"]) <= case["signature"].keys():
        raise ValueError(f"{name}: no value for {without}, or divisible names other arguments than the signature: {case['divisible']}")
    if case["kind"] not in KINDS:
        raise ValueError(f"{name}: kind is {case['kind']!r}, expected one of {', '.join(KINDS)}")
    if not (case.get("hgmma", True) and case.get("wide", True)) and not case.get("reason"):
        raise ValueError(f"{name}: hgmma=False or wide=False needs a reason")


def list_cases(op: str) -> list[dict]:
    """The cases of an op without their kernels, which do not travel between processes."""
    return [{key: case[key] for key in case.keys() - {"kernel"}} for case in cases_of(op)]


def compile_case(op: str, name: str, arch: int) -> Code:
    """Compiles one case for sm_<arch> and reads what came out. For a process in which TRITON_INTERPRET is not set."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    case = next(case for case in cases_of(op) if case["name"] == name)
    kernel, constants = case["kernel"], case["constexprs"]
    signature = {arg: "constexpr" if arg in constants else case["signature"][arg] for arg in kernel.arg_names}
    multiples = {(kernel.arg_names.index(arg),): [["tt.divisibility", 16]] for arg in case["divisible"] if arg not in constants}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=multiples)
    options = dict(num_warps=case["num_warps"], num_stages=case["num_stages"], **COMPILE_OPTIONS)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        commands = ([tools / "cuobjdump", "-res-usage", cubin], [tools / "nvdisasm", "-c", cubin])
        usage, sass = (subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands)
    metadata = compiled.metadata
    return describe(usage, sass, metadata.shared, metadata.num_warps, metadata.tmem_size)


def audit(ops: list[str], archs: list[int]) -> list[tuple[str, int, dict, Code | str]]:
    """(op: name, architecture, case, Code or the compiler's error) of every case, in order, compiled by JOBS processes."""
    os.environ.pop("TRITON_INTERPRET", None)  # interpreted kernels cannot be compiled; the children inherit this
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(JOBS, mp_context=context) as pool:
        listed = [(op, case) for op, cases in zip(ops, pool.map(list_cases, ops), strict=True) for case in cases]
        jobs = [(op, case, arch) for op, case in listed for arch in archs if arch in case.get("archs", ARCHS)]
        futures = [pool.submit(compile_case, op, case["name"], arch) for op, case, arch in jobs]
        results = []
        for (op, case, arch), future in zip(jobs, futures, strict=True):
            error = future.exception()
            # triton's compilation errors do not all survive the way between processes, their text does
            results.append((f"{Path(op).stem}: {case['name']}", arch, case, future.result() if error is None else _last_line(error)))
    return results


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def read_table(path: Path) -> dict[str, dict[str, dict]]:
    """Rows by case and architecture. None of them if the table is missing or was written with another triton, which is printed."""
    if not path.is_file():
        print(f"growth is not judged: there is no {path.name}")
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    if content["triton"] != importlib.metadata.version("triton"):
        print(f"growth is not judged: {path.name} was written with triton {content['triton']}")
        return {}
    return content["cases"]


def write_table(path: Path, rows: dict[str, dict[str, dict]]) -> None:
    """One line per case and architecture, so that a diff shows what changed."""
    cases = []
    for name, by_arch in sorted(rows.items()):
        lines = ",\n".join(f"   {json.dumps(arch)}: {json.dumps(by_arch[arch])}" for arch in sorted(by_arch, key=int))
        cases.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    version = json.dumps(importlib.metadata.version("triton"))
    path.write_text(f'{{\n "triton": {version},\n "cases": {{\n' + ",\n".join(cases) + "\n }\n}\n", encoding="utf-8")


def print_table(results, faults) -> None:
    header = ("case", "sm", "regs", "stack", "LDL", "STL", "shared", "warps", "occupancy", "HGMMA", "HMMA", "other", "ld128", "st128", "")
    rows = [header]
    for (name, arch, _, code), wrong in zip(results, faults, strict=True):
        if isinstance(code, str):
            cells = (name, arch, *[""] * 12)
        else:
            share, limit = occupancy(code, arch)
            spill = (code.registers, code.stack, code.local_loads, code.local_stores, code.shared, code.warps)
            wide = ("-" if part is None else f"{part:.0%}" for part in (code.wide_loads, code.wide_stores))
            cells = (name, arch, *spill, f"{share:.0%} {limit}", code.hgmma, code.hmma, code.other_mma, *wide)
        rows.append((*map(str, cells), "FAILS: " + "; ".join(wrong) if wrong else "ok"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightningdit_kernels.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", metavar="OP", help=f"{', '.join(OPS)}, or a .py file with audit_cases(); default: all ops")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHS, help="default: all three")
    parser.add_argument("--table", type=Path, default=TABLE, help="the committed table (default: kernels/audit.json)")
    parser.add_argument("--write", action="store_true", help="replace these rows of the table by what was found")
    options = parser.parse_args(arguments)
    for op in options.op or ():
        if op not in OPS and not Path(op).is_file():
            parser.error(f"--op is {op!r}, expected one of {', '.join(OPS)}, or a file")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("the audit needs triton: pip install triton (Linux only)")

    ops = []
    for op in options.op or OPS:
        if op.endswith(".py") or (Path(__file__).parent / f"{op}_triton.py").is_file():
            ops.append(op)
        else:
            print(f"{op}: has no Triton kernel yet, nothing to audit")
    begin = time.perf_counter()
    results = audit(ops, options.arch or list(ARCHS)) if ops else []
    if not results:
        print("no cases")
        return 0
    table = read_table(options.table)
    faults = []
    for name, arch, case, code in results:
        before = table.get(name, {}).get(str(arch))
        wrong = [code] if isinstance(code, str) else verdict(case, arch, code, None if options.write else before)
        if table and before is None and not options.write:
            wrong.append(f"not in {options.table.name}: add it with --write")
        faults.append(wrong)
    print_table(results, faults)
    failed = sum(map(bool, faults))
    print(f"{len(results)} compiled in {time.perf_counter() - begin:.0f} s, {failed} failed")
    if options.write and failed:
        print(f"{options.table.name} is not written: a kernel that fails is mended first")
    elif options.write:
        stems = {Path(op).stem for op in ops}
        audited = {str(arch) for arch in options.arch or ARCHS}
        rows = {
            name: {arch: row for arch, row in by_arch.items() if name.partition(":")[0] not in stems or arch not in audited}
            for name, by_arch in table.items()
        }
        for name, arch, _, code in results:
            row = {key: round(value, 3) if isinstance(value, float) else value for key, value in asdict(code).items()}
            rows.setdefault(name, {})[str(arch)] = row
        write_table(options.table, {name: by_arch for name, by_arch in rows.items() if by_arch})
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
