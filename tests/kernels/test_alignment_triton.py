"""The Triton kernels of the margin losses, in the interpreter without a GPU, against fp64 and the official numbers.

The gradient of the distance-matrix loss is a step function of the similarities: pairs within EPS of the margin may fall on either side.
Tokens with such a pair are left out of the comparison, and must be few.
"""

import pytest
import torch

pytest.importorskip("triton")
from lightningdit_kernels import alignment_triton as triton_kernels  # noqa: E402
from lightningdit_kernels.alignment import (  # noqa: E402
    _factor,
    marginal_cosine_loss_backward_ref,
    marginal_cosine_loss_ref,
    marginal_distance_matrix_loss_ref,
)
from lightningdit_kernels.testing import assert_matches_truth, poisoned_memory, random_tensor  # noqa: E402
from lightningdit_kernels.tuning import Config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EPS, EXCLUDED = 2e-6, 0.02  # of the largest cosine; of all tokens


class Cosine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, f, margin):
        ctx.save_for_backward(z, f)
        ctx.margin = margin
        return triton_kernels.marginal_cosine_loss_fwd(z, f, margin)

    @staticmethod
    def backward(ctx, grad):
        return triton_kernels.marginal_cosine_loss_bwd(grad, *ctx.saved_tensors, ctx.margin), None, None


class Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, f, margin):
        loss, *norms = triton_kernels.marginal_distance_matrix_loss_fwd(z, f, margin)
        ctx.save_for_backward(z, f, *norms)
        ctx.margin = margin
        return loss

    @staticmethod
    def backward(ctx, grad):
        return triton_kernels.marginal_distance_matrix_loss_bwd(grad, *ctx.saved_tensors, ctx.margin), None, None


def cosine(z, f, margin):
    return Cosine.apply(z, f, margin)


def distance(z, f, margin):
    return Distance.apply(z, f, margin)


def tokens(batch, count, channels, features=None, dtype=torch.float32):
    features = channels if features is None else features
    return dict(z=random_tensor(batch, count, channels, dtype=dtype, seed=1, device=DEVICE),
                f=random_tensor(batch, count, features, dtype=dtype, seed=2, device=DEVICE))


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a small tensor has several of tokens and of channels."""
    monkeypatch.setattr(triton_kernels, "ROWS", {(80, "any"): [Config(dict(ROWS=4, BLOCK_C=8), num_warps=4)]})
    monkeypatch.setattr(triton_kernels, "PROJECT", {(80, "any"): [Config(dict(BLOCK_M=16, BLOCK_K=16, BLOCK_N=16), num_warps=4)]})
    for table, blocks in (("FORWARD", dict(BLOCK_N=16, BLOCK_K=16)), ("BACKWARD", dict(BLOCK_M=16, BLOCK_N=16, BLOCK_K=16, BLOCK_C=16))):
        classes = {(80, name): [Config(blocks, num_warps=4)] for name in ("fp32", "half", "bf16", "bf16 long", "any", "any long")}
        monkeypatch.setattr(triton_kernels, table, classes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 19, 37), (1, 3, 2)], ids=str)
def test_cosine_matches_truth(shape, dtype, small_blocks):
    assert_matches_truth(cosine, marginal_cosine_loss_ref, tokens(*shape, dtype=dtype) | dict(margin=0.9), frozen=("f",))


def compare_distance(inputs, margin):
    """Value and gradient against fp64, tokens with a pair near the margin left out. Returns the share of tokens left out."""
    z, f = inputs["z"], inputs["f"]
    grad = torch.tensor(1.7, device=DEVICE)
    results = []
    for _ in range(2):
        with poisoned_memory():
            loss, *norms = triton_kernels.marginal_distance_matrix_loss_fwd(z, f, margin)
            results.append((loss, triton_kernels.marginal_distance_matrix_loss_bwd(grad, z, f, *norms, margin)))
    (loss, gradient), again = results
    assert torch.equal(loss, again[0]) and torch.equal(gradient, again[1])

    def truth(dtype):
        leaf = z.to(dtype).requires_grad_()
        value = marginal_distance_matrix_loss_ref(leaf, f.to(dtype), margin)
        return value.detach().double(), torch.autograd.grad(1.7 * value, leaf)[0].to(z.dtype if dtype != torch.float64 else dtype).double()

    (true, true_gradient), (plain, plain_gradient) = truth(torch.float64), truth(torch.float32)
    z_hat, f_hat = (torch.nn.functional.normalize(x.double(), dim=-1) for x in (z, f))
    away = ((z_hat @ z_hat.mT - f_hat @ f_hat.mT).abs() - margin).abs()
    clear = (away > EPS).all(-1)
    assert abs(loss - true) <= 2 * abs(plain - true) + 4 * torch.finfo(torch.float32).eps * true
    difference, allowed = (gradient.double() - true_gradient)[clear], (plain_gradient - true_gradient)[clear].abs().max()
    assert difference.abs().max() <= 2 * allowed + 4 * torch.finfo(z.dtype).eps * true_gradient.abs().max()
    return 1 - clear.float().mean().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 37, 33, 21), (2, 16, 5, 40), (3, 1, 4, 4)], ids=str)
def test_distance_matches_truth(shape, dtype, small_blocks):
    assert compare_distance(tokens(*shape, dtype=dtype), 0.05) <= EXCLUDED


@pytest.mark.parametrize("dtype, channels", [(torch.float32, 70), (torch.float32, 32), (torch.bfloat16, 140)], ids=str)
def test_distance_matches_truth_with_the_table(dtype, channels):
    """More than one block of tokens i; of tokens j one in bf16, several in fp32."""
    assert compare_distance(tokens(1, 67, channels, 65, dtype=dtype), 0.1) <= EXCLUDED


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_distance_of_more_tokens_than_an_integer_holds_signs_of(dtype, small_blocks, monkeypatch):
    """16 blocks of 16 tokens, and a rest."""
    config = Config(dict(BLOCK_M=128, BLOCK_N=16, BLOCK_K=32, BLOCK_C=32), num_warps=4)
    monkeypatch.setattr(triton_kernels, "BACKWARD", {(80, name): [config] for name in ("bf16 long", "any")})
    forward = [Config(dict(BLOCK_N=128, BLOCK_K=32), num_warps=4)]
    monkeypatch.setattr(triton_kernels, "FORWARD", {(80, name): forward for name in ("fp32", "half")})
    assert triton_kernels._blocks(260, config) == 3
    assert compare_distance(tokens(1, 260, 20, 5, dtype=dtype), 0.2) <= 0.2


def test_distance_with_inputs_of_two_dtypes(small_blocks):
    inputs = tokens(1, 20, 24)
    assert compare_distance(inputs | dict(f=inputs["f"].bfloat16()), 0.05) <= EXCLUDED
    assert compare_distance(inputs | dict(z=inputs["z"].half()), 0.05) <= EXCLUDED


@pytest.mark.parametrize("case", ["0", "1", "2", "3"])
@pytest.mark.parametrize("name, loss, margin", [("mcos", cosine, "cos_margin"), ("mdms", distance, "distmat_margin")])
def test_official_values_and_gradients(golden, name, loss, margin, case):
    tensors, metadata = golden("alignment")
    z, f = (tensors[f"{case}.{key}"].flatten(2).mT.contiguous().to(DEVICE) for key in ("z_projected", "vf_feature"))
    z.requires_grad_()
    value = loss(z, f, metadata["cases"][case][margin])
    (gradient,) = torch.autograd.grad(value, z)
    expected = tensors[f"{case}.grad_z.{name}"].flatten(2).mT.to(DEVICE)
    assert value.item() == pytest.approx(tensors[f"{case}.{name}_loss"].item(), rel=1e-5)
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_zero_token_gives_the_gradient_of_the_definition(small_blocks):
    """Below the clamp the norm is a constant, here as in torch."""
    inputs = tokens(1, 18, 20)
    inputs["z"][0, 3] = 0
    z, f = inputs["z"].double().requires_grad_(), inputs["f"].double()
    for op, reference in ((cosine, marginal_cosine_loss_ref), (distance, marginal_distance_matrix_loss_ref)):
        (expected,) = torch.autograd.grad(reference(z, f, 0.1), z)
        leaf = inputs["z"].requires_grad_()
        (gradient,) = torch.autograd.grad(op(leaf, inputs["f"], 0.1), leaf)
        assert torch.allclose(gradient[0, 3].double(), expected[0, 3], rtol=1e-5)


def gradient_of(op, inputs, margin):
    leaf = inputs["z"].clone().requires_grad_()
    value = op(leaf, inputs["f"], margin)
    return value.detach(), torch.autograd.grad(value, leaf)[0]


@pytest.mark.parametrize("op, reference", [(cosine, marginal_cosine_loss_ref), (distance, marginal_distance_matrix_loss_ref)])
@pytest.mark.parametrize("shape", [(1, 37, 1), (2, 1, 1), (3, 1, 20)], ids=str)
def test_one_channel_or_one_token_has_no_gradient(shape, op, reference, small_blocks):
    """One channel: every cosine is 1 or -1. One token: its distance matrix is 0. What comes out as a gradient is rounding."""
    inputs = tokens(*shape)
    value, gradient = gradient_of(op, inputs, 0.3)
    torch.testing.assert_close(value, reference(inputs["z"].double(), inputs["f"].double(), 0.3).float())
    if shape[2] == 1 or op is distance:
        assert (gradient * inputs["z"]).abs().max() <= 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_identical_tokens_and_pairs_exactly_at_the_margin_cost_nothing(dtype, small_blocks):
    inputs = tokens(1, 37, 20, dtype=dtype)
    value, gradient = gradient_of(distance, inputs | dict(f=inputs["z"].clone()), 0.0)
    assert value == 0 and not gradient.any()
    z, f = torch.zeros(1, 37, 4, dtype=dtype, device=DEVICE), torch.zeros(1, 37, 4, dtype=dtype, device=DEVICE)
    z[..., 0] = f[..., 0] = 1
    z[:, 1, 1], f[:, 1] = 2**-13, 1  # cos z = 1 in fp32, cos f = 1 * 1 / (1 * 2) = 0.5
    for margin, free in ((0.5, True), (0.4999, False)):
        value, gradient = gradient_of(distance, dict(z=z, f=f), margin)
        assert bool(value == 0) == free
        assert bool(gradient.any()) != free


@pytest.mark.parametrize("op", [cosine, distance])
@pytest.mark.parametrize("poison", ["z", "f"])
def test_what_is_not_a_number_does_not_pass_unnoticed(op, poison, small_blocks):
    inputs = tokens(1, 37, 20)
    inputs[poison][0, 20, 3] = float("nan")
    assert op(**inputs, margin=0.2).isnan()


def test_project(small_blocks):
    x, q = random_tensor(2, 17, 40, seed=1, device=DEVICE), random_tensor(40, 19, seed=2, device=DEVICE)
    out, norm = triton_kernels.project(x, q)
    torch.testing.assert_close(out, x @ q, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm, x.norm(dim=-1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1), (9, 5), (5, 9), (40, 32), (70, 33)], ids=str)
@pytest.mark.parametrize("change", ["none", "copies", "zeros", "nan"])
def test_factor(shape, change):
    """Of weights of any rank, as the definition has it."""
    weight = random_tensor(*shape, seed=1, device=DEVICE)
    last = weight.shape[1] - 1
    if change == "copies":
        weight[:, last] = weight[:, 0] = 3 * weight[:, last // 2]
    elif change == "zeros":
        weight[:, last // 2] = 0
    elif change == "nan":
        weight[0, last] = float("nan")
    with poisoned_memory():
        L, q = triton_kernels.factor(weight)
    expected, _ = _factor(weight)
    assert torch.equal(L.isnan(), expected.isnan())
    if change != "nan":  # where r exceeds C, pivots are rounding and columns of L differ: not what they stand for
        wide = weight.double()
        torch.testing.assert_close(q @ L.mT, wide, rtol=1e-6, atol=3e-7)
        torch.testing.assert_close(L @ L.mT, wide.mT @ wide, rtol=1e-7, atol=3e-7)


def test_no_buffer_is_as_large_as_a_matrix_of_similarities(small_blocks):
    """Every allocation of forward and backward, traced: far below B * N * N for N well above C."""
    batch, count, channels = 1, 70, 3
    inputs = tokens(batch, count, channels)
    sizes = []

    class Trace(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            sizes.extend(value.nbytes for value in (out if isinstance(out, tuple | list) else [out]) if isinstance(value, torch.Tensor))
            return out

    with Trace():
        loss, *norms = triton_kernels.marginal_distance_matrix_loss_fwd(**inputs, margin=0.1)
        triton_kernels.marginal_distance_matrix_loss_bwd(torch.ones_like(loss), *inputs.values(), *norms, 0.1)
    assert sizes and max(sizes) <= 4 * batch * count * channels


def test_reference_backward_is_the_gradient_of_the_definition():
    inputs = {name: value.double() for name, value in tokens(2, 9, 7).items()}
    z = inputs["z"].requires_grad_()
    (expected,) = torch.autograd.grad(1.7 * marginal_cosine_loss_ref(z, inputs["f"], 0.9), z)
    grad = torch.tensor(1.7, device=DEVICE, dtype=torch.float64)
    torch.testing.assert_close(marginal_cosine_loss_backward_ref(grad, z.detach(), inputs["f"], 0.9), expected)
