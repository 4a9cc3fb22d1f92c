"""GroupNorm followed by SiLU, the pair before every convolution of the autoencoder. B batch, C channels in G groups, H x W pixels."""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels import native
from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape, define, differentiable, result_dtype


def _format(x):
    """Channels-last if x is and is not contiguous as well (one pixel, one channel); else contiguous. The result's format, too."""
    last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if last else torch.contiguous_format


def group_norm_silu_ref(x, weight, bias, num_groups, eps=1e-6, out_dtype=None):
    """The definition of group_norm_silu in plain PyTorch."""
    acc = accumulation_dtype(x)
    y = nnf.silu(nnf.group_norm(x.to(acc), num_groups, weight.to(acc), bias.to(acc), eps))
    return y.to(result_dtype(x) if out_dtype is None else out_dtype).contiguous(memory_format=_format(x))


def _moments(x, num_groups, eps):
    """Mean and 1 / sqrt(variance + eps) of every group, (B, G)."""
    groups = x.to(accumulation_dtype(x)).unflatten(1, (num_groups, -1)).flatten(2)
    mean = groups.mean(-1, keepdim=True)
    return mean[..., 0], torch.rsqrt((groups - mean).square().mean(-1) + eps)


def _group_norm_silu(x, weight, bias, num_groups, eps, out_dtype):
    """The reference of the operator: the result, and the moments for the backward."""
    return group_norm_silu_ref(x, weight, bias, num_groups, eps, out_dtype), *_moments(x, num_groups, eps)


def group_norm_silu_backward_ref(grad, x, weight, bias, mean, rstd, num_groups):
    """dx = rstd * (dy w - mean(dy w) - x_hat mean(dy w x_hat)), dy = grad * d silu(y)/dy; dw = sum dy x_hat, db = sum dy."""
    acc = accumulation_dtype(x)
    x_hat = x.to(acc).unflatten(1, (num_groups, -1)).flatten(2)
    x_hat = ((x_hat - mean.to(acc)[..., None]) * rstd.to(acc)[..., None]).reshape(x.shape)
    w = weight.to(acc)[:, None, None]
    y = x_hat * w + bias.to(acc)[:, None, None]
    sigmoid = y.sigmoid()
    dy = grad.to(acc) * sigmoid * (1 + y * (1 - sigmoid))

    def group_mean(values):
        return per_channel(values.unflatten(1, (num_groups, -1)).mean((2, 3, 4)))

    def per_channel(values):
        return values.repeat_interleave(x.shape[1] // num_groups, 1)[..., None, None]

    scale = per_channel(rstd.to(acc))
    grad_x = scale * (dy * w - group_mean(dy * w) - x_hat * group_mean(dy * w * x_hat))
    grad_x = grad_x.to(x.dtype).contiguous(memory_format=_format(x))
    return grad_x, (dy * x_hat).sum((0, 2, 3)).to(weight.dtype), dy.sum((0, 2, 3)).to(bias.dtype)


def _fake(x, weight, bias, num_groups, eps, out_dtype):
    out = torch.empty_like(x, dtype=out_dtype, memory_format=_format(x))
    mean, rstd = (x.new_empty((x.shape[0], num_groups), dtype=accumulation_dtype(x)) for _ in range(2))
    return out, mean, rstd


def _backward_fake(grad, x, weight, bias, *_):
    return torch.empty_like(x, memory_format=_format(x)), torch.empty_like(weight), torch.empty_like(bias)


def _cuda(x, weight, bias, num_groups, eps, out_dtype):
    if torch.float64 in (x.dtype, weight.dtype, bias.dtype, out_dtype):
        return _group_norm_silu(x, weight, bias, num_groups, eps, out_dtype)
    if x.shape[1:].numel() >= 2**31:
        found = f"x has shape {tuple(x.shape)}, {x.shape[1:].numel()} values an image"
        raise ValueError(f"group_norm_silu: {found}, expected fewer than 2^31: the kernel counts them in 32 bits")
    from lightningdit_kernels import groupnorm_triton

    x, last = x.contiguous(memory_format=_format(x)), _format(x) == torch.channels_last
    return groupnorm_triton.group_norm_silu_fwd(x, weight.contiguous(), bias.contiguous(), num_groups, eps, out_dtype, last)


def _backward_cuda(grad, x, weight, bias, mean, rstd, num_groups):
    if torch.float64 in (grad.dtype, x.dtype, weight.dtype, bias.dtype):
        return group_norm_silu_backward_ref(grad, x, weight, bias, mean, rstd, num_groups)
    from lightningdit_kernels import groupnorm_triton

    layout = _format(x)
    x, grad = x.contiguous(memory_format=layout), grad.contiguous(memory_format=layout)
    weight, bias = weight.contiguous(), bias.contiguous()
    return groupnorm_triton.group_norm_silu_bwd(grad, x, weight, bias, mean, rstd, num_groups, layout == torch.channels_last)


def _serves(*tensors):
    return native.serves(*(tensor.dtype if isinstance(tensor, Tensor) else tensor for tensor in tensors))


def _cpu(x, weight, bias, num_groups, eps, out_dtype):
    if not _serves(x, out_dtype):
        return _group_norm_silu(x, weight, bias, num_groups, eps, out_dtype)
    out, mean, rstd = _fake(x, weight, bias, num_groups, eps, out_dtype)
    layout = _format(x)
    x, weight, bias = x.contiguous(memory_format=layout), weight.float().contiguous(), bias.float().contiguous()
    native.group_norm_silu_forward(x, weight, bias, out, mean, rstd, num_groups, eps, layout == torch.channels_last)
    return out, mean, rstd


def _backward_cpu(grad, x, weight, bias, mean, rstd, num_groups):
    if not _serves(grad, x):
        return group_norm_silu_backward_ref(grad, x, weight, bias, mean, rstd, num_groups)
    layout = _format(x)
    grad_x = torch.empty_like(x, memory_format=layout)
    sums = x.new_empty((2, x.shape[0], x.shape[1]), dtype=torch.float32)  # of dy and dy * x_hat, per image and channel
    native.group_norm_silu_backward(grad.contiguous(memory_format=layout), x.contiguous(memory_format=layout), weight.float().contiguous(),
                                    bias.float().contiguous(), mean, rstd, grad_x, sums, num_groups, layout == torch.channels_last)
    return grad_x, sums[1].sum(0).to(weight.dtype), sums[0].sum(0).to(bias.dtype)


def _setup_context(ctx, inputs, output):
    x, weight, bias, ctx.num_groups, _, _ = inputs
    ctx.save_for_backward(x, weight, bias, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad, *_):
    if grad is None:
        return (None,) * 6
    return *torch.ops.lightningdit.group_norm_silu_backward(grad, *ctx.saved_tensors, ctx.num_groups), None, None, None


define("group_norm_silu(Tensor x, Tensor weight, Tensor bias, int num_groups, float eps, ScalarType out_dtype) -> (Tensor, Tensor, Tensor)",
       _group_norm_silu, _fake, _cpu, _cuda)
define("group_norm_silu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias, Tensor mean, Tensor rstd, int num_groups) "
       "-> (Tensor, Tensor, Tensor)", group_norm_silu_backward_ref, _backward_fake, _backward_cpu, _backward_cuda)
differentiable("group_norm_silu", _setup_context, _backward)


def group_norm_silu(x: Tensor, weight: Tensor, bias: Tensor, num_groups: int, eps: float = 1e-6) -> Tensor:
    """silu(group_norm(x) * weight + bias), statistics over the channels of a group and all pixels, in fp32.

    Args:
        x: (B, C, H, W), fp32, bf16, fp16 or fp64, contiguous or channels-last; anything else is made contiguous.
        weight, bias: (C,).
        num_groups: divides C.
    Returns: (B, C, H, W) in x's memory format and dtype, or in the autocast dtype inside torch.autocast.
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
    out_dtype = result_dtype(x)
    if torch.compiler.is_compiling() and not (x.is_cuda or x.device.type == "cpu" and native.serves(x.dtype, out_dtype)):
        return group_norm_silu_ref(x, weight, bias, num_groups, eps, out_dtype)  # no kernel: the compiler fuses the definition
    return torch.ops.lightningdit.group_norm_silu(x, weight, bias, num_groups, eps, out_dtype)[0]
