"""Attention on packed qkv with 2-D rotary position embedding and optional QK-norm.

B batch, N tokens, H heads, Dh head dimension.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape, result_dtype

BACKENDS = ("auto", "sdpa")


def head_norm_ref(x, weight, bias, eps, center):
    """RMSNorm, or LayerNorm with center=True, over the last dimension of x (..., Dh)."""
    if center:
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def rope_ref(x, positions, freqs):
    """Rotates channel pairs (2i, 2i+1) of x (B, N, H, Dh), in the first half of Dh by row * freqs[i], in the second by column * freqs[i].

    Angles are in the dtype of x, which the caller makes fp32 at least: in bf16 an angle of 100 is off by up to a quarter of a radian.
    """
    angle = (positions.to(x.dtype).unsqueeze(-1) * freqs.to(x.dtype)).flatten(1).unsqueeze(1)  # (N, 1, Dh/2)
    cos, sin = angle.cos(), angle.sin()
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def rope_attention_ref(
    qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, eps=1e-6, center=False
):
    """The definition of rope_attention in plain PyTorch."""
    q, k, v = qkv.unbind(2)  # (B, N, H, Dh) each
    dtype, acc = result_dtype(qkv), accumulation_dtype(qkv)
    if q_weight is not None:
        q = head_norm_ref(q.to(acc), q_weight, q_bias, eps, center)
        k = head_norm_ref(k.to(acc), k_weight, k_bias, eps, center)
    if positions is not None:
        q, k = rope_ref(q.to(acc), positions, freqs), rope_ref(k.to(acc), positions, freqs)
    q, k, v = (a.to(dtype).transpose(1, 2) for a in (q, k, v))
    return nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def rope_attention(
    qkv: Tensor,
    positions: Tensor | None = None,
    freqs: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(q' k'^T / sqrt(Dh)) v per head, non-causal, where q' and k' are q and k after QK-norm, then 2-D RoPE (both in fp32).

    RoPE turns the channel pair (2i, 2i+1) of the first half of Dh by the angle row * freqs[i], of the second half by column * freqs[i].

    Args:
        qkv: (B, N, 3, H, Dh), fp32, bf16, fp16 or fp64: the output of one linear layer, unflattened.
        positions: (N, 2), row and column of every token. None, together with freqs: no RoPE.
        freqs: (Dh/4,), radians per unit of position.
        q_weight, k_weight: (Dh,), QK-norm over Dh: RMSNorm, or LayerNorm with center=True. None, both: no QK-norm.
        q_bias, k_bias: (Dh,), or None, both.
        eps, center: of the QK-norm; without meaning when there is none.
        backend: "sdpa" or "auto".
    Returns: (B, N, H*Dh) in qkv.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError for a shape, dtype, combination or backend other than these.
    Source: RoPE, arXiv:2104.09864; QK-norm, arXiv:2302.05442; axial 2-D form, EVA-02, arXiv:2303.11331.
    """
    op = "rope_attention"
    check_floating(op, qkv=qkv, freqs=freqs, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    if qkv.dim() != 5 or qkv.shape[2] != 3:
        raise ValueError(f"{op}: qkv has shape {tuple(qkv.shape)}, expected (B, N, 3, H, Dh)")
    head_dim = qkv.shape[4]
    if (positions is None) != (freqs is None):
        raise ValueError(f"{op}: {'positions' if positions is None else 'freqs'} is None, expected both positions and freqs, or neither")
    if positions is not None:
        if head_dim % 4:
            raise ValueError(f"{op}: qkv has head dimension {head_dim}, expected a multiple of 4 for 2-D RoPE")
        if positions.device != qkv.device:
            raise ValueError(f"{op}: positions is on {positions.device}, expected {qkv.device} like qkv")
        check_shape(op, (qkv.shape[1], 2), "(N, 2) of qkv", positions=positions)
        check_shape(op, (head_dim // 4,), "(Dh/4,) of qkv", freqs=freqs)
    if (q_weight is None) != (k_weight is None):
        raise ValueError(f"{op}: {'q_weight' if q_weight is None else 'k_weight'} is None, expected both q_weight and k_weight, or neither")
    if (q_bias is None) != (k_bias is None):
        raise ValueError(f"{op}: {'q_bias' if q_bias is None else 'k_bias'} is None, expected both q_bias and k_bias, or neither")
    if q_bias is not None and q_weight is None:
        raise ValueError(f"{op}: q_bias is given without q_weight, expected a bias only together with a weight")
    check_shape(op, (head_dim,), "(Dh,) of qkv", q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    return rope_attention_ref(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, eps, center)
