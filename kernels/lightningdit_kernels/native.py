"""ctypes bindings of the native CPU library (kernels/csrc), which CMake installs beside this file.

The functions take contiguous CPU tensors, write into tensors that the caller made, and use torch.get_num_threads() threads.
"""

import ctypes
import logging
from pathlib import Path

import torch

ABI_VERSION = 6
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # the numbers of common.h
LEVELS = {1: "baseline", 3: "AVX2", 4: "AVX-512"}
MISSING = "native_missing.txt"  # written by setup.py in place of a library that could not be built: why

_pointer, _size, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_float
_SIGNATURES = {
    "lightningdit_attention_scratch": [_size, _size, _int],
    "lightningdit_attention_forward": [_pointer] * 10 + [_size] * 4 + [_float] + [_int] * 4,
    "lightningdit_attention_backward": [_pointer] * 12 + [_size] * 4 + [_float] + [_int] * 4,
    "lightningdit_cosine_forward": [_pointer] * 4 + [_size] * 2 + [_float] * 2 + [_int] * 3,
    "lightningdit_cosine_backward": [_pointer] * 4 + [_size] * 2 + [_float] * 2 + [_int] * 3,
    "lightningdit_distance": [_pointer] * 8 + [_size] * 4 + [_float] * 2 + [_int] * 3,
    "lightningdit_gather_rows": [_pointer] * 2 + [_size] * 2 + [_int],
    "lightningdit_norm_forward": [_pointer] * 10 + [_size] * 3 + [_float] + [_int] * 4,
    "lightningdit_norm_backward": [_pointer] * 11 + [_size] * 3 + [_int] * 4,
    "lightningdit_groupnorm_forward": [_pointer] * 7 + [_size] * 4 + [_float] + [_int] * 4,
    "lightningdit_groupnorm_backward": [_pointer] * 9 + [_size] * 4 + [_int] * 4,
    "lightningdit_swiglu_forward": [_pointer] * 3 + [_size] * 2 + [_int] * 3,
    "lightningdit_swiglu_backward": [_pointer] * 5 + [_size] * 2 + [_int] * 3,
}


def _load(folder: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library of this folder, or None, and one line about it."""
    found = [path for path in sorted(folder.glob("liblightningdit_kernels.*")) if path.suffix in (".so", ".dylib", ".dll")]
    if not found:
        missing = folder / MISSING
        return None, missing.read_text().strip() if missing.is_file() else "the native library was never built here (pip install builds it)"
    try:
        library = ctypes.CDLL(str(found[0]))
    except OSError as error:
        return None, f"{found[0].name} does not load: {error}"
    version = library.lightningdit_abi_version()
    if version != ABI_VERSION:
        return None, f"{found[0].name} has ABI {version}, this package needs {ABI_VERSION}: install again"
    for name, arguments in _SIGNATURES.items():
        getattr(library, name).argtypes = arguments
    library.lightningdit_attention_scratch.restype = _size
    return library, f"{found[0].name}, {LEVELS[library.lightningdit_level()]}"


library, about = _load(Path(__file__).parent)


available = library is not None  # a plain bool, which torch.compile can read
if not available:
    logging.getLogger("lightningdit_kernels").warning("no native CPU kernels: %s; on CPU every op uses its plain PyTorch definition", about)


def serves(*dtypes: torch.dtype) -> bool:
    """Whether the library is there and knows these dtypes; bf16 and fp16 do not meet in one kernel."""
    both = torch.bfloat16 in dtypes and torch.float16 in dtypes
    return available and not both and all(dtype in DTYPES for dtype in dtypes)


NORM_CHUNK = 32  # tokens, as in norm.h


def norm_forward(x, y, gate, scale, shift, weight, bias, eps, center, out_dtype):
    """What norm.norm_forward_ref computes. The (B, D) vectors are brought to fp32 here: they are N times smaller than x."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    gate, factor = _or_constant(gate, 1, scale.shape), _factor(scale, weight)
    shift, bias = _or_constant(shift, 0, scale.shape), _or_constant(bias, 0, scale.shape[1:])
    residual, h = None if y is None else torch.empty_like(x), torch.empty_like(x, dtype=out_dtype)
    rstd = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    mean = torch.empty_like(rstd) if center else None
    tensors = x, y, bias, gate, factor, shift, residual, h, mean, rstd
    dtypes = DTYPES[x.dtype], 0 if y is None else DTYPES[y.dtype], DTYPES[out_dtype]
    _run("lightningdit_norm_forward", *map(_address, tensors), *x.shape, eps, *dtypes)
    return x if y is None else residual, h, mean, rstd


def norm_backward(grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype, shift_dtype):
    """What norm.norm_backward_ref computes. branch_dtype is y's where both are given."""
    residual, grad_h = residual.contiguous(), grad_h.contiguous()
    (B, N, D), chunks = residual.shape, -(-residual.shape[1] // NORM_CHUNK)
    grad_residual = None if grad_residual is None else grad_residual.contiguous()
    y = None if y is None else y.contiguous()
    dx = torch.empty_like(residual)
    y_dtype = branch_dtype if y is None else y.dtype
    if bias is not None and y_dtype is None:
        y_dtype = residual.dtype  # the kernel sums for the bias where it writes dy
    dy = None if y_dtype is None else torch.empty_like(residual, dtype=y_dtype)
    sums = residual.new_empty((B, chunks, 4, D), dtype=torch.float32)
    gates, factor = _or_constant(gate, 1, scale.shape), _factor(scale, weight)
    tensors = grad_residual, grad_h, residual, y, gates, factor, mean, rstd, dx, dy, sums
    dtypes = DTYPES[residual.dtype], 0 if dy is None else DTYPES[dy.dtype], DTYPES[grad_h.dtype]
    _run("lightningdit_norm_backward", *map(_address, tensors), B, N, D, *dtypes)
    by_scale, by_shift, by_branch, by_gate = sums.sum(1).unbind(1)  # views, to be copied: results of an operator must not share memory
    if bias is not None:  # sum dx * (y + bias) in two parts
        by_gate = torch.addcmul(by_gate, bias.float(), by_branch)
    return (
        dx,
        None if branch_dtype is None else dy,
        None if y is None else by_gate.to(gate.dtype, copy=bias is None, memory_format=torch.contiguous_format),
        _own(by_scale, scale.dtype) if weight is None else (by_scale * weight.float()).to(scale.dtype),
        None if shift_dtype is None else _own(by_shift, shift_dtype),
        None if weight is None else (by_scale * (1 + scale.float())).sum(0).to(weight.dtype),
        None if bias is None else (gates * by_branch).sum(0).to(bias.dtype),
    )


def _own(view, dtype):
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _or_constant(vector, constant, shape):
    """A vector in fp32; a missing one as a constant, so that the kernel needs no variants."""
    return torch.full(shape, constant, dtype=torch.float32) if vector is None else vector.float().contiguous()


def _factor(scale, weight):
    factor = 1 + scale.float()
    return (factor if weight is None else factor * weight.float()).contiguous()


def _address(tensor):
    return None if tensor is None else tensor.data_ptr()


def attention_forward(qkv, table, bias, q_weight, k_weight, q_bias, k_bias, eps, center, out, lse) -> None:
    """out (B, N, H*Dh) and lse (B, H, N) of packed qkv (B, N, 3, H, Dh); table (N, Dh/2, 2) and the parameters in fp32."""
    tensors = qkv, table, bias, q_weight, k_weight, q_bias, k_bias, out, lse, _attention_scratch(qkv, False)
    _run("lightningdit_attention_forward", *map(_address, tensors), *_head_sizes(qkv), eps, center, DTYPES[qkv.dtype], DTYPES[out.dtype])


def attention_backward(grad, qkv, lse, table, bias, q_weight, k_weight, q_bias, k_bias, eps, center, grad_qkv, sums) -> None:
    """grad_qkv, and sums (B, H, 7, Dh): over tokens, the gradients of q_weight, q_bias, k_weight, k_bias, and of bias for q, k, v."""
    tensors = grad, qkv, lse, table, bias, q_weight, k_weight, q_bias, k_bias, grad_qkv, sums, _attention_scratch(qkv, True)
    _run("lightningdit_attention_backward", *map(_address, tensors), *_head_sizes(qkv), eps, center, DTYPES[qkv.dtype], DTYPES[grad.dtype])


def _head_sizes(qkv):
    return qkv.shape[0], qkv.shape[1], qkv.shape[3], qkv.shape[4]


def _attention_scratch(qkv, backward):
    floats = library.lightningdit_attention_scratch(qkv.shape[1], qkv.shape[4], backward)
    return qkv.new_empty((torch.get_num_threads(), floats), dtype=torch.float32)


def group_norm_silu_forward(x, weight, bias, out, mean, rstd, num_groups: int, eps: float, channels_last: bool) -> None:
    """out, mean and rstd (B, G) of x (B, C, H, W), dense in the stated format, and weight and bias (C,) in fp32."""
    scratch = _group_norm_scratch(x, channels_last)
    pointers = [tensor.data_ptr() for tensor in (x, weight, bias, out, mean, rstd, scratch)]
    _run("lightningdit_groupnorm_forward", *pointers, *_image_sizes(x), num_groups, eps, channels_last, DTYPES[x.dtype], DTYPES[out.dtype])


def group_norm_silu_backward(grad, x, weight, bias, mean, rstd, grad_x, sums, num_groups: int, channels_last: bool) -> None:
    """grad_x, and sums (2, B, C): of dy and of dy * x_hat over the pixels, dy the gradient to the norm's result."""
    scratch = _group_norm_scratch(x, channels_last)
    if not channels_last and x.dtype != torch.float32:
        scratch = x.new_empty(torch.get_num_threads() * (x[:1].numel() // num_groups), dtype=torch.float32)
    pointers = [tensor.data_ptr() for tensor in (grad, x, weight, bias, mean, rstd, grad_x, sums, scratch)]
    _run("lightningdit_groupnorm_backward", *pointers, *_image_sizes(x), num_groups, channels_last, DTYPES[grad.dtype], DTYPES[x.dtype])


def _image_sizes(x):
    return x.shape[0], x.shape[1], x.shape[2] * x.shape[3]


def _group_norm_scratch(x, channels_last):
    batch, channels, pixels = _image_sizes(x)
    chunks = -(-pixels // 64)  # of LIGHTNINGDIT_GROUPNORM_CHUNK
    return x.new_empty(batch * (2 * chunks + 4) * channels if channels_last else 0, dtype=torch.float32)


def swiglu_forward(packed, bias, out_dtype):
    """What swiglu.swiglu_ref computes."""
    packed, hidden = packed.contiguous(), packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], hidden), dtype=out_dtype)
    rows = out.numel() // hidden if hidden else 0
    tensors = packed, _or_constant(bias, 0, packed.shape[-1:]), out
    _run("lightningdit_swiglu_forward", *map(_address, tensors), rows, hidden, DTYPES[packed.dtype], DTYPES[out_dtype])
    return out


SWIGLU_CHUNK = 32  # rows, as in swiglu.h


def swiglu_backward(grad, packed, bias):
    """What swiglu.swiglu_backward_ref computes."""
    grad, packed, hidden = grad.contiguous(), packed.contiguous(), grad.shape[-1]
    rows = grad.numel() // hidden if hidden else 0
    grad_packed = torch.empty_like(packed)
    sums = None if bias is None else packed.new_empty((-(-rows // SWIGLU_CHUNK), 2 * hidden), dtype=torch.float32)
    tensors = grad, packed, _or_constant(bias, 0, packed.shape[-1:]), grad_packed, sums
    _run("lightningdit_swiglu_backward", *map(_address, tensors), rows, hidden, DTYPES[grad.dtype], DTYPES[packed.dtype])
    return grad_packed, None if bias is None else sums.sum(0).to(bias.dtype)


def gather_rows(addresses, out) -> None:
    """out (n, K) from n rows in memory, of as many bytes each, that begin at addresses (n,) int64. The caller answers for what is there."""
    bytes_per_row = out.nbytes // len(out) if len(out) else 0
    threads = max(1, min(torch.get_num_threads(), out.nbytes >> 21))  # of 2 MiB each: few threads are enough to fill the memory's bandwidth
    code = library.lightningdit_gather_rows(addresses.data_ptr(), out.data_ptr(), len(out), bytes_per_row, threads)
    assert code == 0, f"lightningdit_gather_rows returned {code}"


def marginal_cosine_loss(z, f, margin: float, eps: float):
    """The loss of z and f (B, N, C), a scalar in fp32."""
    z, f, rows = z.contiguous(), f.contiguous(), z.shape[0] * z.shape[1]
    loss, partial = z.new_empty((), dtype=torch.float32), z.new_empty(-(-rows // 64), dtype=torch.float64)  # LIGHTNINGDIT_ALIGNMENT_CHUNK
    pointers = map(_address, (z, f, partial, loss))
    _run("lightningdit_cosine_forward", *pointers, rows, z.shape[2], 1 - margin, eps, DTYPES[z.dtype], DTYPES[f.dtype])
    return loss


def marginal_cosine_loss_backward(grad, z, f, margin: float, eps: float):
    """The gradient to z, in z.dtype, of grad, a scalar in fp32."""
    z, f, grad_z = z.contiguous(), f.contiguous(), torch.empty_like(z, memory_format=torch.contiguous_format)
    pointers = map(_address, (grad, z, f, grad_z))
    rows, width = z.shape[0] * z.shape[1], z.shape[2]
    _run("lightningdit_cosine_backward", *pointers, rows, width, 1 - margin, eps, DTYPES[z.dtype], DTYPES[f.dtype])
    return grad_z


def marginal_distance_matrix_loss(z, f, margin: float, eps: float, gradient: bool):
    """The loss of z (B, N, C) and f (B, N, E), both inverse norms (B, N), and the gradient to z (B, N, C) or None; all fp32."""
    z, f, (batch, tokens, width) = z.contiguous(), f.contiguous(), z.shape
    z_inverse, f_inverse = (x.new_empty((batch, tokens), dtype=torch.float32) for x in (z, f))
    grad_z = torch.empty_like(z, dtype=torch.float32) if gradient else None
    padded, z_rows, f_rows = -(-tokens // 32) * 32, -(-width // 8) * 8, -(-f.shape[2] // 8) * 8  # to ..._ALIGNMENT_PANEL and _ROWS
    images = 1 if batch < torch.get_num_threads() else torch.get_num_threads()
    scratch = z.new_empty(images * padded * (z_rows + f_rows + (z_rows + 2 * 32 + 1 if gradient else 0)), dtype=torch.float32)
    loss, partial = z.new_empty((), dtype=torch.float32), z.new_empty(batch * padded // 8, dtype=torch.float64)
    pointers = map(_address, (z, f, z_inverse, f_inverse, grad_z, loss, partial, scratch))
    sizes, dtypes = (batch, tokens, width, f.shape[2]), (DTYPES[z.dtype], DTYPES[f.dtype])
    _run("lightningdit_distance", *pointers, *sizes, margin, eps, *dtypes)
    return loss, z_inverse, f_inverse, grad_z


def _run(name: str, *arguments) -> None:
    code = getattr(library, name)(*arguments, torch.get_num_threads())
    assert code == 0, f"{name} returned {code} for {arguments}"
