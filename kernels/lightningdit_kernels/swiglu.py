"""SwiGLU's activation on the packed [gate | up] output of one linear layer. F hidden size of the feed-forward."""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels import native
from lightningdit_kernels.library import accumulation_dtype, check_floating, define, differentiable, result_dtype, triton_serves


def swiglu_ref(packed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The definition of swiglu in plain PyTorch."""
    gate, up = packed.to(accumulation_dtype(packed)).chunk(2, dim=-1)
    return (nnf.silu(gate) * up).to(out_dtype)


def swiglu_backward_ref(grad: Tensor, packed: Tensor, bias: bool = False) -> tuple[Tensor, Tensor]:
    """The gradient to packed, d silu(a)/da = s * (1 + a * (1 - s)) with s = sigmoid(a), and its sum over rows (empty without bias).

    That sum is the gradient to the bias of the linear layer that made packed: it is free beside the gradient, a pass of its own later.
    """
    acc = accumulation_dtype(packed)
    gate, up = packed.to(acc).chunk(2, dim=-1)
    grad, sigmoid = grad.to(acc), gate.sigmoid()
    grad_packed = torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), dim=-1)
    return grad_packed.to(packed.dtype), _row_sum(grad_packed) if bias else packed.new_empty(0)


def _row_sum(grad_packed):
    return grad_packed.to(accumulation_dtype(grad_packed)).reshape(-1, grad_packed.shape[-1]).sum(0)


def _swiglu_cpu(packed, out_dtype):
    if not native.serves(packed.dtype, out_dtype):
        return swiglu_ref(packed, out_dtype)
    out = _swiglu_fake(packed, out_dtype)
    native.swiglu_forward(packed.contiguous(), out)
    return out


def _swiglu_backward_cpu(grad, packed, bias):
    if not native.serves(grad.dtype, packed.dtype):
        return swiglu_backward_ref(grad, packed, bias)
    grad_packed = packed.new_empty(packed.shape)
    native.swiglu_backward(grad.contiguous(), packed.contiguous(), grad_packed)
    return grad_packed, _row_sum(grad_packed) if bias else packed.new_empty(0)


def _swiglu_cuda(packed, out_dtype):
    if not triton_serves(packed.dtype, out_dtype):
        return swiglu_ref(packed, out_dtype)
    from lightningdit_kernels.swiglu_triton import swiglu_fwd

    return swiglu_fwd(packed, out_dtype)


def _swiglu_backward_cuda(grad, packed, bias):
    if not triton_serves(grad.dtype, packed.dtype):
        return swiglu_backward_ref(grad, packed, bias)
    from lightningdit_kernels.swiglu_triton import swiglu_bwd

    grad_packed, grad_bias = swiglu_bwd(grad, packed, bias)
    return grad_packed, packed.new_empty(0) if grad_bias is None else grad_bias


def _swiglu_fake(packed, out_dtype):
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2), dtype=out_dtype)


def _swiglu_backward_fake(grad, packed, bias):
    if not bias:
        return packed.new_empty(packed.shape), packed.new_empty(0)
    return packed.new_empty(packed.shape), packed.new_empty(packed.shape[-1], dtype=accumulation_dtype(packed))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return torch.ops.lightningdit.swiglu_backward(grad, *ctx.saved_tensors, False)[0], None


define("swiglu(Tensor packed, ScalarType out_dtype) -> Tensor", swiglu_ref, _swiglu_fake, _swiglu_cpu, _swiglu_cuda)
define(
    "swiglu_backward(Tensor grad, Tensor packed, bool bias) -> (Tensor grad_packed, Tensor grad_bias)",
    swiglu_backward_ref,
    _swiglu_backward_fake,
    _swiglu_backward_cpu,
    _swiglu_backward_cuda,
)
differentiable("swiglu", _setup_context, _backward)


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * up, with gate = packed[..., :F] and up = packed[..., F:], computed in fp32.

    Args:
        packed: (..., 2F), fp32, bf16, fp16 or fp64.
    Returns: (..., F) in packed.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError if the last dimension is odd or missing, or the dtype is another.
    Source: GLU variants, arXiv:2002.05202.
    """
    check_floating("swiglu", packed=packed)
    if packed.dim() == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed has shape {tuple(packed.shape)}, expected an even last dimension (gate and up)")
    out_dtype = result_dtype(packed)
    serves = {"cpu": native.serves, "cuda": triton_serves}.get(packed.device.type)
    if torch.compiler.is_compiling() and not (serves and serves(packed.dtype, out_dtype)):
        return swiglu_ref(packed, out_dtype)  # no kernel: the compiler fuses the definition, but cannot look into an operator
    return torch.ops.lightningdit.swiglu(packed, out_dtype)
