"""swiglu on CUDA: one pass over memory each way, the activation recomputed in the backward.

M rows (tokens of all samples), F hidden size. packed is (M, 2F), [gate | up]. The backward can also sum the gradient to packed over its
rows, which is the gradient to the bias of the linear layer that made packed: each program adds its own rows, a second pass adds
the programs in fixed order.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightningdit_kernels.tuning import Config, pick

# Shape class: columns of a program, 256 a warp, so that a lane holds one 16-byte vector of bf16 in each of its rows and the sums over rows
# stay inside a thread. Two rows at a time: the backward with sums then takes 94 registers on sm_90, and five programs share a
# multiprocessor; four rows take 160.
_WARPS = {16: 1, 32: 1, 64: 1, 128: 1, 256: 1, 512: 2, 1024: 4}
CONFIGS = {(80, str(columns)): [Config(dict(ROWS=rows), warps) for rows in (2, 4, 1)] for columns, warps in _WARPS.items()}


@triton.jit(do_not_specialize=["M"])
def _swiglu_fwd_kernel(packed, out, M, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr):
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    rows = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    mask = (rows < M) & (columns < F)
    gate = tl.load(packed + rows * (2 * F) + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(packed + rows * (2 * F) + F + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + rows * F + columns, (gate * tl.sigmoid(gate) * up).to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "chunk_rows"])
def _swiglu_bwd_kernel(
    grad, packed, grad_packed, partial, M, chunk_rows, F: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """d gate = grad * up * s * (1 + gate * (1 - s)), d up = grad * gate * s, s = sigmoid(gate); if partial, their sums over the chunk."""
    blocks: tl.constexpr = (F + COLUMNS - 1) // COLUMNS
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    chunk = tl.program_id(0) // blocks
    first = chunk.to(tl.int64) * chunk_rows
    count = tl.minimum(M - first, chunk_rows).to(tl.int32)
    gate_total, up_total = tl.zeros([1, COLUMNS], tl.float32), tl.zeros([1, COLUMNS], tl.float32)
    packed += first * (2 * F)
    grad_packed += first * (2 * F)
    grad += first * F
    for start in range(0, count, ROWS):
        rows = start + tl.arange(0, ROWS)[:, None]
        mask = (rows < count) & (columns < F)
        at_gate, at_up = rows * (2 * F) + columns, rows * (2 * F) + F + columns
        gate = tl.load(packed + at_gate, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(packed + at_up, mask=mask, other=0.0).to(tl.float32)
        d = tl.load(grad + rows * F + columns, mask=mask, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(gate)
        d_gate = d * up * sigmoid * (1.0 + gate * (1.0 - sigmoid))
        d_up = d * gate * sigmoid
        tl.store(grad_packed + at_gate, d_gate.to(grad_packed.dtype.element_ty), mask=mask)
        tl.store(grad_packed + at_up, d_up.to(grad_packed.dtype.element_ty), mask=mask)
        if partial is not None:
            gate_total += tl.sum(d_gate, 0, keep_dims=True)
            up_total += tl.sum(d_up, 0, keep_dims=True)
    if partial is not None:
        tl.store(partial + chunk.to(tl.int64) * (2 * F) + columns, gate_total, mask=columns < F)
        tl.store(partial + chunk.to(tl.int64) * (2 * F) + F + columns, up_total, mask=columns < F)


def _columns(hidden: int) -> int:
    return min(1024, max(16, triton.next_power_of_2(hidden)))


def _launch(op: str, launch, like: Tensor, hidden: int, key: tuple):
    """Launching twice is harmless, since every output is overwritten."""
    launch(pick(op, CONFIGS, like.device, str(_columns(hidden)), (hidden, *key), launch))


def swiglu_fwd(packed: Tensor, out_dtype: torch.dtype) -> Tensor:
    """Launches the forward on packed (..., 2F); returns (..., F)."""
    packed, F = packed.contiguous(), packed.shape[-1] // 2
    out = packed.new_empty((*packed.shape[:-1], F), dtype=out_dtype)
    M, columns = math.prod(packed.shape[:-1]), _columns(F)

    def launch(config):
        grid = (triton.cdiv(M, config.blocks["ROWS"]) * triton.cdiv(F, columns),)
        _swiglu_fwd_kernel[grid](packed, out, M, F=F, COLUMNS=columns, **config.launch())

    if out.numel():
        _launch("swiglu_fwd", launch, packed, F, (str(packed.dtype), str(out_dtype)))
    return out


def swiglu_bwd(grad: Tensor, packed: Tensor, bias: bool = False) -> tuple[Tensor, Tensor | None]:
    """Launches the backward: the gradient to packed and, with bias, its fp32 sum over rows (2F,), else None."""
    grad, packed, F = grad.contiguous(), packed.contiguous(), grad.shape[-1]
    grad_packed = torch.empty_like(packed)
    M, columns = math.prod(packed.shape[:-1]), _columns(F)
    # About 1,024 programs, two waves of five on 132 multiprocessors; at M = 32,768, F = 3,072 the partial sums are 1 % of the bytes.
    chunk_rows = max(16, triton.cdiv(M * triton.cdiv(F, columns), 1024))
    chunks = triton.cdiv(M, chunk_rows)
    partial = packed.new_empty((chunks, 2 * F), dtype=torch.float32) if bias else None

    def launch(config):
        grid = (chunks * triton.cdiv(F, columns),)
        _swiglu_bwd_kernel[grid](grad, packed, grad_packed, partial, M, chunk_rows, F=F, COLUMNS=columns, **config.launch())

    if grad.numel():
        _launch("swiglu_bwd", launch, packed, F, (str(packed.dtype), str(grad.dtype), bias))
    return grad_packed, partial.sum(0) if bias else None


def audit_cases() -> list[dict]:
    """Every static configuration at the model's hidden sizes (XL 3072, B 2048, S 1024), bf16."""
    cases = []
    for hidden in (3072, 2048, 1024):
        config = CONFIGS[80, str(_columns(hidden))][0]
        constants = dict(F=hidden, COLUMNS=_columns(hidden), **config.blocks)
        common = dict(num_warps=config.num_warps, num_stages=config.num_stages, archs=(80, 90, 100), kind="memory")
        forward = dict(packed="*bf16", out="*bf16", M="i32")
        backward = dict(grad="*bf16", packed="*bf16", grad_packed="*bf16", partial="*fp32", M="i32", chunk_rows="i32")
        for name, kernel, signature in (("fwd", _swiglu_fwd_kernel, forward), ("bwd", _swiglu_bwd_kernel, backward)):
            divisible = [argument for argument, kind in signature.items() if kind.startswith("*")]
            case = dict(name=f"swiglu_{name} F={hidden}", kernel=kernel, signature=signature, constexprs=constants, divisible=divisible)
            cases.append(case | common)
    return cases
