"""The CUDA tests, so that one of them that crashes, hangs or takes the GPU along loses no other: make test-gpu OUT=folder.

    python bench/gpu_tests.py --out FOLDER [--jobs 8] [--budget-s SECONDS] [--compile-s 600]

First all tests are run once by a process a core, with their comparisons left out (bench/warm.py), for what they launch to be compiled when
they run: Triton compiles a kernel on one core, and tests that wait for each other would wait for that. Whatever goes wrong there costs
nothing but the time, at most --compile-s seconds and half the budget.

Those of the kernels, most of whose time Triton's compiler takes on the host, are spread over processes; the others, which measure memory
or start processes of their own, run one file after the other. A process that ended early or printed nothing new for TEST_S seconds is
replaced: the test that it was in is "lost", the rest is run by the next one. FOLDER gets test_gpu.json, {"summary", "compiled_ahead",
"tests": {test: {"outcome", "seconds", "message"}}}, written anew every few seconds, and test_gpu.log. Exit status 1: some test failed or
was lost; 3: the budget ended first.
"""

import argparse
import collections
import concurrent.futures
import json
import os
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.gpu import LEAST_S, PYTEST, UNFINISHED, no_choices_kept, open_folder, run_limited, seconds  # noqa: E402
from bench.harness import write  # noqa: E402
from bench.journal import read_journal  # noqa: E402

# In which every test must come to an end: twice what compiling the largest one took on a core by itself (143 s), for where nothing was
# compiled ahead and neighbours compile as well.
TEST_S = 300
COMPILE_S = 600
WORTH = ("test_bench_step", "test_generation", "test_levers", "test_optim", "test_plan", "test_train_distributed")  # other files come last


def files_of(folder: Path) -> list[Path]:
    """The files with CUDA tests, kernels first, then by worth: only these are imported."""
    def rank(path):
        return path.parent == folder, WORTH.index(path.stem) if path.stem in WORTH else len(WORTH), path

    return sorted((path for path in folder.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text(encoding="utf-8")), key=rank)


class Job:
    """Some files, or a part of their tests, run to the end by as many processes as that takes."""

    def __init__(self, name, files, folder, part="0/1", test_s=TEST_S, plugins=()):
        self.name, self.files, self.part, self.test_s, self.plugins = name, files, part, test_s, plugins
        self.journal, self.log = folder / f"{name}.jsonl", folder / f"{name}.log"

    def run(self, end, stop):
        """Until `end` of time.monotonic() at most, and until the event `stop` is set."""
        known, code = -1, "no time was left"
        while not stop.is_set() and (left_s := end - time.monotonic()) > 0 and (before := len(read_journal(self.journal))) > known:
            known = before  # a process that adds nothing to the journal is the last one
            command = [*PYTEST, *self.files, "-m", "gpu", "-q", "-p", "no:cacheprovider", "-p", "bench.journal",
                       "--journal", self.journal, "--journal-part", self.part, "--continue-on-collection-errors",
                       *(argument for plugin in self.plugins for argument in ("-p", plugin))]
            code = run_limited(command, self.log, left_s, self.journal, self.test_s, stop)
            in_flight = [test for test, line in read_journal(self.journal).items() if line["outcome"] == "begun"]
            for test in in_flight:
                self.note(test, "lost", f"the process ended in it: {self.said(code)}")
            if code in (0, 1, 5) and not in_flight:
                return
        tail = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines() if self.log.is_file() else []
        begun = "not all tests were begun" if read_journal(self.journal) else "no test was begun"
        self.note(self.name, "lost", f"{begun}, {self.said(code)}: {tail[-1] if tail else 'no output'}")

    @staticmethod
    def said(code):
        return code if isinstance(code, str) else f"exit status {code}"

    def note(self, test, outcome, message):
        with self.journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(dict(test=test, outcome=outcome, seconds=0.0, message=message)) + "\n")


def jobs_of(tests: Path, folder: Path, parts: int, test_s: float = TEST_S) -> tuple[list[Job], list[Job]]:
    """(those that run side by side, those that run one after the other)."""
    files = files_of(tests)
    kernels = [path for path in files if path.parent != tests]
    together = [Job(f"kernels_{part}", kernels, folder, f"{part}/{parts}", test_s) for part in range(parts)] if kernels else []
    return together, [Job(path.stem, [path], folder, test_s=test_s) for path in files if path not in kernels]


def compile_ahead(tests: Path, folder: Path, end: float, processes: int | None = None, test_s: float = TEST_S) -> tuple[dict, list[Job]]:
    """Runs all tests with bench.warm, until `end` of time.monotonic() at most: ({"seconds", "processes", "tests": by outcome}, the jobs).

    Their processes share the GPU; a context takes half a GB, what the kernels' tests hold about as much.
    """
    begin, processes = time.monotonic(), processes or min(16, os.cpu_count() or 1)
    files = files_of(tests)
    jobs = [Job(f"compile_{part}", files, folder, f"{part}/{processes}", test_s, ("bench.warm",)) for part in range(processes)]
    stop = threading.Event()
    with no_choices_kept(), concurrent.futures.ThreadPoolExecutor(processes) as pool:
        try:
            concurrent.futures.wait([pool.submit(job.run, end, stop) for job in jobs])
        finally:  # by a signal, too
            stop.set()
    outcomes = collections.Counter(line["outcome"] for job in jobs for line in read_journal(job.journal).values())
    return dict(seconds=round(time.monotonic() - begin, 1), processes=processes, tests=dict(outcomes)), jobs


def report(jobs: list[Job], begin: float, path: Path, ahead: dict | None = None) -> dict:
    """Writes what is known so far; returns the summary."""
    tests = {test: {key: line[key] for key in ("outcome", "seconds", "message")}
             for job in jobs for test, line in read_journal(job.journal).items()}
    summary = dict(collections.Counter(line["outcome"] for line in tests.values()), seconds=round(time.monotonic() - begin, 1))
    write(path, dict(summary=summary, compiled_ahead=ahead, tests=tests))
    return summary


def run(tests: Path, out: Path, parts: int, end: float, test_s: float = TEST_S, compile_s: float = COMPILE_S) -> dict:
    """Runs all, and returns the summary: how many of each outcome, and the seconds."""
    begin, path, log = time.monotonic(), out / "test_gpu.json", out / "test_gpu.log"
    with tempfile.TemporaryDirectory() as folder:
        ahead, before = None, []
        if compile_s > 0:
            ahead, before = compile_ahead(tests, Path(folder), begin + min(compile_s, (end - begin) / 2), test_s=test_s)
            print(f"compiled ahead: {ahead['tests']} by {ahead['processes']} processes in {ahead['seconds']:.0f} s", flush=True)
        together, alone = jobs_of(tests, Path(folder), parts, test_s)

        def one_after_the_other(jobs):
            for job in jobs:
                job.run(end, stop)

        stop = threading.Event()
        off = mock.patch.dict(os.environ, LIGHTNINGDIT_AUTOTUNE="0")  # what processes time while they share a GPU decides nothing
        with off, concurrent.futures.ThreadPoolExecutor(max(1, len(together))) as pool:
            try:
                for jobs in ([[job] for job in together], [alone]):  # a neighbour's memory would count in the tests that measure it
                    waiting = [pool.submit(one_after_the_other, one) for one in jobs]
                    while concurrent.futures.wait(waiting, timeout=5).not_done:
                        report([*together, *alone], begin, path, ahead)
                    for future in waiting:
                        future.result()
            finally:  # by a signal, too
                stop.set()
        summary = report([*together, *alone], begin, path, ahead)
        log.write_text("".join(f"\n==== {job.name}\n{job.log.read_text(encoding='utf-8', errors='replace')}"
                               for job in (*before, *together, *alone) if job.log.is_file()), encoding="utf-8")
    return summary


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)), help="processes for the kernels' tests")
    parser.add_argument("--budget-s", type=seconds(LEAST_S), default=float("inf"), help="seconds in which to end")
    parser.add_argument("--test-s", type=seconds(1), default=TEST_S, help="at most, of a test")
    parser.add_argument("--compile-s", type=seconds(), default=COMPILE_S, help="at most, to compile ahead of the first test; 0: do not")
    options = parser.parse_args()
    if options.jobs < 1:
        parser.error(f"--jobs: got {options.jobs}, expected a positive number")
    out, end = open_folder(parser, options.out), time.monotonic() + options.budget_s - 15
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    summary = run(ROOT / "tests", out, options.jobs, end, options.test_s, options.compile_s)
    for test, line in json.loads((out / "test_gpu.json").read_text(encoding="utf-8"))["tests"].items():
        if line["outcome"] not in ("passed", "skipped"):
            first = line["message"].splitlines()[0][:200] if line["message"] else ""
            print(f"{line['outcome']:8} {test}\n         {first}")
    print(f"{out / 'test_gpu.json'}: {summary}")
    if time.monotonic() > end:
        return UNFINISHED
    return int(any(name not in ("passed", "skipped", "seconds") for name in summary))


if __name__ == "__main__":
    sys.exit(main())
