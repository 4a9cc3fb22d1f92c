"""The sums over partial results that the backwards of norm, swiglu and attention write, in one launch and in a fixed order.

A program owns COLUMNS columns. A row of its tile of ROWS x COLUMNS adds every ROWS-th row of the partial sums one after another, then
the rows of the tile are added: the order follows from shapes alone. Eight columns of fp32 are one sector: at XL/1 swiglu has 768 programs,
attention 432 and norm 432 for 132 multiprocessors, where torch.sum ran 48, 27 and 9 blocks. All of them are resident at once; with two of
a thread's loads under way, 16 bytes each, that is 26 KB and more in a multiprocessor, what L2 needs to be busy.
"""

import triton
import triton.language as tl
from torch import Tensor

from lightningdit_kernels.launch_triton import cdiv, fast_launch
from lightningdit_kernels.tuning import Config

SUMS = Config(dict(ROWS=128, COLUMNS=8, UNROLL=4), num_warps=8)
MAX_OUTPUTS = 4


@triton.jit
def add_rows(
    partial, rows, step, end, passes, columns, mask, INNER: tl.constexpr, OUTER_STRIDE: tl.constexpr, INNER_STRIDE: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    """A tile whose row r is the sum of rows r, r + step, ... below end, in this order: at most `passes` of them.

    Row k lies at k // INNER * OUTER_STRIDE + k % INNER * INNER_STRIDE. rows: [ROWS, 1]; end: the same, or one for all;
    columns, mask: [1, COLUMNS].
    """
    total = tl.zeros([rows.shape[0], columns.shape[1]], tl.float32)
    # Tiles of two axes: with one of three, for the UNROLL loads, triton 3.9 spreads them over lanes, and shuffles in the loop.
    for first in range(0, passes, UNROLL):
        for i in tl.static_range(UNROLL):
            row = rows + (first + i) * step
            at = (row // INNER).to(tl.int64) * OUTER_STRIDE + row % INNER * INNER_STRIDE
            total += tl.load(partial + at + columns, mask=(row < end) & mask, other=0.0)
    return total


@fast_launch
@triton.jit(do_not_specialize=["K"])
def _sum_kernel(
    partial, out_0, out_1, out_2, out_3, K, WIDTH: tl.constexpr, INNER: tl.constexpr, STRIDES: tl.constexpr, APART: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """out_i[group] = sum over k < K of partial[k // INNER, group, k % INNER, i], each of WIDTH columns. An output may be None.

    APART, unless 0: all outputs lie in out_0, as many values apart.
    """
    blocks: tl.constexpr = (WIDTH + COLUMNS - 1) // COLUMNS
    group, which = tl.program_id(0) // blocks, tl.program_id(1)
    columns = (tl.program_id(0) % blocks * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    mask = columns < WIDTH
    rows = tl.arange(0, ROWS)[:, None]
    partial += group * STRIDES[1] + which * STRIDES[3]
    tile = add_rows(partial, rows, ROWS, K, tl.cdiv(K, ROWS), columns, mask, INNER, STRIDES[0], STRIDES[2], UNROLL)
    total, own = tl.sum(tile, 0, keep_dims=True), group * WIDTH + columns
    if APART:
        tl.store(out_0 + which * APART + own, total.to(out_0.dtype.element_ty), mask=mask)
    elif which == 0:
        if out_0 is not None:
            tl.store(out_0 + own, total.to(out_0.dtype.element_ty), mask=mask)
    elif which == 1:
        if out_1 is not None:
            tl.store(out_1 + own, total.to(out_1.dtype.element_ty), mask=mask)
    elif which == 2:
        if out_2 is not None:
            tl.store(out_2 + own, total.to(out_2.dtype.element_ty), mask=mask)
    else:
        if out_3 is not None:
            tl.store(out_3 + own, total.to(out_3.dtype.element_ty), mask=mask)


def _constants(partial: Tensor, outputs: int) -> dict:
    """What the kernel is specialised on. The outer size is not: it grows with the batch."""
    apart = partial.shape[1] * partial.shape[4] if outputs < partial.shape[3] else 0
    return dict(WIDTH=partial.shape[4], INNER=max(1, partial.shape[2]), STRIDES=partial.stride()[:4], APART=apart)


def sum_partials(partial: Tensor, *outputs: Tensor | None) -> None:
    """Writes outputs[i] = partial[:, :, :, i].sum((0, 2)), rounded once to its dtype.

    partial: (outer, groups, inner, up to 4 outputs, columns), fp32, dense columns. outputs: contiguous, groups * columns values each, or
        one tensor that has them one after another.
    """
    outer, groups, inner, count, width = partial.shape
    complete = len(outputs) == count or len(outputs) == 1 and outputs[0].numel() == count * groups * width
    assert partial.stride(4) == 1 and complete and count <= MAX_OUTPUTS, (partial.shape, partial.stride(), len(outputs))
    if groups * count * width:
        grid = (groups * cdiv(width, SUMS.blocks["COLUMNS"]), count)
        padded = (*outputs, *(None for _ in range(MAX_OUTPUTS - len(outputs))))
        _sum_kernel[grid](partial, *padded, outer * inner, **_constants(partial, len(outputs)), **SUMS.launch())


def sum_case(name: str, partial: Tensor, outputs: tuple[str | None, ...], archs: tuple[int, ...] = (80, 90, 100)) -> dict:
    """A launch of sum_partials for audit_cases(). outputs: types of their pointers, such as "*fp32"."""
    types = dict(partial="*fp32", K="i32") | {f"out_{i}": kind for i, kind in enumerate(outputs)}
    absent = {f"out_{i}": None for i in range(MAX_OUTPUTS) if not types.get(f"out_{i}")}
    constexprs = absent | _constants(partial, len(outputs)) | SUMS.blocks
    signature = {name: "constexpr" if name in constexprs else types[name] for name in _sum_kernel.arg_names}
    return dict(
        name=name, kernel=_sum_kernel, signature=signature, constexprs=constexprs,
        divisible=[name for name, kind in signature.items() if kind.startswith("*")],
        num_warps=SUMS.num_warps, num_stages=SUMS.num_stages, archs=archs, kind="small",
    )  # fmt: skip
