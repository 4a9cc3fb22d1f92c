"""Attention on packed qkv with 2-D rotary position embedding and optional QK-norm.

B batch, N tokens, H heads, Dh head dimension. q' and k' are q and k after QK-norm and rotation: what attention compares.
"""

import importlib
import math

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels.library import LIBRARY, accumulation_dtype, check_floating, check_shape, define, differentiable, result_dtype

BACKENDS = ("auto", "triton", "sdpa", "flash_attn", "xformers")

# What "auto" chooses on CUDA for bf16 and fp16: (compute capability, N, Dh) -> the backend that won forward + backward in
# bench_attention.py. Empty: not yet measured on a GPU. What has no row here is served by "sdpa".
MEASURED: dict[tuple[tuple[int, int], int, int], str] = {}


def head_norm_ref(x, weight, bias, eps, center):
    """RMSNorm, or LayerNorm with center=True, over the last dimension of x (..., Dh)."""
    x, _ = _standardise(x, eps, center)
    x = x * weight.to(x.dtype)
    return x if bias is None else x + bias.to(x.dtype)


def _standardise(x, eps, center):
    if center:
        x = x - x.mean(-1, keepdim=True)
    rstd = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return x * rstd, rstd


def rope_table(positions, freqs, dtype):
    """cos and sin of every angle, (N, Dh/2, 2), from angles in fp32 at least: in bf16 100 is off by up to a quarter of a radian."""
    acc = torch.float64 if dtype == torch.float64 else torch.float32
    angle = (positions.to(acc).unsqueeze(-1) * freqs.to(acc)).flatten(1)
    return torch.stack((angle.cos(), angle.sin()), dim=-1).to(dtype)


def rotate_ref(x, table, sign=1):
    """Turns channel pairs (2i, 2i+1) of x (B, N, H, Dh) by sign times the i-th angle of their token."""
    cos, sin = table.to(x.dtype).unsqueeze(1).unbind(-1)  # (N, 1, Dh/2) each
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack((even * cos - sign * odd * sin, sign * even * sin + odd * cos), dim=-1).flatten(-2)


def rope_ref(x, positions, freqs):
    """Rotates x (B, N, H, Dh), the first half of Dh by row * freqs[i], the second by column * freqs[i]."""
    return rotate_ref(x, rope_table(positions, freqs, x.dtype))


def queries_and_keys_ref(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center):
    """q' and k' (B, N, H, Dh): in fp32 where there is something to do, else q and k as they are."""
    q, k = qkv[:, :, 0], qkv[:, :, 1]
    acc = accumulation_dtype(qkv)
    if q_weight is not None:
        q = head_norm_ref(q.to(acc), q_weight, q_bias, eps, center)
        k = head_norm_ref(k.to(acc), k_weight, k_bias, eps, center)
    if table is not None:
        q, k = rotate_ref(q.to(acc), table), rotate_ref(k.to(acc), table)
    return q, k


def rope_attention_ref(
    qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, eps=1e-6, center=False, attend=None
):
    """The definition of rope_attention in plain PyTorch. attend(q, k, v), (B, N, H, Dh) each: the attention, by default PyTorch's."""
    dtype = result_dtype(qkv)
    table = None if positions is None else rope_table(positions, freqs, accumulation_dtype(qkv))
    q, k = queries_and_keys_ref(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center)
    return (attend or _sdpa)(q.to(dtype), k.to(dtype), qkv[:, :, 2].to(dtype)).flatten(2)


def _sdpa(q, k, v):
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_forward_ref(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype):
    """out (B, N, H*Dh) and lse (B, H, N), the logarithm of each softmax's denominator, which the backward starts from."""
    q, k, v = _operands(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v
    return out.transpose(1, 2).flatten(2).to(out_dtype), lse


def _operands(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype):
    """q', k', v (B, H, N, Dh), rounded to out_dtype as the products see them, in the accumulation dtype."""
    q, k = queries_and_keys_ref(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center)
    return (a.to(out_dtype).to(accumulation_dtype(qkv)).transpose(1, 2) for a in (q, k, qkv[:, :, 2]))


def attention_backward_ref(grad, qkv, out, lse, table, q_weight, k_weight, q_bias, k_bias, eps, center):
    """Gradients of qkv, q_weight, k_weight, q_bias, k_bias; empty for what is None.

    With P = exp(S - lse), S = q' k'^T / sqrt(Dh), and delta = rowsum(dO * O):
    dV = P^T dO, dS = P * (dO V^T - delta), dq' = dS k' / sqrt(Dh), dk' = dS^T q' / sqrt(Dh); then back through rotation and norm.
    """
    q, k, v = _operands(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    heads = qkv.shape[3:]
    grad, out = (a.to(q.dtype).unflatten(-1, heads).transpose(1, 2) for a in (grad, out))
    p = (q @ k.mT * scale - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (a.transpose(1, 2) for a in (ds @ k, ds.mT @ q, p.mT @ grad))
    dq, dq_weight, dq_bias = _raw_gradient_ref(dq, qkv[:, :, 0], table, q_weight, q_bias, eps, center)
    dk, dk_weight, dk_bias = _raw_gradient_ref(dk, qkv[:, :, 1], table, k_weight, k_bias, eps, center)
    return torch.stack((dq, dk, dv), dim=2).to(qkv.dtype), dq_weight, dk_weight, dq_bias, dk_bias


def _raw_gradient_ref(grad, x, table, weight, bias, eps, center):
    """From the gradient of q' (or k') to those of raw q (or k), weight and bias."""
    if table is not None:
        grad = rotate_ref(grad, table, sign=-1)
    if weight is None:
        return grad, x.new_empty(0), x.new_empty(0)
    x, rstd = _standardise(x.to(grad.dtype), eps, center)
    weight_grad, bias_grad = (grad * x).sum((0, 1, 2)).to(weight.dtype), grad.sum((0, 1, 2))
    grad = grad * weight.to(grad.dtype)
    grad = grad - x * (grad * x).mean(-1, keepdim=True) - (grad.mean(-1, keepdim=True) if center else 0)
    return grad * rstd, weight_grad, x.new_empty(0) if bias is None else bias_grad.to(bias.dtype)


def _attention_cuda(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype):
    if refusal := _triton_refuses(qkv.dtype, out_dtype, qkv.shape[4]):
        raise ValueError(f"rope_attention: {refusal}")
    from lightningdit_kernels.attention_triton import rope_attention_fwd

    return rope_attention_fwd(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype)


def _attention_backward_cuda(grad, qkv, out, lse, table, q_weight, k_weight, q_bias, k_bias, eps, center):
    from lightningdit_kernels.attention_triton import rope_attention_bwd

    return rope_attention_bwd(grad, qkv, out, lse, table, q_weight, k_weight, q_bias, k_bias, eps, center)


def _triton_refuses(dtype, out_dtype, head_dim) -> str:
    """Why the Triton kernels cannot compute this, or ""."""
    if torch.float64 in (dtype, out_dtype):
        return f"backend 'triton' got dtype {dtype}, expected fp32, bf16 or fp16"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"backend 'triton' got head dimension {head_dim}, expected a multiple of 8 up to 256"
    return ""


def _attention_fake(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype):
    batch, n, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, n, heads * head_dim), dtype=out_dtype), qkv.new_empty((batch, heads, n), dtype=accumulation_dtype(qkv))


def _attention_backward_fake(grad, qkv, out, lse, table, q_weight, k_weight, q_bias, k_bias, eps, center):
    parameters = (q_weight, k_weight, q_bias, k_bias)
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(0) if a is None else a.new_empty(a.shape) for a in parameters)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.center, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:1], *output, *tensors[1:])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 9
    saved = ctx.saved_tensors  # read once: under checkpointing each reading recomputes
    grad_qkv, *gradients = torch.ops.lightningdit.rope_attention_backward(grad, *saved, ctx.eps, ctx.center)
    gradients = (None if parameter is None else gradient for gradient, parameter in zip(gradients, saved[4:], strict=True))
    return grad_qkv, None, *gradients, None, None, None


_ARGUMENTS = "Tensor? table, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, float eps, bool center"
define(
    f"rope_attention(Tensor qkv, {_ARGUMENTS}, ScalarType out_dtype) -> (Tensor out, Tensor lse)", attention_forward_ref, _attention_fake
)
define(
    f"rope_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    attention_backward_ref,
    _attention_backward_fake,
)
LIBRARY.impl("rope_attention", _attention_cuda, "CUDA")
LIBRARY.impl("rope_attention_backward", _attention_backward_cuda, "CUDA")
differentiable("rope_attention", _setup_context, _backward)


def _triton(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, eps, center):
    out_dtype = result_dtype(qkv)
    if qkv.device.type != "cuda":
        raise ValueError(f"rope_attention: backend 'triton' got qkv on {qkv.device}, expected a CUDA device")
    if refusal := _triton_refuses(qkv.dtype, out_dtype, qkv.shape[4]):
        raise ValueError(f"rope_attention: {refusal}")
    return fused(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, eps, center)


def fused(qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, eps=1e-6, center=False):
    """rope_attention through the operator, whatever the device: on CUDA the Triton kernels, elsewhere the operator's definition."""
    if freqs is not None and freqs.requires_grad:
        raise ValueError("rope_attention: freqs requires a gradient, expected a constant, or backend 'sdpa', which has that gradient")
    out_dtype = result_dtype(qkv)
    # An eighth of bf16's rounding error, and half the bytes of fp32.
    table_dtype = torch.float16 if out_dtype == torch.bfloat16 else accumulation_dtype(qkv)
    table = None if positions is None else rope_table(positions, freqs, table_dtype)
    return torch.ops.lightningdit.rope_attention(qkv, table, q_weight, k_weight, q_bias, k_bias, eps, center, out_dtype)[0]


def _peer(backend: str, package: str, function: str, head_dims: str, limit: int):
    """attend(q, k, v) of a peer, whose absence or limits are errors: nothing else takes its place silently."""
    try:
        attention = getattr(importlib.import_module(package), function)
    except ImportError as error:
        pip = {"flash_attn": "flash-attn --no-build-isolation", "xformers": "xformers"}[backend]
        raise ImportError(f"rope_attention: backend {backend!r} needs `pip install {pip}`: {error}") from error

    def attend(q, k, v):
        if q.device.type != "cuda" or q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"rope_attention: backend {backend!r} got {q.dtype} on {q.device}, expected bf16 or fp16 on a CUDA device")
        if q.shape[-1] % 8 or q.shape[-1] > limit:
            raise ValueError(f"rope_attention: backend {backend!r} got head dimension {q.shape[-1]}, expected {head_dims}")
        return attention(q, k, v)

    return attend


def _attend(backend: str):
    if backend == "flash_attn":
        return _peer(backend, "flash_attn", "flash_attn_func", "a multiple of 8 up to 256", 256)
    if backend == "xformers":
        return _peer(backend, "xformers.ops", "memory_efficient_attention", "a multiple of 8 up to 256", 256)
    return _sdpa


def _auto(qkv) -> str:
    """The backend that "auto" stands for."""
    if not MEASURED or qkv.device.type != "cuda" or result_dtype(qkv) not in (torch.bfloat16, torch.float16):
        return "sdpa"
    return MEASURED.get((torch.cuda.get_device_capability(qkv.device), qkv.shape[1], qkv.shape[4]), "sdpa")


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
        backend: "triton" (CUDA; Dh a multiple of 8 up to 256; no gradient of freqs), "sdpa" (PyTorch's attention after norm and
            rotation in plain PyTorch; any device), "flash_attn", "xformers" (the same with these packages, CUDA, bf16 and fp16), or
            "auto": the fastest that was measured for this GPU, N and Dh, else "sdpa".
    Returns: (B, N, H*Dh) in qkv.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError for a shape, dtype, combination or backend other than these; ImportError for a backend that is not installed.
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
    backend = _auto(qkv) if backend == "auto" else backend
    arguments = (qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, eps, center)
    return _triton(*arguments) if backend == "triton" else rope_attention_ref(*arguments, attend=_attend(backend))
