"""group_norm_silu against statistics taken by hand in fp64."""

import pytest
import torch

from lightningdit_kernels import group_norm_silu, native
from lightningdit_kernels.groupnorm import group_norm_silu_backward_ref, group_norm_silu_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor, values_and_gradients


def eager(x, weight, bias, num_groups, eps=1e-6):
    groups = x.unflatten(1, (num_groups, -1)).flatten(2)
    centered = groups - groups.mean(-1, keepdim=True)
    normed = (centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = normed * weight[:, None, None] + bias[:, None, None]
    return y * torch.sigmoid(y)


LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])


def inputs(shape, num_groups, dtype=torch.float32):
    channels = shape[1]
    affine = dict(weight=1 + random_tensor(channels, dtype=dtype, seed=1) / 4, bias=random_tensor(channels, dtype=dtype, seed=2))
    return dict(x=random_tensor(*shape, dtype=dtype), num_groups=num_groups) | affine


@LAYOUTS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, num_groups", [((2, 64, 13, 8), 32), ((1, 6, 7, 5), 3), ((3, 4, 1, 1), 1), ((0, 4, 2, 2), 2)], ids=str)
def test_matches_truth(shape, num_groups, dtype, layout, backend):
    case = inputs(shape, num_groups, dtype)
    case["x"] = case["x"].to(memory_format=layout)
    assert_matches_truth(group_norm_silu, eager, case)


@LAYOUTS
def test_the_memory_format_is_kept(layout, backend):
    case = inputs((2, 8, 6, 5), 4)
    x = case["x"].to(memory_format=layout).requires_grad_()
    out = group_norm_silu(**case | dict(x=x))
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert out.is_contiguous(memory_format=layout) and grad.is_contiguous(memory_format=layout)


def test_other_strides_are_made_contiguous(backend):
    case = inputs((4, 8, 6, 10), 4)
    case["x"] = case["x"][::2, :, 1:, ::2]
    assert_matches_truth(group_norm_silu, eager, case)
    assert group_norm_silu(**case).is_contiguous()


@LAYOUTS
def test_a_large_mean_does_not_cancel(layout, backend):
    """At a mean of 1000 standard deviations sum(x^2) - sum(x)^2 / n would lose every digit of the variance. What remains is the rounding
    of the mean to fp32, 3e-5 of a standard deviation, and at each place in the formulas where it enters.
    """
    if backend == "reference":
        pytest.skip("PyTorch's channels-last GroupNorm on CPU does lose them (torch 2.11)")
    case = inputs((1, 8, 20, 9), 2)
    case["x"] = (1000 + case["x"]).to(memory_format=layout)
    values = values_and_gradients(group_norm_silu, case)
    doubled = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    for name, true in values_and_gradients(eager, doubled).items():
        assert (values[name] - true).abs().max() <= 2e-4 * true.abs().max(), name


@LAYOUTS
@pytest.mark.skipif(not native.available, reason=native.about)
def test_threads_do_not_change_the_result(layout):
    case = inputs((4, 32, 40, 40), 8)
    x = case["x"].to(memory_format=layout).requires_grad_()
    weight, bias = case["weight"].requires_grad_(), case["bias"].requires_grad_()
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        out = group_norm_silu(x, weight, bias, 8)
        results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight, bias))))
    torch.set_num_threads(before)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(other[:2], results[0][:2], strict=True))


def test_opcheck_of_channels_last(kernels_or_reference):
    case = inputs((2, 4, 3, 5), 2)
    x = case["x"].to(memory_format=torch.channels_last)
    weight, bias = case["weight"], case["bias"]
    operators = torch.ops.lightningdit
    tensors = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    torch.library.opcheck(operators.group_norm_silu, (*tensors, 2, 1e-6, torch.float32))
    out, mean, rstd = operators.group_norm_silu(x, weight, bias, 2, 1e-6, torch.float32)
    torch.library.opcheck(operators.group_norm_silu_backward, (out, x, weight, bias, mean, rstd, 2))


def test_backward_reference_is_the_gradient_of_the_definition():
    case = inputs((2, 6, 3, 5), 3, torch.float64)
    tensors = [case[name].requires_grad_() for name in ("x", "weight", "bias")]
    grad = random_tensor(2, 6, 3, 5, dtype=torch.float64, seed=3)
    expected = torch.autograd.grad(group_norm_silu_ref(*tensors, 3), tensors, grad)
    x, weight, bias = (tensor.detach() for tensor in tensors)
    _, mean, rstd = torch.ops.lightningdit.group_norm_silu(x, weight, bias, 3, 1e-6, torch.float64)
    torch.testing.assert_close(group_norm_silu_backward_ref(grad, x, weight, bias, mean, rstd, 3), expected)


def test_autocast_gives_the_autocast_dtype_and_fp32_statistics():
    case = inputs((2, 8, 6, 6), 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = group_norm_silu(**case)
    assert torch.equal(inside, group_norm_silu(**case).bfloat16())
    assert inside.dtype == torch.bfloat16


def test_gradcheck():
    case = inputs((2, 4, 2, 3), 2, torch.float64)
    tensors = [case[name].requires_grad_() for name in ("x", "weight", "bias")]
    assert torch.autograd.gradcheck(lambda x, weight, bias: group_norm_silu(x, weight, bias, 2), tensors)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(num_groups=3), "num_groups is 3, expected a divisor of the 4 channels"),
        (dict(num_groups=0), "num_groups is 0"),
        (dict(x=torch.zeros(2, 4, 3)), r"x has shape \(2, 4, 3\), expected \(B, C, H, W\)"),
        (dict(weight=torch.zeros(5)), r"weight has shape \(5,\), expected \(4,\)"),
        (dict(bias=torch.zeros(4, dtype=torch.int32)), "bias has dtype torch.int32"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        group_norm_silu(**inputs((1, 4, 2, 2), 2) | change)
