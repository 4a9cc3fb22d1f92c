"""Attention on packed qkv with 2-D rotary position embedding and optional QK-norm.

B batch, N tokens, H heads, Dh head dimension. q' and k' are q and k after QK-norm and rotation: what attention compares.
"""

import functools
import importlib
import logging
import math
import operator

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
    triton_available,
)
from lightningdit_kernels.tuning import choose, in_thread, time_candidates

_log = logging.getLogger("lightningdit_kernels")

BACKENDS = ("auto", "triton", "sdpa", "flash_attn", "xformers")

# The starting guess of "auto" on CUDA for bf16 and fp16, until it is timed on the GPU at hand: (compute capability, N, Dh) -> the backend
# that was fastest, or level, forward + backward. Without a row, not yet measured, the guess is "sdpa".
MEASURED = {((9, 0), n, head_dim): "triton" for n, head_dim in ((256, 64), (256, 72), (1024, 72))}


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


def operands_ref(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, dtype):
    """q', k' and v (B, N, H, Dh) in dtype: in fp32 where there is something to do, then rounded."""
    acc = accumulation_dtype(qkv)
    if bias is not None:
        qkv = qkv.to(acc) + bias.to(acc)
    q, k, v = qkv.unbind(2)
    if q_weight is not None:
        q = head_norm_ref(q.to(acc), q_weight, q_bias, eps, center)
        k = head_norm_ref(k.to(acc), k_weight, k_bias, eps, center)
    if positions is not None:
        table = rope_table(positions, freqs, acc)
        q, k = rotate_ref(q.to(acc), table), rotate_ref(k.to(acc), table)
    return q.to(dtype), k.to(dtype), v.to(dtype)


def rope_attention_ref(
    qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, bias=None, eps=1e-6, center=False, attend=None
):
    """The definition of rope_attention in plain PyTorch. attend(q, k, v), (B, N, H, Dh) each: the attention, by default PyTorch's."""
    parameters = (q_weight, k_weight, q_bias, k_bias, bias)
    return (attend or _sdpa)(*operands_ref(qkv, positions, freqs, *parameters, eps, center, result_dtype(qkv))).flatten(2)


def _sdpa(q, k, v):
    q, k, v = (a.transpose(1, 2) for a in (q, k, v))
    return nnf.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def attention_forward_ref(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype):
    """out (B, N, H*Dh) and lse (B, H, N), the logarithm of each softmax's denominator, which the backward starts from."""
    q, k, v = _operands(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype)
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    lse = scores.logsumexp(-1)
    out = (scores - lse.unsqueeze(-1)).exp() @ v
    return out.transpose(1, 2).flatten(2).to(out_dtype), lse


def _operands(qkv, *arguments):
    """q', k', v (B, H, N, Dh), rounded to the result's dtype as the products see them, in the accumulation dtype."""
    return (a.to(accumulation_dtype(qkv)).transpose(1, 2) for a in operands_ref(qkv, *arguments))


def attention_backward_ref(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center):
    """Gradients of qkv, q_weight, k_weight, q_bias, k_bias and bias; empty for what is None.

    With P = exp(S - lse), S = q' k'^T / sqrt(Dh), and delta = rowsum(dO * O):
    dV = P^T dO, dS = P * (dO V^T - delta), dq' = dS k' / sqrt(Dh), dk' = dS^T q' / sqrt(Dh); then back through rotation and norm.
    """
    q, k, v = _operands(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out.dtype)
    scale = 1 / math.sqrt(q.shape[-1])
    heads = qkv.shape[3:]
    grad, out = (a.to(q.dtype).unflatten(-1, heads).transpose(1, 2) for a in (grad, out))
    p = (q @ k.mT * scale - lse.unsqueeze(-1)).exp()
    ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
    dq, dk, dv = (a.transpose(1, 2) for a in (ds @ k, ds.mT @ q, p.mT @ grad))
    table = None if positions is None else rope_table(positions, freqs, q.dtype)
    biased = qkv.to(q.dtype) if bias is None else qkv.to(q.dtype) + bias.to(q.dtype)
    dq, dq_weight, dq_bias = _raw_gradient_ref(dq, biased[:, :, 0], table, q_weight, q_bias, eps, center)
    dk, dk_weight, dk_bias = _raw_gradient_ref(dk, biased[:, :, 1], table, k_weight, k_bias, eps, center)
    grad_qkv = torch.stack((dq, dk, dv), dim=2)
    grad_bias = None if bias is None else grad_qkv.sum((0, 1)).to(bias.dtype)
    gradients = (dq_weight, dk_weight, dq_bias, dk_bias, grad_bias)
    return grad_qkv.to(qkv.dtype), *(qkv.new_empty(0) if gradient is None else gradient for gradient in gradients)


def _raw_gradient_ref(grad, x, table, weight, bias, eps, center):
    """From the gradient of q' (or k') to those of what the norm saw, x, and of the norm's weight and bias."""
    if table is not None:
        grad = rotate_ref(grad, table, sign=-1)
    if weight is None:
        return grad, None, None
    x, rstd = _standardise(x, eps, center)
    weight_grad, bias_grad = (grad * x).sum((0, 1, 2)).to(weight.dtype), grad.sum((0, 1, 2))
    grad = grad * weight.to(grad.dtype)
    grad = grad - x * (grad * x).mean(-1, keepdim=True) - (grad.mean(-1, keepdim=True) if center else 0)
    return grad * rstd, weight_grad, None if bias is None else bias_grad.to(bias.dtype)


def _attention_cpu(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype):
    if not native.serves(qkv.dtype, out_dtype):
        return attention_forward_ref(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype)
    qkv = qkv.contiguous()
    out, lse = _attention_fake(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype)
    if out.numel():
        small = _in_fp32(positions, freqs, bias, q_weight, k_weight, q_bias, k_bias)
        native.attention_forward(qkv, *small, eps, center, out, lse)
    return out, lse


def _attention_backward_cpu(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center):
    if not native.serves(grad.dtype, qkv.dtype, out.dtype):
        return attention_backward_ref(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center)
    batch, _, _, heads, head_dim = qkv.shape
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    sums = qkv.new_zeros((batch, heads, 7, head_dim), dtype=torch.float32)
    if out.numel():
        small = _in_fp32(positions, freqs, bias, q_weight, k_weight, q_bias, k_bias)
        native.attention_backward(grad.contiguous(), qkv.contiguous(), lse, *small, eps, center, grad_qkv, sums)
    by_head = sums.sum(0)
    of_norm = by_head.sum(0)
    gradients = (of_norm[0], of_norm[2], of_norm[1], of_norm[3], by_head[:, 4:].transpose(0, 1))
    pairs = zip((q_weight, k_weight, q_bias, k_bias, bias), gradients, strict=True)
    return grad_qkv, *(qkv.new_empty(0) if a is None else own(gradient, a.dtype) for a, gradient in pairs)


def _in_fp32(positions, freqs, *parameters):
    """cos and sin of every angle, and the parameters: a thousandth of qkv, so that the kernel needs no variants."""
    table = None if positions is None else _kept_table(positions, freqs)
    return table, *(None if a is None else a.float().contiguous() for a in parameters)


_tables: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}  # by sizes and dtypes: positions, freqs and their table


def _kept_table(positions, freqs):
    """rope_table in fp32, kept for the next call: a model's positions are constant. Comparing takes 2 us, the table 150 (256 tokens)."""
    key = positions.shape, positions.dtype, freqs.shape, freqs.dtype
    kept = _tables.get(key)
    if kept is None or not (torch.equal(kept[0], positions) and torch.equal(kept[1], freqs)):
        if len(_tables) >= 16:  # resolutions that a process has seen, a few at most
            _tables.clear()
        with torch.inference_mode(False):  # one made for sampling serves training, too
            kept = positions.clone(), freqs.clone(), rope_table(positions, freqs, torch.float32).contiguous()
        _tables[key] = kept
    return kept[2]


def own(x, dtype):
    """A contiguous copy: results of an operator must not share memory."""
    return x.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _attention_cuda(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype):
    if refusal := _triton_refuses(qkv.dtype, out_dtype, qkv.shape[4]):
        raise ValueError(f"rope_attention: {refusal}")
    from lightningdit_kernels.attention_triton import rope_attention_fwd

    return rope_attention_fwd(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype)


def _attention_backward_cuda(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center):
    from lightningdit_kernels.attention_triton import rope_attention_bwd

    return rope_attention_bwd(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center)


def _triton_refuses(dtype, out_dtype, head_dim) -> str:
    """Why the Triton kernels cannot compute this, or ""."""
    if torch.float64 in (dtype, out_dtype):
        return f"backend 'triton' got dtype {dtype}, expected fp32, bf16 or fp16"
    if head_dim % 8 or not 8 <= head_dim <= 256:
        return f"backend 'triton' got head dimension {head_dim}, expected a multiple of 8 up to 256"
    return ""


def _attention_fake(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype):
    batch, n, _, heads, head_dim = qkv.shape
    return qkv.new_empty((batch, n, heads * head_dim), dtype=out_dtype), qkv.new_empty((batch, heads, n), dtype=accumulation_dtype(qkv))


def _attention_backward_fake(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center):
    parameters = (q_weight, k_weight, q_bias, k_bias, bias)
    return qkv.new_empty(qkv.shape), *(qkv.new_empty(0) if a is None else a.new_empty(a.shape) for a in parameters)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.center, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors[:1], *output, *tensors[1:])


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 11
    saved = ctx.saved_tensors  # read once: under checkpointing each reading recomputes
    grad_qkv, *gradients = torch.ops.lightningdit.rope_attention_backward(grad, *saved, ctx.eps, ctx.center)
    gradients = (None if parameter is None else gradient for gradient, parameter in zip(gradients, saved[5:], strict=True))
    return grad_qkv, None, None, *gradients, None, None, None


_ARGUMENTS = (
    "Tensor? positions, Tensor? freqs, Tensor? q_weight, Tensor? k_weight, Tensor? q_bias, Tensor? k_bias, Tensor? bias, "
    "float eps, bool center"
)
define(
    f"rope_attention(Tensor qkv, {_ARGUMENTS}, ScalarType out_dtype) -> (Tensor out, Tensor lse)",
    attention_forward_ref,
    _attention_fake,
    _attention_cpu,
    _attention_cuda,
)
define(
    f"rope_attention_backward(Tensor grad, Tensor qkv, Tensor out, Tensor lse, {_ARGUMENTS}) -> ({', '.join(['Tensor'] * 6)})",
    attention_backward_ref,
    _attention_backward_fake,
    _attention_backward_cpu,
    _attention_backward_cuda,
)
differentiable("rope_attention", _setup_context, _backward)


def _triton(qkv, *arguments):
    if qkv.device.type != "cuda":
        raise ValueError(f"rope_attention: backend 'triton' got qkv on {qkv.device}, expected a CUDA device")
    if refusal := _triton_refuses(qkv.dtype, result_dtype(qkv), qkv.shape[4]):
        raise ValueError(f"rope_attention: {refusal}")
    return fused(qkv, *arguments)


def fused(
    qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, bias=None, eps=1e-6, center=False
):
    """rope_attention through the operator: on CUDA the Triton kernels, on CPU the native ones, where they serve, else its definition."""
    for name, tensor in (("positions", positions), ("freqs", freqs)):
        if tensor is not None and tensor.requires_grad:
            raise ValueError(f"rope_attention: {name} requires a gradient, expected a constant, or backend 'sdpa', which has that gradient")
    arguments = (qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, result_dtype(qkv))
    return torch.ops.lightningdit.rope_attention(*arguments)[0]


# Package, function, the keyword of its softmax scale, what pip installs it from. Both want head dimensions that are multiples of 8.
PEERS = {
    "flash_attn": ("flash_attn", "flash_attn_func", "softmax_scale", "flash-attn --no-build-isolation"),
    "xformers": ("xformers.ops", "memory_efficient_attention", "scale", "xformers"),
}

PEER_DEVICE = "cuda"


def padded(attention, multiple: int, scale: str):
    """attend(q, k, v), head dimensions padded by zeros to the next multiple, and the softmax scale of the true one, by that keyword."""

    def attend(q, k, v):
        head_dim = q.shape[-1]
        missing = -head_dim % multiple
        if not missing:
            return attention(q, k, v)
        q, k, v = (nnf.pad(a, (0, missing)) for a in (q, k, v))
        out = attention(q, k, v, **{scale: head_dim**-0.5})
        return (out[0] if isinstance(out, tuple) else out)[..., :head_dim]

    return attend


def _peer(backend: str):
    """attend(q, k, v) of a peer, whose absence or limits are errors: nothing else takes its place silently."""
    package, function, scale, pip = PEERS[backend]
    try:
        attention = getattr(importlib.import_module(package), function)
    except ImportError as error:
        raise ImportError(f"rope_attention: backend {backend!r} needs `pip install {pip}`: {error}") from error

    def attend(q, k, v):
        if q.device.type != PEER_DEVICE or q.dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"rope_attention: backend {backend!r} got {q.dtype} on {q.device}, expected bf16 or fp16 on a CUDA device")
        if q.shape[-1] > 256:
            raise ValueError(f"rope_attention: backend {backend!r} got head dimension {q.shape[-1]}, expected at most 256")
        return padded(attention, 8, scale)(q, k, v)

    return attend


def _attend(backend: str):
    return _peer(backend) if backend in PEERS else _sdpa


def _auto(qkv, positions, freqs, q_weight, q_bias, bias, center) -> str:
    """The backend that "auto" stands for; "native" is the operator on CPU, where its C++ kernel serves and needs no gradient of angles."""
    dtypes = (qkv.dtype, result_dtype(qkv))
    constant = not any(a is not None and a.requires_grad for a in (positions, freqs))
    if qkv.device.type == "cpu":
        return "native" if constant and native.serves(*dtypes) else "sdpa"
    _, n, _, heads, head_dim = qkv.shape
    measurable = constant and dtypes[1] in (torch.bfloat16, torch.float16) and not _triton_refuses(*dtypes, head_dim)
    if not (qkv.device.type == "cuda" and triton_available and measurable) or 0 in (n, heads):
        return "sdpa"
    qk_norm = "none" if q_weight is None else ("LayerNorm" if center else "RMSNorm") + (" with bias" if q_bias is not None else "")
    flags = (positions is not None, qk_norm, bias is not None, torch.compiler.is_compiling())
    sizes = (operator.index(n), operator.index(heads), operator.index(head_dim))  # of a graph for any N, one for each N: the choice is its
    return _fastest(qkv.device.index, *sizes, *dtypes, *flags)


def _fastest(index, n, heads, head_dim, dtype, out_dtype, rope, qk_norm, biased, compiled) -> str:
    """The backend chosen for this shape. torch.compile calls it while it traces, and takes the answer for a constant."""
    device, candidates = _candidates(index, n, head_dim)
    if len(candidates) == 1:
        return candidates[0]
    shape = (n, heads, head_dim, dtype, out_dtype, rope, qk_norm, biased, compiled)
    # Timing takes gradients, for which the thread of a backward (that recomputes, of checkpointing) would wait for itself.
    untimed = "a backward" if torch._C._current_graph_task_id() != -1 else ""
    return choose("rope_attention", candidates, device, _words(*shape), lambda: measure(candidates, device, *shape), untimed)


# As torch.compiler.assume_constant_result does, which imports the compiler: over a second of every start.
_fastest._dynamo_marked_constant = True


@functools.cache
def _candidates(index: int | None, n: int, head_dim: int) -> tuple[torch.device, tuple[str, ...]]:
    """The GPU and what may compute attention on it, the starting guess first; of fake tensors on a machine without a GPU, the guess."""
    if not torch.cuda.is_available():
        return torch.device("cuda"), ("sdpa",)
    device = torch.device("cuda", torch.cuda.current_device() if index is None else index)
    guess = MEASURED.get((torch.cuda.get_device_capability(device), n, head_dim), "sdpa")
    return device, (guess, *(backend for backend in ("triton", "sdpa") if backend != guess))


@functools.cache
def _words(n, heads, head_dim, dtype, out_dtype, rope, qk_norm, biased, compiled) -> tuple[str]:
    """The shape as a person reads it: the key of the choice."""
    dtypes = dict.fromkeys(str(each).removeprefix("torch.") for each in (dtype, out_dtype))
    extras = [name for name, given in (("RoPE", rope), ("bias", biased)) if given]
    words = f"{n} tokens, {heads} x {head_dim}", *dtypes, "QK-norm", qk_norm, *extras, "compiled" if compiled else "eager"
    return (" ".join(words),)


MEASURED_TOKENS = 16_384  # of a batch, at least one sample: with 16 heads and N = 256, 8 programs of the forward on an SM of an H200
BYTES_A_VALUE = 128  # that PyTorch's way takes for each of the B * N * H * Dh values of q in eager mode: fp32 copies of q and k, mostly
# Copies of qkv that stand for what a compiler makes of rotation, bias, QK-norm and their gradients. On an H100 compiled graphs with the
# first two took attention and 5.1 to 5.7 copies, the backward's own included, and with QK-norm 12.2; the parts are an estimate.
PASSES = dict(rope=2, bias=2, qk_norm=7)
WRONG = 0.05  # distance from fp32, relative to its norm. bf16 is within 0.01.


def measure(candidates, device, *shape) -> dict[str, float]:
    """Milliseconds of a forward and backward by backend, for those that compute it correctly; {}: the GPU's memory does not suffice.

    The arguments are those of _measure, which runs in a thread.
    """
    try:
        return in_thread(lambda: _measure(candidates, device, *shape), device)
    except torch.OutOfMemoryError:
        _log.warning("rope_attention: not enough memory to time %s; it uses the starting guess, %s", ", ".join(candidates), candidates[0])
        return {}


def _measure(candidates, device, n, heads, head_dim, dtype, out_dtype, rope, qk_norm, biased, compiled):
    """measure() for qkv (any, n, 3, heads, head_dim) in dtype and a result in out_dtype.

    compiled: PyTorch's ways are timed as what a compiler makes of them, since none can run here, inside another compilation: attention
    itself, and copies of qkv (PASSES). The Triton kernels are the same in both.
    """
    generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay what they are

    def normal(*sizes, dtype=torch.float32):
        return torch.randn(sizes, generator=generator, device=device, dtype=dtype)

    batch = max(1, MEASURED_TOKENS // n)
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        batch = max(1, min(batch, free // 4 // (BYTES_A_VALUE * n * heads * head_dim)))
    inputs = dict(qkv=normal(batch, n, 3, heads, head_dim, dtype=dtype), center=qk_norm.startswith("LayerNorm"))
    if rope:
        freqs = 10_000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))
        inputs |= dict(positions=normal(n, 2) * math.sqrt(n), freqs=freqs)
    for name in "qk" if qk_norm != "none" else "":
        inputs[f"{name}_weight"] = 1 + normal(head_dim) / 4
        inputs |= {f"{name}_bias": normal(head_dim) / 4} if qk_norm.endswith("bias") else {}
    inputs |= dict(bias=normal(3, heads, head_dim)) if biased else {}
    grad = normal(batch, n, heads * head_dim, dtype=out_dtype)
    ways = {backend: functools.partial(rope_attention_ref, attend=_attend(backend)) for backend in candidates if backend != "triton"}
    ways |= dict(triton=fused)

    with torch.autocast(device.type, out_dtype, enabled=out_dtype != dtype):
        correct = [backend for backend in candidates if _correct(backend, ways[backend], inputs, grad)]
        if compiled:
            passes = sum(PASSES[name] for name, given in (("rope", rope), ("bias", biased), ("qk_norm", qk_norm != "none")) if given)
            ways |= {backend: functools.partial(_as_compiled, way, passes) for backend, way in ways.items() if backend != "triton"}
        return time_candidates("rope_attention", {backend: functools.partial(_step, ways[backend], inputs, grad) for backend in correct})


def _step(attention, inputs, grad):
    """The result of attention(**inputs), the gradient of qkv and those of the parameters."""
    leaves = {name: inputs[name].detach().requires_grad_() for name in inputs if name not in ("positions", "freqs", "center")}
    out = attention(**inputs | leaves)
    return out.detach(), *torch.autograd.grad(out, list(leaves.values()), grad, allow_unused=True)


def _as_compiled(attention, passes, qkv, **_):
    for _ in range(passes):  # one more, in the backward, puts the gradients of q, k and v together whatever is asked
        qkv = qkv.clone()
    return attention(qkv)


def _correct(backend, attention, inputs, grad) -> bool:
    """Whether result and gradient of qkv are those of fp32, and the gradients of the parameters finite; says so if not."""
    try:
        ours = _step(attention, inputs, grad)  # of all samples: this call chooses the tiles, for which a few would be too small
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever it is, the others serve
        _log.warning("rope_attention: backend %r is left out of the measurement: %s: %s", backend, type(error).__name__, error)
        return False
    with torch.autocast(grad.device.type, enabled=False):
        truth = _step(rope_attention_ref, inputs | dict(qkv=inputs["qkv"][:2].float()), grad[:2].float())
    apart = max(float((a[:2].float() - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(ours[:2], truth[:2], strict=True))
    if not apart <= WRONG or not all(bool(a.isfinite().all()) for a in ours):
        _log.warning("rope_attention: backend %r is wrong here, %.3g from fp32, and left out of the measurement", backend, apart)
        return False
    return True


def rope_attention(
    qkv: Tensor,
    positions: Tensor | None = None,
    freqs: Tensor | None = None,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    q_bias: Tensor | None = None,
    k_bias: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
    center: bool = False,
    backend: str = "auto",
) -> Tensor:
    """softmax(q' k'^T / sqrt(Dh)) v per head, non-causal, where q' and k' are q and k after QK-norm, then 2-D RoPE (both in fp32).

    RoPE turns the channel pair (2i, 2i+1) of the first half of Dh by the angle row * freqs[i], of the second half by column * freqs[i].

    Args:
        qkv: (B, N, 3, H, Dh), fp32, bf16, fp16 or fp64: the output of one linear layer, unflattened.
        positions: (N, 2), row and column of every token. None, together with freqs: no RoPE.
        freqs: (Dh/4,), radians per unit of position. Any positions will do, fractions and several grids in one sequence too.
        q_weight, k_weight: (Dh,), QK-norm over Dh: RMSNorm, or LayerNorm with center=True. None, both: no QK-norm.
        q_bias, k_bias: (Dh,), the QK-norm's, or None, both.
        bias: (3, H, Dh), of the linear layer that made qkv, if that layer left it out: it is added here, in fp32, before everything
            else. Its gradient then comes out of the attention's backward, where that layer would read the gradient of qkv once more.
        eps, center: of the QK-norm; without meaning when there is none.
        backend: "triton" (CUDA; Dh a multiple of 8 up to 256; no gradient of freqs), "sdpa" (PyTorch's attention after norm and
            rotation in plain PyTorch; any device), "flash_attn", "xformers" (the same with these packages, CUDA, bf16 and fp16), or
            "auto": on CPU the native kernel (fp32, bf16, fp16). On CUDA, in bf16 and fp16, "triton" or "sdpa": the first call for a shape
            times both, which takes about a second, and the choice is kept on disk (tuning.py; LIGHTNINGDIT_AUTOTUNE=0: never). It may
            differ from machine to machine, and with it the last bits. Else "sdpa".
    Returns: (B, N, H*Dh) in qkv.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError for a shape, dtype, combination or backend other than these; ImportError for a backend that is not installed.
    Source: RoPE, arXiv:2104.09864; QK-norm, arXiv:2302.05442; axial 2-D form, EVA-02, arXiv:2303.11331.
    """
    op = "rope_attention"
    check_floating(op, qkv=qkv, freqs=freqs, q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias, bias=bias)
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
    check_shape(op, tuple(qkv.shape[2:]), "(3, H, Dh) of qkv", bias=bias)
    check_shape(op, (head_dim,), "(Dh,) of qkv", q_weight=q_weight, k_weight=k_weight, q_bias=q_bias, k_bias=k_bias)
    if backend not in BACKENDS:
        raise ValueError(f"{op}: backend is {backend!r}, expected one of {', '.join(BACKENDS)}")
    backend = _auto(qkv, positions, freqs, q_weight, q_bias, bias, center) if backend == "auto" else backend
    arguments = (qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center)
    if backend == "triton":
        return _triton(*arguments)
    return fused(*arguments) if backend == "native" else rope_attention_ref(*arguments, attend=_attend(backend))
