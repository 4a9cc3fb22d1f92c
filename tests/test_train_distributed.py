"""train/dit.py on several processes, preempted, killed and fed NaNs: what is trained is the same."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.chaos import TINY, Fault, Life, difference, outcome
from bench.harness import WAITED
from lightningdit import checkpoint, cli, replay
from lightningdit.config import DiTConfig, load, parse
from lightningdit.distributed import REQUEUE
from lightningdit.log import read_log
from lightningdit.model import LightningDiT
from lightningdit.training import losses

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    """live(run, *arguments, processes=1, mode="ddp", faults=(), code=0) -> its Life, ended, all processes with that exit code."""
    folder = tmp_path_factory.mktemp("lives")

    def start(run, *arguments, processes=1, mode="ddp", per_node=None, faults=(), code=0):
        base = [*TINY, "--micro-batch", 1, "--steps", 8, "--checkpoint-every", 4, "--data.cache", folder / "latents", "--parallel", mode]
        life = Life([*base, "--run", run, *arguments], folder / run.name, processes, per_node, faults)
        codes = life.wait()
        assert code is None or codes == [code] * processes, (codes, life.text())
        return life

    return start


def rows(run):
    return {line["step"]: line for line in read_log(run) if "loss" in line}


@pytest.fixture(scope="module")
def alone(live, tmp_path_factory):
    """An undisturbed run of one process, 8 micro-batches an update, gradients clipped."""
    run = tmp_path_factory.mktemp("alone") / "run"
    live(run)
    assert max(row["grad_norm"] for row in rows(run).values()) > 1.0  # so that clipping, at 1, did something
    return run


@pytest.fixture(scope="module")
def sharded(live, tmp_path_factory):
    """An undisturbed run of two processes with FSDP."""
    run = tmp_path_factory.mktemp("sharded") / "run"
    assert "2 processes (fsdp)" in live(run, processes=2, mode="fsdp").text()
    return run


@pytest.mark.parametrize("processes, mode, per_node", [(2, "ddp", None), (4, "ddp", None), (4, "hsdp", 2)])
def test_losses_do_not_depend_on_the_number_of_processes(live, alone, tmp_path, processes, mode, per_node):
    """Same images, latents, noise, times and dropped labels: the first loss, before any update, is the same to the last bits of a sum."""
    run = tmp_path / "run"
    assert f"{processes} processes ({mode})" in live(run, processes=processes, mode=mode, per_node=per_node).text()
    assert rows(run)[1]["loss"] == pytest.approx(rows(alone)[1]["loss"], rel=1e-6)
    assert difference(outcome(run), outcome(alone), exact=False) is None


def test_sharding_changes_nothing(alone, sharded):
    assert difference(outcome(sharded), outcome(alone), exact=False) is None


@pytest.mark.parametrize("processes, mode, exact", [(2, "fsdp", True), (1, "ddp", False), (4, "fsdp", False), (2, "ddp", False)])
def test_a_sharded_checkpoint_goes_on_on_any_number_of_processes(live, sharded, tmp_path, processes, mode, exact):
    run = tmp_path / "run"
    shutil.copytree(sharded, run)
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    assert "resuming at step 4" in live(run, processes=processes, mode=mode).text()
    assert difference(outcome(run), outcome(sharded), exact) is None


def test_moments_on_the_host_change_nothing_and_may_come_and_go(live, sharded, tmp_path):
    """A sharded run with the state of AdamW on the CPU from the beginning, and after a resumption only."""
    run = tmp_path / "run"
    live(run, "--optim.state", "cpu", processes=2, mode="fsdp")
    assert difference(outcome(run), outcome(sharded), exact=True) is None
    for state in ("fp32", "cpu"):
        shutil.rmtree(run / "checkpoints" / "step_0000008")
        assert "resuming at step 4" in live(run, "--optim.state", state, processes=2, mode="fsdp").text()
        assert difference(outcome(run), outcome(sharded), exact=True) is None
    assert "optim.state: 'cpu' -> '8bit'" in live(run, "--optim.state", "8bit", code=1).text()


def test_four_replicas_go_on_bitwise(live, tmp_path):
    """Sums over more than two processes depend on where in a message a gradient travels, which DDP must not change on its way."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    live(whole, processes=4)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    assert "resuming at step 4" in live(run, processes=4).text()
    assert difference(outcome(run), outcome(whole), exact=True) is None


def test_the_average_is_the_same_however_it_is_spread(live, tmp_path, monkeypatch):
    """Model guidance, validation losses and scores all pass through the average weights, which change at every step. A run that goes on in
    the middle is bitwise the same; a batch that is looked at again is guided too."""
    more = ("--flow.model-guidance", 0.4, "--flow.model-guidance-start", 2, "--optim.ema", 0.5, "--validate-every", 2, "--score.every", 4,
            "--score.num", 21, "--score.num-steps", 2, "--sample.batch-size", 8, "--sample.guidance-scale", 1)
    runs = {name: tmp_path / name for name in ("alone", "ddp", "fsdp", "again")}
    for name, options in (("alone", {}), ("ddp", dict(processes=2)), ("fsdp", dict(processes=2, mode="fsdp"))):
        live(runs[name], *more, **options)
        events = {key: [line[key] for line in read_log(runs[name]) if key in line] for key in ("val_mse", "val_cos", "fd_digits")}
        assert difference(outcome(runs[name]), outcome(runs["alone"]), exact=False) is None
        if name == "alone":
            expected = events
        assert [len(values) for values in events.values()] == [4, 4, 2] and len(set(events["val_mse"])) == 4
        assert all(events[key] == pytest.approx(expected[key], rel=1e-3) for key in events), (name, events, expected)
    shutil.copytree(runs["alone"], runs["again"])
    shutil.rmtree(runs["again"] / "checkpoints" / "step_0000008")
    live(runs["again"], *more)
    assert difference(outcome(runs["again"]), outcome(runs["alone"]), exact=True) is None

    x1, x0 = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    batch = dict(x1=x1, x0=x0, t=torch.tensor([0.3, 0.7]), y=torch.tensor([1, 2]), drop_labels=torch.tensor([False, False]))
    incident, guides = runs["alone"] / "incidents" / "step_0000006.safetensors", []
    checkpoint.save_weights(incident, batch | dict(indices=torch.tensor([5, 6])))
    monkeypatch.setattr(replay, "losses", lambda *given, guide, **batch: guides.append(guide) or losses(*given, guide=guide, **batch))
    assert cli.main(["replay", "--incident", str(incident)]) == 0 and len(guides) == 2
    average = checkpoint.load_tensors(runs["alone"] / "checkpoints" / "step_0000004", "ema")
    assert all(torch.equal(guides[0].state_dict()[name], value) for name, value in average.items() if "feat_rope" not in name)


def test_export_of_a_sharded_checkpoint_is_one_official_file(alone, sharded, tmp_path):
    assert len(list((sharded / "checkpoints" / "step_0000008" / "model").iterdir())) == 2
    states = []
    for run in (alone, sharded):
        file = tmp_path / f"{run.parent.name}.pt"
        assert cli.main(["export", "--checkpoint", str(run), "--out", str(file)]) == 0
        states.append(torch.load(file, weights_only=True)["ema"])
    LightningDiT(**load(DiTConfig, sharded / "config.yaml").model_arguments()).load_weights(states[1])
    torch.testing.assert_close(states[1], states[0], rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_preemption_saves_and_asks_to_be_started_again(live, alone, tmp_path, number):
    run = tmp_path / "run"
    life = live(run, faults=[Fault("signal", n=6, number=number)], code=REQUEUE)
    assert "interrupted: step 6 is saved" in life.text()
    assert "resuming at step 6" in live(run).text()
    assert difference(outcome(run), outcome(alone), exact=True) is None


def test_preemption_of_one_process_of_two(live, tmp_path):
    """They agree on a step, save it together, and both end with the code for a requeue."""
    run = tmp_path / "run"
    arguments = ("--steps", 12, "--checkpoint-every", 100)
    life = live(run, *arguments, processes=2, mode="fsdp", faults=[Fault("signal", n=3, rank=1, number=signal.SIGUSR1)], code=REQUEUE)
    assert "interrupted: step 10 is saved" in life.text()
    assert "resuming at step 10" in live(run, *arguments, processes=2, mode="fsdp").text() and len(rows(run)) == 12


UNDER_TORCHRUN = """
import os, runpy, sys
from bench.chaos import Fault, Hooks
folder, sys.argv = sys.argv[1], sys.argv[2:]
if os.environ["RANK"] == "1":
    Hooks([Fault("kill", n=6, once=folder + "/first"), Fault("kill", n=8, once=folder + "/second")], folder, folder + "/journal")
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_torchrun_restarts_by_itself_and_gives_up_quickly(live, sharded, tmp_path):
    """Rank 1 is killed in update 6, torchrun starts both again, from step 4 or, if that save was not through, 2; rank 1 is killed in
    update 8, and no restart is left."""
    (tmp_path / "script.py").write_text(UNDER_TORCHRUN)
    run = tmp_path / "run"
    arguments = [*TINY, "--micro-batch", 1, "--steps", 8, "--checkpoint-every", 2, "--parallel", "fsdp", "--run", run]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--max-restarts=1", "--",
               tmp_path / "script.py", tmp_path, ROOT / "train" / "dit.py", *arguments]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=240, cwd=ROOT,
                            env=dict(live_environment(), TQDM_DISABLE="1"))
    since_s = time.time() - (tmp_path / "second").stat().st_mtime
    assert result.returncode != 0 and re.search("resuming at step [24]", result.stdout), result.stderr
    assert re.search("SIGKILL|Signal 9", result.stderr), result.stderr
    assert since_s < 60, since_s  # torchrun's own patience with a process that does not end is 30 s
    assert re.search("resuming at step [46]", live(run, processes=2, mode="fsdp").text())
    assert difference(outcome(run), outcome(sharded), exact=True) is None


def live_environment():
    return os.environ | dict(OMP_NUM_THREADS="1", GOMP_SPINCOUNT="3000", PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))


def test_nan_stops_the_run_and_leaves_a_whole_checkpoint(live, alone, tmp_path):
    run = tmp_path / "run"
    life = live(run, faults=[Fault("nan", n=5)], code=1)
    assert "error: non-finite loss or gradient at step 5. The update was left out; the last checkpoint is of step 4" in life.text()
    assert checkpoint.latest_checkpoint(run)[1]["step"] == 4
    live(run)  # the fault is gone: as if it had never been
    assert difference(outcome(run), outcome(alone), exact=True) is None


def test_nan_is_skipped_or_rolled_back(live, tmp_path):
    """Both leave the update out, one going on, one going back before it; without a lower learning rate the results are bitwise the same.
    The batch stays bad when it is met again. Rolled back with a lower learning rate, a kill in the middle of it loses nothing of that."""
    runs = [tmp_path / name for name in ("skipped", "rolled back", "killed", "undisturbed")]
    for run in runs[:2]:
        text = live(run, "--guard.policy", "skip" if run == runs[0] else "rollback", faults=[Fault("nan", n=6)]).text()
        assert "warning: step 6: non-finite loss or gradient; the update was left out; its batch is in" in text
        assert ("going back to step 4; steps 6 will be left out" in text) == (run == runs[1])
    results = [outcome(run) for run in runs[:2]]
    assert all(math.isnan(result[1].pop(6)[0]) for result in results)
    assert difference(*results, exact=True) is None and all(math.isfinite(loss) for loss, _ in results[0][1].values())
    batch = checkpoint.load_weights(runs[0] / "incidents" / "step_0000006.safetensors")
    assert batch.keys() == {"x1", "x0", "t", "y", "drop_labels", "indices"} and all(len(tensor) == 8 for tensor in batch.values())

    lower = ("--guard.policy", "rollback", "--guard.lr-factor", 0.5)
    live(runs[3], *lower, faults=[Fault("nan", n=6)])
    # Before it is noted, and when training is on its way.
    killed_at = [Fault("kill", "log", path=".partial_incidents.json"), Fault("kill", n=7)]
    for fault in killed_at:
        live(runs[2], *lower, faults=[Fault("nan", n=6), fault], code=-signal.SIGKILL)
    live(runs[2], *lower, faults=[Fault("nan", n=6)])
    assert json.loads((runs[2] / "incidents.json").read_text()) == dict(left_out=[6], lr_factor=0.5)
    lr = {step: row["lr"] for step, row in rows(runs[2]).items()}
    assert lr[7] == lr[5] == 0.5 * lr[4]
    results = [outcome(run) for run in runs[2:]]
    assert all(math.isnan(result[1].pop(6)[0]) for result in results)
    assert difference(*results, exact=True) is None


def test_nan_on_one_process_of_two_is_left_out_by_both(live, tmp_path):
    run = tmp_path / "run"
    live(run, "--guard.policy", "skip", processes=2, mode="fsdp", faults=[Fault("nan", n=3, rank=1)])
    assert rows(run)[3]["left_out"] and all(math.isfinite(rows(run)[step]["loss"]) for step in (2, 4, 8))


def test_a_spike_is_left_out(live, tmp_path):
    run = tmp_path / "run"
    arguments = ("--guard.policy", "skip", "--guard.window", 8, "--guard.threshold", 8.0)
    text = live(run, *arguments, faults=[Fault("spike", n=7, number=10**9)]).text()
    assert "warning: step 7: spike of the loss or the gradient norm" in text and (run / "incidents" / "step_0000007.safetensors").is_file()
    assert [step for step, row in rows(run).items() if row.get("left_out")] == [7] and rows(run)[8]["loss"] < 100


def test_too_many_incidents_stop_the_run(live, tmp_path):
    faults = [Fault("nan", n=step) for step in (2, 4, 6)]
    for policy in ("skip", "rollback"):
        life = live(tmp_path / policy, "--guard.policy", policy, "--guard.most", 2, faults=faults, code=1)
        assert "These are 3 incidents, guard.most is 2." in life.text()


def test_deterministic_says_what_it_sets_and_repeats_bitwise(live, tmp_path):
    for name in ("one", "two"):
        text = live(tmp_path / name, "--deterministic", "--micro-batch", 4).text()
        assert "deterministic: torch.use_deterministic_algorithms(True), cudnn.benchmark = False" in text
    assert difference(outcome(tmp_path / "one"), outcome(tmp_path / "two"), exact=True) is None


TRACED = """
import collections, json, runpy, sys, torch
sys.modules["tyro"] = None  # as on a GPU machine that lacks it
from lightningdit import training
draw, trace = training.draw_batch, torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
def in_optimizer(event):
    parent = event.cpu_parent
    return parent is not None and (parent.name == "aten::_fused_adamw_" or in_optimizer(parent))
def draw_batch(*arguments):
    step = arguments[4] + 1
    if step == 3:
        trace.start()
    if step == 8:
        trace.stop()
        print("TRACE", json.dumps(collections.Counter(event.name for event in trace.events() if not in_optimizer(event))))
    return draw(*arguments)
training.draw_batch = draw_batch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


COUNTED = """
import json, runpy, sys, torch
from bench.harness import note_waits
from lightningdit import training
draw, waits = training.draw_batch, []
def draw_batch(*arguments):
    step = arguments[4] + 1
    if step == 3:
        note_waits(waits)
        torch.cuda.set_sync_debug_mode("warn")
        torch.ones((), device="cuda").item()
        assert len(waits) == 1, waits
        waits.clear()
    if step == 8:
        torch.cuda.set_sync_debug_mode("default")
        print("WAITS", json.dumps(waits))
    return draw(*arguments)
training.draw_batch = draw_batch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


NOTICE_AND_WAIT = """
import json, torch, warnings
from bench.harness import note_waits
waits = []
note_waits(waits)
torch._C._cuda_set_sync_debug_mode(1)  # what torch.cuda.set_sync_debug_mode calls when it has found a device
print(json.dumps(waits))
warnings.warn("called a synchronizing CUDA operation (Triggered internally at /pytorch/c10/cuda/CUDAFunctions.cpp:281.)")
print(json.dumps(waits))
"""


@pytest.mark.skipif(not hasattr(torch._C, "_cuda_set_sync_debug_mode"), reason="a PyTorch without CUDA")
def test_only_calls_that_wait_are_counted():
    """PyTorch's notice that this debug mode is a prototype speaks of synchronizing operations, too."""
    result = subprocess.run([sys.executable, "-c", NOTICE_AND_WAIT], capture_output=True, text=True, cwd=ROOT, env=live_environment())
    assert result.returncode == 0, result.stderr
    assert "prototype feature and does not yet detect all synchronizing operations" in result.stderr
    before, after = map(json.loads, result.stdout.splitlines())
    assert before == []
    assert after == ["<string>:8"]


def test_the_warning_is_worded_as_the_installed_pytorch_words_it():
    library = Path(torch.__file__).parent / "lib" / "libc10_cuda.so"
    if not library.is_file():
        pytest.skip("a PyTorch without CUDA")
    assert WAITED.encode() in library.read_bytes()


def recipe_of(arguments, path):
    """Writes the recipe of the digits with `--section.name value` pairs put in, as the command line would, for which it needs tyro."""
    yaml = pytest.importorskip("yaml")
    recipe = yaml.safe_load((ROOT / "train" / "configs" / "digits.yaml").read_text())
    for name, value in zip(arguments[::2], map(str, arguments[1::2]), strict=True):
        *sections, key = name.removeprefix("--").replace("-", "_").split(".")
        part = recipe
        for section in sections:
            part = part.setdefault(section, {})
        part[key] = yaml.safe_load(value)
    path.write_text(yaml.safe_dump(recipe))
    return path


def test_a_recipe_is_what_the_command_line_makes_of_its_fields(tmp_path):
    arguments = [*map(str, TINY), "--optim.clip-grad-norm", "1.0", "--data.resident", "none"]
    recipe = ROOT / "train" / "configs" / "digits.yaml"
    assert load(DiTConfig, recipe_of(arguments, tmp_path / "recipe.yaml")) == parse(DiTConfig, arguments, recipe=recipe)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("resident", ["device", "none"])
def test_a_gpu_is_never_waited_for_between_two_lines_of_the_log(tmp_path, resident):
    """Five whole updates of two micro-batches, with clipping, without a synchronising call; the counter itself is tried on one."""
    for package in ("matplotlib", "PIL", "sklearn", "tensorboard"):
        pytest.importorskip(package)
    arguments = [*TINY, "--log-every", 10, "--steps", 10, "--micro-batch", 4, "--checkpoint-every", 100, "--optim.clip-grad-norm", 1.0,
                 "--model.hidden-size", 64, "--data.resident", resident, "--device", "cuda", "--precision", "bf16",
                 "--run", tmp_path / "run"]
    recipe = recipe_of(arguments, tmp_path / "recipe.yaml")
    command = [sys.executable, "-c", COUNTED, ROOT / "train" / "dit.py", "--config", recipe]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, cwd=ROOT, env=live_environment())
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.split("WAITS ")[1].splitlines()[0]) == []


def test_steps_between_two_lines_of_the_log_never_wait_for_the_device(tmp_path, script):
    """In the trace of five whole updates no operator reads a value back, except inside the CPU's fused AdamW, which reads step counts."""
    arguments = [*TINY, "--log-every", 10, "--steps", 10, "--micro-batch", 4, "--checkpoint-every", 100, "--run", tmp_path / "run"]
    (tmp_path / "traced.py").write_text(TRACED)
    result = script(tmp_path / "traced.py", ROOT / "train" / "dit.py", "--config", recipe_of(arguments, tmp_path / "recipe.yaml"))
    counts = json.loads(result.stdout.split("TRACE ")[1].splitlines()[0])
    assert counts["aten::_fused_adamw_"] >= 5
    waits = {name: times for name, times in counts.items() if name in ("aten::item", "aten::_local_scalar_dense", "aten::nonzero")}
    assert not waits, waits


OPTIONS = ("--model.depth", 2, "--optim.name", "muon", "--model.batch-adaln", "--model.split-k", 4)


def test_muon_batched_modulations_and_split_gradients_go_on_bitwise_and_agree_over_processes(live, tmp_path):
    whole, run, two = (tmp_path / name for name in ("whole", "run", "two"))
    live(whole, *OPTIONS)
    shutil.copytree(whole, run)
    shutil.rmtree(run / "checkpoints" / "step_0000008")
    assert "resuming at step 4" in live(run, *OPTIONS).text()
    assert difference(outcome(run), outcome(whole), exact=True) is None
    live(two, *OPTIONS, processes=2)
    assert difference(outcome(two), outcome(whole), exact=False) is None


def test_a_bf16_residual_and_split_gradients_are_sharded(live, tmp_path):
    options = ("--precision", "bf16", "--model.bf16-residual", "--model.split-k", 4)
    for name, processes in (("alone", 1), ("sharded", 2)):
        live(tmp_path / name, *options, processes=processes, mode="fsdp")
    first, last = ([rows(tmp_path / name)[step]["loss"] for name in ("alone", "sharded")] for step in (1, 8))
    assert first[1] == pytest.approx(first[0], rel=1e-4) and last[1] == pytest.approx(last[0], rel=0.02)
