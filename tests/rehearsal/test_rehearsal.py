"""The stand-in CUDA driver and the verdict over a rehearsal."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import OPS
from rehearsal import __main__ as rehearsal
from rehearsal import stand_in

ROOT = Path(__file__).resolve().parent.parent.parent

# Prints what the stand-in does in each of several situations, as one line of JSON.
PROBE = """
import json, os
import torch, triton, triton.language as tl

graphs = []

@triton.jit
def fill(pointer, N: tl.constexpr):
    tl.store(pointer + tl.arange(0, N), 1.0)

def raised(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
    return ""

def captured(body):
    graphs.append(graph := torch.cuda.CUDAGraph())
    with torch.cuda.graph(graph):
        body()
    graph.replay()

gib = 2**30
x = torch.ones(8, device="cuda")
found = {
    "name": torch.cuda.get_device_name(),
    "capability": torch.cuda.get_device_capability(),
    "memory": torch.cuda.get_device_properties(0).total_memory,
}
large = torch.empty(70 * gib, dtype=torch.uint8, device="cuda")
found["too much"] = raised(lambda: torch.empty(20 * gib, dtype=torch.uint8, device="cuda"))
del large
torch.cuda.empty_cache()
found["after a free"] = raised(lambda: torch.empty(75 * gib, dtype=torch.uint8, device="cuda"))
found["zero"], found["true"] = (x + 1).sum().item(), (x == 2).all().item()
fill[(1,)](x, 8)
found["CPU tensor"] = raised(lambda: fill[(1,)](torch.ones(8), 8))
found["grid"] = raised(lambda: fill[(1, 70_000)](x, 8))
found["capture"] = raised(lambda: captured(lambda: fill[(1,)](x, 8)))
found["sync in capture"] = raised(lambda: captured(lambda: x.sum().item()))
print(json.dumps(found), flush=True)
os._exit(0)  # PyTorch aborts where a graph whose capture failed is destroyed
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What PROBE printed, and the lines of the trace."""
    if reason := stand_in.unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("rehearsal")
    script = folder / "probe.py"  # Triton reads the source of a kernel from its file
    script.write_text(PROBE, encoding="utf-8")
    trace = folder / "trace"
    with stand_in.environment(stand_in.CARDS["h100"], folder / "cache", trace) as variables:
        variables.pop("TRITON_INTERPRET", None)
        command = [sys.executable, str(script)]
        done = subprocess.run(command, capture_output=True, text=True, env=variables, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for path in folder.glob("trace.*") for line in path.read_text().splitlines()]
    return json.loads(done.stdout.splitlines()[-1]), lines


def test_pytorch_sees_the_card(seen):
    card = stand_in.CARDS["h100"]
    assert seen[0]["name"] == card.name
    assert seen[0]["capability"] == [9, 0]
    assert seen[0]["memory"] == int(card.memory_gib * 2**30)


def test_memory_ends_where_the_cards_does(seen):
    assert seen[0]["too much"].startswith("OutOfMemoryError")
    assert seen[0]["after a free"] == ""


def test_what_is_read_back_was_not_computed(seen):
    assert seen[0]["zero"] == 0
    assert seen[0]["true"] is True


def test_launches_are_checked(seen):
    assert "cannot be accessed from Triton" in seen[0]["CPU tensor"]
    assert "invalid" in seen[0]["grid"]


def test_captures_refuse_what_cuda_refuses(seen):
    assert seen[0]["capture"] == ""
    assert "captur" in seen[0]["sync in capture"]


def test_launches_are_traced(seen):
    kernels = [line.split() for line in seen[1] if " kernel " in line and line.endswith(" fill")]
    assert ["run", "kernel", "1", "1", "1"] in [words[:5] for words in kernels]
    assert "captured" in [words[0] for words in kernels]


def test_a_command_is_asked_for():
    command = [sys.executable, "-m", "rehearsal.stand_in", "--card", "h200"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", check=False)
    assert done.returncode == 2
    assert "no command" in done.stderr


# The verdict


def stage(status="done", rows=(), output=""):
    return {"status": status, "result": {"results": list(rows)}, "seconds": 1.0, "output": output}


def where(problems):
    return [problem.where for problem in problems]


def test_a_stage_that_ended_well_has_no_problem():
    rows = [{"op": "swiglu", "contestants": [{"name": "ours", "status": "ok"}]}]
    assert rehearsal.problems_of_stage("swiglu_1", stage(rows=rows)) == []


@pytest.mark.parametrize("status", ["failed", "incorrect"])
def test_a_row_without_a_measurement_is_a_problem(status):
    contestants = [{"name": "ours", "status": status, "reason": "out of memory"}]
    rows = [{"op": "swiglu", "contestants": contestants}]
    output = f"{rehearsal.SUMMARY}\nFAILED bench/b.py::bench_swiglu[a] - x\n"
    problems = rehearsal.problems_of_stage("swiglu_1", stage("done, with failures", rows, output))
    assert where(problems) == ["swiglu_1: swiglu: ours"]
    assert "out of memory" in problems[0].message


def test_ours_must_fit():
    rows = [{"op": "swiglu", "contestants": [{"name": "ours", "status": "too large"}]}]
    output = f"{rehearsal.SUMMARY}\nFAILED bench/b.py::bench_swiglu[a] - ours is not timed\n"
    problems = rehearsal.problems_of_stage("swiglu_1", stage("done, with failures", rows, output))
    assert where(problems) == ["swiglu_1"]
    assert "ours is not timed" in problems[0].message


@pytest.mark.parametrize("status", ["unavailable", "too large"])
def test_what_is_not_installed_or_does_not_fit_is_no_problem(status):
    rows = [{"op": "swiglu", "contestants": [{"name": "liger", "status": status}]}]
    assert rehearsal.problems_of_stage("swiglu_1", stage(rows=rows)) == []


@pytest.mark.parametrize(
    "status", ["cut short (stopped after 540 s)", "failed (139)", "lost: no file"]
)
def test_a_stage_that_did_not_end_is_a_problem(status):
    problems = rehearsal.problems_of_stage("overlay", stage(status, output="E   KeyError: 'x'"))
    assert where(problems) == ["overlay"]
    assert "KeyError" in problems[0].message


def test_a_failed_first_step_is_a_problem():
    rows = [
        {"case": "xl", "rows": [{"name": "ours", "status": "ok", "first_step_failed": "killed"}]}
    ]
    assert where(rehearsal.problems_of_stage("step", stage(rows=rows))) == ["step: xl: ours"]


@pytest.mark.parametrize("outcome", ["failed", "lost", "begun"])
def test_a_test_that_did_not_pass_is_a_problem(outcome):
    tests = {
        "a": {"outcome": "passed", "message": ""},
        "b": {"outcome": "skipped", "message": "needs flash-attn"},
        "c": {"outcome": outcome, "message": "E"},
    }
    assert where(rehearsal.problems_of_tests(tests)) == ["c"]


@pytest.mark.parametrize("outcomes", [[], ["skipped"]])
def test_tests_that_never_ran_are_a_problem(outcomes):
    tests = {str(i): {"outcome": one, "message": ""} for i, one in enumerate(outcomes)}
    assert where(rehearsal.problems_of_tests(tests)) == ["tests"]


def test_a_case_that_failed_without_a_row_is_a_problem():
    rows = [{"case": "xl", "rows": [{"name": "ours", "status": "failed", "reason": "zero"}]}]
    output = f"{rehearsal.SUMMARY}\nFAILED bench/b.py::bench_step[a] - x\nERROR bench/b.py::bench_step[b]\n"
    problems = rehearsal.problems_of_stage("step", stage("done, with failures", rows, output))
    assert where(problems) == ["step: xl: ours", "step"]


def test_a_row_that_needs_numbers_explains_no_failed_case(monkeypatch):
    known = rehearsal.NeedsNumbers("peer", "no plan", "nothing is computed")
    monkeypatch.setattr(rehearsal, "NEEDS_NUMBERS", [known])
    contestants = [{"name": "peer", "status": "failed", "reason": "no plan"}]
    output = f"{rehearsal.SUMMARY}\nFAILED bench/b.py::bench_attention[b] - KeyError\n"
    rows = [{"op": "rope_attention", "contestants": contestants}]
    problems = rehearsal.problems_of_stage("a", stage("done, with failures", rows, output))
    assert where(problems) == ["a: rope_attention: peer", "a"]
    assert [bool(problem.reason()) for problem in problems] == [True, False]


def test_failed_cases_that_are_not_all_listed_are_a_problem():
    rows = [{"case": "xl", "rows": [{"name": "ours", "status": "failed", "reason": "zero"}]}]
    output = "FAILED bench/b.py::bench_step[b] - x\n"  # the end of a long output
    problems = rehearsal.problems_of_stage("step", stage("done, with failures", rows, output))
    assert where(problems) == ["step: xl: ours", "step"]


def test_a_skipped_stage_is_a_problem():
    skipped = {"status": "skipped: needs `pip install x`", "result": None, "seconds": 1.0}
    assert where(rehearsal.problems_of_stage("overlay", skipped)) == ["overlay"]


def test_results_of_other_sources_are_measured_again(tmp_path):
    path = tmp_path / "gemms" / "stages.json"
    rehearsal.forget_unless_of("one", path.parent)
    for content, sources, kept in (("[1]", "one", True), ("[1", "one", False), ("[1]", "other", False)):
        path.write_text(content)
        rehearsal.forget_unless_of(sources, path.parent)
        assert path.exists() == kept


def test_only_what_is_listed_needs_numbers(monkeypatch, capsys):
    known = rehearsal.NeedsNumbers(r"^overlay", "loss is zero", "nothing is computed")
    monkeypatch.setattr(rehearsal, "NEEDS_NUMBERS", [known])
    problems = [
        rehearsal.Problem("overlay: xl", "incorrect: loss is zero"),
        rehearsal.Problem("overlay: xl", "failed: OutOfMemoryError"),
        rehearsal.Problem("step", "incorrect: loss is zero"),
    ]
    assert rehearsal.report("h100", problems) == 2
    assert capsys.readouterr().out.count("FAULT") == 2


def test_a_short_rehearsal_has_a_stage_of_each_kind():
    """Of the ops one, whose files all come to harness.run_case; of a file's several benchmarks each; of one's cases any."""

    def kind(name):
        file = Path(rehearsal.STAGES[name][0]).stem.removeprefix("bench_")
        benchmark = name if name in ("ceilings", "gemms", "overlay") else ""
        return "an op" if file in OPS else file, benchmark

    assert set(map(kind, rehearsal.SHORT)) == set(map(kind, rehearsal.STAGES))
