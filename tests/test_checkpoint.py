"""Checkpoints are complete or absent; damage is named; nothing untrusted is unpickled."""
import errno
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from lightningdit import checkpoint
from lightningdit.checkpoint import CheckpointError

ROOT = Path(__file__).resolve().parent.parent


def write(run, step, value=0.0, keep=2):
    tensors = {name: {"w": torch.full((1000,), value), "b": torch.arange(3)} for name in ("model", "ema")}
    return checkpoint.save_checkpoint(run, step, tensors | {"trainer": {"rng.cpu": torch.get_rng_state()}}, {"seed": 1}, keep)


def test_save_load_and_keep(tmp_path):
    for step in (5, 10, 15):
        write(tmp_path, step, float(step))
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [10, 15]
    path, state = checkpoint.latest_checkpoint(tmp_path)
    assert path.name == "step_0000015" and state["step"] == 15 and state["seed"] == 1
    assert torch.equal(checkpoint.load_tensors(path, "model")["w"], torch.full((1000,), 15.0))
    assert torch.equal(checkpoint.load_weights(tmp_path)["w"], torch.full((1000,), 15.0))  # a run
    assert torch.equal(checkpoint.load_weights(path, "model")["b"], torch.arange(3))  # a checkpoint of it
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_0000010", "step_0000015"]


def parts_of(file):
    """(header, the bytes after it) of a safetensors file, whose metadata is in no order."""
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def test_one_process_writes_what_torch_distributed_checkpoint_would(tmp_path):
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(4), "step": torch.zeros(()), "half": torch.ones(2, 3, dtype=torch.bfloat16).T,
               "empty": torch.zeros(0, 3), "rng": torch.get_rng_state()}
    path = checkpoint.save_checkpoint(tmp_path, 1, dict(model=tensors), {}) / "model"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({name: tensor.contiguous() for name, tensor in tensors.items()}, no_dist=True,
                 storage_writer=dcp.HuggingFaceStorageWriter(str(tmp_path / "theirs"), save_distributed=True))
    (ours,), (theirs,) = path.iterdir(), (tmp_path / "theirs").iterdir()
    assert ours.name == theirs.name
    (header, data), (their_header, their_data) = map(parts_of, (ours, theirs))
    assert header == their_header
    assert data == their_data
    loaded = checkpoint.load_tensors(path.parent, "model")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing", "no state", "bad state", "changed state"])
def test_damage_is_named_and_the_one_before_is_taken(tmp_path, damage):
    write(tmp_path, 1, 1.0)
    path = write(tmp_path, 2, 2.0)
    (file,) = (path / "model").iterdir()
    data = bytearray(file.read_bytes())
    if damage == "truncated":
        file.write_bytes(data[:-100])
    elif damage == "flipped":
        data[-50] ^= 1
        file.write_bytes(data)
    elif damage == "missing":
        file.unlink()
    elif damage == "no state":
        (path / "state.json").unlink()
    elif damage == "changed state":  # still valid JSON
        (path / "state.json").write_text((path / "state.json").read_text().replace('"step": 2', '"step": 3'))
    else:
        (path / "state.json").write_text("[1]")
    word = dict(truncated="is truncated", flipped="SHA-256 differs", missing="is missing").get(damage, "state.json is missing or damaged")
    with pytest.raises(CheckpointError, match=word):
        checkpoint.load_weights(path)
    warnings = []
    found, _ = checkpoint.latest_checkpoint(tmp_path, warn=warnings.append)
    assert found.name == "step_0000001" and len(warnings) == 1 and word in warnings[0]


def test_a_damaged_later_one_does_not_count_among_those_that_stay(tmp_path):
    write(tmp_path, 3, 3.0, keep=1)
    (write(tmp_path, 9, 9.0) / "state.json").write_text("{}")
    write(tmp_path, 5, 5.0, keep=1)
    assert [step for step, _ in checkpoint.list_checkpoints(tmp_path)] == [5, 9]
    assert checkpoint.latest_checkpoint(tmp_path, warn=lambda text: None)[1]["step"] == 5


def test_a_failed_save_leaves_the_previous_checkpoint_whole(tmp_path, monkeypatch):
    write(tmp_path, 1, 1.0)
    serialised, calls = checkpoint.serialised, []

    def full_disk(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return serialised(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "serialised", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write(tmp_path, 2, 2.0)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]
    assert checkpoint.latest_checkpoint(tmp_path)[1]["step"] == 1


def test_saving_in_the_background_keeps_what_was_there_when_it_began(tmp_path, monkeypatch):
    """The writer waits for a lock while the tensors change; the error of a failed save comes with the next call."""
    lock, serialised = threading.Lock(), checkpoint.serialised

    def slow(*args, **kwargs):
        with lock:
            return serialised(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "serialised", slow)
    weight, saver = torch.zeros(3), checkpoint.Saver(tmp_path)
    with lock:
        saver.start(1, {"model": {"w": weight}}, {})
        weight += 1
        assert not checkpoint.list_checkpoints(tmp_path)
    assert saver.wait() == 1 and saver.wait() is None
    assert torch.equal(checkpoint.load_weights(tmp_path, "model")["w"], torch.zeros(3))
    shutil.rmtree(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    saver.start(2, {"model": {"w": weight}}, {})
    with pytest.raises(OSError):
        saver.start(3, {"model": {"w": weight}}, {})


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from lightningdit import checkpoint
from lightningdit.distributed import process_group
from lightningdit.optim import build_optimizer
group = process_group(torch.device("cpu"))
group.__enter__()
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.BatchNorm1d(7, affine=False), torch.nn.Linear(7, 3))
several = dist.is_initialized()  # one process has no group, as in training
if several:
    fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (dist.get_world_size(),)))
optimizer = build_optimizer(model, 0.1)
def train():
    model(torch.linspace(-1, 1, 20).view(4, 5) ** 2).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
if sys.argv[2] == "save":
    train()
    checkpoint.save_checkpoint(sys.argv[1], 1, dict(model=model.state_dict(), trainer=checkpoint.trainer_tensors(model, optimizer)), {})
else:
    path, state = checkpoint.latest_checkpoint(sys.argv[1])
    checkpoint.load_into(path, "model", model.state_dict())
    checkpoint.load_trainer(path, model, optimizer)
train()
values = [(p.full_tensor() if several else p).double().sum().item() for p in model.parameters()]
if not several or dist.get_rank() == 0:
    print("VALUES", values)
group.__exit__(None, None, None)
"""


def test_any_number_of_processes_reads_what_two_wrote(tmp_path, script):
    (tmp_path / "script.py").write_text(SHARDED)

    def run(processes, what):
        out = script(tmp_path / "script.py", tmp_path, what, processes=processes).stdout
        return [float(value) for value in out.split("VALUES [")[1].split("]")[0].split(",")]

    truth = run(2, "save")
    assert len(list((tmp_path / "checkpoints" / "step_0000001" / "model").iterdir())) == 2
    for processes in (1, 2, 3):
        assert run(processes, "load") == pytest.approx(truth, rel=1e-6)
    whole = checkpoint.load_tensors(tmp_path / "checkpoints" / "step_0000001", "model")
    shapes = {key: tuple(tensor.shape) for key, tensor in whole.items()}
    assert (shapes["0.weight"], shapes["2.bias"], shapes["1.num_batches_tracked"]) == ((7, 5), (3,), ())


FAILED = """
import time, torch, torch.distributed as dist
from lightningdit.checkpoint import Saver
from lightningdit.distributed import process_group
with process_group(torch.device("cpu")):
    saver, kept = Saver("RUN"), dist.group.WORLD  # as a model keeps it: destroyed, but its connections stay
    if dist.get_rank() == 0:
        saver.start(1, dict(model=dict(w=torch.zeros(2))), {})
        time.sleep(1)  # the save waits for the other process by now
        raise RuntimeError("rank 0 failed")
    dist.barrier()  # never comes to the save
"""


def test_one_of_several_that_fails_waits_for_no_save(tmp_path):
    """It waited for a process that waited for it. In processes of their own, whose end is the interpreter's."""
    (tmp_path / "script.py").write_text(FAILED.replace("RUN", str(tmp_path)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    paths = os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels"))
    started = []
    for rank in range(2):
        variables = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR="127.0.0.1", MASTER_PORT=port, OMP_NUM_THREADS=1)
        environment = os.environ | {name: str(value) for name, value in variables.items()} | dict(PYTHONPATH=paths)
        started.append(subprocess.Popen([sys.executable, str(tmp_path / "script.py")], env=environment, stderr=subprocess.PIPE, text=True))
    try:
        errors = [process.communicate(timeout=100)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [1, 1], errors
    assert "RuntimeError: rank 0 failed" in errors[0] and "Traceback" in errors[1]
    assert checkpoint.list_checkpoints(tmp_path) == []


def test_a_write_that_the_system_refuses(tmp_path, script):
    """A real refusal rather than a simulated one: the kernel limits the size of files of a child process."""
    write(tmp_path, 1, 1.0)
    (tmp_path / "script.py").write_text(
        "import sys, signal, resource, torch; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); from lightningdit import checkpoint\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "try: checkpoint.save_checkpoint(sys.argv[1], 2, {'model': {'w': torch.zeros(1_000_000)}}, {})\n"
        "except OSError as error: print('refused:', error)")
    result = script(tmp_path / "script.py", tmp_path)
    assert "refused:" in result.stdout, result.stderr
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["step_0000001"]


def test_read_only_directory_is_an_oserror(tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(OSError):
        write(tmp_path, 1)


class Attack:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_malicious_pickle_is_refused(tmp_path):
    victim = tmp_path / "executed"
    torch.save({"ema": Attack(victim)}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Attack(victim)))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(CheckpointError, match="refuses it"):
            checkpoint.load_weights(tmp_path / name)
    assert not victim.exists()


@pytest.mark.parametrize("name, content, message", [
    ("nothing.pt", None, "no file or folder"),
    ("short.pt", b"PK\x03\x04 cut", "refuses it"),
    ("empty.safetensors", b"", "not a whole safetensors file"),
    ("text.safetensors", b"hello world, this is no header", "not a whole safetensors file"),
])
def test_files_that_are_no_weights(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        checkpoint.load_weights(tmp_path / name)


def test_entries_that_are_no_state_dict(tmp_path):
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"ema": {"a": 3}}, tmp_path / "numbers.pt")
    with pytest.raises(CheckpointError, match="got a list"):
        checkpoint.load_weights(tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="not a state dict of tensors"):
        checkpoint.load_weights(tmp_path / "numbers.pt")


def test_empty_run(tmp_path):
    assert checkpoint.latest_checkpoint(tmp_path) is None
    with pytest.raises(CheckpointError, match="holds no undamaged checkpoint"):
        checkpoint.load_weights(tmp_path)


def test_exported_name_must_say_the_format(tmp_path):
    with pytest.raises(ValueError, match="ends in .pt or .safetensors"):
        checkpoint.save_weights(tmp_path / "weights.bin", {})


def test_optimizer_state_round_trip(tmp_path):
    from lightningdit.optim import build_optimizer

    def train(model, optimizer, steps):
        for _ in range(steps):
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    models = [torch.nn.Linear(3, 2) for _ in range(2)]
    optimizers = [build_optimizer(model, 0.1) for model in models]
    train(models[0], optimizers[0], 3)
    models[1].load_state_dict(models[0].state_dict())
    path = checkpoint.save_checkpoint(tmp_path, 3, dict(trainer=checkpoint.trainer_tensors(models[0], optimizers[0])), {})
    checkpoint.load_trainer(path, models[1], optimizers[1])
    state = torch.get_rng_state()
    train(models[0], optimizers[0], 2)
    torch.set_rng_state(state)
    train(models[1], optimizers[1], 2)
    assert torch.equal(models[0].weight, models[1].weight)
    with pytest.raises(CheckpointError, match="does not belong to this model"):
        checkpoint.load_trainer(path, torch.nn.Linear(5, 2), optimizers[1])
    with pytest.raises(CheckpointError, match="trainer does not fit, .*\n  missing weight"):
        checkpoint.load_into(path, "trainer", dict(models[1].named_parameters()))
