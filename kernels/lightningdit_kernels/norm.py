"""RMSNorm (or LayerNorm statistics) with adaLN modulation, and the same fused with the gated residual before it.

B batch, N tokens, D width. The backward needs x' (or x), which the next op keeps anyway, and 4 bytes a token: rstd (with center, mean too).
"""

import torch
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

TRITON_MAX_WIDTH = 4608  # wider rows no longer fit the registers of the backward; they take the definition


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


def gated_residual_rms_norm_modulate_ref(x, y, gate, scale, shift=None, weight=None, eps=1e-6, center=False, out_dtype=None, bias=None):
    """The definition of gated_residual_rms_norm_modulate in plain PyTorch."""
    x = _add_branch(x, y, gate, bias)
    return x, rms_norm_modulate_ref(x, scale, shift, weight, eps, center, out_dtype)


def _add_branch(x, y, gate, bias):
    """x' = x + gate * (y + bias), rounded once."""
    acc = accumulation_dtype(x)
    branch = _plus(y, bias, acc)
    return (x.to(acc) + (branch if gate is None else gate.to(acc).unsqueeze(1) * branch)).to(x.dtype)


def _plus(y, bias, acc):
    return y.to(acc) if bias is None else y.to(acc) + bias.to(acc)


def norm_forward_ref(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
    """(x', h, mean, rstd): the definition once more, with the statistics that the backward keeps.

    Without y, x' is x; without center, mean is None.
    """
    acc = accumulation_dtype(x)
    if y is not None:
        x = _add_branch(x, y, gate, bias)
    x_hat, mean = x.to(acc), None
    if center:
        mean = x_hat.mean(-1, keepdim=True)
        x_hat = x_hat - mean
    rstd = torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    h = x_hat * rstd * _factor(scale, weight, acc)
    if shift is not None:
        h = h + shift.to(acc).unsqueeze(1)
    return x, h.to(out_dtype), mean, rstd


def norm_backward_ref(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype):
    """(dx, dy, dgate, dscale, dshift, dweight, dbias), where None is what was not asked for; residual is x'.

    With x_hat = (x' - mean) * rstd and a = grad_h * (1 + scale) * weight,
    dx = grad_residual + rstd * (a - [center] mean(a) - x_hat * mean(a * x_hat)), and dy = gate * dx. dgate =
    sum over tokens of dx * (y + bias) is computed if y is given, dbias = sum over all tokens of dy if bias is.
    """
    acc = accumulation_dtype(residual)
    grad_h, x_hat = grad_h.to(acc), residual.to(acc)
    x_hat = (x_hat if mean is None else x_hat - mean) * rstd
    a = grad_h * _factor(scale, weight, acc)
    dx = a - x_hat * (a * x_hat).mean(-1, keepdim=True)
    if mean is not None:
        dx = dx - a.mean(-1, keepdim=True)
    dx = dx * rstd
    if grad_residual is not None:
        dx = dx + grad_residual.to(acc)
    dy = dx if gate is None else gate.to(acc).unsqueeze(1) * dx
    by_sample = (grad_h * x_hat).sum(1)
    return (
        dx.to(residual.dtype),
        None if branch_dtype is None else dy.to(branch_dtype, copy=dy is dx),  # results of an operator must not share memory
        None if y is None else (dx * _plus(y, bias, acc)).sum(1).to(gate.dtype),
        (by_sample if weight is None else by_sample * weight.to(acc)).to(scale.dtype),
        None if shift_dtype is None else grad_h.sum(1).to(shift_dtype),
        None if weight is None else (by_sample * (1 + scale.to(acc))).sum(0).to(weight.dtype),
        None if bias is None else dy.sum((0, 1)).to(bias.dtype),
    )


def _factor(scale, weight, acc):
    factor = (1 + scale.to(acc)).unsqueeze(1)
    return factor if weight is None else factor * weight.to(acc)


# The operators. A schema has no optional result: what a variant lacks is an empty tensor.


def _forward_cpu(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
    if not native.serves(x.dtype, x.dtype if y is None else y.dtype, out_dtype):
        return norm_forward_ref(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype)
    return native.norm_forward(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype)


def _backward_cpu(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype):
    dtypes = residual.dtype, grad_h.dtype, residual.dtype if y is None else y.dtype, branch_dtype or residual.dtype
    backward = native.norm_backward if native.serves(*dtypes) else norm_backward_ref
    return backward(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype)


def _forward_cuda(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
    if not _triton_serves(x, out_dtype, y, gate, scale, shift, weight, bias):
        return norm_forward_ref(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype)
    from lightningdit_kernels.norm_triton import norm_fwd

    residual, *rest = norm_fwd(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype)
    return x if y is None else residual, *rest


def _backward_cuda(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype):
    if not _triton_serves(residual, grad_h.dtype, y, gate, scale, weight, bias):
        return norm_backward_ref(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype)
    from lightningdit_kernels.norm_triton import norm_bwd

    return norm_bwd(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype)


def _triton_serves(x, out_dtype, *others):
    return triton_serves(x.dtype, out_dtype, *(t.dtype for t in others if t is not None)) and x.shape[-1] <= TRITON_MAX_WIDTH


def _forward_fake(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=accumulation_dtype(x))
    return x.new_empty(x.shape), x.new_empty(x.shape, dtype=out_dtype), torch.empty_like(rstd) if center else None, rstd


def _backward_fake(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype):
    by_sample = residual.new_empty((residual.shape[0], residual.shape[2]))
    return (
        residual.new_empty(residual.shape),
        None if branch_dtype is None else residual.new_empty(residual.shape, dtype=branch_dtype),
        None if y is None else torch.empty_like(by_sample, dtype=gate.dtype),
        torch.empty_like(by_sample, dtype=scale.dtype),
        None if shift_dtype is None else torch.empty_like(by_sample, dtype=shift_dtype),
        None if weight is None else weight.new_empty(weight.shape),
        None if bias is None else bias.new_empty(bias.shape),
    )


def _operators(forward, backward):
    """The four operator functions around one way of computing: without and with the branch, forward and backward."""

    def full(results, x):
        return tuple(x.new_empty(0) if result is None else result for result in results)

    def norm(x, scale, shift, weight, eps, center, out_dtype):
        _, *rest = forward(x, None, None, scale, shift, weight, None, eps, center, out_dtype)
        return full(rest, x)

    def norm_backward(grad_h, x, scale, weight, mean, rstd, center, shift_dtype):
        mean = mean if center else None
        dx, _, _, *rest, _ = backward(None, grad_h, x, None, None, scale, weight, None, mean, rstd, None, shift_dtype)
        return full((dx, *rest), x)

    def gated(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
        return full(forward(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype), x)

    def gated_backward(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, center, branch_dtype, shift_dtype):
        mean = mean if center else None
        gradients = backward(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype)
        return full(gradients, residual)

    return norm, norm_backward, gated, gated_backward


_SCHEMAS = (
    "rms_norm_modulate(Tensor x, Tensor scale, Tensor? shift, Tensor? weight, float eps, bool center, ScalarType out_dtype)"
    " -> (Tensor h, Tensor mean, Tensor rstd)",
    "rms_norm_modulate_backward(Tensor grad_h, Tensor x, Tensor scale, Tensor? weight, Tensor mean, Tensor rstd, bool center,"
    " ScalarType? shift_dtype) -> (Tensor dx, Tensor dscale, Tensor dshift, Tensor dweight)",
    "gated_residual_rms_norm_modulate(Tensor x, Tensor y, Tensor? gate, Tensor scale, Tensor? shift, Tensor? weight, Tensor? bias,"
    " float eps, bool center, ScalarType out_dtype) -> (Tensor residual, Tensor h, Tensor mean, Tensor rstd)",
    "gated_residual_rms_norm_modulate_backward(Tensor? grad_residual, Tensor grad_h, Tensor residual, Tensor? y, Tensor? gate,"
    " Tensor scale, Tensor? weight, Tensor? bias, Tensor mean, Tensor rstd, bool center, ScalarType? branch_dtype, ScalarType? shift_dtype)"
    " -> (Tensor dx, Tensor dy, Tensor dgate, Tensor dscale, Tensor dshift, Tensor dweight, Tensor dbias)",
)
for _schema, *_implementations in zip(
    _SCHEMAS,
    _operators(norm_forward_ref, norm_backward_ref),
    _operators(_forward_fake, _backward_fake),
    _operators(_forward_cpu, _backward_cpu),
    _operators(_forward_cuda, _backward_cuda),
    strict=True,
):
    define(_schema, *_implementations)


def _setup_norm(ctx, inputs, output):
    x, scale, shift, weight, _, ctx.center, _ = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # those of mean and rstd would be launches that fill them with zeros
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.save_for_backward(x, scale, weight, mean, rstd)


def _norm_backward(ctx, grad_h, *_):
    if grad_h is None:
        return (None,) * 7
    dx, dscale, dshift, dweight = torch.ops.lightningdit.rms_norm_modulate_backward(grad_h, *ctx.saved_tensors, ctx.center, ctx.shift_dtype)
    return _wanted(ctx, dx, dscale, dshift, dweight, None, None, None)


def _setup_gated(ctx, inputs, output):
    _, y, gate, scale, shift, weight, bias, _, ctx.center, _ = inputs
    residual, _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)  # the final layer does not use x': its gradient is then not read
    ctx.branch_dtype = y.dtype if ctx.needs_input_grad[1] else None
    ctx.shift_dtype = None if shift is None else shift.dtype
    ctx.out_dtype = output[1].dtype
    ctx.save_for_backward(residual, y if gate is not None and ctx.needs_input_grad[2] else None, gate, scale, weight, bias, mean, rstd)


def _gated_backward(ctx, grad_residual, grad_h, *_):
    if grad_h is None:
        grad_h = torch.zeros_like(ctx.saved_tensors[0], dtype=ctx.out_dtype)
    arguments = grad_residual, grad_h, *ctx.saved_tensors, ctx.center, ctx.branch_dtype, ctx.shift_dtype
    gradients = torch.ops.lightningdit.gated_residual_rms_norm_modulate_backward(*arguments)
    return _wanted(ctx, *gradients, None, None, None)


def _wanted(ctx, *gradients):
    return tuple(gradient if need else None for gradient, need in zip(gradients, ctx.needs_input_grad, strict=True))


differentiable("rms_norm_modulate", _setup_norm, _norm_backward)
differentiable("gated_residual_rms_norm_modulate", _setup_gated, _gated_backward)


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
    out_dtype = result_dtype(x) if out_dtype is None else out_dtype
    if _compiler_fuses(x, None, out_dtype):
        return rms_norm_modulate_ref(x, scale, shift, weight, eps, center, out_dtype)
    return torch.ops.lightningdit.rms_norm_modulate(x, scale, shift, weight, eps, center, out_dtype)[0]


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
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x' = x + gate * (y + bias), then h = rms_norm_modulate(x', scale, shift, weight, eps, center, out_dtype).

    Args:
        x: (B, N, D), the residual stream, fp32, bf16, fp16 or fp64.
        y: (B, N, D), the output of the branch before; its dtype may differ from x's.
        gate: (B, D), broadcast over N, or None for 1.
        scale, shift, weight, eps, center, out_dtype: as in rms_norm_modulate.
        bias: (D,), or None for 0: the bias of the linear layer that made y, if that layer left it out. It is added in fp32, and its
            gradient is summed in the pass of the backward that writes dy.
    Returns: x' (B, N, D) in x.dtype, and h (B, N, D).
    Raises: ValueError for a shape or dtype other than these.
    Source: adaLN-Zero, DiT, arXiv:2212.09748; RMSNorm, arXiv:1910.07467.
    """
    op = "gated_residual_rms_norm_modulate"
    _check(op, x, scale, shift, weight)
    check_floating(op, x=x, y=y, gate=gate, bias=bias)
    check_shape(op, tuple(x.shape), "the shape of x", y=y)
    check_shape(op, (x.shape[0], x.shape[2]), "(B, D) of x", gate=gate)
    check_shape(op, (x.shape[2],), "(D,) of x", bias=bias)
    out_dtype = result_dtype(x) if out_dtype is None else out_dtype
    if _compiler_fuses(x, y, out_dtype):
        return gated_residual_rms_norm_modulate_ref(x, y, gate, scale, shift, weight, eps, center, out_dtype, bias)
    return torch.ops.lightningdit.gated_residual_rms_norm_modulate(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype)[:2]


def _compiler_fuses(x, y, out_dtype):
    """Whether torch.compile is tracing and no kernel would serve: it then gets the definition, since it cannot look into an operator."""
    if not torch.compiler.is_compiling():
        return False
    dtypes = (x.dtype, out_dtype) if y is None else (x.dtype, y.dtype, out_dtype)
    if x.device.type == "cpu":
        return not native.serves(*dtypes)
    return not (x.device.type == "cuda" and triton_serves(*dtypes) and x.shape[-1] <= TRITON_MAX_WIDTH)


def _check(op, x, scale, shift, weight):
    check_floating(op, x=x, scale=scale, shift=shift, weight=weight)
    if x.dim() != 3:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, expected (B, N, D)")
    check_shape(op, (x.shape[0], x.shape[2]), "(B, D) of x", scale=scale, shift=shift)
    check_shape(op, (x.shape[2],), "(D,) of x", weight=weight)
