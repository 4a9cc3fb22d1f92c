"""The audit on kernels that must pass and kernels that must fail, and its arithmetic on numbers known from elsewhere."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from lightningdit_kernels import audit
from lightningdit_kernels.audit import Load, Result, judge, no_longer_there, verdict
from lightningdit_kernels.machine_code import Code, access_bytes, check_case, describe, occupancy, read_sass, wide_share

PROBES = Path(__file__).with_name("probes_triton.py")
GOOD = Code(
    registers=64,
    stack=0,
    local_loads=0,
    local_stores=0,
    shared=0,
    warps=4,
    tensor_memory=0,
    hgmma=0,
    hmma=0,
    other_mma=0,
    wide_loads=1.0,
    wide_stores=1.0,
    fp64=0,
    atomics=0,
)
FAULTS = {  # case of the probes -> what the audit says of it; the others are fine
    "narrow": "its main loads are narrower than 16 bytes",
    "narrow loop": "its main loads are narrower than 16 bytes",
    "spill": r"spills \(\d+ B stack, \d+ LDL, \d+ STL\)",
    "double": r"\d+ fp64 instructions",
    "atomic": r"\d+ atomics",
    "warp product": "no HGMMA",
    "too much shared memory": "262144 B of shared memory, a block may have 166912",
    "does not compile": "CompilationError",
}


AUDITOR = """
import contextlib, io, json, os, sys, traceback
from lightningdit_kernels.audit import main
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what compilers print
for line in sys.stdin:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        try:
            code = main(json.loads(line))
        except SystemExit as end:
            code = end.code
        except Exception:  # the test that asked sees it; the process serves the next one
            code = None
            traceback.print_exc(file=printed)
    print(json.dumps([code, printed.getvalue()]), file=answers, flush=True)
"""


@pytest.fixture(scope="module")
def run_audit():
    """run_audit(arguments) -> exit code and output of the command, with TRITON_INTERPRET set as it is in this very process: it must compile
    all the same. One process for all, because it takes seconds to import torch, and as long again in the one that its compilers are forked
    from.
    """
    package = Path(audit.__file__).parents[1]
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(package)}
    command = [sys.executable, "-c", AUDITOR]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment) as process:

        def run(*arguments):
            print(json.dumps([*map(str, arguments)]), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield run
        process.stdin.close()


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_probe_gets_its_verdict(tmp_path, run_audit):
    table = tmp_path / "audit.json"
    code, printed = run_audit("--op", PROBES, "--table", table, "--write")
    assert code == 1, printed
    rows = re.findall(r"^probes_triton: (.+?)  +(80|90|100) .*?(ok|FAILS: .*)$", printed, re.M)
    assert len(rows) == 17
    for name, _, said in rows:
        assert re.fullmatch(f"FAILS: {FAULTS[name]}.*" if name in FAULTS else "ok", said), f"{name}: {said}"
    assert "audit.json is not written" in printed and not table.exists()

    # On the kernels that pass: a table is written, holds, is missed where a row lacks, and growth against it fails.
    good = tmp_path / "good.py"
    source = PROBES.read_text().replace("    return [\n", "    cases = [\n")
    good.write_text(source + '    return [case for case in cases if case["name"] == "warpgroup product"]\n')
    assert run_audit("--op", good, "--table", table, "--write", "--arch", 90)[0] == 0
    assert run_audit("--op", good, "--table", table, "--arch", 90)[0] == 0
    content = json.loads(table.read_text())
    row = content["cases"]["good: warpgroup product"]["90"]
    assert row["hgmma"] > 0 and row["local_loads"] == 0 and row["shared"] == 16384
    bad = tmp_path / "bad.py"  # alone in its batch
    bad.write_text(source + '    return [case for case in cases if case["name"] == "does not compile"]\n')
    code, printed = run_audit("--op", bad, "--table", tmp_path / "bad.json", "--write", "--arch", 90)
    assert code == 1
    assert "FAILS: CompilationError" in printed
    row["shared"] //= 2
    table.write_text(json.dumps(content))
    code, printed = run_audit("--op", good, "--table", table, "--arch", 90, "--arch", 100)
    assert code == 1
    assert "shared grew from 8192 to 16384" in printed and "not in audit.json: add it with --write" in printed


TWICE = '''

import torch


@triton.jit
def _twice_kernel(x, out, size, REPEAT: tl.constexpr, BLOCK: tl.constexpr):
    """Reads x REPEAT times over: each program its own block and those after it."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(x + offsets)
    for again in tl.static_range(1, REPEAT):
        total += tl.load(x + (offsets + again * BLOCK) % size)
    tl.store(out + offsets, total)


def audit_cases():
    common = dict(kernel=_twice_kernel, num_warps=4, num_stages=1, kind="small", divisible=["x", "out", "size"], archs=(90,))
    signature = dict(x="*fp32", out="*fp32", size="i32")
    return [dict(name="twice", signature=signature, constexprs=dict(REPEAT=REPEAT, BLOCK=256), **common)]


def workloads():
    x, out = torch.empty(4096), torch.empty(4096)

    def launch():
        _twice_kernel[(16,)](x, out, 4096, REPEAT=LAUNCHED, BLOCK=256, num_warps=4, num_stages=1)
        return out.clone() if CLONED else out

    return [dict(name="twice", launch=launch, reads=(x,))]
'''


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel_that_reads_twice_fails_against_the_table(tmp_path, run_audit):
    """L2 sees both reads; PyTorch's copy of the result shows in the workload; a launch that the audit does not compile is a fault too."""
    table, file = tmp_path / "audit.json", tmp_path / "planted.py"
    imports = "import triton\nimport triton.language as tl\n"
    file.write_text(f"{imports}REPEAT, LAUNCHED, CLONED = 1, 1, False\n{TWICE}")
    assert run_audit("--op", file, "--table", table, "--write")[0] == 0
    content = json.loads(table.read_text())
    row = content["cases"]["planted: twice"]["90"]
    assert (row["traffic"], row["l2"]) == (1.0, 1.0)
    assert content["workloads"]["planted: twice"]["90"] == dict(traffic=1.0, l2=1.0, memory_us=row["memory_us"], issue_us=None)

    launched = "--op", file, "--table", table, "--launched"
    code, printed = run_audit(*launched)
    assert code == 0
    assert "1 compiled and 0 workloads counted" in printed
    fewer = tmp_path / "fewer.json"
    row["registers"] -= 9
    fewer.write_text(json.dumps(content))
    code, printed = run_audit("--op", file, "--table", fewer, "--launched")
    assert code == 1
    assert "registers grew" in printed
    del row["traffic"]
    fewer.write_text(json.dumps(content))
    assert run_audit("--op", file, "--table", fewer, "--launched")[0] == 2
    content["triton"], content["cases"]["planted: gone"] = "1.0", {"90": dict(traffic=1.0)}
    fewer.write_text(json.dumps(content))
    code, printed = run_audit("--op", file, "--table", fewer, "--launched")
    assert code == 1
    assert "is in the table, but is not compiled any more" in printed

    file.write_text(f"{imports}REPEAT, LAUNCHED, CLONED = 3, 3, True\n{TWICE}")
    code, printed = run_audit("--op", file, "--table", table)
    assert code == 1
    of_case, of_workload = re.findall(r"^planted: twice .*FAILS: (.*)$", printed, re.M)
    assert of_case == "l2 grew from 1.0 to 2.000"
    assert of_workload == "traffic grew from 1.0 to 2.000; l2 grew from 1.0 to 3.000"

    file.write_text(f"{imports}REPEAT, LAUNCHED, CLONED = 1, 3, False\n{TWICE}")
    code, printed = run_audit("--op", file, "--table", table)
    assert code == 1
    assert "launches twice_kernel in a configuration that no case compiles" in printed


SASS = """
        /*0000*/                   LDG.E.128 R4, [R2.64] ;
        /*0010*/              @!P0 LDG.E.64.CONSTANT R8, [R2.64] ;
        /*0020*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8] ;
        /*0030*/               @P1 LDG.E.U16 R8, [R2.64] ;
        /*0040*/               @P2 BRA 0x30 ;
        /*0050*/               @P3 BRA 0x10 ;
        /*0060*/                   STG.E.128 [R2.64], R4 ;
        /*0070*/                   EXIT ;
        /*0080*/                   BRA 0x80;
        /*0090*/                   NOP;
"""


def test_sass_is_read_with_its_loops():
    sass = read_sass(SASS)
    assert [(opcode.partition(".")[0], depth) for opcode, depth in zip(sass.opcodes, sass.depths(), strict=True)] == [
        ("LDG", 0), ("LDG", 1), ("HGMMA", 1), ("LDG", 2), ("BRA", 2), ("BRA", 1), ("STG", 0), ("EXIT", 0), ("BRA", 0), ("NOP", 0),
    ]  # fmt: skip
    assert sass.opcodes[2] == "HGMMA.64x64x16.F32.BF16"
    assert sass.loops == ((1, 5), (3, 4))
    assert wide_share(sass, ("LDG",)) == pytest.approx(16 / (16 + 8 * 16 + 2 * 256))
    assert wide_share(sass, ("STG",)) == 1 and wide_share(sass, ("LDGSTS",)) is None
    code = describe("Function f:\n  REG:40 STACK:8 SHARED:0 LOCAL:0", sass, 1024, 4)
    assert (code.registers, code.stack, code.hgmma, code.hmma, code.other_mma) == (40, 8, 1, 0, 0)


@pytest.mark.parametrize(
    "opcode, size",
    [("LDG.E", 4), ("LDG.E.128.CONSTANT", 16), ("LDG.E.ENL2.256", 32), ("LDG.E.U8", 1), ("LDGSTS.E.BYPASS.128", 16), ("LDG.E.U16", 2)],
)
def test_access_bytes(opcode, size):
    assert access_bytes(opcode) == size


@pytest.mark.parametrize(
    "change, arch, bound",
    [  # the figures of NVIDIA's occupancy calculator
        (dict(registers=32), 90, (1.0, "warps")),
        (dict(registers=64), 90, (0.5, "registers")),
        (dict(registers=255), 90, (0.125, "registers")),
        (dict(registers=255, warps=8), 90, (0.125, "registers")),
        (dict(registers=168), 80, (0.1875, "registers")),
        (dict(registers=32, shared=48 * 1024), 80, (0.1875, "shared")),
        (dict(registers=32, shared=48 * 1024), 90, (0.25, "shared")),
        (dict(registers=32, warps=1), 90, (0.5, "blocks")),
        (dict(registers=32, tensor_memory=256), 100, (0.125, "tensor memory")),
    ],
)
def test_occupancy(change, arch, bound):
    assert occupancy(replace(GOOD, **change), arch) == bound


@pytest.mark.parametrize(
    "code, case, arch, fault",
    [
        (dict(), dict(kind="memory"), 90, None),
        (dict(stack=8), dict(kind="small"), 90, "spills"),
        (dict(local_stores=1), dict(kind="small"), 90, "spills"),
        (dict(hmma=8), dict(kind="attention"), 90, "no HGMMA"),
        (dict(hmma=8), dict(kind="attention"), 80, None),
        (dict(hgmma=8), dict(kind="attention"), 90, None),
        (dict(wide_loads=None), dict(kind="memory"), 90, "no global loads"),
        (dict(wide_loads=0.4), dict(kind="memory"), 100, "narrower"),
        (dict(wide_loads=0.4), dict(kind="small"), 100, None),
        (dict(registers=72), dict(kind="memory"), 90, None),
        (dict(registers=73), dict(kind="memory"), 90, "registers grew from 64 to 73"),
        (dict(shared=1025), dict(kind="memory"), 90, "shared grew from 0 to 1025"),
        (dict(registers=255, warps=32), dict(kind="small"), 90, "no block fits"),
    ],
)
def test_verdict(code, case, arch, fault):
    before = dict(registers=64, shared=0) if case["kind"] == "memory" else None
    faults = verdict(case, arch, replace(GOOD, **code), before)
    assert faults == [] if fault is None else len(faults) == 1 and fault in faults[0]


LOAD = Load(traffic=1.0, l2=2.0, memory_us=10.0, issue_us=5.0)
ROW = dict(registers=64, shared=0, traffic=1.0, l2=2.0, memory_us=10.0, issue_us=5.0)


@pytest.mark.parametrize(
    "load, row, faults",
    [
        (dict(), dict(), []),
        (dict(traffic=1.02), dict(), []),
        (dict(traffic=1.03), dict(), ["traffic grew from 1.0 to 1.030"]),
        (dict(l2=2.05), dict(), ["l2 grew from 2.0 to 2.050"]),
        (dict(issue_us=5.2), dict(), []),
        (dict(issue_us=5.3), dict(), ["issue_us grew from 5.0 to 5.300"]),
        (dict(memory_us=10.2), dict(), []),
        (dict(memory_us=20.0), dict(), ["memory_us grew from 10.0 to 20.000"]),
        (dict(traffic=0.5, l2=0.5, issue_us=1.0), dict(), []),
        (dict(issue_us=None), dict(issue_us=None), []),
        (dict(traffic=0.0004), dict(traffic=0.0), []),
        (dict(), dict(issue_us=None), ["issue_us is not in the table: add it with --write"]),
        (dict(issue_us=None), dict(), ["issue_us is in the table, but is not counted any more: where that is meant, --write"]),
        (dict(traffic=2.0, l2=4.0), dict(), ["traffic grew from 1.0 to 2.000", "l2 grew from 2.0 to 4.000"]),
    ],
)
@pytest.mark.parametrize("case, code", [(dict(kind="small"), GOOD), (None, None)], ids=["case", "workload"])
def test_growth_of_traffic_and_floors_fails(case, code, load, row, faults):
    result = Result("op: case", 90, case, code, [], replace(LOAD, **load))
    judge(result, ROW | row)
    assert result.faults == faults


def test_a_workload_that_failed_is_not_judged_by_its_load():
    result = Result("op: workload", 90, None, None, ["does not run"])
    judge(result, ROW)
    assert result.faults == ["does not run"]


def test_a_case_that_training_does_not_launch_is_not_judged_by_its_load():
    result = Result("op: case", 90, dict(kind="small"), GOOD, [])
    judge(result, dict(registers=64, shared=0))
    assert result.faults == []
    judge(result, ROW)
    assert [fault.partition(",")[0] for fault in result.faults] == [f"{name} is in the table" for name in audit.GROWTH]


def test_what_is_no_longer_there_fails_until_the_table_is_written():
    results = [Result("norm: here", 90, dict(kind="small"), GOOD, []), Result("norm: launched", 90, None, None, [], LOAD)]
    table = dict(
        cases={"norm: here": {"90": ROW, "100": ROW}, "norm: away": {"90": ROW, "80": ROW}, "swiglu: not audited": {"90": ROW}},
        workloads={"norm: launched": {"90": ROW}, "norm: here": {"90": ROW}, "swiglu: not audited": {"90": ROW}},
    )
    missing = no_longer_there(table, results, {"norm"}, (90, 100))
    assert [(result.name, result.arch, result.faults[0].partition(" any more")[0]) for result in missing] == [
        ("norm: here", 100, "is in the table, but is not compiled"),
        ("norm: away", 90, "is in the table, but is not compiled"),
        ("norm: here", 90, "is in the table, but is not listed"),
    ]


class Kernel:
    arg_names = ["x", "BLOCK"]


def test_the_table_is_of_the_triton_that_is_installed_by_make():
    """Else the audit judges no growth."""
    (pinned,) = re.findall(r"^triton==(\S+)$", (audit.TABLE.parent.parent / "constraints.txt").read_text(), re.MULTILINE)
    assert json.loads(audit.TABLE.read_text())["triton"] == pinned


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(signature=dict(y="*bf16")), r"lack \['x'\] and have \['y'\] too much"),
        (dict(constexprs={}), r"lack \['BLOCK'\]"),
        (dict(signature=dict(x="*bf16", BLOCK="constexpr"), constexprs={}), r"no value for \['BLOCK'\]"),
        (dict(divisible=["z"]), "divisible names other arguments"),
        (dict(kind="fast"), "kind is 'fast', expected one of memory, attention"),
        (dict(hgmma=False), "needs a reason"),
    ],
)
def test_a_malformed_case_is_refused(change, message):
    case = dict(name="n", kernel=Kernel, signature=dict(x="*bf16"), constexprs=dict(BLOCK=8), divisible=["x"], kind="memory") | change
    with pytest.raises(ValueError, match=message):
        check_case("op", case)


def test_nothing_to_audit_is_no_failure(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(audit, "__file__", str(tmp_path / "audit.py"))
    monkeypatch.setattr(audit, "TABLE", tmp_path / "none.json")
    assert audit.main([]) == 0
    assert "norm: has no Triton kernel yet" in capsys.readouterr().out
    monkeypatch.setattr(audit, "read_table", lambda path: dict(cases={"norm: fwd": {"90": ROW}}, workloads={}))
    assert audit.main([]) == 1  # the file of the kernel was removed, its row was not
    assert "norm: fwd" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        audit.main(["--op", "nrom"])


def test_a_file_that_is_not_a_table_is_named(tmp_path, capsys):
    damaged = tmp_path / "damaged.json"
    damaged.write_text('{"triton": "3.6.0", "cas')
    for path, said in ((tmp_path / "mistyped.json", "expected a file, or --write"), (damaged, "is not an audit table")):
        with pytest.raises(SystemExit):
            audit.main(["--op", "swiglu", "--table", str(path)])
        assert said in (error := capsys.readouterr().err) and str(path) in error


def test_a_part_of_a_table_of_another_triton_is_not_written(tmp_path, capsys):
    table = tmp_path / "audit.json"
    table.write_text('{"triton": "1.0", "cases": {"norm: fwd": {}}}')
    with pytest.raises(SystemExit):
        audit.main(["--op", "swiglu", "--table", str(table), "--write"])
    assert "has no rows of this triton" in capsys.readouterr().err and "1.0" in table.read_text()
