"""The stand-in CUDA driver and the verdict over a rehearsal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.gpu import OPS
from rehearsal import __main__ as rehearsal
from rehearsal import stand_in

ROOT = Path(__file__).resolve().parent.parent.parent
OK, INVALID_ARGUMENT, OUT_OF_MEMORY = 0, 1, 2  # of cudaError_t
CAPTURE_INVALIDATED, CAPTURE_MERGE, CAPTURE_UNMATCHED = 901, 902, 903
CAPTURE_UNJOINED, CAPTURE_ISOLATION, CAPTURE_IMPLICIT = 904, 905, 906
ILLEGAL_STATE, CAPTURE_UNSUPPORTED, CAPTURED_EVENT, CAPTURE_WRONG_THREAD = 401, 900, 907, 908

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

side, third = torch.cuda.Stream(), torch.cuda.Stream()

def on_side_streams(joined):
    main = torch.cuda.current_stream()
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y = x + 1
        third.wait_stream(side)
        with torch.cuda.stream(third):
            y = y * 2
        side.wait_stream(third)
    if joined:
        main.wait_stream(side)

def after_work_that_is_not_captured():
    main = torch.cuda.current_stream()
    found["isolation"] = raised(lambda: main.wait_event(before))

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
found["side streams"] = raised(lambda: captured(lambda: on_side_streams(joined=True)))
with torch.cuda.stream(side):
    w = torch.ones(8, device="cuda", requires_grad=True)
side.synchronize()
found["backward"] = raised(lambda: captured(lambda: (w * x).sum().backward()))
before = torch.cuda.current_stream().record_event()
found["unjoined"] = raised(lambda: captured(lambda: on_side_streams(joined=False)))
found["invalidated"] = raised(lambda: captured(after_work_that_is_not_captured))
found["sync in capture"] = raised(lambda: captured(lambda: x.sum().item()))
print(json.dumps(found), flush=True)
os._exit(0)  # PyTorch aborts where a graph whose capture failed is destroyed
"""

# Prints {case: [status of the last wait, status of the end of the capture]}.
CAPTURES = """
import ctypes, json
from concurrent.futures import ThreadPoolExecutor

cuda = ctypes.CDLL(None)
thread = ThreadPoolExecutor(1)

def made(create, *arguments):
    handle = ctypes.c_void_p()
    assert create(ctypes.byref(handle), *arguments) == 0
    return handle

memory = made(cuda.cudaMalloc, ctypes.c_size_t(8))
a, b, c, other = (made(cuda.cudaStreamCreate) for _ in range(4))

def work(stream):
    assert cuda.cudaMemsetAsync(memory, 0, ctypes.c_size_t(8), stream) == 0

def recorded(stream, flags=0):
    event = made(cuda.cudaEventCreate)
    assert cuda.cudaEventRecordWithFlags(event, stream, flags) == 0
    return event

def wait(stream, event, flags=0):
    return cuda.cudaStreamWaitEvent(stream, event, flags)

def join(stream, other):
    return wait(stream, recorded(other))

def end(stream):
    return cuda.cudaStreamEndCapture(stream, ctypes.byref(ctypes.c_void_p()))

def fork_and_join():
    join(b, a), work(b)
    return join(a, b)

def through_a_third_stream():
    join(b, a), join(c, b), work(c), join(b, c)
    return join(a, b)

def one_by_another():
    join(b, a), join(c, a), work(b), work(c), join(c, b)
    return join(a, c)

def fork_without_work():
    return join(b, a)

def external():
    outside = recorded(other)
    recorded(a, EXTERNAL)
    return wait(a, outside, EXTERNAL)

def external_event_on_a_fork():
    join(b, a), recorded(b, EXTERNAL)
    return 0

def never_joined():
    join(b, a), work(b)
    return 0

def work_after_the_join():
    join(b, a), work(b), join(a, b), work(b)
    return 0

def joined_before_its_last_work():
    join(b, a)
    event = recorded(b)
    work(b)
    return wait(a, event)

def third_stream_never_joined():
    join(b, a), join(c, b), work(c)
    return join(a, b)

def event_from_outside():
    work(other)
    return join(a, other)

def event_from_outside_on_a_fork():
    join(b, a)
    return join(b, other)

def event_of_a_capture_that_ended():
    return wait(a, ended)

def event_of_another_capture():
    assert cuda.cudaStreamBeginCapture(other, 0) == 0
    status = join(a, other)
    end(other)
    return status

def ended_on_a_fork():
    join(b, a)
    return end(b)

def ended_in_another_thread():
    return thread.submit(end, a).result()

def begun_again():
    return cuda.cudaStreamBeginCapture(a, GLOBAL)

def allocation():
    return cuda.cudaMalloc(ctypes.byref(ctypes.c_void_p()), ctypes.c_size_t(8))

def allocation_in_another_thread():
    return thread.submit(allocation).result()

def wait_of_the_host():
    return cuda.cudaDeviceSynchronize()

def wait_of_the_host_for_a_fork():
    join(b, a)
    return cuda.cudaStreamSynchronize(b)

def wait_of_the_host_for_an_event():
    return cuda.cudaEventQuery(recorded(a))

def launch_on_the_legacy_stream():
    return cuda.cudaMemsetAsync(memory, 0, ctypes.c_size_t(8), None)

EXTERNAL = NON_BLOCKING = 1
GLOBAL, THREAD_LOCAL, RELAXED = 0, 1, 2
cases = [fork_and_join, through_a_third_stream, one_by_another, fork_without_work, external,
         external_event_on_a_fork, never_joined, work_after_the_join, joined_before_its_last_work,
         third_stream_never_joined, event_from_outside, event_from_outside_on_a_fork,
         event_of_a_capture_that_ended, event_of_another_capture, ended_on_a_fork, begun_again,
         ended_in_another_thread, allocation, allocation_in_another_thread, wait_of_the_host,
         wait_of_the_host_for_a_fork, wait_of_the_host_for_an_event, launch_on_the_legacy_stream]
found, ended = {}, None

def captured(case, mode):
    assert cuda.cudaStreamBeginCapture(a, mode) == 0
    work(a)
    return [case(), end(a)]

for case in [*cases, fork_and_join]:
    found.setdefault(case.__name__, []).append(captured(case, GLOBAL))
    if case is fork_and_join:
        cuda.cudaStreamBeginCapture(a, 0)
        ended = recorded(a)
        end(a)
for case in [allocation, allocation_in_another_thread, wait_of_the_host]:
    found[case.__name__ + " in other modes"] = [captured(case, m) for m in (THREAD_LOCAL, RELAXED)]
a = made(cuda.cudaStreamCreateWithFlags, NON_BLOCKING)
found["non-blocking"] = captured(launch_on_the_legacy_stream, GLOBAL)
found["outside"] = [wait(b, ended), wait(b, recorded(other), EXTERNAL)]
print(json.dumps(found))
"""

# Processes on one card of 79.2 GiB: prints what each of them was answered.
MEMORY = """
import ctypes, json, os, subprocess, sys

cuda = ctypes.CDLL(None)

def allocate(gib):
    pointer = ctypes.c_void_p()
    return cuda.cudaMalloc(ctypes.byref(pointer), ctypes.c_size_t(gib << 30)), pointer

def free_gib():
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    cuda.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return round(free.value / 2**30, 1)

def child():
    command = [sys.executable, __file__, "child"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())

if sys.argv[1:] == ["child"]:
    status, _ = allocate(70)
    if os.fork():
        print(status, flush=True)
    sys.stdin.read()
    os._exit(0)

def in_a_fork():
    read, write = os.pipe()
    if not os.fork():
        before = free_gib()
        cuda.cudaFree(mine)
        answer = {"before": before, "status": allocate(5)[0], "after": free_gib()}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.wait()
    return json.loads(os.read(read, 1000))

found = {"total": free_gib()}
first, found["child"] = child()
found["parent beside it"], _ = allocate(70)
found["left beside it"] = free_gib()
first.kill()
first.wait()  # its fork lives on
found["left when it was killed"] = free_gib()
first.stdin.close()
found["parent"], mine = allocate(70)
second, found["child beside it"] = child()
second.communicate()
found["fork"] = in_a_fork()
found["left after the fork"] = free_gib()
cuda.cudaFree(mine)
found["left at the end"] = free_gib()
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def seen(probe, tmp_path_factory):
    """What PROBE printed, and the lines of the trace."""
    folder = tmp_path_factory.mktemp("trace")
    found = probe(PROBE, STAND_IN_TRACE=str(folder / "trace"))
    lines = [line for path in folder.iterdir() for line in path.read_text().splitlines()]
    return found, lines


@pytest.fixture(scope="module")
def captures(probe):
    return probe(CAPTURES)


@pytest.fixture(scope="module")
def memory(probe):
    return probe(MEMORY)


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


@pytest.mark.parametrize("body", ["side streams", "backward"])
def test_pytorch_captures_side_streams(seen, body):
    assert seen[0][body] == ""


def test_pytorch_reports_a_side_stream_that_is_not_joined(seen):
    assert "unjoined work" in seen[0]["unjoined"]


def test_pytorch_reports_a_wait_for_work_that_is_not_captured(seen):
    assert "dependency created on uncaptured work" in seen[0]["isolation"]
    assert "previous error during capture" in seen[0]["invalidated"]


@pytest.mark.parametrize(
    "case",
    [
        "fork_and_join",
        "through_a_third_stream",
        "one_by_another",
        "fork_without_work",
        "external",
    ],
)
def test_joined_forks_are_captured(captures, case):
    assert captures[case][0] == [OK, OK]


@pytest.mark.parametrize(
    "case",
    [
        "never_joined",
        "work_after_the_join",
        "joined_before_its_last_work",
        "third_stream_never_joined",
        "external_event_on_a_fork",
    ],
)
def test_a_capture_needs_its_forks_joined(captures, case):
    assert captures[case] == [[OK, CAPTURE_UNJOINED]]


@pytest.mark.parametrize(
    ("case", "status"),
    [
        ("event_from_outside", CAPTURE_ISOLATION),
        ("event_from_outside_on_a_fork", CAPTURE_ISOLATION),
        ("event_of_a_capture_that_ended", CAPTURE_ISOLATION),
        ("event_of_another_capture", CAPTURE_MERGE),
        ("ended_on_a_fork", CAPTURE_UNMATCHED),
        ("begun_again", ILLEGAL_STATE),
        ("allocation", CAPTURE_UNSUPPORTED),
        ("allocation_in_another_thread", CAPTURE_UNSUPPORTED),
        ("wait_of_the_host", CAPTURE_UNSUPPORTED),
        ("wait_of_the_host_for_a_fork", CAPTURE_UNSUPPORTED),
        ("wait_of_the_host_for_an_event", CAPTURED_EVENT),
        ("launch_on_the_legacy_stream", CAPTURE_IMPLICIT),
    ],
)
def test_what_a_capture_forbids_invalidates_it(captures, case, status):
    assert captures[case] == [[status, CAPTURE_INVALIDATED]]


def test_the_mode_of_a_capture_says_which_threads_it_forbids_to_allocate(captures):
    refused = [CAPTURE_UNSUPPORTED, CAPTURE_INVALIDATED]
    assert captures["allocation in other modes"] == [refused, [OK, OK]]
    assert captures["allocation_in_another_thread in other modes"] == [[OK, OK], [OK, OK]]
    assert captures["wait_of_the_host in other modes"] == [refused, refused]


def test_the_legacy_stream_waits_for_blocking_streams_only(captures):
    assert captures["non-blocking"] == [OK, OK]


def test_a_capture_ends_in_the_thread_that_began_it(captures):
    assert captures["ended_in_another_thread"] == [[CAPTURE_WRONG_THREAD, OK]]


def test_events_of_captures_are_refused_outside(captures):
    assert captures["outside"] == [INVALID_ARGUMENT, INVALID_ARGUMENT]


def test_a_failed_capture_leaves_the_streams_usable(captures):
    assert captures["fork_and_join"][-1] == [OK, OK]


def test_processes_share_the_card(memory):
    assert memory["total"] == 79.2
    assert memory["child"] == OK
    assert memory["parent beside it"] == OUT_OF_MEMORY
    assert memory["left beside it"] == 9.2


def test_a_killed_process_holds_no_memory(memory):
    assert memory["left when it was killed"] == 79.2
    assert memory["parent"] == OK
    assert memory["child beside it"] == OUT_OF_MEMORY


def test_a_fork_holds_what_it_allocates_alone(memory):
    assert memory["fork"] == {"before": 9.2, "status": OK, "after": 4.2}
    assert memory["left after the fork"] == 9.2
    assert memory["left at the end"] == 79.2


def test_commands_that_run_side_by_side_have_a_card_each(tmp_path):
    variables = dict(os.environ, STAND_IN_MEMORY=str(tmp_path / "memory"))
    one = rehearsal.Rehearsal(tmp_path, variables, 1, True, [], "")
    for name in ("a", "b"):
        one.call([sys.executable, "-c", "import os; print(os.environ['STAND_IN_MEMORY'])"], name)
    assert (tmp_path / "a.log").read_text() != (tmp_path / "b.log").read_text()


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


def test_a_short_rehearsal_has_a_stage_of_each_kind_but_three():
    """Of the ops one, whose files all come to harness.run_case; of a file's several benchmarks each; of one's cases any."""

    def kind(name):
        file = Path(rehearsal.STAGES[name][0]).stem.removeprefix("bench_")
        benchmark = name if name in ("ceilings", "gemms", "overlay") else ""
        return "an op" if file in OPS else file, benchmark

    left_out = {kind("overlay"), kind("gemms"), kind("images")}  # why is said there
    assert set(map(kind, rehearsal.SHORT)) == set(map(kind, rehearsal.STAGES)) - left_out
