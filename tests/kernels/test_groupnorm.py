"""group_norm_silu against statistics taken by hand in fp64."""

import pytest
import torch

from lightningdit_kernels import group_norm_silu
from lightningdit_kernels.testing import assert_matches_truth, random_tensor


def eager(x, weight, bias, num_groups, eps=1e-6):
    groups = x.unflatten(1, (num_groups, -1)).flatten(2)
    centered = groups - groups.mean(-1, keepdim=True)
    normed = (centered / (centered.square().mean(-1, keepdim=True) + eps).sqrt()).reshape(x.shape)
    y = normed * weight[:, None, None] + bias[:, None, None]
    return y * torch.sigmoid(y)


def inputs(shape, num_groups, dtype=torch.float32):
    channels = shape[1]
    affine = dict(weight=1 + random_tensor(channels, dtype=dtype, seed=1) / 4, bias=random_tensor(channels, dtype=dtype, seed=2))
    return dict(x=random_tensor(*shape, dtype=dtype), num_groups=num_groups) | affine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, num_groups", [((2, 64, 8, 8), 32), ((1, 6, 7, 5), 3), ((3, 4, 1, 1), 1), ((0, 4, 2, 2), 2)], ids=str)
def test_matches_truth(shape, num_groups, dtype):
    assert_matches_truth(group_norm_silu, eager, inputs(shape, num_groups, dtype))


def test_channels_last():
    case = inputs((2, 8, 6, 6), 4)
    case["x"] = case["x"].to(memory_format=torch.channels_last)
    assert_matches_truth(group_norm_silu, eager, case)


def test_autocast_gives_the_autocast_dtype_and_fp32_statistics():
    case = inputs((2, 8, 6, 6), 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = group_norm_silu(**case)
    assert torch.equal(inside, group_norm_silu(**case).bfloat16())


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
