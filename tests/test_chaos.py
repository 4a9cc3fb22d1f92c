"""The short fault campaign, and that the campaign sees what it is there to see."""
import json
import subprocess
import sys
from pathlib import Path

import torch

from bench import chaos

ROOT = Path(__file__).resolve().parent.parent
KINDS = {"NaN loss", "write of a save failed", "killed at a step", "killed inside a save", "killed while it wrote something else",
         "one rank killed", "preempted by a signal", "disk full for some steps", "number of processes changed"}


def kinds_met(out):
    """The kinds of fault of a short campaign, whose runs all ended as if nothing had been."""
    command = [sys.executable, str(ROOT / "bench" / "chaos.py"), "--short", "--seed", "697", "--out", str(out)]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    runs = json.loads(out.read_text())["runs"]
    assert runs and all(run["corruption"] is None and not run["hung"] and not run["unclear_ends"] for run in runs), result.stdout
    assert sum(len(run["faults"]) for run in runs) >= 2 * len(runs) and "corruptions: 0" in result.stdout
    return {fault for run in runs for fault in run["faults"]}


def test_short_campaign(tmp_path):
    met = kinds_met(tmp_path / "first.json")
    if KINDS - met:  # where a save comes late, a life may end before its fault
        met |= kinds_met(tmp_path / "second.json")
    assert KINDS <= met


def test_a_life_is_asked_where_it_went_on_from(tmp_path):
    life = chaos.Life.__new__(chaos.Life)
    life.outputs = [tmp_path / "out"]
    for text, step in (("resuming at step 6[rank1]:[W1127 warning", 6), ("training from the beginning\n", 0), ("Killed\n", None)):
        life.outputs[0].write_text(text)
        assert life.start() == step


def test_a_difference_is_seen_and_counted():
    rows, tensors = {1: (2.0, 1.0), 2: (1.5, 0.5)}, {"model.w": torch.tensor([1.0, 2.0])}
    whole = (2, rows, tensors)
    assert chaos.difference(whole, whole, exact=True) is None
    off = (2, rows, {"model.w": torch.tensor([1.0, 2.0 + 1e-6])})
    assert "model.w: differs by" in chaos.difference(off, whole, exact=True) and chaos.difference(off, whole, exact=False) is None
    assert chaos.difference((2, rows, {"model.w": torch.tensor([1.0, 2.1])}), whole, exact=False)
    assert chaos.difference((2, {1: (2.0, 1.0)}, tensors), whole, exact=False).startswith("step 2, 1 losses")
    result = dict(index=0, faults=["NaN loss"], corruption="model.w", lives=2, bitwise=True, lost_steps=3, unclear_ends=0, hung=0, missed=0)
    assert "corruptions: 1" in chaos.table([result]) and f"{'NaN loss':42} {1:6} {0:10}" in chaos.table([result])


def test_only_a_process_inside_a_collective_is_excused():
    stack = 'Fatal Python error: Aborted\n\nCurrent thread 0x0000 (most recent call first):\n  File "{}", line 5\n  File "/torch/a"'
    assert chaos.IN_COLLECTIVE.search(stack.format("/site-packages/torch/autograd/graph.py"))
    assert chaos.IN_COLLECTIVE.search(stack.format("/site-packages/torch/distributed/distributed_c10d.py"))
    assert not chaos.IN_COLLECTIVE.search(stack.format("/lib/python3.11/threading.py"))
    assert not chaos.IN_COLLECTIVE.search(stack.format("/project/lightningdit/checkpoint.py"))
