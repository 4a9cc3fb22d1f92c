"""The estimate of memory against what autograd really keeps, and the tables made from it."""
import contextlib
import functools
import gc
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import lightningdit.model
from lightningdit import memory, plan
from lightningdit.config import ConfigError, DiTConfig, from_dict, parse
from lightningdit.model import CHECKPOINTING, PRESETS, LightningDiT
from lightningdit.optim import EMA, build_optimizer
from lightningdit_kernels import rope_attention

ROOT = Path(__file__).resolve().parent.parent
LIGHTNING = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
SMALL = dict(input_size=8, in_channels=8, num_classes=5)


class LiveBytes(TorchDispatchMode):
    """Bytes of the storages that operators made inside and that somebody still holds: also what selective checkpointing caches, of which
    saved_tensors_hooks would not hear."""

    def __init__(self):
        super().__init__()
        self.made, self.peak = {}, 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        result = op(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                reference = StorageWeakRef(tensor.untyped_storage())
                self.made[reference.cdata] = reference, tensor.untyped_storage().nbytes()
        self.peak = max(self.peak, self.now())
        return result

    def now(self):
        self.made = {key: value for key, value in self.made.items() if not value[0].expired()}
        return sum(size for _, size in self.made.values())


@pytest.fixture
def uncomputed():
    """Inside, tensors have storages and no values."""
    with FakeTensorMode():
        yield


def live_bytes(model, count, bf16):
    """(after the forward pass, at the peak of forward and backward)."""
    x, t, y = torch.randn(count, model.in_channels, model.input_size, model.input_size), torch.rand(count), torch.zeros(count).long()
    with LiveBytes() as live:
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x, t, y, y.bool()).float().square().mean()
        after_forward = live.now()
        loss.backward()
    return after_forward, live.peak


@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("shape", [
    dict(hidden_size=128, num_heads=4, depth=8, **LIGHTNING),
    dict(hidden_size=72, num_heads=1, depth=6, use_qknorm=True, **LIGHTNING),  # XL's heads
    dict(hidden_size=64, num_heads=4, depth=8, use_rope=True, wo_shift=True),  # the plain DiT
    dict(hidden_size=64, num_heads=4, depth=8, bf16_residual=True, **LIGHTNING),
])
def test_activations_are_those_that_autograd_keeps(uncomputed, shape, bf16, checkpointing):
    """The slope over the number of images: weights, their bf16 copies and gradients do not depend on it."""
    options = dict(use_checkpoint=checkpointing != "none", checkpoint_policy="selective" if checkpointing == "selective" else "full")
    model = LightningDiT(**SMALL, **shape, **options).train()
    kept, peak = ((b - a) / 8 for a, b in zip(live_bytes(model, 24, bf16), live_bytes(model, 32, bf16), strict=True))
    assert plan._activations(model, 2 if bf16 else 4, checkpointing)[0] == pytest.approx(kept, rel=0.03)
    assert plan.activation_bytes(model, 2 if bf16 else 4) == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("bf16", [False, True])
def test_selective_checkpointing_keeps_as_much_with_the_attention_of_pytorch(uncomputed, monkeypatch, bf16):
    monkeypatch.setattr(lightningdit.model, "rope_attention", functools.partial(rope_attention, backend="sdpa"))
    shape = dict(hidden_size=128, num_heads=4, depth=8, **LIGHTNING)
    model = LightningDiT(**SMALL, **shape, use_checkpoint=True, checkpoint_policy="selective").train()
    kept, peak = ((b - a) / 8 for a, b in zip(live_bytes(model, 24, bf16), live_bytes(model, 32, bf16), strict=True))
    assert plan._activations(model, 2 if bf16 else 4, "selective")[0] == pytest.approx(kept, rel=0.03)
    assert plan.activation_bytes(model, 2 if bf16 else 4) == pytest.approx(peak, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("state", ["fp32", "cpu"])
def test_the_estimate_is_within_a_tenth_of_what_a_gpu_takes(checkpointing, state):
    """B/1 in bf16, updates of two micro-batches: at the peak, in the second backward pass, all gradients are there."""
    if torch.cuda.mem_get_info()[0] < 20e9:
        pytest.skip("needs 20 GB of free GPU memory")
    options = dict(use_checkpoint=checkpointing != "none", checkpoint_policy="selective" if checkpointing == "selective" else "full")
    count = dict(none=32, selective=48, full=128)[checkpointing]
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = LightningDiT(**PRESETS["B/1"], **LIGHTNING, **options).cuda().train()
    average, optimizer = EMA(model), build_optimizer(model, 1e-4, state=state)
    x, t, y = (tensor.cuda() for tensor in (torch.randn(count, 32, 16, 16), torch.rand(count), torch.zeros(count).long()))
    for step in range(3):
        if step == 2:  # workspaces are there, kernels are compiled and tuned
            torch.cuda.reset_peak_memory_stats()
        for _ in range(2):
            with torch.autocast("cuda", torch.bfloat16):
                prediction = model(x, t, y, y.bool())
            prediction.float().square().mean().backward()
            del prediction
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        average.update(step)
    measured = torch.cuda.max_memory_allocated() - before
    estimate = sum(plan.training_memory(model, count, True, checkpointing=checkpointing, state=state).values())
    print(f"B/1, {count} images, checkpointing {checkpointing}, state {state}: {measured / 1e9:.3f} GB, estimate {estimate / 1e9:.3f} GB")
    assert estimate == pytest.approx(measured, rel=0.1)


def meta(**options):
    with torch.device("meta"):
        return LightningDiT(**PRESETS["XL/1"], **LIGHTNING, **options)


def test_activations_of_xl():
    none, selective, full = (plan.activation_bytes(meta(), 2, c) for c in CHECKPOINTING)
    assert none == pytest.approx(336e6, rel=0.01) and selective / none == pytest.approx(0.69, abs=0.01) and full / none < 0.2


def test_training_memory_by_layout_and_optimizer_state():
    model, parameters = meta(), 675.26e6
    whole = plan.training_memory(model, 0, True)
    assert sum(whole.values()) == pytest.approx((4 + 4 + 8 + 4 + 2) * parameters, rel=1e-3)
    block = sum(p.numel() for p in model.blocks[0].parameters())
    sharded = plan.training_memory(model, 0, True, shards=8)
    outside = parameters - 28 * block
    assert sum(sharded.values()) == pytest.approx(20 * parameters / 8 + 2 * (2 + 2 + 4) * block + 4 * outside, rel=1e-3)
    assert sum(plan.training_memory(model, 0, True, state="8bit").values()) < sum(whole.values()) - 5.9 * parameters
    assert sum(plan.training_memory(model, 0, True, state="cpu").values()) == pytest.approx((4 + 4 + 4 + 2) * parameters, rel=1e-3)


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    model = meta()
    for card in plan.CARDS[1:]:
        for shards in plan.LAYOUTS.values():
            for checkpointing in CHECKPOINTING:
                options = dict(shards=shards, checkpointing=checkpointing)
                count = plan.largest_micro_batch(model, card * 1e9, True, **options)
                need = [sum(plan.training_memory(model, n, True, **options).values()) for n in (count, count + 1)]
                assert need[0] <= card * 1e9 < need[1]
    assert plan.largest_micro_batch(model, 10e9, True) == 0


def test_the_documented_table_is_the_present_one():
    assert (ROOT / "docs/memory.md").read_text() == plan.document()


class Limited(LightningDiT):
    """A model on a device that holds `most` images."""

    most, tried = 0, []

    def forward(self, x, *arguments):
        self.tried.append(len(x))
        if len(x) > self.most:
            raise torch.OutOfMemoryError(f"no room for {len(x)} images")
        return super().forward(x, *arguments)


@pytest.mark.parametrize("most, expected", [(100, 24), (13, 12), (7, 6), (1, 1), (0, 0)])
def test_the_largest_micro_batch_by_trial(most, expected):
    model = Limited(**SMALL, hidden_size=16, num_heads=1, depth=1, **LIGHTNING).eval()
    model.most, model.tried = most, []
    sizes = [24, 12, 8, 6, 4, 3, 2, 1]
    cpu = torch.device("cpu")
    assert memory.largest_by_trial(sizes, lambda count: plan._try_pass(model, count, False, cpu), cpu) == expected
    assert model.tried == [n for n in sizes if n >= expected]
    assert not model.training and all(p.grad is None for p in model.parameters())


def test_other_errors_of_a_trial_pass_through():
    def attempt(count):
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        memory.largest_by_trial([2, 1], attempt, "cpu")


@pytest.mark.parametrize("message", ["CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"])
def test_what_allocates_by_itself_runs_out_of_memory_in_its_own_words(message):
    def attempt(count):
        if count > 1:
            raise RuntimeError(message)

    assert memory.largest_by_trial([2, 1], attempt, "cpu") == 1


def gradients_in_the_last_pass(model):
    """Bytes of the gradients that were there in the last forward pass of a trial."""
    seen = []

    def watch(module, arguments):
        seen.append(sum(p.grad.nbytes for p in model.parameters() if p.grad is not None))

    handle = model.register_forward_pre_hook(watch)
    return seen, handle


def test_a_trial_of_a_part_of_the_batch_has_the_gradients_of_the_parts_before_it():
    model = LightningDiT(**SMALL, hidden_size=16, num_heads=1, depth=1, **LIGHTNING)
    seen, handle = gradients_in_the_last_pass(model)
    plan._try_pass(model, 2, False, torch.device("cpu"), passes=2)
    handle.remove()
    assert seen == [0, sum(p.nbytes for p in model.parameters() if p.requires_grad)]
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("gigabytes, spare", [(24e9, memory.SPARE), (80e9, plan.SPARE_SHARE * 80e9)])
def test_a_trial_leaves_room_for_moments_average_and_what_it_does_not_see(gigabytes, spare, monkeypatch):
    model, taken = LightningDiT(**SMALL, hidden_size=16, num_heads=1, depth=1, **LIGHTNING), []
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=gigabytes))
    monkeypatch.setattr(plan, "_try_pass", lambda model, count, *rest: None)

    @contextlib.contextmanager
    def ballast(size, device):
        taken.append(size)
        yield

    monkeypatch.setattr(memory, "ballast", ballast)
    assert plan.choose_micro_batch(model, 8, "none", True, torch.device("cuda")) == (8, "by trial")
    total, trained = (sum(p.numel() for p in model.parameters() if p.requires_grad >= least) for least in (False, True))
    assert taken == [int(8 * trained + 4 * total + spare)]


@pytest.mark.parametrize("fits", [4, 0])
def test_no_attempt_finds_what_nobody_holds(fits):
    """A reference cycle that was there before, and those of failed attempts."""

    class Cycle:
        def __init__(self):
            self.itself = self

    left, alive = [weakref.ref(Cycle())], []

    def attempt(size):
        alive.append(sum(one() is not None for one in left))
        left.append(weakref.ref(Cycle()))
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")

    gc.disable()
    try:
        assert memory.largest_by_trial([8, 4, 2], attempt, "cpu") == fits
        if not fits:
            assert all(one() is None for one in left)
    finally:
        gc.enable()
    assert not any(alive)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
def test_ballast_is_taken_and_given_back():
    memory.free_memory("cuda")  # or ballast frees what earlier tests left
    before = torch.cuda.memory_allocated()
    with memory.ballast(2**28, "cuda"):
        inside = torch.cuda.memory_allocated()
    assert inside == before + 2**28
    assert torch.cuda.memory_allocated() == before
    assert memory.largest_by_trial([1], lambda count: None, "cuda", spare=2**50) == 0


def test_micro_batch_by_the_estimate(monkeypatch):
    model, cpu = LightningDiT(**SMALL, hidden_size=16, num_heads=1, depth=1, **LIGHTNING), torch.device("cpu")
    fixed, each = sum(plan.training_memory(model, 0, False).values()), plan.activation_bytes(model, 4)
    for room, expected in ((1000, 24), (11.5, 8), (1.5, 1)):
        monkeypatch.setattr(plan.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": fixed + room * each}.get)
        assert plan.choose_micro_batch(model, 24, "none", False, cpu) == (expected, "by the estimate")
    monkeypatch.setattr(plan.os, "sysconf", {"SC_PAGE_SIZE": 1, "SC_PHYS_PAGES": fixed}.get)
    with pytest.raises(torch.OutOfMemoryError, match="not even one image"):
        plan.choose_micro_batch(model, 24, "none", False, cpu)


def test_advice_names_what_is_left_to_do():
    config = DiTConfig(micro_batch=128)
    assert "--micro-batch 64" in plan.out_of_memory_advice(config) and "selective" in plan.out_of_memory_advice(config)
    config.model.use_checkpoint, config.micro_batch = True, None
    assert "--micro-batch auto" in plan.out_of_memory_advice(config) and "policy" not in plan.out_of_memory_advice(config)
    assert "--optim.state cpu (slower steps); --optim.state 8bit" in plan.out_of_memory_advice(config)
    config.optim.state = "cpu"
    assert "optim.state" not in plan.out_of_memory_advice(config)


def test_micro_batch_accepts_numbers_and_auto_only():
    assert [from_dict(DiTConfig, dict(micro_batch=value)).micro_batch for value in ("auto", 4, None)] == ["auto", 4, None]
    with pytest.raises(ConfigError, match="micro_batch: got 'half', expected int or auto"):
        from_dict(DiTConfig, dict(micro_batch="half"))
    assert parse(DiTConfig, ["--micro-batch", "auto"]).micro_batch == "auto" and parse(DiTConfig, ["--micro-batch", "8"]).micro_batch == 8


def test_the_trainer_reports_the_micro_batch_it_chose_and_says_what_to_do_without_memory(script, tmp_path):
    small = ("--model.depth 1 --model.hidden-size 32 --model.num-heads 2 --batch-size 16 --steps 1 --optim.warmup 0 --final-samples 0 "
             "--score.every 0 --sample-num 10 --sample.num-steps 2").split()
    command = [ROOT / "train" / "dit.py", "--run", tmp_path / "run", *small, "--micro-batch", "auto"]
    assert "micro-batch 16 of 16 images a process, the largest that fits by the estimate" in script(*command).stdout
    (tmp_path / "tiny.py").write_text(
        "import os, runpy, sys; os.sysconf = lambda name: 1; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
    result = script(tmp_path / "tiny.py", *command, "--device", "cpu", check=False)
    assert result.returncode == 1 and "error: out of memory; in this order: --model.use-checkpoint" in result.stderr, result.stderr
