"""SwiGLU's activation on the packed [gate | up] output of one linear layer. F hidden size of the feed-forward."""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels import native
from lightningdit_kernels.library import (
    accumulation_dtype,
    check_floating,
    check_shape,
    define,
    differentiable,
    result_dtype,
    triton_serves,
)


def swiglu_ref(packed: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """The definition of swiglu in plain PyTorch."""
    gate, up = _plus(packed, bias).chunk(2, dim=-1)
    return (nnf.silu(gate) * up).to(out_dtype)


def swiglu_backward_ref(grad: Tensor, packed: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The gradient to packed, d silu(a)/da = s * (1 + a * (1 - s)) with s = sigmoid(a), and its sum over rows, the gradient to bias."""
    gate, up = _plus(packed, bias).chunk(2, dim=-1)
    grad, sigmoid = grad.to(gate.dtype), gate.sigmoid()
    grad_packed = torch.cat((grad * up * sigmoid * (1 + gate * (1 - sigmoid)), grad * gate * sigmoid), dim=-1)
    grad_bias = None if bias is None else torch.atleast_2d(grad_packed).flatten(0, -2).sum(0).to(bias.dtype)
    return grad_packed.to(packed.dtype), grad_bias


def _plus(packed, bias):
    acc = accumulation_dtype(packed)
    return packed.to(acc) if bias is None else packed.to(acc) + bias.to(acc)


def _swiglu_cpu(packed, bias, out_dtype):
    forward = native.swiglu_forward if native.serves(packed.dtype, out_dtype) else swiglu_ref
    return forward(packed, bias, out_dtype)


def _backward_cpu(grad, packed, bias):
    backward = native.swiglu_backward if native.serves(grad.dtype, packed.dtype) else swiglu_backward_ref
    return backward(grad, packed, bias)


def _triton_serves(bias, *dtypes):
    return triton_serves(*dtypes, *(() if bias is None else (bias.dtype,)))


def _swiglu_cuda(packed, bias, out_dtype):
    if not _triton_serves(bias, packed.dtype, out_dtype):
        return swiglu_ref(packed, bias, out_dtype)
    from lightningdit_kernels.swiglu_triton import swiglu_fwd

    return swiglu_fwd(packed, bias, out_dtype)


def _backward_cuda(grad, packed, bias):
    if not _triton_serves(bias, grad.dtype, packed.dtype):
        return swiglu_backward_ref(grad, packed, bias)
    from lightningdit_kernels.swiglu_triton import swiglu_bwd

    return swiglu_bwd(grad, packed, bias)


def _swiglu_fake(packed, bias, out_dtype):
    return packed.new_empty((*packed.shape[:-1], packed.shape[-1] // 2), dtype=out_dtype)


def _backward_fake(grad, packed, bias):
    return packed.new_empty(packed.shape), None if bias is None else bias.new_empty(bias.shape)


def _full(backward):
    """As an operator: a schema has no optional result, without bias its gradient is an empty tensor."""

    def operator(grad, packed, bias):
        grad_packed, grad_bias = backward(grad, packed, bias)
        return grad_packed, packed.new_empty(0) if grad_bias is None else grad_bias

    return operator


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])


def _backward(ctx, grad):
    gradients = torch.ops.lightningdit.swiglu_backward(grad, *ctx.saved_tensors)
    return *(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=False)), None


define("swiglu(Tensor packed, Tensor? bias, ScalarType out_dtype) -> Tensor", swiglu_ref, _swiglu_fake, _swiglu_cpu, _swiglu_cuda)
define(
    "swiglu_backward(Tensor grad, Tensor packed, Tensor? bias) -> (Tensor grad_packed, Tensor grad_bias)",
    *map(_full, (swiglu_backward_ref, _backward_fake, _backward_cpu, _backward_cuda)),
)
differentiable("swiglu", _setup_context, _backward)


def swiglu(packed: Tensor, bias: Tensor | None = None) -> Tensor:
    """silu(gate) * up, with gate = (packed + bias)[..., :F] and up = (packed + bias)[..., F:], computed in fp32.

    Args:
        packed: (..., 2F), fp32, bf16, fp16 or fp64.
        bias: (2F,), or None for 0: the bias of the linear layer that made packed, if that layer left it out. Its gradient is summed in
            the pass of the backward that writes the gradient to packed.
    Returns: (..., F) in packed.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError if the last dimension is odd or missing, bias has another size, or a dtype is another.
    Source: GLU variants, arXiv:2002.05202.
    """
    check_floating("swiglu", packed=packed, bias=bias)
    if packed.dim() == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed has shape {tuple(packed.shape)}, expected an even last dimension (gate and up)")
    check_shape("swiglu", (packed.shape[-1],), "(2F,) of packed", bias=bias)
    out_dtype = result_dtype(packed)
    serves = {"cpu": native.serves, "cuda": triton_serves}.get(packed.device.type)
    if torch.compiler.is_compiling() and not (serves and serves(packed.dtype, out_dtype)):
        return swiglu_ref(packed, bias, out_dtype)  # no kernel: the compiler fuses the definition, but cannot look into an operator
    return torch.ops.lightningdit.swiglu(packed, bias, out_dtype)
