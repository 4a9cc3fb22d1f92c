"""The GPU benchmark in stages that can be restarted, then one results file: make bench-gpu OUT=folder.

    python bench/gpu.py --out FOLDER [--stage NAME] [--budget-s SECONDS]

Each stage is a process of its own, pytest, that writes FOLDER/stages/<name>.json and may take 9 minutes; a stage whose file is there is
done. The stages <op>_1 to <op>_3 are the same in fresh processes, and one row each in the end. After the training steps and the ops come
sampling, the tokenizer, data, the smaller models, growth, and the sweeps over B, N and Dh; `-- --official CHECKOUT` adds the official code.
With a budget no stage is begun that might not end in time; exit status 3 then says: run again, to continue. When all are done they
are merged into FOLDER/kernels_<device>.json. Copied to bench/results, that file is in the next `make report`.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.harness import merge, write  # noqa: E402

STAGE_S = 9 * 60
UNFINISHED = 3

REPEATS = 3  # processes: layout in memory, allocator and compilation differ between them


def stages() -> dict[str, list[str]]:
    """What pytest is called with, by name, in order of worth, should time run out."""
    ops = ("norm", "attention", "swiglu", "alignment", "groupnorm")

    def training(preset, tokens, part):
        points = ["--shapes", preset, "--tokens", str(tokens), "--case-s", "120"]
        return {f"step_{preset}_{tokens}_{part}": ["bench/bench_step.py", "-k", f"bench_step and {part}", *points]}

    table = {"ceilings": ["bench/bench_ceilings.py", "-k", "copy or square"]}
    table |= training("xl", 256, "ladder") | training("xl", 256, "kernels")
    table["gemms"] = ["bench/bench_ceilings.py", "-k", "model_gemms"]
    for process in range(1, REPEATS + 1):  # a stage that is repeated is pooled by harness.merge
        table |= {f"{op}_{process}": [f"bench/bench_{op}.py", "--case-s", "10"] for op in ops}
    table["overlay"] = ["bench/bench_step.py", "-k", "overlay", "--shapes", "xl"]
    table["sampling"] = ["bench/bench_sampling.py", "--shapes", "xl", "--rounds", "3"]
    table |= {f"vavae_{case}": ["bench/bench_tokenizer.py", "-k", case, "--case-s", "60"] for case in ("step", "encode", "decode")}
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


def run_stage(name: str, path: Path, extra: list[str]) -> bool:
    """Runs one stage into `path`; False, with what it printed, if it failed or took too long."""
    partial = path.with_suffix(".partial")
    arguments = [*STAGES[name], "--benchmark-only", "--results", str(partial), "-q", "--benchmark-columns=median", *extra]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    begin = time.perf_counter()
    try:
        code = subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment, timeout=STAGE_S).returncode
    except subprocess.TimeoutExpired:
        code = f"stopped after {STAGE_S} s"
    # A failing contestant of ours fails the stage's test, but its row says so: the measurement stands.
    if code not in (0, 1) or not partial.is_file():
        print(f"stage {name}: failed ({code})", flush=True)
        return False
    partial.replace(path)
    print(f"stage {name}: {time.perf_counter() - begin:.0f} s{', with failures' if code else ''}", flush=True)
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--stage", action="append", choices=tuple(STAGES), help="default: all that are not done")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="seconds in which to end")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("pytest", nargs="*", help="after --: more arguments for pytest, such as --shapes all")
    options = parser.parse_args()
    folder, begin, failed = options.out.resolve() / "stages", time.perf_counter(), False
    folder.mkdir(parents=True, exist_ok=True)
    longest = 0.0
    for name in options.stage or STAGES:
        path = folder / f"{name}.json"
        if path.is_file():
            print(f"stage {name}: done before", flush=True)
            continue
        elapsed = time.perf_counter() - begin
        if elapsed + longest > options.budget_s:
            print(f"stage {name}: not begun, {elapsed:.0f} s of {options.budget_s:.0f} s are gone; run again to continue", flush=True)
            return UNFINISHED
        failed |= not run_stage(name, path, ["--device", options.device, *options.pytest])
        longest = max(longest, time.perf_counter() - begin - elapsed)
    missing = [name for name in STAGES if not (folder / f"{name}.json").is_file()]
    if missing:
        print(f"no results file yet: {', '.join(missing)} to do")
        return 1 if failed else 0
    merged = merge([json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in STAGES])
    device = re.sub(r"[^a-z0-9]+", "_", merged.get("gpu", "cpu").lower()).strip("_")
    path = options.out / f"kernels_{device}.json"
    write(path, merged)
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
