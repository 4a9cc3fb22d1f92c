"""RMSNorm (or LayerNorm statistics) with adaLN modulation, and the same fused with the gated residual before it.

B batch, N tokens, D width.
"""

import torch
from torch import Tensor

from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape, result_dtype


def rms_norm_modulate_ref(x, scale, shift=None, weight=None, eps=1e-6, center=False, out_dtype=None):
    """The definition of rms_norm_modulate in plain PyTorch."""
    acc = accumulation_dtype(x)
    x_hat = x.to(acc)
    if center:
        x_hat = x_hat - x_hat.mean(-1, keepdim=True)
    x_hat = x_hat * torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    if weight is not None:
        x_hat = x_hat * weight.to(acc)
    h = x_hat * (1 + scale.to(acc)).unsqueeze(1)
    if shift is not None:
        h = h + shift.to(acc).unsqueeze(1)
    return h.to(result_dtype(x) if out_dtype is None else out_dtype)


def gated_residual_rms_norm_modulate_ref(x, y, gate, scale, shift=None, weight=None, eps=1e-6, center=False, out_dtype=None):
    """The definition of gated_residual_rms_norm_modulate in plain PyTorch."""
    acc = accumulation_dtype(x)
    branch = y.to(acc) if gate is None else gate.to(acc).unsqueeze(1) * y.to(acc)
    x = (x.to(acc) + branch).to(x.dtype)
    return x, rms_norm_modulate_ref(x, scale, shift, weight, eps, center, out_dtype)


def rms_norm_modulate(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """h = x / rms(x) * weight * (1 + scale) + shift, with rms(x) = sqrt(mean(x^2) + eps) over D, accumulated in fp32.

    Args:
        x: (B, N, D), fp32, bf16, fp16 or fp64.
        scale, shift: (B, D), broadcast over N. shift=None means no shift.
        weight: (D,), or None for 1.
        center: subtract the row mean first, which makes the statistics those of LayerNorm.
        out_dtype: dtype of h. Default: x.dtype, or the autocast dtype inside torch.autocast.
    Returns: h (B, N, D).
    Raises: ValueError for a shape or dtype other than these.
    Source: RMSNorm, arXiv:1910.07467; LayerNorm, arXiv:1607.06450; modulation (adaLN), DiT, arXiv:2212.09748.
    """
    _check("rms_norm_modulate", x, scale, shift, weight)
    return rms_norm_modulate_ref(x, scale, shift, weight, eps, center, out_dtype)


def gated_residual_rms_norm_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    scale: Tensor,
    shift: Tensor | None = None,
    weight: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * y, then h = rms_norm_modulate(x', scale, shift, weight, eps, center, out_dtype).

    Args:
        x: (B, N, D), the residual stream, fp32, bf16, fp16 or fp64.
        y: (B, N, D), the output of the branch before; its dtype may differ from x's.
        gate: (B, D), broadcast over N, or None for 1.
        scale, shift, weight, eps, center, out_dtype: as in rms_norm_modulate.
    Returns: x' (B, N, D) in x.dtype, and h (B, N, D).
    Raises: ValueError for a shape or dtype other than these.
    Source: adaLN-Zero, DiT, arXiv:2212.09748; RMSNorm, arXiv:1910.07467.
    """
    op = "gated_residual_rms_norm_modulate"
    _check(op, x, scale, shift, weight)
    check_floating(op, x=x, y=y, gate=gate)
    check_shape(op, tuple(x.shape), "the shape of x", y=y)
    check_shape(op, (x.shape[0], x.shape[2]), "(B, D) of x", gate=gate)
    return gated_residual_rms_norm_modulate_ref(x, y, gate, scale, shift, weight, eps, center, out_dtype)


def _check(op, x, scale, shift, weight):
    check_floating(op, x=x, scale=scale, shift=shift, weight=weight)
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (B, N, D)")
    check_shape(op, (x.shape[0], x.shape[2]), "(B, D) of x", scale=scale, shift=shift)
    check_shape(op, (x.shape[2],), "(D,) of x", weight=weight)
