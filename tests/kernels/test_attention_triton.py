"""The Triton kernels of rope_attention, through the operator: in triton's interpreter, and on CUDA where there is one."""

import itertools

import pytest
import torch
import torch.utils.checkpoint

pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")

from lightningdit_kernels import attention, attention_triton, rope_attention  # noqa: E402
from lightningdit_kernels.attention import fused  # noqa: E402
from lightningdit_kernels.attention import rope_attention_ref as eager  # noqa: E402
from lightningdit_kernels.testing import (  # noqa: E402
    assert_matches_truth,
    assert_within,
    poisoned_memory,
    random_tensor,
    truth_and_bounds,
    values_and_gradients,
)
from lightningdit_kernels.testing import rope_frequencies as frequencies  # noqa: E402
from lightningdit_kernels.testing import token_grid as grid  # noqa: E402

pytestmark = pytest.mark.usefixtures("few_programs_of_sums")
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="with a CUDA device test_cuda_matches_truth runs the kernels compiled")


@pytest.fixture(autouse=True)
def triton_serves_cpu():
    """The operators call the Triton launchers for CPU tensors too, which the interpreter can run."""
    with torch.library._scoped_library("lightningdit", "IMPL") as library:
        library.impl("rope_attention", attention._attention_cuda, "CPU", allow_override=True)
        library.impl("rope_attention_backward", attention._attention_backward_cuda, "CPU", allow_override=True)
        yield


@pytest.fixture(params=["resident", "prologue"])
def way(request, monkeypatch):
    """Rotation inside the attention kernels, as for few tokens, or by the prologue, as for many."""
    monkeypatch.setattr(attention_triton, "RESIDENT_TOKENS", 256 if request.param == "resident" else 0)


def inputs_of(rows, columns, heads, head_dim, dtype, norm="none", rope=True, bias=True, batch=1):
    inputs = dict(qkv=random_tensor(batch, rows * columns, 3, heads, head_dim, dtype=dtype))
    if norm != "none":
        inputs |= {f"{name}_weight": 1 + random_tensor(head_dim, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 1)}
    if norm == "layer":
        inputs |= {f"{name}_bias": random_tensor(head_dim, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 3)}
        inputs |= dict(center=True, eps=1e-5)
    if bias:
        inputs |= dict(bias=random_tensor(3, heads, head_dim, dtype=dtype, seed=5) / 2)
    return inputs | (dict(positions=grid(rows, columns), freqs=frequencies(head_dim)) if rope else {})


class recorded:
    """A kernel that notes in `launches` what it is compiled for: its name, the dtypes of its arguments, all tensors, and constants."""

    def __init__(self, kernel, launches):
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid):
        def launch(*args, **constants):
            assert all(isinstance(arg, torch.Tensor) for arg in args)
            self.launches.append((self.kernel.fn.__name__, [arg.dtype for arg in args], constants))
            self.kernel[grid](*args, **constants)

        return launch


# Rows, columns, heads, Dh: N = 16, 63, 64; main part with padding (8), with tail (24, 40, 72), without either (64, 128).
SHAPES = [(4, 4, 2, 8), (7, 9, 1, 24), (4, 4, 1, 40), (8, 8, 1, 64), (7, 9, 1, 72), (4, 4, 1, 128), (1, 1, 1, 8)]


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_truth(shape, dtype):
    assert_matches_truth(fused, eager, inputs_of(*shape, dtype), frozen=("freqs",))


@interpreted
@pytest.mark.parametrize(
    "rope, norm, dtype",
    [(rope, norm, torch.float32) for rope in (False, True) for norm in ("none", "rms", "layer")] + [(True, "layer", torch.bfloat16)],
    ids=str,
)
def test_rotation_and_norm(rope, norm, dtype, way):
    # Without RoPE, softmax is blind to the key's bias: that gradient is zero, and what is computed is rounding noise.
    inputs = inputs_of(3, 7, 2, 24, dtype, norm, rope)
    assert_matches_truth(fused, eager, inputs, frozen=("freqs",) if rope else ("freqs", "k_bias"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int32], ids=str)
def test_any_positions(dtype, way):
    """Fractions, repetitions, negative and distant coordinates in no order: what the rotation may not take for a grid."""
    positions = torch.tensor([[0, 3], [7, 0], [0, 0], [250, -7], [7, 3], [-31, 250], [1000, 999], [0, 3], [5, 5]])
    positions = positions.to(dtype) if dtype == torch.int32 else positions.to(dtype) / 7 + 0.3
    inputs = inputs_of(3, 3, 2, 24, torch.float32, "rms")
    assert_matches_truth(fused, eager, inputs | dict(positions=positions), frozen=("positions", "freqs"))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_rope_table(dtype):
    """Lines name the first token with the same coordinate, so that few lines of the table are read; their values are the definition's."""
    positions, freqs = grid(5, 7).float() / 3, frequencies(24)
    lines, table = attention_triton._rope_table(positions, freqs, 24, dtype)
    assert torch.equal(lines.long(), torch.stack((torch.arange(35) // 7 * 7, torch.arange(35) % 7), 1))
    expected = attention.rope_table(positions.double(), freqs.double(), torch.float64).flatten(1)
    assert (table - expected).abs().max() < (2**-11 if dtype == torch.bfloat16 else 2**-22)


@interpreted
def test_several_blocks_and_samples(way):
    """More tokens than one block holds, with a remainder, and more than one sample: offsets, masks and the order of partial sums."""
    assert_matches_truth(fused, eager, inputs_of(7, 10, 1, 8, torch.float32, "layer", batch=2), frozen=("freqs",))


@interpreted
@pytest.mark.filterwarnings("ignore:overflow encountered", "ignore:invalid value encountered")  # NumPy's, in rows of padding
def test_scores_far_below_zero(way):
    """Every score is near -400: exp2(-lse) overflows for a key of padding, which must not reach a gradient as inf * 0."""
    qkv = random_tensor(1, 5, 3, 1, 8) / 8
    qkv[:, :, 0], qkv[:, :, 1] = qkv[:, :, 0] + 12, qkv[:, :, 1] - 12
    truth, bounds = truth_and_bounds(eager, dict(qkv=qkv))
    # exp2 makes the rounding of its argument, at most -577 = -400 log2(e), a relative error of every weight, and eager's product of
    # matrices may by luck be exact: how it sums depends on the machine.
    rounding = 577 * torch.finfo(torch.float32).eps
    bounds = {name: bound + rounding * truth[name].abs().max().item() for name, bound in bounds.items()}
    with poisoned_memory():
        assert_within(values_and_gradients(fused, dict(qkv=qkv)), truth, bounds)


# Heads, Dh: with a padded tail (40, 72), with a full one (48), with none (64).
@interpreted
@pytest.mark.parametrize(
    "heads, head_dim, dtype, rope, bias",
    [
        (2, 40, torch.bfloat16, True, True),
        (1, 48, torch.float16, True, False),
        (1, 64, torch.float16, True, True),
        (1, 72, torch.bfloat16, False, True),
        (1, 72, torch.bfloat16, True, True),
    ],
    ids=str,
)
def test_backward_of_one_program_a_head(heads, head_dim, dtype, rope, bias, monkeypatch):
    """256 tokens: the backward that holds a whole head. More than one head and sample: offsets, and what goes through grad_qkv."""
    launched = []
    kernel = attention_triton._rope_attention_bwd_head_kernel
    monkeypatch.setattr(attention_triton, "_rope_attention_bwd_head_kernel", recorded(kernel, launched))
    inputs = inputs_of(16, 16, heads, head_dim, dtype, rope=rope, bias=bias, batch=heads)
    # Without RoPE, softmax is blind to the key's bias: that part of its gradient is zero, and what is computed is rounding noise.
    frozen = ("freqs",) if rope else ("bias",)
    assert_matches_truth(fused, eager, inputs, frozen=frozen)
    assert launched


@interpreted
def test_one_program_a_head_needs_gradients_in_the_operands_dtype(monkeypatch):
    """It keeps q' in the gradient's place: with an fp32 qkv under autocast that place is of another dtype, and the prologue serves."""
    launched = []
    kernel = attention_triton._rope_attention_bwd_head_kernel
    monkeypatch.setattr(attention_triton, "_rope_attention_bwd_head_kernel", recorded(kernel, launched))
    inputs = inputs_of(16, 16, 1, 24, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        values = values_and_gradients(fused, inputs, frozen=("freqs",))
    assert values["grad.qkv"].dtype == torch.float32 and not launched


@interpreted
def test_a_compiled_graph_with_two_grids_of_its_own():
    """Inductor lets the second grid lie where the first one was, as the same object, and counts no write."""
    inputs = inputs_of(3, 3, 1, 8, torch.float32)

    def twice(qkv, bias, freqs, offset):
        index = torch.arange(3.0)
        first = fused(qkv, torch.cartesian_prod(index, index) + offset, freqs, bias=bias)
        return first + fused(qkv, torch.cartesian_prod(index, index) * 3 * offset, freqs, bias=bias)

    arguments = inputs["qkv"], inputs["bias"], inputs["freqs"], torch.tensor(0.5)
    torch.testing.assert_close(torch.compile(twice, fullgraph=True)(*arguments), twice(*arguments))


@interpreted
def test_empty_batch_and_strided_input():
    inputs = inputs_of(2, 3, 2, 8, torch.float32, "rms")
    weight = inputs["q_weight"].requires_grad_()
    fused(**inputs | dict(qkv=torch.zeros(0, 6, 3, 2, 8, requires_grad=True))).sum().backward()
    assert torch.equal(weight.grad, torch.zeros(8))
    strided = random_tensor(3, 6, 2, 2, 16)[..., ::2].permute(2, 1, 0, 3, 4)
    assert_matches_truth(fused, eager, inputs | dict(qkv=strided), frozen=("freqs",))


@interpreted
def test_autocast_rounds_after_the_rotation():
    """Inside autocast fp32 qkv is normalised and rotated in fp32, multiplied in bf16, and its gradient is fp32 again."""
    inputs = inputs_of(4, 4, 1, 24, torch.float32, "rms")

    def inside(op):
        return lambda **kw: torch.autocast("cpu", torch.bfloat16)(op)(**kw)

    ours, plain = (values_and_gradients(inside(op), inputs, frozen=("freqs",)) for op in (fused, eager))
    doubled = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    assert ours["out.0"].dtype == torch.bfloat16 and ours["grad.qkv"].dtype == torch.float32
    for name, true in values_and_gradients(eager, doubled, frozen=("freqs",)).items():
        # The yardstick of testing.py with the ulp of bf16 for the fp32 gradients too, because the products behind them take bf16.
        bound = 2 * (plain[name] - true).abs().max() + 4 * 2**-8 * true.abs().max()
        assert (ours[name] - true).abs().max() <= bound, name


@interpreted
def test_checkpointing_recomputes_the_same():
    inputs = inputs_of(4, 4, 1, 24, torch.float32, "rms")
    qkv = inputs.pop("qkv").requires_grad_()
    (plain,) = torch.autograd.grad(fused(qkv, **inputs).square().sum(), qkv)
    (again,) = torch.autograd.grad(torch.utils.checkpoint.checkpoint(fused, qkv, use_reentrant=False, **inputs).square().sum(), qkv)
    assert torch.equal(plain, again)


@interpreted
def test_opcheck():
    inputs = inputs_of(2, 2, 1, 8, torch.float32, "layer")
    where = inputs["positions"], inputs["freqs"]
    parameters = [inputs[name].requires_grad_() for name in ("q_weight", "k_weight", "q_bias", "k_bias", "bias")]
    arguments = (inputs["qkv"].requires_grad_(), *where, *parameters, 1e-5, True, torch.float32)
    torch.library.opcheck(torch.ops.lightningdit.rope_attention, arguments)


@interpreted
def test_nothing_is_specialised_on_the_batch(monkeypatch):
    """What triton compiles for is the same for every batch: constexprs, launch options, and no number among the arguments."""
    launches = []
    for name in ("prologue", "fwd", "bwd", "bwd_head"):
        name = f"_rope_attention_{name}_kernel"
        monkeypatch.setattr(attention_triton, name, recorded(getattr(attention_triton, name), launches))
    seen = []
    for batch in (1, 3):
        launches.clear()
        for inputs in (inputs_of(2, 3, 1, 8, torch.float32, "rms", batch=batch), inputs_of(16, 16, 1, 8, torch.bfloat16, batch=batch)):
            fused(**inputs | dict(qkv=inputs["qkv"].requires_grad_())).sum().backward()
        seen.append(list(launches))
    assert len(seen[0]) >= 4 and seen[0] == seen[1]


def test_audit_cases_name_every_argument():
    cases = attention_triton.audit_cases()
    assert len({case["name"] for case in cases}) == len(cases)
    for case in cases:
        assert list(case["signature"]) == case["kernel"].arg_names
        assert {name for name, kind in case["signature"].items() if kind == "constexpr"} == case["constexprs"].keys()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize(
    "shape", [(16, 16, 16, 72), (16, 16, 6, 64), (32, 32, 4, 72), (7, 9, 2, 128), (19, 17, 2, 40), (4, 4, 1, 256)], ids=str
)
def test_cuda_matches_truth(shape, norm, dtype):
    inputs = inputs_of(*shape, dtype, norm, batch=3)
    inputs = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    assert_matches_truth(lambda **kw: rope_attention(**kw, backend="triton"), eager, inputs, frozen=("freqs",))


def test_a_forward_with_16_channels_never_has_64_queries_for_8_warps_on_sm_90():
    """In fp32 such a kernel reads shared memory that is not its own: an illegal memory access on an H100."""
    for head_dim, dtype, norm, n in itertools.product(range(8, 257, 8), (torch.float32, torch.bfloat16), (False, True), (64, 256, 1024)):
        shape_class = attention_triton._shape_class("forward", n, head_dim, dtype, norm)
        arch = max(known for known, name in attention_triton.FORWARD if name == shape_class and known <= 90)
        for config in attention_triton.FORWARD[arch, shape_class]:
            if head_dim > 16 and 16 in attention_triton.head_split(head_dim):
                assert (config.blocks["BLOCK_M"], config.num_warps) != (64, 8), (head_dim, dtype, norm, n)
