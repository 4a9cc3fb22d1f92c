"""swiglu on CUDA: one pass over memory each way, the activation recomputed in the backward.

M rows (tokens of all samples), F hidden size. packed is (M, 2F), [gate | up], and may lack the bias (2F,) of the linear
layer that made it. The backward then also sums the gradient to packed over its rows: each program adds its own rows, a second kernel
(sums_triton) adds the programs in fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightningdit_kernels.launch_triton import cdiv, fast_launch, next_power_of_2
from lightningdit_kernels.plans_triton import planned
from lightningdit_kernels.sums_triton import sum_case, sum_partials
from lightningdit_kernels.tuning import Config, pick

# Shape class: columns of a program, 256 a warp, so that a lane holds one 16-byte vector of bf16 in each of its rows and the sums over rows
# stay inside a thread. Two rows at a time: the backward with sums then takes 96 to 107 registers, and four or five programs share a
# multiprocessor; four rows take 160. Where F is no multiple of 8 ("unaligned") accesses are narrow and take more addresses: one row at a
# time then, and 80 registers.
_WARPS = {16: 1, 32: 1, 64: 1, 128: 1, 256: 1, 512: 2, 1024: 4}
_ROWS = {"": (2, 4, 1), " unaligned": (1, 2)}
CONFIGS = {
    (80, f"{columns}{alignment}"): [Config(dict(ROWS=rows), warps) for rows in choices]
    for columns, warps in _WARPS.items()
    for alignment, choices in _ROWS.items()
}


@triton.jit
def _bias(bias, columns, START: tl.constexpr, F: tl.constexpr):
    """Columns START .. START + F of bias in fp32, [1, COLUMNS]; without one, zero."""
    if bias is None:
        tile = tl.full([1, 1], 0.0, tl.float32)
    else:
        tile = tl.load(bias + START + columns, mask=columns < F, other=0.0).to(tl.float32)
    return tile


@fast_launch
@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _swiglu_fwd_kernel(packed, bias, out, M, chunk_rows, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    first = (tl.program_id(0) // blocks).to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    gate_bias, up_bias = _bias(bias, columns, 0, F), _bias(bias, columns, F, F)
    packed += first * (2 * F)
    out += first * F
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < count) & (columns < F)
        gate = tl.load(packed + rows * (2 * F) + columns, mask=mask, other=0.0).to(tl.float32) + gate_bias
        up = tl.load(packed + rows * (2 * F) + F + columns, mask=mask, other=0.0).to(tl.float32) + up_bias
        tl.store(out + rows * F + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _swiglu_bwd_kernel(
    grad, packed, bias, grad_packed, partial, M, chunk_rows, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """d gate = grad * up * s * (1 + gate * (1 - s)), d up = grad * gate * s, s = sigmoid(gate); with bias, their sums over the chunk."""
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    chunk = tl.program_id(0) // blocks
    first = chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    gate_bias, up_bias = _bias(bias, columns, 0, F), _bias(bias, columns, F, F)
    gate_total, up_total = tl.zeros([1, COLUMNS], tl.float32), tl.zeros([1, COLUMNS], tl.float32)
    packed += first * (2 * F)
    grad_packed += first * (2 * F)
    grad += first * F
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < count) & (columns < F)
        at_gate, at_up = rows * (2 * F) + columns, rows * (2 * F) + F + columns
        gate = tl.load(packed + at_gate, mask=mask, other=0.0).to(tl.float32) + gate_bias
        up = tl.load(packed + at_up, mask=mask, other=0.0).to(tl.float32) + up_bias
        d = tl.load(grad + rows * F + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        silu = gate * sigmoid
        d_gate = d * up * (sigmoid + silu * (1.0 - sigmoid))
        d_up = d * silu
        tl.store(grad_packed + at_gate, d_gate.to(grad_packed.dtype.element_ty), mask=mask)
        tl.store(grad_packed + at_up, d_up.to(grad_packed.dtype.element_ty), mask=mask)
        if partial is not None:
            gate_total += tl.sum(d_gate, 0, keep_dims=True)
            up_total += tl.sum(d_up, 0, keep_dims=True)
    if partial is not None:
        tl.store(partial + chunk.to(tl.int64) * (2 * F) + columns, gate_total, mask=columns < F)
        tl.store(partial + chunk.to(tl.int64) * (2 * F) + F + columns, up_total, mask=columns < F)


def _columns(hidden: int) -> int:
    return min(1024, max(16, next_power_of_2(hidden)))


def _shape_class(hidden: int) -> str:
    return f"{_columns(hidden)}{' unaligned' if hidden % 8 else ''}"


def _chunks(rows: int, blocks: int, programs: int, least: int) -> tuple[int, int]:
    """(chunks, rows a chunk): about `programs` programs in all, of at least `least` rows."""
    size = max(least, cdiv(rows * blocks, programs))
    return cdiv(rows, size), size


def _launch(op: str, launch, like: Tensor, hidden: int, key: tuple):
    """Launching twice is harmless, since every output is overwritten."""
    launch(pick(op, CONFIGS, like.device, _shape_class(hidden), (hidden, *key), launch))


@planned
def swiglu_fwd(packed: Tensor, bias: Tensor | None, out_dtype: torch.dtype) -> Tensor:
    """Launches the forward on packed (..., 2F) and bias (2F,); returns (..., F)."""
    packed, F = packed.contiguous(), packed.shape[-1] // 2
    bias = None if bias is None else bias.contiguous()
    out = packed.new_empty((*packed.shape[:-1], F), dtype=out_dtype)
    M, columns = math.prod(packed.shape[:-1]), _columns(F)
    blocks = cdiv(F, columns)
    chunks, chunk_rows = _chunks(M, blocks, programs=4096, least=8)  # rows share one load of the bias

    def launch(config):
        grid = (chunks * blocks,)
        _swiglu_fwd_kernel[grid](packed, bias, out, M, chunk_rows, F=F, COLUMNS=columns, **config.launch())

    if out.numel():
        _launch("swiglu_fwd", launch, packed, F, (str(packed.dtype), str(out_dtype), bias is None))
    return out


@planned
def swiglu_bwd(grad: Tensor, packed: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Launches the backward: the gradients to packed and to bias."""
    grad, packed, F = grad.contiguous(), packed.contiguous(), grad.shape[-1]
    bias = None if bias is None else bias.contiguous()
    grad_packed = torch.empty_like(packed)
    M, columns = math.prod(packed.shape[:-1]), _columns(F)
    blocks = cdiv(F, columns)
    # About 1,024 programs, two waves of five on 132 multiprocessors; at M = 32,768, F = 3,072 the partial sums are 1 % of the bytes.
    chunks, chunk_rows = _chunks(M, blocks, programs=1024, least=16)
    partial = None if bias is None else packed.new_empty((chunks, 2 * F), dtype=torch.float32)

    def launch(config):
        grid = (chunks * blocks,)
        _swiglu_bwd_kernel[grid](grad, packed, bias, grad_packed, partial, M, chunk_rows, F=F, COLUMNS=columns, **config.launch())

    if grad.numel():
        _launch("swiglu_bwd", launch, packed, F, (str(packed.dtype), str(grad.dtype), bias is None))
    if bias is None:
        return grad_packed, None
    grad_bias = torch.empty_like(bias)
    sum_partials(partial.view(chunks, 1, 1, 1, 2 * F), grad_bias)
    return grad_packed, grad_bias


def audit_cases() -> list[dict]:
    """Every static configuration at the model's hidden sizes, S to 1p6B: bf16, without a bias and with one in fp32."""
    cases = []
    for hidden in (1024, 2048, 2730, 3072, 4096, 4778):
        config = CONFIGS[80, _shape_class(hidden)][0]
        constants = dict(F=hidden, COLUMNS=_columns(hidden), **config.blocks)
        common = dict(num_warps=config.num_warps, num_stages=config.num_stages, archs=(80, 90, 100), kind="memory")
        if hidden % 8:
            common |= dict(wide=False, reason=f"a row of {hidden} values of bf16 is no multiple of 16 bytes")
        sizes = dict(M="i32", chunk_rows="i32")
        forward = dict(packed="*bf16", out="*bf16", **sizes)
        backward = dict(grad="*bf16", packed="*bf16", grad_packed="*bf16", **sizes)
        for name, kernel, signature, rest in (
            ("fwd", _swiglu_fwd_kernel, forward, dict(bias=None)),
            ("fwd+bias", _swiglu_fwd_kernel, forward | dict(bias="*fp32"), {}),
            ("bwd", _swiglu_bwd_kernel, backward, dict(bias=None, partial=None)),
            ("bwd+bias", _swiglu_bwd_kernel, backward | dict(bias="*fp32", partial="*fp32"), {}),
        ):
            divisible = [argument for argument, kind in signature.items() if kind.startswith("*")]
            case = dict(name=f"swiglu_{name} F={hidden}", kernel=kernel, signature=signature, constexprs=constants | rest)
            cases.append(case | dict(divisible=divisible) | common)
        partial = torch.empty(1, 1, 1, 1, 2 * hidden, device="meta")
        cases.append(sum_case(f"swiglu_sum F={hidden}", partial, ("*fp32",)))
    return cases


def workloads(tokens: int = 32768, hidden: int = 3072) -> list[dict]:
    """What training launches, for lightningdit_kernels.traffic: XL/1."""
    packed, bias = torch.empty(tokens, 2 * hidden, dtype=torch.bfloat16), torch.empty(2 * hidden)
    grad = torch.empty(tokens, hidden, dtype=torch.bfloat16)
    return [
        dict(name="swiglu forward", launch=lambda: swiglu_fwd(packed, bias, packed.dtype), reads=(packed, bias), programs=3),
        dict(name="swiglu backward", launch=lambda: swiglu_bwd(grad, packed, bias), reads=(grad, packed, bias), programs=3),
    ]
