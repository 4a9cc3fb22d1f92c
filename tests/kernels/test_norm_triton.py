"""The Triton norm kernels in triton's interpreter (on CUDA where there is a device): values, gradients, sums, and what they compile for."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lightningdit_kernels import norm_triton
from lightningdit_kernels.norm import gated_residual_rms_norm_modulate_ref, norm_backward_ref, norm_forward_ref
from lightningdit_kernels.testing import assert_matches_truth, poisoned_memory, random_tensor

pytestmark = pytest.mark.usefixtures("few_programs_of_sums")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Norm(torch.autograd.Function):
    """The launchers as one differentiable function of all inputs."""

    @staticmethod
    def forward(ctx, x, y, gate, scale, shift, weight, bias, center):
        residual, h, mean, rstd = norm_triton.norm_fwd(x, y, gate, scale, shift, weight, bias, 1e-6, center, x.dtype)
        ctx.save_for_backward(x if y is None else residual, y, gate, scale, shift, weight, bias, mean, rstd)
        return residual, h

    @staticmethod
    def backward(ctx, grad_residual, grad_h):
        residual, y, gate, scale, shift, weight, bias, mean, rstd = ctx.saved_tensors
        branch_dtype, shift_dtype = (None if t is None else t.dtype for t in (y, shift))
        y = None if gate is None else y
        saved = residual, y, gate, scale, weight, bias, mean, rstd
        return *norm_triton.norm_bwd(grad_residual, grad_h, *saved, branch_dtype, shift_dtype), None


def ours(x, scale, y=None, gate=None, shift=None, weight=None, bias=None, center=False):
    residual, h = Norm.apply(x, y, gate, scale, shift, weight, bias, center)
    return h if y is None else (residual, h)


def eager(x, scale, y=None, gate=None, shift=None, weight=None, bias=None, center=False):
    residual, h, _, _ = norm_forward_ref(x, y, gate, scale, shift, weight, bias, 1e-6, center, x.dtype)
    return h if y is None else (residual, h)


def inputs_of(shape, dtype=torch.float32, given=("y", "gate", "shift", "weight", "bias"), **more):
    B, N, D = shape
    shapes = dict(x=shape, scale=(B, D), y=shape, gate=(B, D), shift=(B, D), weight=(D,), bias=(D,))
    names = [name for name in shapes if name in ("x", "scale") or name in given]
    return {name: random_tensor(*shapes[name], dtype=dtype, seed=seed, device=DEVICE) for seed, name in enumerate(names, 1)} | more


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
@pytest.mark.parametrize("shape", [(1, 18, 97), (2, 1, 384)], ids=str)
def test_matches_truth(shape, center, dtype):
    assert_matches_truth(ours, eager, inputs_of(shape, dtype, center=center))


@pytest.mark.parametrize("shape", [(1, 2, 1152), (3, 1, 16), (1, 1, 1), (2, 5, 3), (1, 33, 24), (0, 4, 8), (2, 0, 8)], ids=str)
def test_shapes(shape):
    assert_matches_truth(ours, eager, inputs_of(shape))


@pytest.mark.parametrize("given", [(), ("shift",), ("weight",), ("y",), ("y", "gate"), ("y", "shift", "weight"), ("y", "bias")], ids=str)
def test_variants(given):
    assert_matches_truth(ours, eager, inputs_of((2, 5, 40), given=given))
    assert_matches_truth(ours, eager, inputs_of((2, 5, 40), given=given, center=True))


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_the_next_row_is_loaded_ahead(center):
    """A bf16 stream from 512 columns on; chunks of 16 tokens and of 2."""
    shape = (1, 18, 520)
    assert norm_triton._backward_class(shape[2], torch.bfloat16, True) == "512 16-bit stream"
    assert_matches_truth(ours, eager, inputs_of(shape, torch.bfloat16, center=center))


def test_strided_inputs():
    inputs = inputs_of((2, 5, 24))
    inputs["scale"], inputs["shift"], inputs["gate"] = random_tensor(2, 72, seed=9, device=DEVICE).chunk(3, dim=1)
    inputs["x"] = random_tensor(5, 2, 24, device=DEVICE).transpose(0, 1)
    assert_matches_truth(ours, eager, inputs)


def test_fp32_residual_with_bf16_branch():
    """The training case, against the backward in fp64, and the dtypes of all results."""
    bf16, shape = torch.bfloat16, (2, 18, 40)
    x, y, grad_residual = (random_tensor(*shape, dtype=dtype, seed=seed) for seed, dtype in enumerate((torch.float32, bf16, torch.float32)))
    gate, scale, shift = (random_tensor(2, 40, dtype=bf16, seed=seed) for seed in (4, 5, 6))
    weight, bias, grad_h = random_tensor(40, seed=7), random_tensor(40, seed=9), random_tensor(*shape, dtype=bf16, seed=8)
    tensors = [t.to(DEVICE) for t in (x, y, gate, scale, shift, weight, bias)]
    with poisoned_memory():
        residual, h, mean, rstd = norm_triton.norm_fwd(*tensors, 1e-6, False, bf16)
    assert (residual.dtype, h.dtype, mean, rstd.dtype) == (torch.float32, bf16, None, torch.float32)
    saved = [grad_residual, grad_h, residual.cpu(), y, gate, scale, weight, bias, mean, rstd.cpu()]
    truth = norm_backward_ref(*(t if t is None else t.double() for t in saved), torch.float64, torch.float64)
    on_device = [t if t is None else t.to(DEVICE) for t in saved]
    with poisoned_memory():
        results = norm_triton.norm_bwd(*on_device, bf16, bf16)
    again = norm_triton.norm_bwd(*on_device, bf16, bf16)
    assert [r.dtype for r in results] == [torch.float32, bf16, bf16, bf16, bf16, torch.float32, torch.float32]
    for result, second, true in zip(results, again, truth, strict=True):
        assert torch.equal(result, second)
        units = 1 if result.dtype == bf16 else 16  # one rounding to bf16; sums of 36 numbers in fp32
        assert (result.cpu().double() - true).abs().max() <= units * torch.finfo(result.dtype).eps * true.abs().max()


def test_final_layer_without_gradient_to_the_residual():
    inputs = inputs_of((2, 5, 24))
    assert_matches_truth(lambda **k: ours(**k)[1], lambda **k: gated_residual_rms_norm_modulate_ref(**k)[1], inputs)
    names = "x", "y", "gate", "scale", "shift", "weight", "bias"
    x, y, gate, scale, shift, weight, bias = (inputs[name] for name in names)
    residual, _, _, rstd = norm_triton.norm_fwd(x, y, gate, scale, shift, weight, bias, 1e-6, False, torch.float32)
    grad_h = random_tensor(2, 5, 24, seed=9, device=DEVICE)
    rest = residual, y, gate, scale, weight, bias, None, rstd, torch.float32, torch.float32
    zeros = torch.zeros_like(residual)
    for without, with_zeros in zip(norm_triton.norm_bwd(None, grad_h, *rest), norm_triton.norm_bwd(zeros, grad_h, *rest), strict=True):
        assert without is with_zeros is None or torch.equal(without, with_zeros)


PIECES = [(1152, (1024, 128)), (768, (512, 256)), (384, (256, 128)), (97, (64, 64)), (64, (64,)), (1, (16,))]


@pytest.mark.parametrize("width, expected", PIECES)
def test_pieces(width, expected):
    assert norm_triton.pieces(width) == expected


def test_every_width_has_a_configuration_and_little_waste():
    from lightningdit_kernels.norm import TRITON_MAX_WIDTH

    for width in range(1, TRITON_MAX_WIDTH + 1):
        pieces = norm_triton.pieces(width)
        assert (80, str(pieces[0])) in norm_triton.CONFIGS and width <= sum(pieces)
        for stream in (torch.float32, torch.bfloat16):
            assert (80, norm_triton._backward_class(width, stream, True)) in norm_triton.BACKWARD
        assert sum(pieces) <= 4 / 3 * width or width < 64


def test_audit_cases_name_every_argument():
    for case in norm_triton.audit_cases():
        assert case["signature"].keys() | case["constexprs"].keys() == set(case["kernel"].arg_names), case["name"]
        assert set(case["divisible"]) <= case["signature"].keys()
