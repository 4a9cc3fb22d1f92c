"""GroupNorm followed by SiLU, the pair before every convolution of the autoencoder. B batch, C channels, H x W pixels."""

import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape, result_dtype


def group_norm_silu_ref(x, weight, bias, num_groups, eps=1e-6):
    """The definition of group_norm_silu in plain PyTorch."""
    acc = accumulation_dtype(x)
    return nnf.silu(nnf.group_norm(x.to(acc), num_groups, weight.to(acc), bias.to(acc), eps)).to(result_dtype(x))


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """silu(group_norm(x) * weight + bias), statistics over the channels of a group and all pixels, in fp32.

    Args:
        x: (B, C, H, W), fp32, bf16, fp16 or fp64, contiguous or channels-last.
        weight, bias: (C,).
        num_groups: divides C.
    Returns: (B, C, H, W) in x.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError for a shape, dtype or number of groups other than these.
    Source: GroupNorm, arXiv:1803.08494; SiLU, arXiv:1702.03118.
    """
    op = "group_norm_silu"
    check_floating(op, x=x, weight=weight, bias=bias)
    if x.dim() != 4:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (B, C, H, W)")
    channels = x.shape[1]
    if num_groups < 1 or channels % num_groups:
        raise ValueError(f"{op}: num_groups is {num_groups}, expected a divisor of the {channels} channels of x")
    check_shape(op, (channels,), "(C,) of x", weight=weight, bias=bias)
    return group_norm_silu_ref(x, weight, bias, num_groups, eps)
