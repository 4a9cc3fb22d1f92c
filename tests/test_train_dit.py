"""train/dit.py as users run it: the embedded default, own data, interruption and resumption, and what goes wrong."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import checkpoint, cli
from lightningdit import config as configuration
from lightningdit.config import ConfigError, DiTConfig
from lightningdit.log import read_log
from lightningdit.run import settle_precision
from lightningdit.trained import load_run

ROOT = Path(__file__).resolve().parent.parent
SMALL = ("--model.depth 1 --model.hidden-size 32 --model.num-heads 2 --batch-size 16 --steps 12 --optim.warmup 2 --log-every 3 "
         "--checkpoint-every 4 --sample-every 12 "
         "--validate-every 6 --sample-num 10 --sample.num-steps 3 --final-samples 0 --score.every 0 --optim.schedule constant").split()
ONE_THREAD = os.environ | dict(OMP_NUM_THREADS="1")  # of an interpreter that the tests start themselves, as `script` does


@pytest.fixture(scope="module")
def train(script):
    """train(run, *arguments) -> CompletedProcess of train/dit.py with SMALL and these arguments, on one thread; its code is checked."""

    def start(run, *arguments, small=True, **options):
        return script(ROOT / "train" / "dit.py", "--run", run, *(SMALL if small else ()), *arguments, **dict(OMP_NUM_THREADS=1) | options)

    return start


def losses(run):
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(run) if "loss" in line]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run)
    return run


def test_what_a_run_leaves_behind(undisturbed):
    names = {path.name for path in undisturbed.iterdir()}
    assert names >= {"config.yaml", "environment.json", "log.jsonl", "loss.png", "samples", "checkpoints", "tensorboard"}
    assert names >= {"tokenizer.safetensors"}
    lines = [line for line in read_log(undisturbed) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert all(line["loss"] == pytest.approx(line["mse"] + line["cos"], rel=1e-5) and line["images_per_second"] > 0 for line in lines)
    validation = [line for line in read_log(undisturbed) if "val_mse" in line]
    assert [line["step"] for line in validation] == [6, 12] and all(line["val_cos"] > 0 for line in validation)
    assert sorted(p.name for p in (undisturbed / "checkpoints").iterdir()) == ["step_0000008", "step_0000012"]
    grid = np.asarray(Image.open(undisturbed / "samples" / "step_0000012.png"))
    assert grid.std() > 10


@pytest.mark.parametrize("steps_of_life, threads, precision", [(5, 1, "auto"), (8, 2, "auto"), (5, 1, "fp32"), (8, 2, "bf16")])
def test_interrupted_and_resumed_is_bitwise_the_same(train, undisturbed, tmp_path, steps_of_life, threads, precision):
    """Stops after some steps (between two checkpoints, and on one), goes on, and compares every loss, weight and average."""
    run, whole = tmp_path / "run", undisturbed if (threads, precision) == (1, "auto") else tmp_path / "whole"
    if whole != undisturbed:
        train(whole, "--precision", precision, OMP_NUM_THREADS=threads)
    train(run, "--steps", steps_of_life, "--checkpoint-every", 4, "--precision", precision, OMP_NUM_THREADS=threads)
    newest = max((run / "checkpoints").iterdir())
    if steps_of_life == 5:
        shutil.rmtree(newest)  # as if killed after step 5 with nothing saved since step 4
    result = train(run, OMP_NUM_THREADS=threads)  # with precision auto: that of the run
    assert "resuming at step " + ("4" if steps_of_life == 5 else "8") in result.stdout
    assert losses(run) == losses(whole)
    for name in ("model", "ema", "trainer"):
        ours, theirs = (checkpoint.load_tensors(r / "checkpoints" / "step_0000012", name) for r in (run, whole))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("units, begun, asked, settled", [
    ({"amx_bf16": True}, None, "auto", "bf16"), ({"avx512_bf16": True}, None, "auto", "bf16"), ({"avx512_f": True}, None, "auto", "fp32"),
    ({"avx512_f": True}, None, "bf16", "bf16"), ({"amx_bf16": True}, None, "fp32", "fp32"),
    ({"amx_bf16": True}, "fp32", "auto", "fp32"), ({"avx512_f": True}, "bf16", "auto", "bf16"),
    ({"avx512_f": True}, "bf16", "bf16", "bf16"),
    ({"amx_bf16": True}, "auto", "auto", "fp32"),  # as auto was meant when that run was begun
])
def test_the_precision_is_settled_once(tmp_path, monkeypatch, units, begun, asked, settled):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    config = configuration.load(DiTConfig, ROOT / "train" / "configs" / "digits.yaml")
    config.run = str(tmp_path)
    if begun:
        config.precision = begun
        configuration.save(config, tmp_path / "config.yaml")
    config.precision = asked
    line = settle_precision(config, torch.device("cpu"))
    assert config.precision == settled
    assert line.startswith(f"precision {settled}: ")
    assert "\n" not in line
    assert ("emulates" in line) == (settled == "bf16" and units == {"avx512_f": True})


@pytest.mark.parametrize("units, begun, used", [
    ({"amx_bf16": True}, "bf16", "bf16"), ({"avx512_f": True}, "bf16", "fp32"), ({"amx_bf16": True}, "fp32", "fp32"),
    ({"amx_bf16": True}, "auto", "fp32"),  # begun before precision was settled once, in fp32 then
])
def test_a_run_is_used_in_its_precision_where_that_pays(undisturbed, tmp_path, monkeypatch, capsys, units, begun, used):
    run = shutil.copytree(undisturbed, tmp_path / "run")
    settings = configuration.load(DiTConfig, run / "config.yaml")
    settings.precision = begun
    configuration.save(settings, run / "config.yaml")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert load_run(run)[0].precision == used
    assert ("would emulate bf16" in capsys.readouterr().err) == (begun == "bf16" and used == "fp32")


def test_another_precision_is_another_run(tmp_path):
    config = configuration.load(DiTConfig, ROOT / "train" / "configs" / "digits.yaml")
    config.run, config.precision = str(tmp_path), "bf16"
    configuration.save(config, tmp_path / "config.yaml")
    config.precision = "fp32"
    with pytest.raises(ConfigError, match=r"precision: got 'fp32', expected auto or bf16, with which .* was begun"):
        settle_precision(config, torch.device("cpu"))


def test_scores_leave_the_training_as_it_is_and_outlive_a_resume(train, undisturbed, tmp_path):
    """A run that is scored, and begun anew at step 8, has bitwise the losses of one that is not; its time of training goes on."""
    run, scored = tmp_path / "run", ("--score.every", 4, "--score.num", 20, "--score.num-steps", 2)
    train(run, "--steps", 8, *scored)
    result = train(run, *scored)
    assert losses(run) == losses(undisturbed) and f"score curve       {run / 'score.png'}" in result.stdout
    scores = [line for line in read_log(run) if "score" in line]
    assert [(line["step"], line["images"]) for line in scores] == [(4, 64), (8, 128), (12, 192)]
    assert all(line["score"] == "fd_digits" and line["fd_digits"] > 1 for line in scores)
    seconds = [line["seconds"] for line in read_log(run) if "loss" in line]
    assert seconds == sorted(seconds) and [line["seconds"] for line in scores] == [seconds[3], seconds[7], seconds[11]]
    assert (run / "score.png").is_file()


def test_micro_batches_change_nothing_but_rounding(train, tmp_path):
    train(tmp_path / "whole", "--precision", "fp32")
    train(tmp_path / "parts", "--precision", "fp32", "--micro-batch", 4)
    torch.testing.assert_close(torch.tensor(losses(tmp_path / "parts")), torch.tensor(losses(tmp_path / "whole")), rtol=1e-4, atol=1e-5)


def test_ctrl_c_saves_and_the_same_command_goes_on(train, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train" / "dit.py"), "--run", str(run), *SMALL,
               "--steps", "100000", "--log-every", "1", "--checkpoint-every", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ONE_THREAD)
    deadline = time.time() + 120
    while not (run / "log.jsonl").is_file() or len(read_log(run)) < 5:
        assert process.poll() is None and time.time() < deadline, (process.kill(), process.communicate())
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    step = int(re.search(r"interrupted: step (\d+) is saved", output)[1])
    assert (run / "checkpoints" / f"step_{step:07d}").is_dir() and losses(run)[-1][0] == step
    assert losses(run)[:5] == losses(undisturbed)[:5]
    result = train(run, "--steps", step + 3, "--checkpoint-every", 100000)
    assert f"resuming at step {step}" in result.stdout and [s for s, *_ in losses(run)] == list(range(1, step + 4))


def test_killed_at_any_moment_goes_on_bitwise(train, undisturbed, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, str(ROOT / "train" / "dit.py"), "--run", str(run), *SMALL, "--log-every", "1", "--checkpoint-every", "1"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=ROOT, env=ONE_THREAD)
    deadline = time.time() + 120
    while len(read_log(run)) < 3:
        assert process.poll() is None and time.time() < deadline, process.kill()
        time.sleep(0.02)
    process.kill()
    process.wait()
    assert "resuming at step" in train(run, "--log-every", 1).stdout
    assert losses(run) == losses(undisturbed)


def test_damaged_newest_checkpoint_is_passed_over(train, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    (file,) = (run / "checkpoints" / "step_0000012" / "ema").iterdir()
    file.write_bytes(file.read_bytes()[:-1000])
    result = train(run)
    assert f"ema/{file.name} is truncated" in result.stdout + result.stderr and "resuming at step 8" in result.stdout
    assert losses(run) == losses(undisturbed)


def test_refused_writes_leave_the_previous_checkpoint(train, script, tmp_path):
    """The kernel refuses large writes from step 5 on (a file-size limit stands in for the full disk)."""
    run = tmp_path / "run"
    train(run, "--steps", 4)
    (tmp_path / "full.py").write_text(
        "import resource, signal, runpy, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (110_000, 110_000))\n"
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    result = script(tmp_path / "full.py", ROOT / "train" / "dit.py", "--run", run, *SMALL, check=False)
    assert result.returncode == 1 and "could not save step 12" in result.stderr, result.stderr[-2000:]
    assert "the checkpoint of step 4 is whole" in result.stderr
    assert "warning: could not save step 8" in result.stdout
    assert [p.name for p in (run / "checkpoints").iterdir()] == ["step_0000004"]


def test_dry_run_prints_the_plan_and_does_nothing(train, tmp_path):
    result = train(tmp_path / "run", "--config", ROOT / "train/configs/lightningdit_xl_64ep.yaml", "--dry-run", small=False)
    for text in ("675.26 M", "237.25 G forward, 711.76 G in training", "2.516 GiB  weights", "5.029 GiB  optimizer",
                 "40.102 GiB  activations of 128", "bf16", "| 24 |", "| 141 |", "1251.1 of 1024 images", "63.9 epochs"):
        assert text in result.stdout, result.stdout
    assert not (tmp_path / "run").exists()


def picture_folder(root, classes=("cat", "dog"), images=12):
    rng = np.random.default_rng(0)
    for index, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for i in range(images):
            Image.fromarray(rng.integers(0, 100 + 100 * index, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return root


def test_own_images_are_encoded_once_cached_and_trained_on(train, tmp_path):
    folder, run = picture_folder(tmp_path / "photos"), tmp_path / "run"
    arguments = ["--data.path", folder, "--data.image-size", 16, "--steps", 4, "--optim.warmup", 0]
    result = train(run, *arguments)
    assert "grayscale" in result.stdout and "2 classes" in result.stdout
    assert len(list((run / "latents").iterdir())) == 1
    cached = next((run / "latents").iterdir()).stat().st_mtime_ns
    train(run, *arguments, "--steps", 6)
    assert next((run / "latents").iterdir()).stat().st_mtime_ns == cached
    assert cli.main(["sample", "--checkpoint", str(run), "--classes", "dog", "--num", "2", "--out", str(tmp_path / "dogs.png")]) == 0


def test_a_store_that_is_truncated_while_it_is_read_is_named_and_costs_no_checkpoint(train, undisturbed, tmp_path):
    run, store = tmp_path / "run", next((undisturbed / "latents").iterdir())
    shutil.copytree(store, tmp_path / "store")
    arguments = ["--data.path", tmp_path / "store", "--data.resident", "none", "--steps", 100_000, "--log-every", 1]
    process = subprocess.Popen([sys.executable, str(ROOT / "train" / "dit.py"), "--run", str(run), *SMALL, *map(str, arguments)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 200
    while not checkpoint.list_checkpoints(run):
        assert process.poll() is None and time.monotonic() < deadline, (process.kill(), process.communicate())
        time.sleep(0.1)
    shard = next((tmp_path / "store").glob("shard_*.safetensors"))
    os.truncate(shard, 0)
    error = process.communicate(timeout=200)[1]
    assert process.returncode == -signal.SIGBUS and "Bus error" in error and "latents.py" in error, error[-2000:]
    assert checkpoint.latest_checkpoint(run)[1]["step"] >= 4
    result = train(run, *arguments, check=False)
    assert result.returncode == 1 and f"{shard}: truncated or overgrown, got 0 bytes" in result.stderr


@pytest.mark.parametrize("arguments, message", [
    (["--data.path", "/nowhere/at/all"], "no folder or file /nowhere/at/all"),
    (["--model.hidden-size", 30], "model.hidden_size: got 30, expected a multiple of 4"),
    (["--tokenizer.path", "nowhere.safetensors"], "no file nowhere.safetensors"),
    (["--tokenizer.latent-channels", 7], "tokenizer.latent_channels: got 7, expected"),
    (["--data.image-size", 16], "data.image_size: got 16, expected 8 for the bundled digits"),
    (["--data.num-classes", 3], "data.num_classes: got 3, expected at least 10"),
    (["--init", "nowhere.pt"], "no file or folder nowhere.pt"),
    (["--score.every", 4, "--score.extractor", "inception", "--score.weights", "nowhere.pth"], "nowhere.pth"),
    (["--device", "cuda"], "device: got 'cuda'"),
])
def test_bad_input_is_one_clear_line(train, tmp_path, arguments, message):
    if arguments[0] == "--device" and torch.cuda.is_available():
        pytest.skip("CUDA is available here")
    result = train(tmp_path / "run", *arguments, check=False)
    assert result.returncode == 1 and message in result.stderr, result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ") or "\n  " in message


def test_missing_compiler_is_said_before_any_work(train, tmp_path):
    result = train(tmp_path / "run", "--compile", "--device", "cpu", check=False, CXX="", PATH="/nonexistent")
    assert result.returncode == 1 and "needs a compiler (g++ or clang++)" in result.stderr and not (tmp_path / "run").exists()


def test_another_configuration_or_tokenizer_in_the_same_run(train, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    result = train(run, "--model.depth", 2, "--optim.lr", 0.5, check=False)
    assert result.returncode == 1 and "model.depth: 1 -> 2" in result.stderr and "optim.lr: " in result.stderr
    assert losses(run) == losses(undisturbed)


def test_checkpoint_of_another_model(train, undisturbed, tmp_path):
    result = train(tmp_path / "run", "--model.depth", 2, "--init", undisturbed, check=False)
    assert result.returncode == 1 and "missing blocks.1.attn.qkv.weight" in result.stderr


def test_sample_command(undisturbed, tmp_path, capsys):
    def draw(*arguments):
        out = tmp_path / "grid.png"
        assert cli.main(["sample", "--checkpoint", str(undisturbed), "--out", str(out), *arguments]) == 0
        return np.asarray(Image.open(out))

    three = draw("--classes", "3,7", "--num", "4", "--seed", "5")
    tile = (three.shape[1] - 2) // 2
    alone = draw("--classes", "3", "--num", "1", "--seed", "5")
    assert np.array_equal(three[:tile, :tile], alone)  # image i is the same whatever is drawn with it
    assert not np.array_equal(three[:tile, :tile], three[:tile, tile + 2 :])
    for arguments, message in ((["--classes", "10"], "classes: got '10', expected numbers 0 to 9"), (["--num", "0"], "num: got 0"),
                               (["--num-steps", "-1"], "sample.num_steps: got -1"), (["--shift", "0"], "sample.shift")):
        with pytest.raises(SystemExit, match=re.escape(message)):
            draw(*arguments)
    with pytest.raises(SystemExit, match="no run and no file"):
        cli.main(["sample", "--checkpoint", str(tmp_path / "none")])


def test_export_is_the_official_layout(undisturbed, tmp_path):
    assert cli.main(["export", "--checkpoint", str(undisturbed), "--out", str(tmp_path / "weights.pt")]) == 0
    exported = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert set(exported) == {"model", "ema"} and "blocks.0.adaLN_modulation.1.weight" in exported["ema"]
    state = json.loads((undisturbed / "checkpoints" / "step_0000012" / "state.json").read_text())
    assert state["step"] == 12 and state["classes"] == [str(d) for d in range(10)]
    config, tokenizer = undisturbed / "config.yaml", undisturbed / "tokenizer.safetensors"
    arguments = ["--config", str(config), "--tokenizer", str(tokenizer), "--num", "1", "--out", str(tmp_path / "one.png")]
    assert cli.main(["sample", "--checkpoint", str(tmp_path / "weights.pt"), *arguments]) == 0
    with pytest.raises(SystemExit, match="--config and --tokenizer are needed"):
        cli.main(["sample", "--checkpoint", str(tmp_path / "weights.pt")])


def test_sampling_with_another_tokenizer_shows_both_hashes(undisturbed, tmp_path):
    from lightningdit.tokenizer.vavae import Tokenizer

    run = tmp_path / "run"
    shutil.copytree(undisturbed, run)
    other = Tokenizer.load(run / "tokenizer.safetensors")
    trained_on = other.sha256
    other.latent_std.mul_(2)
    other.save(run / "tokenizer.safetensors")
    with pytest.raises(SystemExit) as error:
        cli.main(["sample", "--checkpoint", str(run), "--out", str(tmp_path / "grid.png")])
    assert trained_on in str(error.value) and other.sha256 in str(error.value)


def test_a_short_run_already_draws_digits(train, tmp_path):
    """The full default reaches 95 % and more; half of its steps with half of its batch must reach 85 %."""
    quick = ["--steps", 300, "--batch-size", 64, "--final-samples", 200, "--score.every", 0]
    rare = ["--sample-every", 1000, "--checkpoint-every", 1000, "--validate-every", 1000]
    result = train(tmp_path / "run", *quick, *rare, small=False)
    accuracy = float(re.search(r"digits recognised ([\d.]+)%", result.stdout)[1])
    assert accuracy >= 85, result.stdout
