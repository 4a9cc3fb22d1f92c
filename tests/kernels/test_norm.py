"""rms_norm_modulate and gated_residual_rms_norm_modulate against torch's own norms in fp64."""

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import gated_residual_rms_norm_modulate, native, rms_norm_modulate
from lightningdit_kernels.norm import norm_backward_ref, norm_forward_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

OPERATORS = torch.ops.lightningdit
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(2, 16, 192), (3, 63, 100), (1, 1, 3), (2, 0, 8), (0, 4, 8)]


def eager_norm(x, scale, shift=None, weight=None, eps=1e-6, center=False):
    width = x.shape[-1:]
    normed = nnf.layer_norm(x, width, weight, None, eps) if center else nnf.rms_norm(x, width, weight, eps)
    return normed * (1 + scale[:, None]) + (0 if shift is None else shift[:, None])


def eager_residual(x, y, gate, scale, bias=None, **rest):
    y = y if bias is None else y + bias
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
def test_norm_matches_truth(shape, dtype, center, backend):
    assert_matches_truth(rms_norm_modulate, eager_norm, norm_inputs(shape, dtype) | dict(center=center, eps=1e-5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_gated_residual_matches_truth(shape, dtype, center, backend):
    more = dict(y=random_tensor(*shape, dtype=dtype, seed=5), gate=random_tensor(shape[0], shape[2], dtype=dtype, seed=6), center=center)
    more |= dict(bias=random_tensor(shape[2], dtype=dtype, seed=7))
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, norm_inputs(shape, dtype) | more)


def test_width_one(backend):
    """Only the RMS: of a single centred number nothing is left, and its gradient is rounding noise times 1/sqrt(eps)."""
    inputs = norm_inputs((1, 1, 1), torch.float32)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs | dict(y=torch.ones(1, 1, 1), gate=None))


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("weight", [False, True])
@pytest.mark.parametrize("gate", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_optional_arguments(shift, weight, gate, bias, backend):
    inputs = norm_inputs((2, 7, 36), torch.float32, shift, weight)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    inputs |= dict(y=random_tensor(2, 7, 36, seed=5), gate=random_tensor(2, 36, seed=6) if gate else None)
    inputs |= dict(bias=random_tensor(36, seed=7) if bias else None)
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs)


def test_non_contiguous_and_broadcast(backend):
    inputs = norm_inputs((2, 6, 10), torch.float32)
    inputs["x"] = random_tensor(6, 2, 10).transpose(0, 1)
    inputs["scale"], inputs["shift"] = random_tensor(2, 20).chunk(2, dim=1)
    assert_matches_truth(rms_norm_modulate, eager_norm, inputs)
    inputs |= dict(y=random_tensor(2, 10, 6, seed=5).mT, gate=random_tensor(1, 10).expand(2, 10))
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs)


def test_fp32_residual_with_bf16_branch(backend):
    inputs = norm_inputs((2, 16, 48), torch.float32) | dict(y=random_tensor(2, 16, 48, dtype=torch.bfloat16, seed=5))
    inputs |= dict(gate=random_tensor(2, 48, dtype=torch.bfloat16, seed=6), bias=random_tensor(48, seed=7))

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
    y, gate, bias = (random_tensor(*size, dtype=torch.float64).requires_grad_() for size in ((2, 3, 5), (2, 5), (5,)))

    def function(*tensors):
        return gated_residual_rms_norm_modulate(*tensors[:-1], center=center, bias=tensors[-1])

    assert torch.autograd.gradcheck(function, (x, y, gate, scale, shift, weight, bias))


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
        (dict(bias=torch.zeros(2, 8)), r"bias has shape \(2, 8\), expected \(8,\)"),
    ],
)
def test_bad_input(change, message):
    inputs = norm_inputs((2, 4, 8), torch.float32)
    if not change.keys() & {"y", "gate", "bias"}:
        with pytest.raises(ValueError, match=message):
            rms_norm_modulate(**inputs | change)
    with pytest.raises(ValueError, match=message):
        gated_residual_rms_norm_modulate(**dict(y=torch.zeros(2, 4, 8), gate=None) | inputs | change)


def gated_arguments(dtype=torch.float32, shape=(2, 5, 12), center=False, out_dtype=torch.float32):
    """Positional arguments of the operator, all tensors given."""
    inputs = norm_inputs(shape, dtype)
    y, gate = random_tensor(*shape, dtype=dtype, seed=5), random_tensor(shape[0], shape[2], dtype=dtype, seed=6)
    bias = random_tensor(shape[2], dtype=dtype, seed=7)
    tensors = (inputs["x"], y, gate, inputs["scale"], inputs["shift"], inputs["weight"], bias)
    return *(t.requires_grad_() for t in tensors), 1e-6, center, out_dtype


def test_opcheck_of_a_backward_that_is_asked_for_less(kernels_or_reference):
    x, y, gate, scale, shift, weight, bias, *rest = (t.detach() if isinstance(t, torch.Tensor) else t for t in gated_arguments())
    _, h, *statistics = OPERATORS.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, weight, bias, *rest)
    backward = OPERATORS.gated_residual_rms_norm_modulate_backward
    torch.library.opcheck(backward, (None, h, x, None, gate, scale, None, bias, *statistics, False, None, None))
    torch.library.opcheck(backward, (None, h, x, None, gate, scale, None, None, *statistics, False, None, None))


@pytest.mark.parametrize("center", [False, True], ids=["rms", "layer"])
def test_backward_reference_is_the_gradient_of_the_reference(center):
    x, y, gate, scale, shift, weight, bias, *_ = leaves = gated_arguments(torch.float64)
    residual, h, mean, rstd = norm_forward_ref(*leaves[:7], 1e-6, center, torch.float64)
    grads = torch.randn_like(residual), torch.randn_like(h)
    expected = torch.autograd.grad((residual, h), leaves[:7], grads)
    saved = (None if t is None else t.detach() for t in (residual, y, gate, scale, weight, bias, mean, rstd))
    for want, have in zip(expected, norm_backward_ref(*grads, *saved, torch.float64, torch.float64), strict=True):
        torch.testing.assert_close(have, want)


@pytest.mark.parametrize("needed", [("bias",), ("bias", "gate"), ("y",), ("gate",)], ids=str)
def test_only_some_gradients_are_asked_for(needed, backend):
    """What is frozen changes what the kernel computes, not what it gives for the rest."""
    inputs = norm_inputs((2, 40, 12), torch.float32)
    inputs |= dict(y=random_tensor(2, 40, 12, seed=5), gate=random_tensor(2, 12, seed=6), bias=random_tensor(12, seed=7))
    assert_matches_truth(gated_residual_rms_norm_modulate, eager_residual, inputs, frozen=tuple(inputs.keys() - set(needed)))


def test_a_bias_is_added_before_rounding(backend):
    """y in bf16 and its bias in fp32: their sum is not rounded to bf16, as a linear layer under autocast would."""
    x, y, bias = torch.zeros(1, 1, 4), torch.full((1, 1, 4), 256.0, dtype=torch.bfloat16), torch.full((4,), 0.25)
    residual, _ = gated_residual_rms_norm_modulate(x, y, None, torch.zeros(1, 4), bias=bias)
    assert torch.equal(residual, torch.full_like(x, 256.25))


@pytest.mark.skipif(not native.available, reason=native.about)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_the_result(dtype):
    *inputs, bias = gated_arguments(dtype, (3, 70, 1152))[:7]
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs = gated_residual_rms_norm_modulate(*inputs, bias=bias)
        results.append((*outputs, *torch.autograd.grad(outputs, (*inputs, bias), outputs)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("unused", [0, 1])
def test_an_output_that_is_not_used_has_no_gradient(unused, kernels_or_reference):
    inputs, expected_inputs = gated_arguments()[:6], gated_arguments()[:6]
    used = 1 - unused
    output = gated_residual_rms_norm_modulate(*inputs)[used]
    eager = eager_residual(*expected_inputs[:4], shift=expected_inputs[4], weight=expected_inputs[5])[used]
    got = torch.autograd.grad(output.square().sum(), inputs, materialize_grads=True)
    expected = torch.autograd.grad(eager.square().sum(), expected_inputs, materialize_grads=True)
    for have, want in zip(got, expected, strict=True):
        torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
