"""Selective checkpointing computes matrix products and attention once, whichever operator computes attention."""

import collections
import functools

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import lightningdit.model
from lightningdit.model import LightningDiT, _keep_products, is_attention
from lightningdit_kernels import native, rope_attention

DEPTH = 3
SHAPE = dict(input_size=4, in_channels=4, hidden_size=32, depth=DEPTH, num_heads=2, num_classes=5)
NATIVE, FLASH = "lightningdit::rope_attention", "aten::_scaled_dot_product_flash_attention_for_cpu"
PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm")
aten = torch.ops.aten


class Calls(TorchDispatchMode):
    """Counts the operators that are called inside, by name."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.counts[op.name()] += 1
        return op(*args, **(kwargs or {}))


def profiled(step):
    """{operator: calls} of the second step(): the first compiles. Under a TorchDispatchMode such as Calls, nothing compiled would run."""
    step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        step()
    return collections.Counter(event.name for event in profile.events())


def counted(step):
    """{operator: calls} of step(), not compiled. The profiler would see each call of selective checkpointing twice."""
    with Calls() as calls:
        step()
    return calls.counts


def calls_of_a_step(policy, bf16=False, compiled=False):
    """{operator: calls} of a forward and backward pass; policy: of checkpointing, or None."""
    torch.manual_seed(0)
    options = dict(use_checkpoint=policy is not None, checkpoint_policy=policy or "full")
    flags = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True, use_qknorm=True)
    model = LightningDiT(**SHAPE, **flags, **options).train()
    if compiled:
        torch._dynamo.reset()
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2])

    def step():
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(x, t, y, y == 2).float().square().mean()
        loss.backward()

    return profiled(step) if compiled else counted(step)


@pytest.fixture
def attention(monkeypatch):
    """attention(backend): the model's from now on."""

    def choose(backend):
        if backend == "reference":
            monkeypatch.setattr(native, "available", False)
            backend = "auto"
        chosen = functools.partial(rope_attention, backend=backend)
        monkeypatch.setattr(lightningdit.model, "rope_attention", chosen)

    return choose


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "backend, operator, options",
    [
        ("auto", NATIVE, {}),
        ("auto", NATIVE, dict(bf16=True)),
        ("sdpa", FLASH, {}),
        ("sdpa", FLASH, dict(bf16=True)),
        ("reference", FLASH, {}),  # "auto" without the native library
    ],
)
def test_attention_runs_once_a_block(attention, backend, operator, options, compiled):
    if operator == NATIVE and not native.available:
        pytest.skip(native.about)
    attention(backend)
    calls = calls_of_a_step("selective", compiled=compiled, **options)
    assert calls[operator] == DEPTH
    without = calls_of_a_step(None, compiled=compiled, **options)
    assert {name: calls[name] for name in PRODUCTS} == {name: without[name] for name in PRODUCTS}
    assert calls_of_a_step("full", **options)[operator] == 2 * DEPTH


def test_products_of_attention_in_plain_pytorch_run_once(attention):
    """Where no operator serves, PyTorch writes attention as two products and a softmax."""
    attention("sdpa")
    counts = {}
    for policy in (None, "selective", "full"):
        with sdpa_kernel(SDPBackend.MATH):
            counts[policy] = calls_of_a_step(policy)["aten::bmm"]
    assert counts["selective"] == counts[None]
    assert counts["full"] > counts[None]


# PyTorch's operators on (B, H, N, Dh), those of GPUs too: their shapes can be had without a GPU.
OPERATORS = {
    "flash": lambda q, k, v: aten._scaled_dot_product_flash_attention(q, k, v),
    "efficient": lambda q, k, v: aten._scaled_dot_product_efficient_attention(q, k, v, None, True),
    "cudnn": lambda q, k, v: aten._scaled_dot_product_cudnn_attention(q, k, v, None, True),
    "cpu": lambda q, k, v: aten._scaled_dot_product_flash_attention_for_cpu(q, k, v),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_no_operator_of_pytorch_is_called_again(name):
    def attend(q, k, v):
        return OPERATORS[name](q.sin(), k.sin(), v.sin())[0].sin()

    counts = {}
    for policy in ("full", "selective"):
        options = {}
        if policy == "selective":
            contexts = functools.partial(create_selective_checkpoint_contexts, _keep_products)
            options = dict(context_fn=contexts)
        options |= dict(use_reentrant=False, preserve_rng_state=False)
        shape = dict(device="meta", dtype=torch.bfloat16, requires_grad=True)
        q, k, v = (torch.randn(2, 2, 16, 32, **shape) for _ in range(3))
        calls = counted(lambda: checkpoint(attend, q, k, v, **options).sum().backward())  # noqa: B023 (called at once)
        counts[policy] = sum(n for op, n in calls.items() if "attention" in op)
    assert counts["full"] == 3  # forward, forward again, backward
    assert counts["selective"] == 2


class Named:
    def __init__(self, name):
        self.text = name

    def name(self):
        return self.text


@pytest.mark.parametrize(
    "name, expected",
    [
        ("flash_attn::_flash_attn_forward", True),
        ("flash_attn::_flash_attn_backward", False),
        ("flash_attn_3::fwd", True),
        ("flash_attn_3::bwd", False),
        ("xformers_flash::flash_fwd", True),
        ("xformers_flash::flash_bwd", False),
        ("xformers::efficient_attention_forward_cutlass", True),
        ("xformers::efficient_attention_backward_cutlass", False),
        ("lightningdit::rope_attention", True),
        ("lightningdit::rope_attention_backward", False),
        ("lightningdit::swiglu", False),
        ("aten::_softmax", False),
    ],
)
def test_operators_of_other_packages_are_known_by_their_names(name, expected):
    assert is_attention(Named(name)) is expected


def test_every_attention_operator_of_pytorch_is_known_with_its_backward():
    names = [name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()]
    attention = {name for name in names if "dot_product" in name and "attention" in name}
    assert len(attention) > 8
    for name in attention:
        assert is_attention(Named(name)) is not name.endswith("_backward"), name
