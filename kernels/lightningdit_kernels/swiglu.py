"""SwiGLU's activation on the packed [gate | up] output of one linear layer. F hidden size of the feed-forward."""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels import native
from lightningdit_kernels.library import accumulation_dtype, check_floating, define, differentiable, result_dtype


def swiglu_ref(packed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """The definition of swiglu in plain PyTorch."""
    gate, up = packed.to(accumulation_dtype(packed)).chunk(2, dim=-1)
    return (nnf.silu(gate) * up).to(out_dtype)


def swiglu_backward_ref(grad: Tensor, packed: Tensor) -> Tensor:
    """The gradient to packed: d silu(a)/da = s * (1 + a * (1 - s)), s = sigmoid(a)."""
    acc = accumulation_dtype(packed)
    gate, up = packed.to(acc).chunk(2, dim=-1)
    grad, sigmoid = grad.to(acc), gate.sigmoid()
    return torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), dim=-1).to(packed.dtype)


def _swiglu_cpu(packed, out_dtype):
    if not native.serves(packed.dtype, out_dtype):
        return swiglu_ref(packed, out_dtype)
    out = _swiglu_fake(packed, out_dtype)
    native.swiglu_forward(packed.contiguous(), out)
    return out


def _swiglu_backward_cpu(grad, packed):
    if not native.serves(grad.dtype, packed.dtype):
        return swiglu_backward_ref(grad, packed)
    grad_packed = _swiglu_backward_fake(grad, packed)
    native.swiglu_backward(grad.contiguous(), packed.contiguous(), grad_packed)
    return grad_packed


def _swiglu_fake(packed, out_dtype):
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2), dtype=out_dtype)


def _swiglu_backward_fake(grad, packed):
    return packed.new_empty(packed.shape)


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(inputs[0])


def _backward(ctx, grad):
    return torch.ops.lightningdit.swiglu_backward(grad, *ctx.saved_tensors), None


define("swiglu(Tensor packed, ScalarType out_dtype) -> Tensor", swiglu_ref, _swiglu_fake, _swiglu_cpu)
define("swiglu_backward(Tensor grad, Tensor packed) -> Tensor", swiglu_backward_ref, _swiglu_backward_fake, _swiglu_backward_cpu)
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
    if torch.compiler.is_compiling() and not (packed.device.type == "cpu" and native.serves(packed.dtype, out_dtype)):
        return swiglu_ref(packed, out_dtype)  # no kernel: the compiler fuses the definition, but cannot look into an operator
    return torch.ops.lightningdit.swiglu(packed, out_dtype)
