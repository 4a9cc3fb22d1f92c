"""What runs tests and benchmarks on a GPU loses nothing: stages, budgets, crashes, hangs. On a CPU, with stand-ins for what runs there."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import pytest

from bench import gpu, gpu_tests, harness, journal

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """No sign of pytest-xdist, under which the pytest of a stage would take itself for a worker, and pytest-benchmark measures nothing."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)


def script(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


@pytest.fixture
def run_stages(tmp_path, monkeypatch, capsys):
    """run_stages(*arguments) -> exit status and what was printed of `bench/gpu.py` on a CPU, in this process, with its files in out/."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "out"), "--device", "cpu", *arguments])
        before = signal.getsignal(signal.SIGTERM)
        try:
            return gpu.main(), capsys.readouterr().out
        finally:
            signal.signal(signal.SIGTERM, before)

    return run


def test_stages_find_their_benchmarks():
    """One stage of every form; that none of the others names a file or an option that these do not."""
    forms = {"ceilings": 3, "gemms": 1, "alignment_3": 5, "norm_others_1": 4, "attention_sweep_256_72": 4, "step_xl_256_ladder": 1}
    forms |= {"norm_1": 4, "attention_2": 2, "norm_sweep_256": 8, "alignment_others_1": 9}
    forms |= {"overlay": 1, "vavae_step": 1, "vavae_encode": 1, "sampling": 1, "images": 3, "latents": 2, "growth_width": 1}
    for name, arguments in gpu.STAGES.items():
        assert (ROOT / arguments[0]).is_file(), name
        options = {argument for argument in arguments if argument.startswith("-")}
        assert options <= {"-k", "--batch", "--tokens", "--head-dim", "--dtypes", "--case-s", "--shapes", "--rounds"}, name
    collect = """if True:
        import contextlib, io, sys, pytest
        from bench import gpu
        for name in sys.argv[1:]:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                pytest.main([*gpu.STAGES[name], "--collect-only", "-q", "--device", "cpu", "-p", "no:cacheprovider"])
            print(name, sum("::" in line for line in out.getvalue().splitlines()))
    """
    done = script("-c", collect, *forms)
    assert {name: int(count) for name, count in map(str.split, done.stdout.splitlines())} == forms, done.stdout + done.stderr


def test_what_is_worth_most_comes_first():
    order = list(gpu.STAGES)
    assert order[:3] == ["ceilings", "step_xl_256_ladder", "norm_1"] and order.index("groupnorm_1") < order.index("sampling")
    for op in gpu.OPS:
        assert order.index(f"{op}_1") < order.index("vavae_step") < order.index(f"{op}_2") < order.index(f"{op}_others_1")


def test_stages_restart_and_merge(tmp_path, monkeypatch, run_stages):
    tiny = ["--", "--shapes", "tiny", "--only", "eager,ours", "--rounds", "2", "--case-s", "0.1"]
    out = tmp_path / "out"
    with monkeypatch.context() as short:
        short.setattr(gpu, "LEAST_S", 0.1)
        assert run_stages("--budget-s", "0.1")[0] == gpu.UNFINISHED
    code, printed = run_stages("--stage", "swiglu_1", "--stage", "gemms", *tiny)
    assert code == 0 and f"{len(gpu.STAGES) - 2} stages are still to do" in printed, printed
    state = json.loads((out / "stages.json").read_text())
    assert len(state["gemms"]["result"]["results"][0]["rows"]) == 12
    merged = json.loads((out / "kernels_cpu.json").read_text())  # there before all stages are done
    assert merged["stages_missing"]["norm_1"] == "not begun" and "gemms" not in merged["stages_missing"]
    assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "kernels_cpu.json", "stages.json"]
    assert re.search(r"^gemms +done$", run_stages("--list")[1], re.MULTILINE)
    for name in gpu.STAGES:
        if name not in ("swiglu_1", "gemms"):
            state[name] = dict(status="done", seconds=1.0, result=state["swiglu_1"]["result"])
    (out / "stages.json").write_text(json.dumps(state))
    code, printed = run_stages(*tiny)
    assert code == 0 and printed.count("done before") == len(gpu.STAGES), printed
    merged = json.loads((out / "kernels_cpu.json").read_text())
    assert merged["schema"] == harness.SCHEMA and {"commit", "date", "cpu", "threads", "versions"} <= merged.keys()
    assert "stages_missing" not in merged and {record["kind"] for record in merged["results"]} == {"op", "model_gemms"}
    assert {record["processes"] for record in merged["results"] if record["kind"] == "op"} == {len(gpu.STAGES) - 1}
    with pytest.raises(ValueError, match="stages differ in commit: a and b"):
        harness.merge([merged | dict(commit="a"), merged | dict(commit="b")])


CONFTEST = """
import json, pytest
def pytest_addoption(parser):
    parser.addoption("--results")
    parser.addoption("--device")
@pytest.fixture
def record(request):
    records = []
    def write(value):
        records.append(dict(kind="copy", case=value))
        about = dict(schema="kernels/1", device="cpu", cpu="a", commit="b", versions={}, date="c", results=records)
        open(request.config.getoption("--results"), "w").write(json.dumps(about))
    return write
"""
BENCHMARKS = """
import os, subprocess, sys, time, pytest
def test_good(benchmark, record): benchmark.pedantic(record, args=("good",))
def test_wrong(benchmark, record): benchmark.pedantic(record, args=("wrong",)); assert False, "ours is not timed"
def test_crash(benchmark, record): record("crash"); os._exit(7)
def test_hang(benchmark, record, tmp_path):
    record("hang")
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    open(os.environ["CHILD"], "w").write(str(child.pid))
    time.sleep(100)
def test_absent(benchmark): pytest.skip("data is absent")
def test_broken(benchmark): raise RuntimeError("no kernel image")
"""


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_no_stage_loses_another(tmp_path, monkeypatch, run_stages):
    """One after the other: fine, wrong, crashed, hung, without its data, broken; what was measured stays, what failed is tried again."""
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_stub.py").write_text(BENCHMARKS)
    names = ("good", "wrong", "crash", "hang", "absent", "broken")
    monkeypatch.setattr(gpu, "STAGES", {name: [str(tmp_path / "test_stub.py"), "-k", name, "-p", "no:cacheprovider"] for name in names})
    monkeypatch.setattr(gpu, "commit", lambda: "b")  # as CONFTEST says
    monkeypatch.setenv("CHILD", str(tmp_path / "child"))
    monkeypatch.setenv("PYTEST_ADDOPTS", "--option-of-a-plugin")
    out, child, run_limited = tmp_path / "out", tmp_path / "child", gpu.run_limited

    def wait_for_child(hung):
        end = time.monotonic() + 60
        while not (child.exists() and child.read_text()) and time.monotonic() < end:
            time.sleep(0.2)
        hung.set()

    def until_it_hangs(command, log, limit_s):
        """A limit that is long enough for the others on a busy machine would be waited for."""
        assert limit_s == gpu.STAGE_S
        if "hang" not in command:
            return run_limited(command, log, limit_s)
        hung = threading.Event()
        threading.Thread(target=wait_for_child, args=[hung]).start()
        return run_limited(command, log, limit_s, stop=hung)

    monkeypatch.setattr(gpu, "run_limited", until_it_hangs)

    code, printed = run_stages()
    state = json.loads((out / "stages.json").read_text())
    assert code == 1 and [state[name]["status"] for name in names] == [
        "done", "done, with failures", "cut short (7)", "cut short (stopped)", "skipped: data is absent",
        "failed (no test passed)"]
    assert "no kernel image" in printed and "in test_hang" in (out / "gpu.log").read_text(), "where it hung is in the log"
    assert not alive(int(child.read_text())), "what a killed stage had started is gone, too"
    merged = json.loads((out / "kernels_cpu.json").read_text())
    assert [record["case"] for record in merged["results"]] == ["good", "wrong", "crash", "hang"]
    assert list(merged["stages_missing"]) == ["crash", "hang", "broken"]

    (tmp_path / "test_stub.py").write_text("def test_broken(benchmark, record): benchmark.pedantic(record, args=('mended',))\n"
                                           "def test_crash(benchmark): import os; os._exit(7)\n")
    monkeypatch.setitem(gpu.STAGES, "new", gpu.STAGES["broken"])
    code, printed = run_stages("--stage", "broken", "--stage", "crash", "--stage", "new")
    assert printed.index("stage new: done") < printed.index("stage broken: done"), "what was never begun comes first"
    state = json.loads((out / "stages.json").read_text())
    assert state["crash"]["result"]["results"][0]["case"] == "crash", "a second try that gave nothing leaves the first"
    state["good"]["result"]["cpu"] = "d"
    (out / "stages.json").write_text(json.dumps(state))
    (tmp_path / "test_stub.py").write_text(BENCHMARKS)
    code, printed = run_stages("--stage", "crash")
    assert code == 1 and "not kept" in printed and "cpu: d before, now a" in printed

    def stop(command, *rest):
        Path(command[command.index("--results") + 1]).write_text(json.dumps(state["good"]["result"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu, "run_limited", stop)
    (out / "stages.json").write_text(json.dumps(dict(good=state["good"])))
    with pytest.raises(KeyboardInterrupt):
        run_stages("--stage", "wrong")
    interrupted = json.loads((out / "stages.json").read_text())["wrong"]
    assert interrupted["status"] == "cut short (interrupted)" and interrupted["result"] == state["good"]["result"]


@pytest.mark.parametrize(("option", "value", "said"), [
    ("--budget-s", "nan", "at least 45 seconds"), ("--budget-s", "30", "at least 45 seconds"), ("--budget-s", "soon", "got 'soon'"),
    ("--stage-s", "0", "at least 1 seconds"), ("--compile-s", "-1", "got '-1'"), ("--stage", "nrom_1", "expected one of norm_1")])
def test_what_an_option_expects_is_said(option, value, said, tmp_path, run_stages, capsys):
    with pytest.raises(SystemExit):
        run_stages(f"{option}={value}")
    assert option in (error := capsys.readouterr().err) and said in error
    assert not (tmp_path / "out").exists()


def test_a_damaged_state_and_one_of_another_commit_are_refused_and_left(tmp_path, run_stages, capsys):
    kept = tmp_path / "out" / "stages.json"
    kept.parent.mkdir()
    other = dict(ceilings=dict(status="cut short (7)", result=dict(commit="other")))
    for content, said in (('{"ceilings": {"status": "do', "is damaged"), ("[1]", "is damaged"), ('{"ceilings": {}}', "without status"),
                          (json.dumps(other), "commit: other before, now ")):
        kept.write_text(content)
        with pytest.raises(SystemExit):
            run_stages()
        assert said in (error := capsys.readouterr().err) and str(kept) in error
        assert kept.read_text() == content


def test_a_folder_that_cannot_be_and_a_gpu_that_is_not_there(tmp_path, monkeypatch, run_stages, capsys):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(SystemExit):
        run_stages()
    assert "expected a folder" in capsys.readouterr().err
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    for module in (gpu, gpu_tests):
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path / "new")])
        with pytest.raises(SystemExit, match="no CUDA device"):
            module.main()
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(sys, "argv", ["gpu_tests.py", "--out", str(tmp_path / "new"), "--jobs", "0"])
    with pytest.raises(SystemExit):
        gpu_tests.main()
    assert "--jobs: got 0, expected a positive number" in capsys.readouterr().err


def test_a_limit_of_time_and_one_of_silence_end_a_command(tmp_path):
    command = [sys.executable, "-S", "-c", "import time; time.sleep(60)"]
    assert gpu.run_limited(command, tmp_path / "log", 1) == "stopped after 1 s"
    assert gpu.run_limited(command, tmp_path / "log", 60, tmp_path / "watched", 1) == "stopped after 1 s of silence"


def test_packages_that_were_brought_stay_on_the_path(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "brought.py").write_text("")
    assert gpu.run_limited([sys.executable, "-c", "import brought, bench.gpu, lightningdit_kernels"], tmp_path / "log", 60) == 0


TESTS = """
import os, time, pytest, torch
@pytest.mark.gpu
def test_before(): pass
@pytest.mark.gpu
def test_fails(): assert 1 == 2, "one is not two"
@pytest.mark.gpu
def test_crashes(): os._exit(9)
@pytest.mark.gpu
def test_hangs(): time.sleep(100)
@pytest.mark.gpu
def test_takes_the_gpu_along(monkeypatch):
    def lost(): raise RuntimeError("CUDA error: an illegal memory access was encountered")
    torch.cuda.is_initialized, torch.cuda.synchronize = lambda: True, lost
    lost()
@pytest.mark.gpu
def test_skips(): pytest.skip("needs 20 GB")
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(3))
def test_after(n): assert torch.cuda.is_initialized is not None and not torch.cuda.is_initialized()
def test_not_for_gpus(): assert False
"""


def test_no_test_loses_another(tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = --import-mode=importlib\n")
    tests, out = tmp_path / "tests", tmp_path / "out"
    (tests / "kernels").mkdir(parents=True)
    out.mkdir()
    (tests / "kernels" / "test_k.py").write_text(TESTS)
    autotune_is_off = "assert os.environ['LIGHTNINGDIT_AUTOTUNE'] == '0'"  # processes that share a GPU time nothing
    (tests / "test_other.py").write_text(f"import os, pytest\n@pytest.mark.gpu\ndef test_other(): {autotune_is_off}\n")
    (tests / "test_imports.py").write_text("import pytest, no_such_package\n@pytest.mark.gpu\ndef test_imports(): pass\n")
    (tests / "test_cpu.py").write_text("assert False, 'a file without CUDA tests is not imported'\n")
    summary = gpu_tests.run(tests, out, 2, time.monotonic() + 240, test_s=20, compile_s=0)
    found = json.loads((out / "test_gpu.json").read_text())
    outcomes = {test.rpartition("::")[2] or test: line for test, line in found["tests"].items()}
    assert found["summary"] == summary
    wanted = dict(test_before="passed", test_fails="failed", test_crashes="lost", test_hangs="lost", test_takes_the_gpu_along="failed",
                  test_skips="skipped", test_other="passed") | {f"test_after[{n}]": "passed" for n in range(3)}
    assert {name: outcomes[name]["outcome"] for name in wanted} == wanted
    assert "one is not two" in outcomes["test_fails"]["message"] and "exit status 9" in outcomes["test_crashes"]["message"]
    assert "20 s of silence" in outcomes["test_hangs"]["message"] and "illegal memory" in outcomes["test_takes_the_gpu_along"]["message"]
    (absent,) = [line for test, line in found["tests"].items() if "test_imports" in test]
    assert absent["outcome"] == "failed" and "no_such_package" in absent["message"]
    assert len(found["tests"]) == len(wanted) + 1 and (summary["passed"], summary["failed"], summary["lost"]) == (5, 3, 2)


def test_tests_that_nobody_began_are_not_silent(tmp_path, monkeypatch):
    """The second process, after a crash, cannot even import them."""
    job, crashed = gpu_tests.Job("kernels_0", [], tmp_path), []

    def run_limited(command, log, *rest):
        log.write_text("no kernel image\n")
        if not crashed:
            crashed.append(job.note("a", "passed", ""))
        return 3

    monkeypatch.setattr(gpu_tests, "run_limited", run_limited)
    job.run(time.monotonic() + 60, threading.Event())
    known = journal.read_journal(job.journal)
    assert known["kernels_0"]["outcome"] == "lost"
    assert known["kernels_0"]["message"] == "not all tests were begun, exit status 3: no kernel image"


AHEAD = """
import os, time, pytest
from lightningdit_kernels.testing import assert_matches_truth
def note(what): open(os.environ["NOTES"], "a").write(what + "\\n")
def op(x):
    note(f"launched {x.item():g}")
    return x * 2
def wrong(x): return note("compared") or x * 3
@pytest.mark.gpu
@pytest.mark.parametrize("n", [1.0, 2.0])
def test_op(n):
    import torch
    assert_matches_truth(op, wrong, dict(x=torch.tensor(n)))
@pytest.mark.gpu
def test_crashes(): os._exit(9)
"""


def test_what_tests_launch_is_compiled_ahead_and_nothing_is_compared(tmp_path, monkeypatch):
    """A crash costs nothing else, and the test's own result is of its own run."""
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = --import-mode=importlib\n")
    tests, notes = tmp_path / "tests", tmp_path / "notes"
    (tests / "kernels").mkdir(parents=True)
    (tests / "kernels" / "test_k.py").write_text(AHEAD)
    monkeypatch.setenv("NOTES", str(notes))
    monkeypatch.setattr(gpu_tests.os, "cpu_count", lambda: 2)
    out = tmp_path / "out"
    out.mkdir()
    ahead, _ = gpu_tests.compile_ahead(tests, out, time.monotonic(), processes=2)
    assert "passed" not in ahead["tests"] and not notes.exists(), "no time, nothing compiled"
    summary = gpu_tests.run(tests, out, 1, time.monotonic() + 200, test_s=50)
    ahead = json.loads((out / "test_gpu.json").read_text())["compiled_ahead"]
    assert (ahead["processes"], ahead["tests"]) == (2, dict(passed=2, lost=1))
    noted = notes.read_text().splitlines()
    assert sorted(noted[:2]) == ["launched 1", "launched 2"], "once each, and no comparison"
    assert summary["failed"] == 2 and "compared" in noted[2:], "eager is another function: the tests' own run compares"
    assert "==== compile_1" in (out / "test_gpu.log").read_text()


def test_ops_are_compiled_ahead_once_on_a_machine(tmp_path, monkeypatch):
    """Stages that repeat one another once, in the time that there is, whatever becomes of them."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ran, repeated = [], [name for name in gpu.STAGES if re.fullmatch(r"(norm|swiglu)_[123]", name)]

    def run_limited(command, log, limit_s, stop):
        file = command[len(gpu.PYTEST)]
        ran.append((file, "--compile-only" in command, limit_s))
        return codes.get(file, 0)

    codes = {"bench/bench_swiglu.py": "stopped after 5 s"}
    monkeypatch.setattr(gpu, "run_limited", run_limited)
    ahead = gpu.compile_ahead(repeated, tmp_path, 100, ["--device", "cuda"])
    assert ahead["stages"] == {"norm_1": "0", "swiglu_1": "stopped after 5 s"}
    assert [(file, only) for file, only, _ in sorted(ran)] == [("bench/bench_norm.py", True), ("bench/bench_swiglu.py", True)]
    assert all(95 < limit_s <= 100 for *_, limit_s in ran)
    codes.clear()
    assert gpu.compile_ahead(repeated, tmp_path, 100, ["--device", "cuda"])["stages"] == {"swiglu_1": "0"}, "what did not end well"
    assert gpu.compile_ahead(repeated, tmp_path, 100, ["--device", "cuda"]) is None
    assert list(gpu.compile_ahead([*repeated, "norm_others_1"], tmp_path, 100, ["--device", "cuda"])["stages"]) == ["norm_others_1"]
    assert len(gpu.compile_ahead(repeated, tmp_path, 100, ["--device", "cuda", "--shapes", "l"])["stages"]) == 2, "other shapes"


@pytest.mark.parametrize("what", ["TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "sources"])
def test_ops_are_compiled_again_for_other_caches_and_sources(what, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(gpu, "run_limited", lambda *arguments, stop: 0)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    for name in ("bench", "kernels", "lightningdit"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "module.py").write_text("a = 1\n")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    assert gpu.compile_ahead(["norm_1"], tmp_path, 100, []) is not None
    assert gpu.compile_ahead(["norm_1"], tmp_path, 100, []) is None
    if what == "sources":
        (tmp_path / "kernels" / "module.py").write_text("a = 2\n")
    else:
        monkeypatch.setenv(what, str(tmp_path / "other"))
    assert gpu.compile_ahead(["norm_1"], tmp_path, 100, []) is not None


def test_choices_made_while_compiling_ahead_are_not_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    folder = tmp_path / "inductor" / "ab"
    folder.mkdir(parents=True)
    (folder / "before.best_config").write_text("{}")

    def run_limited(*arguments, stop):
        assert os.environ["LIGHTNINGDIT_AUTOTUNE"] == "0", "nor do our kernels choose"
        (folder / "new.best_config").write_text("{}")
        (folder / "kernel.py").write_text("")
        return 0

    monkeypatch.setattr(gpu, "run_limited", run_limited)
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "1")
    assert gpu.compile_ahead(["norm_1"], tmp_path, 100, [])["stages"] == {"norm_1": "0"}
    assert os.environ["LIGHTNINGDIT_AUTOTUNE"] == "1"
    assert sorted(path.name for path in folder.iterdir()) == ["before.best_config", "kernel.py"]


SLOW = """
import os, pathlib, time, pytest
@pytest.mark.gpu
@pytest.mark.parametrize("n", range(2))
def test_slow(n):
    pathlib.Path(os.environ["PIDS"], str(os.getpid())).touch()
    time.sleep(100)
"""
ENDED_BY_A_SIGNAL = """
import pathlib, signal, sys, time
from bench import gpu, gpu_tests
folder, what = pathlib.Path(sys.argv[1]), sys.argv[2]
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets the jobs in its background ignore it
gpu_tests.os.cpu_count = lambda: 4
slow = [str(folder / "tests" / "kernels" / "test_k.py")]
gpu.STAGES.clear()
gpu.STAGES.update({"a": [*slow, "-p", "no:benchmark", "-k", "0"], "b": [*slow, "-k", "1"]})
gpu.run_limited = lambda command, *rest, run=gpu.run_limited, **more: run([one for one in command if "-only" not in one], *rest, **more)
if what == "ops":
    gpu.compile_ahead(["a", "b"], folder, 100, [])
elif what == "tests ahead":
    gpu_tests.compile_ahead(folder / "tests", folder, time.monotonic() + 100, 2)
else:
    gpu_tests.run(folder / "tests", folder, 2, time.monotonic() + 100, compile_s=0)
"""


@pytest.mark.parametrize(("what", "number"), [("ops", signal.SIGTERM), ("tests ahead", signal.SIGINT), ("tests", signal.SIGTERM)])
def test_a_signal_ends_what_runs_side_by_side(what, number, tmp_path):
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: needs one\naddopts = --import-mode=importlib\n")
    for name in ("tests/kernels", "pids", "temporary"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tests" / "kernels" / "test_k.py").write_text(SLOW)
    paths = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "PIDS": str(tmp_path / "pids")}
    environment = os.environ | paths | {"TMPDIR": str(tmp_path / "temporary")}
    child = subprocess.Popen([sys.executable, "-c", ENDED_BY_A_SIGNAL, tmp_path, what], env=environment, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while len(list((tmp_path / "pids").iterdir())) < 2 and time.monotonic() < end:
            time.sleep(0.1)
        pids = [int(path.name) for path in (tmp_path / "pids").iterdir()]
        assert len(pids) == 2
        child.send_signal(number)
        child.wait(30)
        assert not any(map(alive, pids))
    finally:
        child.kill()
        child.wait()


def test_compiling_alone_measures_nothing(tmp_path):
    results = tmp_path / "results.json"
    dry = ["--benchmark-only", "--shapes", "tiny", "--device", "cpu", "--only", "eager,ours", "-q", "-p", "no:cacheprovider"]
    done = script("-m", "pytest", "bench/bench_swiglu.py", *dry, "--compile-only", "--results", results)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not results.exists()


def test_cuda_tests_are_found_and_shared_out(tmp_path):
    files = gpu_tests.files_of(ROOT / "tests")
    assert [path.stem for path in files][:3] == ["test_attention_triton", "test_gpu", "test_bench_step"] and len(files) >= 8
    together, alone = gpu_tests.jobs_of(ROOT / "tests", tmp_path, 3)
    assert [job.part for job in together] == ["0/3", "1/3", "2/3"] and "test_train_distributed" in [job.name for job in alone]
    assert journal.read_journal(tmp_path / "none") == {}


def test_the_guide_names_what_there_is():
    guide, makefile = ((ROOT / name).read_text() for name in ("docs/gpu.md", "Makefile"))
    targets = set(re.findall(r"`make ([a-z-]+)", guide))
    assert targets == {"test-gpu", "bench-gpu", "levers", "convergence", "rehearse"} and all(f"\n{name}:" in makefile for name in targets)
    assert set(re.findall(r"--stage (\w+)", guide + makefile)) <= gpu.STAGES.keys()
    assert f"at most, of `test-gpu` a test {gpu_tests.TEST_S} seconds" in guide and gpu.STAGE_S == 540
    sources = ("bench/gpu.py", "bench/gpu_tests.py", "bench/step.py", "tests/rehearsal/__main__.py", "tests/rehearsal/stand_in.py")
    source = "".join((ROOT / name).read_text() for name in sources)
    assert all(f'"{option}"' in source for option in set(re.findall(r"--[a-z][a-z-]+", guide)) - {"--data"})
    assert all(name in source for name in ("stages.json", "kernels_", "gpu.log", "test_gpu.json", "test_gpu.log"))
