"""Rehearses what a lent GPU will run, on a machine without one: make rehearse.

    PYTHONPATH=.:kernels:tests python -m rehearsal [--short] [--card h100] [--stage NAME] [--out DIR]

Runs `make test-gpu` and every stage of `make bench-gpu` under the stand-in CUDA driver (stand_in.py),
once as an 80 GB and once as a 141 GB card, and prints what went wrong. Exit status 1: something did
that is not in NEEDS_NUMBERS, the list of what cannot work where nothing is computed. One round of
each case is enough, since the times are invented.

--short is for CI: one kernel test an op and one stage of most kinds, at tiny sizes, as an 80 GB card.
The folder DIR keeps the results of both commands for each card, and what they printed; with the same
DIR a second run resumes with the stages that are not done.
"""

import argparse
import concurrent.futures
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.gpu import STAGES, open_folder, read_json, sources, stage_name
from bench.harness import commit
from bench.journal import read_journal
from rehearsal import stand_in

ROOT = Path(__file__).resolve().parent.parent.parent
ONE_ROUND = ["--rounds", "1", "--case-s", "0.01", "--warmup-s", "0"]
# The limits of time are those of a GPU's machine. An hour of a hang is too much here as well.
HOUR = "3600"
# One of most kinds, and what makes it small. Slowest first, for two at a time. Left out for time:
# "overlay" (its trainer is that of the steps), "gemms" (products, as in "ceilings"), "images" (most
# of it needs real numbers), and the compiled step of the diffusion model: torch.compile is met in
# the tokenizer's step and in sampling.
SHORT = {
    "vavae_step": [],
    "step_b_256_ladder": ["--only", "reference eager,ours eager"],
    "sampling": [],
    "growth_depth": [],
    "swiglu_1": ["--only", "eager,ours"],
    "latents": [],
    "ceilings": [],
}
COMPILED_AHEAD = "swiglu_1"  # as all ops are on a GPU; here it would only take longer
SUMMARY = "short test summary info"  # pytest's, above the list of what failed
SHORT_TESTS = ["tests/kernels/test_gpu.py", "-k", "xl and bfloat16"]


@dataclass(frozen=True)
class NeedsNumbers:
    """An error that says nothing, because the values on which it depends are never computed.

    Args: where, message: regular expressions, of the test's or row's name and of its message.
    """

    where: str
    message: str
    why: str


NEEDS_NUMBERS = [
    NeedsNumbers(
        "test_cuda_graphs_and_the_decoder_of_a_side_stream",
        r"float64\(0\.0\) > 10",
        "images in which every pixel is zero have no contrast",
    ),
    NeedsNumbers(
        r"sdpa cudnn(, padded to \d+)?$",
        "CUDNN_BACKEND_TENSOR_DESCRIPTOR: .*CUDNN_STATUS_NOT_SUPPORTED",
        "cuDNN plans its attention for a real GPU; the stand-in has none of it",
    ),
    NeedsNumbers(
        "^images$",
        r"^skipped: .*/shared/data/\S+ is absent",
        "the pictures are not a part of the project",
    ),
    NeedsNumbers(
        "^images: imagenet-256",
        r"^incorrect: mean difference \d+\.\d+ >",
        "a picture of more than 64 KiB is read back from the stand-in as zeros",
    ),
    NeedsNumbers(
        "^images: .*: dali, ",
        "CUDA runtime API error cudaErrorSymbolNotFound",
        "DALI has its own CUDA runtime, which wants tables of the driver that are not public",
    ),
    NeedsNumbers(
        "^images: .*: torchvision, ",
        "Failed to initialize nvjpeg",
        "the stand-in has no nvJPEG",
    ),
]


@dataclass(frozen=True)
class Problem:
    """Something that failed: a test, a stage or a row of a stage's results."""

    where: str
    message: str

    def reason(self) -> str:
        """Why it is no fault, from NEEDS_NUMBERS, or ""."""
        for known in NEEDS_NUMBERS:
            if re.search(known.where, self.where) and re.search(known.message, self.message):
                return known.why
        return ""


def problems_of_tests(tests: dict[str, dict]) -> list[Problem]:
    """Of {test: {"outcome", "message"}}, as test_gpu.json and the journal have them."""
    problems = [
        Problem(name, f"{line['outcome']}: {line['message']}")
        for name, line in tests.items()
        if line["outcome"] not in ("passed", "skipped")
    ]
    if not any(line["outcome"] == "passed" for line in tests.values()):
        problems.append(Problem("tests", "none of them passed"))
    return problems


def failed_rows(value: object, name: str = "") -> Iterator[Problem]:
    """Rows anywhere in a result that have a reason in place of a measurement.

    An "unavailable" row is none: what it needs is not installed, and it says so. Nor is one that is
    "too large" for the card; where that is ours, its case fails.
    """
    if isinstance(value, list):
        for one in value:
            yield from failed_rows(one, name)
    elif isinstance(value, dict):
        own = value.get("name") or value.get("case") or value.get("op") or ""
        name = f"{name}: {own}" if own else name
        if value.get("status") in ("failed", "incorrect"):
            yield Problem(name, f"{value['status']}: {value.get('reason', 'no reason')}")
        if "first_step_failed" in value:
            yield Problem(name, f"first step: {value['first_step_failed']}")
        for one in value.values():
            yield from failed_rows(one, name)


def problems_of_stage(name: str, stage: dict) -> list[Problem]:
    """Of one entry of stages.json. A stage that was skipped is a problem too."""
    records = (stage["result"] or {}).get("results", [])
    rows = [list(failed_rows(record, name)) for record in records]
    problems = [problem for one in rows for problem in one]
    if stage["status"] == "done":
        return problems
    output = stage.get("output", "")
    if stage["status"] == "done, with failures" and SUMMARY in output:
        # What is in NEEDS_NUMBERS fails no case, so each failed case has a record with another row.
        with_fault = sum(any(not problem.reason() for problem in one) for one in rows)
        if len(re.findall(r"^(?:FAILED|ERROR) ", output, re.MULTILINE)) <= with_fault:
            return problems
    ends = ("E  ", "FAILED", "ERROR")
    lines = [line for line in output.splitlines() if line.startswith(ends)]
    return [*problems, Problem(name, f"{stage['status']}: {' '.join(lines[-3:])}")]


def forget_unless_of(sources: str, folder: Path) -> None:
    """Removes results in `folder` that other sources gave, or that are damaged; those to come are
    of these.
    """
    mark = folder / "sources.txt"
    known = mark.read_text(encoding="utf-8") if mark.is_file() else ""
    if known != sources or not read_json(folder / "stages.json", None):
        (folder / "stages.json").unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        mark.write_text(sources, encoding="utf-8")


@dataclass
class Rehearsal:
    """Both commands under one card, in `out`; `variables` is the environment of the stand-in."""

    out: Path
    variables: dict[str, str]
    lanes: int
    short: bool
    stages: list[str]
    sources: str  # their commit and hash; what others gave is measured again

    def run(self) -> tuple[list[Problem], int]:
        """(what went wrong, how many tests and stages ran to an end)."""
        begin = time.monotonic()
        with concurrent.futures.ThreadPoolExecutor(self.lanes) as pool:
            tests = pool.submit(self.tests) if self.stages == list(self.all_stages()) else None
            if tests and not self.short:  # its warm-up takes every core
                tests.result()
            stages = [pool.submit(self.stage, name) for name in self.stages]
            known = {name: done.result() for name, done in zip(self.stages, stages, strict=True)}
            ran = tests.result() if tests else {}
        problems = problems_of_tests(ran) if tests else []
        for name, stage in known.items():
            problems += problems_of_stage(name, stage)
        ended = sum(line["outcome"] == "passed" for line in ran.values())
        ended += sum(stage["status"].startswith("done") for stage in known.values())
        print(f"{ended} of {len(ran) + len(known)} ended in {time.monotonic() - begin:.0f} s")
        return problems, ended

    def all_stages(self) -> dict:
        return SHORT if self.short else STAGES

    def tests(self) -> dict[str, dict]:
        begin = time.monotonic()
        if self.short:
            journal = self.out / "tests.jsonl"
            journal.unlink(missing_ok=True)
            command = [sys.executable, "-m", "pytest", *SHORT_TESTS, "-m", "gpu", "-q"]
            command += ["-p", "no:cacheprovider", "-p", "bench.journal", "--journal", str(journal)]
            self.call(command, "tests")
            results = read_journal(journal)
        else:
            path = self.out / "test_gpu.json"
            path.unlink(missing_ok=True)
            self.call(self.make("test-gpu", f"--jobs {self.lanes} --test-s {HOUR}"), "tests")
            results = json.loads(path.read_text(encoding="utf-8"))["tests"] if path.is_file() else {}
        skipped = sum(line["outcome"] == "skipped" for line in results.values())
        print(
            f"tests: {len(results)}, {skipped} skipped, {time.monotonic() - begin:.0f} s",
            flush=True,
        )
        return results

    def stage(self, name: str) -> dict:
        own = self.out / name  # stages.json is written by one process at a time
        small = ["--shapes", "tiny", *SHORT[name]] if self.short else []
        extra = " ".join(f"'{one}'" for one in (*ONE_ROUND, "--first-step-s", HOUR, *small))
        compile_s = HOUR if name == COMPILED_AHEAD and not self.short else "0"
        arguments = f"--stage {name} --stage-s {HOUR} --compile-s {compile_s} -- {extra}"
        forget_unless_of(self.sources, own)
        self.call(self.make("bench-gpu", arguments, own), name)
        path = own / "stages.json"
        lost = {"status": "lost: no stages.json", "result": None, "seconds": 0.0}
        stage = read_json(path, {}).get(name, lost)
        print(f"stage {name}: {stage['status']}, {stage['seconds']:.0f} s", flush=True)
        return stage

    def make(self, target: str, arguments: str, out: Path | None = None) -> list[str]:
        return [
            "make",
            target,
            f"PY={sys.executable}",
            f"OUT={out or self.out}",
            f"ARGS={arguments}",
        ]

    def call(self, command: list[str], name: str) -> None:
        # Each command has the card for itself, as on a GPU, where they run one after the other.
        own = self.variables | {"STAND_IN_MEMORY": f"{self.variables['STAND_IN_MEMORY']}.{name}"}
        with (self.out / f"{name}.log").open("w", encoding="utf-8") as log:
            options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "check": False}
            subprocess.run(command, env=own, **options)


def report(card: str, problems: list[Problem]) -> int:
    """Prints the problems and returns how many of them are faults."""
    faults = [problem for problem in problems if not problem.reason()]
    for problem in problems:
        if reason := problem.reason():
            print(f"{card}: needs real numbers: {problem.where}\n    {reason}")
    for fault in faults:
        print(f"{card}: FAULT {fault.where}\n    {' '.join(fault.message.split())[:600]}")
    return len(faults)


def main() -> int:
    parser = argparse.ArgumentParser(prog="rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("--short", action="store_true", help="minutes, for CI")
    parser.add_argument(
        "--card", action="append", choices=tuple(stand_in.CARDS), help="default: all"
    )
    parser.add_argument(
        "--stage", action="append", type=stage_name, metavar="NAME", help="only these stages"
    )
    parser.add_argument("--out", type=Path, help="default: a temporary folder")
    parser.add_argument("--lanes", type=int, default=os.cpu_count(), help="stages at a time")
    options = parser.parse_args()
    if options.lanes < 1:
        parser.error(f"--lanes is {options.lanes}, expected a positive number")
    if options.short and (unknown := sorted(set(options.stage or []) - SHORT.keys())):
        parser.error(f"--stage is {unknown}, expected some of {', '.join(SHORT)} with --short")
    if reason := stand_in.unavailable():
        print(reason, file=sys.stderr)
        return 1
    stages = options.stage or list(SHORT if options.short else STAGES)
    now = f"{commit()} {sources('tests/rehearsal')}"
    faults = 0
    with tempfile.TemporaryDirectory() as temporary:
        out = open_folder(parser, options.out or Path(temporary), device="stand-in")
        for name in options.card or (["h100"] if options.short else list(stand_in.CARDS)):
            card = stand_in.CARDS[name]
            print(f"==== {card.name}, {card.memory_gib} GiB", flush=True)
            (out / name).mkdir(parents=True, exist_ok=True)
            with stand_in.environment(card, cache=out / "cache") as variables:
                variables["DISABLE_PTXAS_OPT"] = "1"  # it need not optimise what does not run
                if options.short:
                    variables["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
                one = Rehearsal(out / name, variables, options.lanes, options.short, stages, now)
                problems, ended = one.run()
            faults += report(name, problems)
            if not ended:
                print(f"{name}: FAULT nothing ran to an end")
                faults += 1
    print(f"rehearsal: {faults} faults")
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
