"""The GPU benchmark in stages that can be restarted, and one results file: make bench-gpu OUT=folder. docs/gpu.md is the guide to it.

    python bench/gpu.py --out FOLDER [--list] [--stage NAME] [--budget-s SECONDS]

Each stage is a process of its own, pytest, that may take 9 minutes. FOLDER gets three files: stages.json, what every stage has come to;
kernels_<device>.json, all results so far in one; gpu.log, what the stages printed. The first two are written anew after each stage, and a
stage that crashes, hangs or runs out of time loses neither the others nor what it had measured itself. Before the first stage of ops all
cores compile what these stages launch, side by side; what they find compiled is not part of their 9 minutes.

Run again on the same FOLDER, it goes on: stages that were never begun first, then those that were cut short or failed. The stages <op>_1
to <op>_3 are the same in fresh processes, and one row each in the end. Ceilings, training steps and the ops in bf16 come first; then
sampling, the tokenizer, repetitions, other dtypes, data, the smaller models, growth, and the sweeps over B, N and Dh;
`-- --official CHECKOUT` adds the official code. With a budget it ends in time; exit status 3 then says: run again, to continue.
Copied to bench/results, the kernels file is in the next `make report`.
"""

import argparse
import concurrent.futures
import contextlib
import difflib
import getpass
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.harness import SAME, commit, merge, write  # noqa: E402
from bench.step import CACHES  # noqa: E402

# Of its plugins only this one (run_limited): others that are installed cost seconds a process.
PYTEST = (sys.executable, "-m", "pytest", "-p", "pytest_benchmark.plugin")
STAGE_S = 9 * 60
LEAST_S = 45  # no stage is begun with less: imports and the first compilation would be all
UNFINISHED = 3
PARTIAL = "stage.json"  # in OUT: the results so far of the stage that runs
TAIL = 3000  # characters of what a failed stage printed that are kept

COMPILE_S = 9 * 60  # at most, to compile ahead of the ops
REPEATS = 3  # processes: layout in memory, allocator and compilation differ between them
OPS = ("norm", "attention", "swiglu", "alignment", "groupnorm")


def stages() -> dict[str, list[str]]:
    """What pytest is called with, by name, in order of worth, should time run out."""

    def training(preset, tokens, part):
        points = ["--shapes", preset, "--tokens", str(tokens), "--case-s", "60"]
        return {f"step_{preset}_{tokens}_{part}": ["bench/bench_step.py", "-k", f"bench_step and {part}", *points]}

    def ops(process, name, dtypes):  # a stage that is repeated is pooled by harness.merge
        return {f"{op}{name}_{process}": [f"bench/bench_{op}.py", "--dtypes", dtypes, "--case-s", "10"] for op in OPS}

    table = {"ceilings": ["bench/bench_ceilings.py", "-k", "copy or square", "--case-s", "10"]}
    table |= training("xl", 256, "ladder") | ops(1, "", "bfloat16") | training("xl", 256, "kernels")
    table["sampling"] = ["bench/bench_sampling.py", "--shapes", "xl", "--rounds", "3"]
    table |= {f"vavae_{case}": ["bench/bench_tokenizer.py", "-k", case, "--case-s", "30"] for case in ("step", "encode", "decode")}
    table["gemms"] = ["bench/bench_ceilings.py", "-k", "model_gemms"]
    table["overlay"] = ["bench/bench_step.py", "-k", "overlay", "--shapes", "xl"]
    for process in range(2, REPEATS + 1):
        table |= ops(process, "", "bfloat16")
    for process in range(1, REPEATS + 1):
        table |= ops(process, "_others", "float16,float32")
    table |= {name: [f"bench/bench_{name}.py", "--case-s", "10"] for name in ("images", "latents")}
    for preset, tokens in (("xl", 1024), ("l", 256), ("l", 1024), ("b", 256), ("b", 1024)):
        table |= training(preset, tokens, "ladder") | training(preset, tokens, "kernels")
    table |= {f"growth_{axis}": ["bench/bench_growth.py", "-k", axis, "--case-s", "10"] for axis in ("batch", "tokens", "width", "depth")}
    sweep = ["--batch", "8,32,128,256", "--dtypes", "bfloat16", "--case-s", "4"]
    for tokens in (256, 1024):
        for op in ("norm", "swiglu", "alignment"):
            table[f"{op}_sweep_{tokens}"] = [f"bench/bench_{op}.py", "--tokens", str(tokens), *sweep]
        for head_dim in (64, 72):
            dims = ["--tokens", str(tokens), "--head-dim", str(head_dim)]
            table[f"attention_sweep_{tokens}_{head_dim}"] = ["bench/bench_attention.py", *dims, *sweep]
    return table


STAGES = stages()


def run_limited(command: list, log: Path, limit_s: float, watched: Path | None = None, silent_s: float = 0.0,
                stop: threading.Event | None = None) -> int | str:
    """Runs a command with the sources on Python's path, its output appended to `log`; returns its exit status, or why it was stopped.

    It has a process group of its own, of which nothing is left afterwards: not what a killed benchmark had started on the GPU either.

    Args:
        watched, silent_s: a file to which the command writes, and for how many seconds it may fail to.
        stop: ends the command when it is set. Threads need it: a signal reaches the main thread only, and not the command's group.
    """
    before = os.environ.get("PYTHONPATH")  # packages that a machine without a registry was brought
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *([before] if before else [])])
    # Without the options that somebody gives their own pytest: they may be of plugins that are not loaded, and change what is printed.
    environment = os.environ | {"PYTHONPATH": paths, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    begin, seen = time.monotonic(), None

    def overdue():
        nonlocal begin_of_silence, seen
        now = time.monotonic()
        if watched is not None and (size := watched.stat().st_size if watched.is_file() else 0) != seen:
            begin_of_silence, seen = now, size
        if stop is not None and stop.is_set():
            return "stopped"
        if now - begin > limit_s:
            return f"stopped after {limit_s:.0f} s"
        return f"stopped after {silent_s:.0f} s of silence" if watched is not None and now - begin_of_silence > silent_s else ""

    begin_of_silence = begin
    with log.open("a", encoding="utf-8") as output:
        child = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=output, stderr=subprocess.STDOUT,
                                 process_group=0)
        try:
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return child.wait(0.5)
                if reason := overdue():
                    child.send_signal(signal.SIGABRT)  # pytest's faulthandler then prints where it was
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(10)
                    return reason
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def read_json(path: Path, default):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return default


def tail(log: Path, begin: int) -> str:
    """The end of what was appended to `log` behind `begin` bytes."""
    with log.open("rb") as file:
        file.seek(max(begin, log.stat().st_size - TAIL))
        return file.read().decode("utf-8", "replace")


def run_stage(name: str, out: Path, limit_s: float, extra: list[str]) -> dict:
    """{"status", "seconds", "result" or None, "output"} of one stage; status "done", or what went wrong.

    "skipped: reason" is done too: what the benchmark needs is not on this machine.
    """
    partial, log = out / PARTIAL, out / "gpu.log"
    partial.unlink(missing_ok=True)
    command = [*PYTEST, *STAGES[name], "--benchmark-only", "--results", partial, "-q", "-rfEs",
               "--benchmark-columns=median", *extra]
    with log.open("a", encoding="utf-8") as file:
        file.write(f"\n==== stage {name}\n")
    size, begin = log.stat().st_size, time.perf_counter()
    code = run_limited(command, log, limit_s)
    stage = dict(status="done", seconds=round(time.perf_counter() - begin, 1), result=read_json(partial, None))
    partial.unlink(missing_ok=True)
    printed = tail(log, size)
    if code not in (0, 1):
        stage |= dict(status=f"cut short ({code})" if stage["result"] else f"failed ({code})", output=printed)
    elif code == 1:  # a contestant that is wrong fails the test, but its row says so: the measurement stands
        stage |= dict(status="done, with failures" if stage["result"] else "failed (no test passed)", output=printed)
    elif stage["result"] is None:
        reason = re.search(r"^SKIPPED \[\d+\] \S+: (.*)$", printed, re.MULTILINE)
        stage |= dict(status=f"skipped: {reason[1]}" if reason else "failed (nothing was measured)", output=printed)
    return stage


@contextlib.contextmanager
def no_choices_kept() -> Iterator[None]:
    """Inside, nobody keeps what was fastest: processes that share a GPU would choose for those that are timed alone on it.

    Our kernels take the first of their table. Inductor chooses, and its choices are removed afterwards: there is no environment variable
    for it, and the option is a part of the key of the compiled graphs. What was compiled stays.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir  # with it comes all of torch.compile, which takes a second

    folder = Path(cache_dir())
    before = set(folder.rglob("*.best_config"))
    try:
        with mock.patch.dict(os.environ, LIGHTNINGDIT_AUTOTUNE="0"):
            yield
    finally:
        for path in set(folder.rglob("*.best_config")) - before:
            path.unlink(missing_ok=True)


def sources(*more: str) -> str:
    """A hash of all Python sources, committed or not, and of those in `more` folders."""
    found = hashlib.sha256()
    for folder in ("bench", "kernels", "lightningdit", *more):
        for path in sorted((ROOT / folder).rglob("*.py")):
            found.update(f"{path.relative_to(ROOT)}\0".encode() + path.read_bytes())
    return found.hexdigest()


def compile_ahead(names: list[str], out: Path, limit_s: float, extra: list[str]) -> dict | None:
    """Runs the given stages of ops side by side up to their first calls: {"seconds", "stages": {name: how it ended}}; None: done before.

    Kernels are then in the caches of Triton and Inductor on this machine's disk; a file says which stages ended well with these sources and
    caches. What goes wrong costs nothing but the time, and is tried again by the next run.
    """
    unique = list({tuple(STAGES[name]): name for name in reversed(names)}.values())[::-1]  # processes that repeat one another
    done = Path(tempfile.gettempdir()) / f"lightningdit_{getpass.getuser()}_compiled.json"
    key = dict(sources=sources(), python=sys.executable, torch=torch.__version__, extra=extra)
    key |= {name: os.environ.get(name, "") for name in CACHES}
    before = read_json(done, {})
    unique = [name for name in unique if before.get("key") != key or name not in before["stages"]]
    if not unique:
        return None
    begin, end, stop = time.monotonic(), time.monotonic() + limit_s, threading.Event()

    def first_calls(name):
        left_s = 0 if stop.is_set() else end - time.monotonic()
        command = [*PYTEST, *STAGES[name], "--benchmark-only", "--compile-only", "-q", *extra]
        return str(run_limited(command, out / "gpu.log", left_s, stop=stop)) if left_s > 0 else "not begun"

    with no_choices_kept(), concurrent.futures.ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 1) // 2))) as pool:
        try:
            ended = dict(zip(unique, pool.map(first_calls, unique), strict=True))
        finally:  # by a signal, too
            stop.set()
    stages = (before["stages"] if before.get("key") == key else {}) | {name: code for name, code in ended.items() if code == "0"}
    with contextlib.suppress(OSError):
        write(done, dict(key=key, stages=stages))
    return dict(seconds=round(time.monotonic() - begin, 1), stages=ended)


def finished(stage: dict | None) -> bool:
    return stage is not None and stage["status"].startswith(("done", "skipped"))


def other_machine(state: dict, result: dict | None, keys: tuple[str, ...] = SAME) -> str:
    """In what the result differs from those in `state` that it would be merged with, or ""."""
    before = next((stage["result"] for stage in state.values() if stage["result"]), None)
    differing = [key for key in keys if before and result and before.get(key) != result.get(key)]
    return ", ".join(f"{key}: {before.get(key)} before, now {result.get(key)}" for key in differing)


def results_file(state: dict, out: Path) -> Path | None:
    """Writes all results so far as one file, with what is missing named in it; None without any."""
    results = [state[name]["result"] for name in STAGES if name in state and state[name]["result"]]
    if not results:
        return None
    merged = merge(results)
    left = {name: state[name]["status"] if name in state else "not begun" for name in STAGES if not finished(state.get(name))}
    path = out / f"kernels_{re.sub(r'[^a-z0-9]+', '_', merged.get('gpu', 'cpu').lower()).strip('_')}.json"
    write(path, merged | (dict(stages_missing=left) if left else {}))
    return path


def stage_name(text: str) -> str:
    """For argparse: one of STAGES."""
    if text not in STAGES:
        close = difflib.get_close_matches(text, STAGES, n=3, cutoff=0.5)
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(close or list(STAGES))}")
    return text


def seconds(least: float = 0.0):
    """For argparse: a time in s of at least `least`, or inf."""

    def parse(text):
        with contextlib.suppress(ValueError):
            if (value := float(text)) >= least:
                return value
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {f'at least {least:g} seconds' if least else 'seconds'}")

    return parse


def open_folder(parser: argparse.ArgumentParser, out: Path, device: str = "cuda") -> Path:
    """The folder for results, made if it is not there. Ends the command where it cannot be, or where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device is visible to torch")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out: got {out}, expected a folder: {error.strerror}")
    return out.resolve()


def read_state(parser: argparse.ArgumentParser, path: Path) -> dict:
    """{stage: what it has come to} of stages.json, {} if there is none. A damaged one ends the command: hours may be in it."""
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        if all({"status", "result"} <= stage.keys() for stage in state.values()):
            return state
        reason = "a stage without status or result"
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error)
    parser.error(f"--out: {path} is damaged ({reason}): bring it again, or name another folder")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", action="append", type=stage_name, metavar="NAME", help="default: all that are not done")
    parser.add_argument("--budget-s", type=seconds(LEAST_S), default=float("inf"), help="seconds in which to end")
    parser.add_argument("--stage-s", type=seconds(1), default=STAGE_S, help="at most, of a stage")
    parser.add_argument("--compile-s", type=seconds(), default=COMPILE_S, help="at most, to compile ahead of the ops; 0: do not")
    parser.add_argument("--list", action="store_true", help="what every stage has come to, and nothing else")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("pytest", nargs="*", help="after --: more arguments for pytest, as --shapes all; plugins by name: -p xdist")
    options = parser.parse_args()
    end = time.monotonic() + options.budget_s
    kept = options.out.resolve() / "stages.json"
    state = read_state(parser, kept)
    if options.list:
        for name in STAGES:
            print(f"{name:24} {state[name]['status'] if name in state else 'not begun'}")
        return 0
    out = open_folder(parser, options.out, options.device)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that a stage that runs is ended
    wanted = [name for name in STAGES if name in (options.stage or STAGES)]
    to_do = [name for name in wanted if not finished(state.get(name)) or (options.stage and "failures" in state[name]["status"])]
    for name in wanted:
        if name not in to_do:
            print(f"stage {name}: {state[name]['status']} before", flush=True)
    refusal = f"{kept} is of another machine or version; name another --out."
    if other := other_machine(state, dict(commit=commit()), ("commit",)):  # the rest is known once a stage has run
        parser.error(f"--out: {refusal} {other}")

    def keep(name, stage):
        """Writes what the stage has come to, and all results so far; "" or why not."""
        if other := other_machine(state, stage["result"]):
            return other
        if not (state.get(name, {}).get("result") and not stage["result"]):  # a second try that gave nothing leaves the first
            state[name] = stage
        write(kept, state)
        results_file(state, out)
        return ""

    ops_to_do = [name for name in to_do if name.partition("_")[0] in OPS and "sweep" not in name]
    for name in sorted(to_do, key=lambda name: name in state):  # those that were never begun first
        left_s = end - time.monotonic()
        if name in ops_to_do and options.device == "cuda" and min(options.compile_s, left_s - LEAST_S) > 0:
            ahead = compile_ahead(ops_to_do, out, min(options.compile_s, left_s / 2), ["--device", options.device, *options.pytest])
            if ahead:
                print(f"compiled ahead in {ahead['seconds']:.0f} s, by exit status: {ahead['stages']}", flush=True)
            ops_to_do, left_s = [], end - time.monotonic()
        if left_s < LEAST_S:
            print(f"stage {name}: not begun, {max(0, left_s):.0f} s are left; run again to continue", flush=True)
            return UNFINISHED
        try:
            stage = run_stage(name, out, min(options.stage_s, left_s - 15), ["--device", options.device, *options.pytest])
        except (KeyboardInterrupt, SystemExit):
            if result := read_json(out / PARTIAL, None):
                keep(name, dict(status="cut short (interrupted)", seconds=0.0, result=result))
            raise
        if other := keep(name, stage):
            print(f"stage {name}: not kept. {refusal} {other}", flush=True)
            return 1
        records = len(stage["result"]["results"]) if stage["result"] else 0
        print(f"stage {name}: {stage['status']}, {records} records in {stage['seconds']:.0f} s", flush=True)
        if stage["status"] != "done" and "output" in stage:
            print("    " + "\n    ".join(stage["output"].strip().splitlines()[-12:]), flush=True)
    path = results_file(state, out)
    missing = [name for name in STAGES if not finished(state.get(name))]
    print(path if path else "no results yet", f"({len(missing)} stages are still to do: --list names them)" if missing else "")
    return int(any(not finished(state.get(name)) or "failures" in state[name]["status"] for name in to_do))


if __name__ == "__main__":
    sys.exit(main())
