"""Compiles every Triton kernel for named GPUs, on a machine without one, and judges the machine code.

    python -m lightningdit_kernels.audit [--op norm] [--arch 90] [--launched | --write]

Each <op>_triton.py lists (kernel, configuration) pairs in audit_cases(), and in workloads() what training launches: XL/1 in bf16 with the
attention backend "triton" (the default, "auto", takes PyTorch's attention until a GPU has been measured), the VA-VAE in bf16 and fp32. The
cases are compiled and disassembled (lightningdit_kernels.machine_code), the workloads are run and counted in triton's interpreter
(lightningdit_kernels.traffic, lightningdit_kernels.issue_floor), and a table is printed: the cases, then the workloads. The audit fails

- on a spill: a stack frame, or loads (LDL) or stores (STL) of local memory;
- on fp64 arithmetic (a Python float that became a double), unless the case says fp64=True and reason="...";
- on atomics (sums whose order is not fixed);
- on more shared memory than a block can have;
- on kind "attention" or "matmul" without HGMMA on sm_90, unless the case says hgmma=False and reason="...";
- on kind "memory" whose main global loads are not 16 bytes wide, unless the case says wide=False and reason="...";
- on a workload that does not run, or that launches what no case compiles;
- on growth of registers, shared memory, traffic or floors against the committed table kernels/audit.json, which --write replaces, and
  on what is in one of them only. Traffic and floors are those of sm_90: of a workload, PyTorch's operators between its kernels included,
  and of the cases that a workload launches. The other cases, the other presets' widths among them, have none.
"""

import argparse
import concurrent.futures
import importlib.metadata
import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from lightningdit_kernels import interpreter, issue_floor, traffic
from lightningdit_kernels.machine_code import OPS, SHARED, Code, Sass, cases_of, compile_kernel, occupancy, read_kernels
from lightningdit_kernels.traffic import Measurement

ARCHS = (80, 90, 100)
TABLE = Path(__file__).resolve().parent.parent / "audit.json"  # in a checkout; an installed package has none
JOBS = 2  # compilers at work at once: one needs up to 1 GiB
BATCH = 8  # cases that a compiler compiles and disassembles as one job
PROGRESS_S = 15  # between lines that say how many are compiled
REGISTER_SLACK = 8  # registers are allocated in eights: less is noise
SHARED_SLACK = 1024  # bytes
# Of a column against the table. The least bytes, too: with one more result they grow, and the ratios over them do not.
GROWTH = dict(traffic=1.02, l2=1.02, memory_us=1.02, issue_us=1.05)
SECTIONS = ("cases", "workloads")  # of the table

Table = dict[str, dict[str, dict[str, dict]]]  # rows by section, name and architecture


@dataclass(frozen=True)
class Load:
    """What a workload does, or a case in the first workload that launches it, summed over its launches there.

    Growth of a case in its other workloads shows in their rows.
    """

    traffic: float  # distinct sectors read and written, over the least bytes of the workload
    l2: float  # sectors of all accesses, over the same
    memory_us: float  # least bytes of the workload at the rate of a copy
    issue_us: float | None  # to issue the instructions; without kernels of kind "small": None if there are no others


@dataclass
class Result:
    """A case on one architecture, or, without a case, a workload. faults: what is wrong."""

    name: str
    arch: int
    case: dict | None
    code: Code | None
    faults: list[str]
    load: Load | None = None

    @property
    def section(self) -> str:
        """Of the table."""
        return "cases" if self.case else "workloads"

    def row(self) -> dict:
        """As the table keeps it."""
        values = {name: value for part in (self.code, self.load) if part for name, value in asdict(part).items()}
        return {name: round(value, 3) if isinstance(value, float) else value for name, value in values.items()}


def verdict(case: dict, arch: int, code: Code, before: dict | None = None) -> list[str]:
    """What is wrong with this code; [] if nothing. before: its row of the committed table."""
    faults = []
    if code.stack or code.local_loads or code.local_stores:
        faults.append(f"spills ({code.stack} B stack, {code.local_loads} LDL, {code.local_stores} STL)")
    if code.fp64 and not case.get("fp64"):
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


def load_verdict(load: Load | None, before: dict) -> list[str]:
    """What has grown against a row of the committed table, or is in one of them only."""
    faults = []
    for name, factor in GROWTH.items():
        now, was = getattr(load, name, None), before.get(name)
        if now is None and was is not None:
            faults.append(f"{name} is in the table, but is not counted any more: where that is meant, --write")
        elif now is not None and was is None:
            faults.append(f"{name} is not in the table: add it with --write")
        elif now is not None and now > was * factor + 0.001:  # the table is rounded to so much
            faults.append(f"{name} grew from {was} to {now:.3f}")
    return faults


def load_of(case: str, measurements: list[Measurement], compiled: dict[str, tuple[Code, Sass]]) -> Load | None:
    """The load of the case of that name, None if no workload launches it. compiled: by case.

    Raises: ValueError if its machine code does not do what the interpreter counted.
    """
    for measurement in measurements:
        if launches := [launch for launch in measurement.launches if launch.case == case]:
            ratios = (sum(getattr(launch, name) for launch in launches) / measurement.least for name in ("dram", "l2"))
            return Load(*ratios, issue_floor.memory_us(measurement.least), issue_us_of(launches, compiled))
    return None


def workload_load(measurement: Measurement, compiled: dict[str, tuple[Code, Sass]]) -> Load | None:
    """The load of a whole workload; None if one of its kernels is not compiled, which is a failure already. Raises: as load_of."""
    if not {launch.case for launch in measurement.launches} <= compiled.keys():
        return None
    ratios = measurement.ratio("dram"), measurement.ratio("l2")
    return Load(*ratios, issue_floor.memory_us(measurement.least), issue_us_of(measurement.launches, compiled))


def issue_us_of(launches: Sequence[traffic.Launch], compiled: dict[str, tuple[Code, Sass]]) -> float | None:
    """The sum of their issue floors, None if all are small."""
    floors = [issue_floor.floor_of(launch, *compiled[launch.case]).us["issue"] for launch in launches if not launch.small]
    return sum(floors) if floors else None


def list_cases(op: str) -> list[dict]:
    """The cases of an op without their kernels, which do not travel between processes."""
    return [{key: case[key] for key in case.keys() - {"kernel"}} for case in cases_of(op)]


def compile_named(op: str, names: list[str], arch: int) -> list[tuple[Code, Sass] | str]:
    """compile_case of each, or why it does not compile: triton's errors do not all survive the way between processes, their text does.

    For a process of prepare_compiler.
    """
    cases, compiled, faults = {case["name"]: case for case in cases_of(op)}, {}, {}
    for name in names:
        try:
            compiled[name] = compile_kernel(cases[name], arch)
        except Exception as error:  # whatever the compiler raises is the verdict on this case, and the others get theirs
            faults[name] = _last_line(error)
    read = faults | dict(zip(compiled, read_kernels([*compiled.values()], arch), strict=True))
    return [read[name] for name in names]


def prepare_compiler() -> None:
    """Initialises a process for compile_named: kernels that are interpreted cannot be compiled."""
    os.environ.pop(interpreter.VARIABLE, None)


def audit(ops: list[str], archs: list[int], launched: set[str] | None = None) -> list[Result]:
    """Every case in order, compiled by JOBS processes while one more runs the workloads; then the workloads.

    Args: launched: names of the cases to compile, "op: name", in place of all; no workload is run then.
    """
    with traffic.forked(JOBS, prepare_compiler) as compilers, traffic.pool() as interpreters:
        results, by_job = [], {}
        for op, cases in zip(ops, compilers.map(list_cases, ops), strict=True):
            for case, arch in itertools.product(cases, archs):
                name = f"{Path(op).stem}: {case['name']}"
                if arch in case.get("archs", ARCHS) and (launched is None or name in launched):
                    results.append(Result(name, arch, case, None, []))
                    by_job.setdefault((op, arch), []).append(results[-1])
        futures = {}  # the op and the results of each
        for (op, arch), listed in by_job.items():
            for at in range(0, len(listed), BATCH):
                some = listed[at : at + BATCH]
                futures[compilers.submit(compile_named, op, [result.case["name"] for result in some], arch)] = op, some
        workloads = _submit_workloads(interpreters, ops) if issue_floor.ARCH in archs and launched is None else []
        counted = [future for _, _, future in workloads]
        while left := concurrent.futures.wait([*futures, *counted], timeout=PROGRESS_S).not_done:
            done = sum(len(some) for future, (_, some) in futures.items() if future not in left)
            total = f"{len(counted) - len(left & {*counted})} of {len(counted)} workloads counted"
            print(f"{done} of {len(results)} compiled, {total}", file=sys.stderr, flush=True)
        measured = [(op, *_measured(op, name, future)) for op, name, future in workloads]
        measurements = {op: [one for of, _, one in measured if of == op and one] for op in ops}
        compiled: dict[str, dict[str, tuple[Code, Sass]]] = {op: {} for op in ops}  # for issue_floor.ARCH
        loads = []
        for future, (op, some) in futures.items():
            error = future.exception()
            for result, read in zip(some, [_last_line(error)] * len(some) if error else future.result(), strict=True):
                if isinstance(read, str):
                    result.faults.append(read)
                    continue
                result.code, sass = read
                if result.arch == issue_floor.ARCH and launched is None:
                    compiled[op][result.case["name"]] = result.code, sass
                    loads.append((result, load_of, (result.case["name"], measurements[op], compiled[op])))
    for op, result, measurement in measured:
        results.append(result)
        if measurement:
            loads.append((result, workload_load, (measurement, compiled[op])))
    for result, load, arguments in loads:
        try:
            result.load = load(*arguments)
        except ValueError as error:
            result.faults.append(f"issue floor: {error}")
    return results


def _submit_workloads(interpreters: concurrent.futures.Executor, ops: list[str]) -> list[tuple[str, str, concurrent.futures.Future]]:
    """Every workload: its op, its name, its measurement to come."""
    names = traffic.listed_names(interpreters, ops)
    return [(op, name, interpreters.submit(traffic.measure_named, op, name)) for op in ops for name in names[op]]


def _measured(op: str, name: str, future: concurrent.futures.Future) -> tuple[Result, Measurement | None]:
    """The result of a workload, with what failed so far, and what it did if it ran."""
    measurement = None
    if error := future.exception():
        faults = {_last_line(error)}
    else:
        measurement = future.result()
        alone = {launch.kernel.strip("_") for launch in measurement.launches if launch.case is None}
        faults = {f"launches {kernel} in a configuration that no case compiles" for kernel in alone}
    return Result(f"{Path(op).stem}: {name}", issue_floor.ARCH, None, None, sorted(faults)), measurement


def _last_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"


def read_table(path: Path) -> Table:
    """The committed table. It has no rows if it is missing or was written with another triton, which is printed.

    Raises: ValueError if the file is something else.
    """
    empty = {section: {} for section in SECTIONS}
    if not path.is_file():
        print(f"growth is not judged: there is no {path.name}")
        return empty
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        written_with, _ = content["triton"], content["cases"].items()
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not an audit table: {error!r}") from error
    if written_with != importlib.metadata.version("triton"):
        print(f"growth is not judged: {path.name} was written with triton {written_with}")
        return empty
    return {section: content.get(section, {}) for section in SECTIONS}


def launched_cases(path: Path) -> dict[str, dict[str, dict]]:
    """Rows of the cases that training launches: those with a load in the committed table, whatever triton it was written with.

    Raises: ValueError if the file is something else.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return {name: by_arch for name, by_arch in cases.items() if "traffic" in by_arch.get(str(issue_floor.ARCH), {})}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not an audit table: {error!r}") from error


def write_table(path: Path, table: Table) -> None:
    """One line per case or workload and architecture, so that a diff shows what changed."""
    parts = [f' "triton": {json.dumps(importlib.metadata.version("triton"))}']
    for section in SECTIONS:
        rows = []
        for name, by_arch in sorted(table[section].items()):
            lines = ",\n".join(f"   {json.dumps(arch)}: {json.dumps(by_arch[arch])}" for arch in sorted(by_arch, key=int))
            rows.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
        parts.append(f" {json.dumps(section)}: {{\n" + ",\n".join(rows) + "\n }")
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")


def print_table(results: list[Result]) -> None:
    header = ("case or workload", "sm", "regs", "stack", "LDL", "STL", "shared", "warps", "occupancy", "HGMMA", "HMMA", "other")
    header += ("ld128", "st128", "traffic", "L2", "memory us", "issue us", "")
    rows = [header]
    for result in results:
        said = "FAILS: " + "; ".join(result.faults) if result.faults else "ok"
        rows.append((result.name, str(result.arch), *map(str, _cells(result, len(header) - 3)), said))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header) - 1)]
    for row in rows:
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]).rstrip())


def _cells(result: Result, columns: int) -> list:
    """What print_table says of a result in so many columns: the machine code of a case, then its load or a workload's."""
    code, load = result.code, result.load
    loads = ["" if code is None else "-"] * 4
    if load is not None:
        issue = "-" if load.issue_us is None else f"{load.issue_us:.1f}"
        loads = [f"{load.traffic:.2f}", f"{load.l2:.2f}", f"{load.memory_us:.1f}", issue]
    if code is None:
        return [""] * (columns - len(loads)) + loads
    share, limit = occupancy(code, result.arch)
    cells = [code.registers, code.stack, code.local_loads, code.local_stores, code.shared, code.warps, f"{share:.0%} {limit}"]
    cells += [code.hgmma, code.hmma, code.other_mma]
    cells += ["-" if part is None else f"{part:.0%}" for part in (code.wide_loads, code.wide_stores)]
    return cells + loads


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lightningdit_kernels.audit", description=__doc__.splitlines()[0])
    parser.add_argument("--op", action="append", metavar="OP", help=f"{', '.join(OPS)}, or a .py file with audit_cases(); default: all ops")
    parser.add_argument("--arch", action="append", type=int, choices=ARCHS, help="default: all three")
    parser.add_argument("--table", type=Path, default=TABLE, help="the committed table (default: kernels/audit.json)")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--launched", action="store_true",
                      help="only the cases that training launches, by the table, and their machine code only: a fifth of the time")
    only.add_argument("--write", action="store_true", help="replace these rows of the table by what was found")
    options = parser.parse_args(arguments)
    for op in options.op or ():
        if op not in OPS and not Path(op).is_file():
            parser.error(f"--op is {op!r}, expected one of {', '.join(OPS)}, or a file")
    if importlib.util.find_spec("triton") is None:
        raise ImportError("the audit needs triton: pip install triton (Linux only)")

    if (options.table != TABLE or options.launched) and not options.table.is_file() and not options.write:
        parser.error(f"--table is {options.table}, expected a file, or --write to make it")

    ops = []
    try:
        table = read_table(options.table)
        launched = launched_cases(options.table) if options.launched else None
    except ValueError as error:
        parser.error(f"--table: {error}")
    if options.write and (options.op or options.arch) and options.table.is_file() and not any(table.values()):
        kept = f"keeps the rest of {options.table}, which has no rows of this triton"
        parser.error(f"--write with --op or --arch {kept}: --write alone renews it")
    # Where all ops are audited, all of the table: also the rows of an op whose file was removed.
    tabled = {name.partition(":")[0] for rows in table.values() for name in rows}
    stems = {Path(op).stem for op in options.op} if options.op else tabled | set(OPS)
    for op in options.op or OPS:
        if op.endswith(".py") or (Path(__file__).parent / f"{op}_triton.py").is_file():
            ops.append(op)
        else:
            print(f"{op}: has no Triton kernel yet, nothing to audit")
    begin = time.perf_counter()
    archs = tuple(options.arch or ARCHS)
    if launched is not None:
        launched = {name: rows for name, rows in launched.items() if name.partition(":")[0] in stems}
        if not launched:
            parser.error(f"--launched: {options.table} has no case of {', '.join(sorted(stems))} with a load, expected one at least")
        table = dict(cases={name: _without_loads(rows) for name, rows in table["cases"].items() if name in launched}, workloads={})
    results = audit(ops, list(archs), None if launched is None else {*launched}) if ops else []
    expected = table if launched is None else dict(cases=launched, workloads={})
    missing = [] if options.write else no_longer_there(expected, results, stems, archs)
    if not results and not missing:
        print("no cases")
        return 0
    for result in results:
        before = table[result.section].get(result.name, {}).get(str(result.arch))
        judge(result, None if options.write else before)
        if tabled and before is None and not options.write and (result.case or not result.faults):
            result.faults.append(f"not in {options.table.name}: add it with --write")
    results += missing
    print_table(results)
    failed = sum(bool(result.faults) for result in results)
    compiled = sum(result.code is not None for result in results)
    counted = sum(result.load is not None for result in results if result.case is None)
    print(f"{compiled} compiled and {counted} workloads counted in {time.perf_counter() - begin:.0f} s, {failed} failed")
    if options.write and failed:
        print(f"{options.table.name} is not written: a kernel that fails is mended first")
    elif options.write:
        renew_table(options.table, table, results, stems, archs)
    return int(failed > 0)


def _without_loads(by_arch: dict[str, dict]) -> dict[str, dict]:
    loads = {field.name for field in fields(Load)}
    return {arch: {name: value for name, value in row.items() if name not in loads} for arch, row in by_arch.items()}


def judge(result: Result, before: dict | None) -> None:
    """Adds what is wrong to the faults of a result. before: its row of the committed table."""
    if result.code is not None:
        result.faults += verdict(result.case, result.arch, result.code, before)
    if before is not None and (result.code is not None or result.load is not None):
        result.faults += load_verdict(result.load, before)


def no_longer_there(table: Table, results: list[Result], stems: set[str], archs: tuple[int, ...]) -> list[Result]:
    """A failure for each row of the table of these ops and architectures that no case and no workload fills any more."""
    found = {(result.section, result.name, result.arch) for result in results}
    faults = dict(zip(SECTIONS, ("is not compiled", "is not listed"), strict=True))
    missing = []
    for section, rows in table.items():
        fault = f"is in the table, but {faults[section]} any more: where that is meant, --write"
        for name, arch in ((name, int(arch)) for name, by_arch in rows.items() for arch in by_arch):
            if name.partition(":")[0] in stems and arch in archs and (section, name, arch) not in found:
                missing.append(Result(name, arch, None, None, [fault]))
    return missing


def renew_table(path: Path, table: Table, results: list[Result], stems: set[str], archs: tuple[int, ...]) -> None:
    """Writes the table with the rows of these ops and architectures replaced by the results."""
    renewed = {section: {} for section in SECTIONS}
    for section, rows in table.items():
        for name, by_arch in rows.items():
            kept = {arch: row for arch, row in by_arch.items() if name.partition(":")[0] not in stems or int(arch) not in archs}
            if kept:
                renewed[section][name] = kept
    for result in results:
        renewed[result.section].setdefault(result.name, {})[str(result.arch)] = result.row()
    write_table(path, renewed)


if __name__ == "__main__":
    sys.exit(main())
