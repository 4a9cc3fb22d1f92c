"""rms_norm_modulate and gated_residual_rms_norm_modulate against torch's own norms in fp64."""

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import gated_residual_rms_norm_modulate, rms_norm_modulate
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 16, 192), (3, 63, 100), (1, 1, 3), (2, 0, 8), (0, 4, 8)]


def eager_norm(x, scale, shift=None, weight=None, eps=1e-6, center=False):
    width = x.shape[-1:]
    normed = nnf.layer_norm(x, width, weight, None, eps) if center else nnf.rms_norm(x, width, weight, eps)
    return normed * (1 + scale[:, None]) + (0 if shift is None else shift[:, None])


def eager_residual(x, y, gate, scale, **rest):
    x = x + (y if gate is None else gate[:, None] * y).to(x.dtype)
    return x, eager_norm(x, scale, **rest)


def norm_inputs(shape, dtype, shift=True, weight=True):
    batch, _, width = shape
    inputs = dict(x=random_tensor(*shape, dtype=dtype, seed=1), scale=random_tensor(batch, width, dtype=dtype, seed=2))
    if shift:
        inputs["shift"] = random_tensor(batch, width, dtype=dtype, seed=3)
    if weight:
        inputs["weight"] = 1 + random_tensor(width, dtype=dtype, seed=4) / 4
    return inputs


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_norm_matches_truth(shape, dtype, center):
    assert_matches_truth(rms_norm_modulate, eager_norm, norm_inputs(shape, dtype) | dict(center=center, eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_gated_residual_matches_truth(shape, dtype, center):
    more = dict(y=random_tensor(*shape, dtype=dtype, seed=5), gate=random_tensor(shape[0], shape[2], dtype=dtype, seed=6), center=center)
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, norm_inputs(shape, dtype) | more)


def test_width_one():
    """Only the RMS: of a single centred number nothing is left, and its gradient is rounding noise times 1/sqrt(eps)."""
    inputs = norm_inputs((1, 1, 1), torch.float32)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs | dict(y=torch.ones(1, 1, 1), gate=None))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("gate", [False, True])
def test_optional_arguments(shift, weight, gate):
    inputs = norm_inputs((2, 7, 36), torch.float32, shift, weight)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    inputs |= dict(y=random_tensor(2, 7, 36, seed=5), gate=random_tensor(2, 36, seed=6) if gate else None)
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs)


def test_non_contiguous_and_broadcast():
    inputs = norm_inputs((2, 6, 10), torch.float32)
    inputs["x"] = random_tensor(6, 2, 10).transpose(0, 1)
    inputs["scale"], inputs["shift"] = random_tensor(2, 20).chunk(2, dim=1)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    inputs |= dict(y=random_tensor(2, 10, 6, seed=5).mT, gate=random_tensor(1, 10).expand(2, 10))
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs)


def test_fp32_residual_with_bf16_branch():
    inputs = norm_inputs((2, 16, 48), torch.float32) | dict(y=random_tensor(2, 16, 48, dtype=torch.bfloat16, seed=5))
    inputs |= dict(gate=random_tensor(2, 48, dtype=torch.bfloat16, seed=6))

    def eager(y, gate, **rest):
        return eager_residual(y=y.to(gate.dtype) if y.dtype == torch.float64 else y.float(), gate=gate.to(rest["x"].dtype), **rest)

    assert_matches_truth(gated_residual_rms_norm_modulate, eager, inputs)
    residual, h = gated_residual_rms_norm_modulate(**inputs)
    assert residual.dtype == h.dtype == torch.float32


def test_output_dtype_follows_autocast_and_argument():
    inputs = norm_inputs((2, 4, 8), torch.float32)
    exact = rms_norm_modulate(**inputs)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rms_norm_modulate(**inputs)
        residual, h = gated_residual_rms_norm_modulate(inputs.pop("x"), exact, None, **inputs)
    assert inside.dtype == h.dtype == torch.bfloat16 and residual.dtype == torch.float32
    assert torch.equal(inside, exact.bfloat16())
    assert torch.equal(rms_norm_modulate(residual, **inputs, out_dtype=torch.float16), rms_norm_modulate(residual, **inputs).half())


@pytest.mark.parametrize("center", [False, True])
def test_gradcheck(center):
    x, scale, shift, weight = (a.requires_grad_() for a in norm_inputs((2, 3, 5), torch.float64).values())
    y, gate = random_tensor(2, 3, 5, dtype=torch.float64).requires_grad_(), random_tensor(2, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: gated_residual_rms_norm_modulate(*a, center=center), (x, y, gate, scale, shift, weight))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(4, 8)), r"x has shape \(4, 8\), expected \(B, N, D\)"),
        (dict(scale=torch.zeros(2, 9)), r"scale has shape \(2, 9\), expected \(2, 8\)"),
        (dict(shift=torch.zeros(1, 8)), r"shift has shape \(1, 8\), expected \(2, 8\)"),
        (dict(weight=torch.zeros(7)), r"weight has shape \(7,\), expected \(8,\)"),
        (dict(x=torch.zeros(2, 4, 8, dtype=torch.int64)), "x has dtype torch.int64"),
        (dict(scale=torch.zeros(2, 8, device="meta")), "scale is on meta, expected cpu"),
        (dict(y=torch.zeros(2, 4, 9)), r"y has shape \(2, 4, 9\), expected \(2, 4, 8\)"),
        (dict(gate=torch.zeros(8)), r"gate has shape \(8,\), expected \(2, 8\)"),
    ],
)
def test_bad_input(change, message):
    inputs = norm_inputs((2, 4, 8), torch.float32)
    if not change.keys() & {"y", "gate"}:
        with pytest.raises(ValueError, match=message):
            rms_norm_modulate(**inputs | change)
    with pytest.raises(ValueError, match=message):
        gated_residual_rms_norm_modulate(**dict(y=torch.zeros(2, 4, 8), gate=None) | inputs | change)
