"""Times the embedded default as users type it, with and without --compile and in fp32, and keeps what it drew.

    python bench/demo.py                      # writes bench/results/demo_cpu.json, docs/digits.png and docs/digits_loss.png

Wall clock includes everything: imports, encoding, compilation, training, the grids and the 500 digits that are scored. The commands
run in turns, `--compile` first without and then with the graphs that it left on disk; each line is of a command's median run.
"""

import argparse
import datetime
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from lightningdit.log import read_log
from lightningdit_kernels.tuning import cpu_name

ROOT = Path(__file__).resolve().parent.parent


COMMANDS = {"eager": ((), ""), "compiled": (("--compile",), ""), "compiled again": (("--compile",), "(graphs on disk)"),
            "fp32": (("--precision", "fp32"), "")}


def run_demo(run, cache, flags, note):
    """One run of train/dit.py in a fresh folder: wall clock, accuracy, validation losses, median images/s."""
    start, environment = time.perf_counter(), os.environ | dict(TORCHINDUCTOR_CACHE_DIR=str(cache))
    command = [sys.executable, str(ROOT / "train" / "dit.py"), "--run", str(run), "--device", "cpu", *flags]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, env=environment)
    wall_s = time.perf_counter() - start
    records = read_log(run)
    rates = sorted(record["images_per_second"] for record in records if "loss" in record)
    validation = [record for record in records if "val_mse" in record][-1]
    command = " ".join(["python train/dit.py", *flags, note]).strip()
    return dict(command=command, wall_s=round(wall_s, 1), images_per_second_median=rates[len(rates) // 2],
                recognised=float(re.search(r"digits recognised ([\d.]+)%", result.stdout)[1]) / 100, steps=validation["step"],
                val_mse=validation["val_mse"], val_cos=validation["val_cos"])


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "demo_cpu.json")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    out = options.out
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    commit = subprocess.run(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    record = dict(what="embedded default, digits", device=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(),
                  load_before=round(os.getloadavg()[0], 2), versions=versions, commit=commit,
                  date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), runs=[])
    with tempfile.TemporaryDirectory() as folder:
        runs = {name: [] for name in COMMANDS}
        for turn in range(options.rounds):
            for name, (flags, note) in COMMANDS.items():
                runs[name].append(run_demo(Path(folder) / f"{name}_{turn}", Path(folder) / f"graphs_{turn}", flags, note))
                print(json.dumps(runs[name][-1]))
        for each in runs.values():
            middle = sorted(each, key=lambda run: run["wall_s"])[(len(each) - 1) // 2]
            record["runs"].append(middle | dict(walls_s=[run["wall_s"] for run in each]))
        newest = max((Path(folder) / "eager_0" / "samples").iterdir())
        shutil.copy(newest, ROOT / "docs" / "digits.png")
        shutil.copy(Path(folder) / "eager_0" / "loss.png", ROOT / "docs" / "digits_loss.png")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
