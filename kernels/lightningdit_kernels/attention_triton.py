"""rope_attention on CUDA: flash attention that rotates and normalises q and k itself, forward and backward, without atomics.

B batch, N tokens, H heads, D head dimension; q, k, v and their gradients stay packed as (B, N, 3, H, D), so nothing is transposed.

D is computed as D0 + D1 channels, D0 the largest power of two in D and D1 a padded tail: 72 as 64 + 16, where one block of 128 would
cost 1.6 times the matrix instructions. N, D and with them all strides are constexpr: head offsets of 72 elements are 16-byte aligned,
which Triton can prove only of constants. A number of tokens is compiled once; nothing depends on the batch.

Two ways to the rotated q and k. Up to RESIDENT_TOKENS each program of the forward makes its own from raw qkv: at 256 tokens a key is used
by one or two programs, and a kernel of its own would move 8 more bytes per element. Beyond, every block of keys would be remade by
N / BLOCK_M programs, so one prologue writes q' and k' and the loops load only matrix operands. The backward of two passes always has this
prologue, which then also writes what each query subtracts: rotating next to its accumulators spills, and takes more instructions.

cos and sin lie in one table (N, D/2, 2), interleaved so that a tile of it lies in registers just as the tile that it turns; for bf16 it is
fp16, with an eighth of bf16's error. One small kernel makes it from positions and frequencies, along with the first token that has the same
row, or column, as each. Lines are read through these: of a 16 x 16 grid 32 half lines, 2.3 KB at D = 72, are all that ever enters the first
cache, and any other positions are right too, whole numbers or not, without a look at them from the host. The prologue, which only moves
memory, reads each token's own line instead: at D = 72 an axis ends inside 16 bytes. Angles made inside the attention kernels would be 74 %
more instructions in the forward's loop on sm_90 (1,330 against 766 with whole lines of the table and 829 so) and spill in the backward.

The bias of the linear layer before is added where q and k are made. v's is added to the result, since the weights of a row sum to one, and
taken out of delta again. All its gradients are column sums of what the backward writes anyway.

The backward is one kernel of two passes, dK and dV of a block of keys, then dQ of the same block of queries: seven products instead of
five, for which no sum crosses programs. On sm_90, at 256 tokens and without QK-norm, one program holds a whole head instead: it rotates
once, takes five products, and moves the op's own bytes only. P is recomputed from lse. Gradients of the QK-norm and of the bias are sums
per program, added in a fixed order.
"""

import functools
import math

import torch
import triton
import triton.language as tl

from lightningdit_kernels.graph_triton import placeholder
from lightningdit_kernels.launch_triton import cdiv, fast_launch, next_power_of_2
from lightningdit_kernels.plans_triton import planned
from lightningdit_kernels.sums_triton import sum_case, sum_partials
from lightningdit_kernels.tuning import Config, pick

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RESIDENT_TOKENS = 256
SHORT_TOKENS = 128  # up to here the forward takes blocks of 64 queries: of one for 256 tokens half or more would be padding
MAX_HEAD_DIM = 256


@triton.jit
def _load(
    base, rows, N: tl.constexpr, STRIDE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, END: tl.constexpr, EVEN_N: tl.constexpr
):
    """Columns START to START + WIDTH of the given rows; 0 beyond column END and row N."""
    columns = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    if EVEN_N:
        if START + WIDTH <= END:
            tile = tl.load(pointers)
        else:
            tile = tl.load(pointers, mask=(columns < END)[None, :], other=0.0)
    else:
        if START + WIDTH <= END:
            tile = tl.load(pointers, mask=(rows < N)[:, None], other=0.0)
        else:
            tile = tl.load(pointers, mask=(rows < N)[:, None] & (columns < END)[None, :], other=0.0)
    return tile


@triton.jit
def _load_pair(
    base, rows, N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr
):
    """Main part and tail of the given rows. Without a tail the second is the first again, and nobody uses it."""
    x0 = _load(base, rows, N, STRIDE, 0, D0, D, EVEN_N)
    x1 = x0
    if D1 > 0:
        x1 = _load(base, rows, N, STRIDE, D0, D1, D, EVEN_N)
    return x0, x1


@triton.jit
def _store(base, rows, N: tl.constexpr, x, STRIDE: tl.constexpr, START: tl.constexpr, END: tl.constexpr, EVEN_N: tl.constexpr):
    WIDTH: tl.constexpr = x.shape[1]
    columns = START + tl.arange(0, WIDTH)
    pointers = base + rows[:, None] * STRIDE + columns[None, :]
    x = x.to(base.dtype.element_ty)
    if EVEN_N:
        if START + WIDTH <= END:
            tl.store(pointers, x)
        else:
            tl.store(pointers, x, mask=(columns < END)[None, :])
    else:
        tl.store(pointers, x, mask=(rows < N)[:, None] & (columns < END)[None, :])


@triton.jit
def _store_pair(
    base, rows, N: tl.constexpr, x0, x1, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EVEN_N: tl.constexpr
):
    _store(base, rows, N, x0, STRIDE, 0, D, EVEN_N)
    if D1 > 0:
        _store(base, rows, N, x1, STRIDE, D0, D, EVEN_N)


@triton.jit
def _load_rows(pointer, rows, N: tl.constexpr, OTHER: tl.constexpr, EVEN_N: tl.constexpr):
    if EVEN_N:
        values = tl.load(pointer + rows)
    else:
        values = tl.load(pointer + rows, mask=rows < N, other=OTHER)
    return values


@triton.jit
def _load_axis(places, rows, AXIS: tl.constexpr, N: tl.constexpr, EVEN_N: tl.constexpr):
    """Row (AXIS 0) or column (1) of the given tokens, from (N, 2)."""
    if EVEN_N:
        values = tl.load(places + 2 * rows + AXIS)
    else:
        values = tl.load(places + 2 * rows + AXIS, mask=rows < N, other=0)
    return values


@triton.jit
def _sine_cosine(x):
    """sin and cos in fp32 to 2 ulp for |x| up to 10^5, in plain arithmetic: no slow path with a stack, no approximate unit.

    Cody and Waite's reduction by multiples of pi/2, whose first two parts times such a multiple are exact; then Cephes' polynomials.
    """
    turns = tl.floor(x * 0.6366197723675814 + 0.5)
    x = ((x - turns * 1.5703125) - turns * 4.837512969970703e-4) - turns * 7.549789954891884e-8
    square = x * x
    sine = ((-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1) * square * x + x
    cosine = ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2) * square * square - 0.5 * square + 1.0
    quadrant = turns.to(tl.int32)
    swap = (quadrant & 1) != 0
    out_sine, out_cosine = tl.where(swap, cosine, sine), tl.where(swap, sine, cosine)
    return tl.where((quadrant & 2) != 0, -out_sine, out_sine), tl.where(((quadrant + 1) & 2) != 0, -out_cosine, out_cosine)


@triton.jit
def _angles(
    positions, freqs, rows, N: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, EVEN_N: tl.constexpr
):
    """Angles of the pairs of channels START to START + WIDTH: the first half of D turns with the row, the second with the column."""
    pairs = START // 2 + tl.arange(0, WIDTH // 2)
    by_row = pairs < D // 4
    freq = tl.load(freqs + tl.where(by_row, pairs, pairs - D // 4), mask=pairs < D // 2, other=0.0).to(tl.float32)
    row = _load_axis(positions, rows, 0, N, EVEN_N).to(tl.float32)
    column = _load_axis(positions, rows, 1, N, EVEN_N).to(tl.float32)
    return tl.where(by_row[None, :], row[:, None], column[:, None]) * freq[None, :]


@triton.jit
def _rotate(
    x, lines, table, rows,
    N: tl.constexpr, SIGN: tl.constexpr, START: tl.constexpr, D: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """Turns the pairs (2i, 2i+1) of x, whose first channel is START, by SIGN times their angles. A pair lies in one thread: no shuffle.

    lines: few lines of the table serve all tokens, and stay in L1. None: each token reads its own, in accesses of 16 bytes whatever D.
    """
    ROWS: tl.constexpr = x.shape[0]
    WIDTH: tl.constexpr = x.shape[1]
    if lines is None:
        angles = _load(table, rows, N, D, START, WIDTH, D, EVEN_N)
    else:
        columns = START + tl.arange(0, WIDTH)
        line, column_line = _load_axis(lines, rows, 0, N, EVEN_N)[:, None], _load_axis(lines, rows, 1, N, EVEN_N)[:, None]
        pointers = table + tl.where((columns < D // 2)[None, :], line, column_line) * D + columns[None, :]
        if START + WIDTH <= D:
            angles = tl.load(pointers)
        else:
            angles = tl.load(pointers, mask=(columns < D)[None, :], other=0.0)
    cos, sin = tl.split(tl.reshape(angles.to(tl.float32), [ROWS, WIDTH // 2, 2]))
    even, odd = tl.split(tl.reshape(x, [ROWS, WIDTH // 2, 2]))
    sin = SIGN * sin
    return tl.reshape(tl.join(even * cos - odd * sin, odd * cos + even * sin), [ROWS, WIDTH])


@triton.jit
def _vector(pointer, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    columns = START + tl.arange(0, WIDTH)
    return tl.load(pointer + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def _add_vector(x0, x1, pointer, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    x0 = x0 + _vector(pointer, 0, D0, D)[None, :]
    if D1 > 0:
        x1 = x1 + _vector(pointer, D0, D1, D)[None, :]
    return x0, x1


@triton.jit
def _centred(x, mean, START: tl.constexpr, D: tl.constexpr):
    columns = START + tl.arange(0, x.shape[1])
    return tl.where((columns < D)[None, :], x - mean[:, None], 0.0)


@triton.jit
def _standardise(x0, x1, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, EPS: tl.constexpr, CENTER: tl.constexpr):
    """x / rms(x), with CENTER after subtracting the mean; and the factor rstd. Padding stays 0."""
    if CENTER:
        total = tl.sum(x0, 1)
        if D1 > 0:
            total += tl.sum(x1, 1)
        mean = total / D
        x0 = _centred(x0, mean, 0, D)
        if D1 > 0:
            x1 = _centred(x1, mean, D0, D)
    squares = tl.sum(x0 * x0, 1)
    if D1 > 0:
        squares += tl.sum(x1 * x1, 1)
    rstd = tl.rsqrt(squares / D + EPS)
    x0 = x0 * rstd[:, None]
    if D1 > 0:
        x1 = x1 * rstd[:, None]
    return x0, x1, rstd


@triton.jit
def _rotated(
    base, bias, lines, table, weight, norm_bias, rows,
    N: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BIASED: tl.constexpr,
    CENTER: tl.constexpr, ROPE: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """q' or k' of raw q or k: the linear layer's bias, QK-norm, then RoPE, in fp32."""
    x0, x1 = _load_pair(base, rows, N, STRIDE, D, D0, D1, EVEN_N)
    if BIASED or NORM or ROPE:
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
    if BIASED:
        x0, x1 = _add_vector(x0, x1, bias, D, D0, D1)
    if NORM:
        x0, x1, _ = _standardise(x0, x1, D, D0, D1, EPS, CENTER)
        x0 = x0 * _vector(weight, 0, D0, D)[None, :]
        if D1 > 0:
            x1 = x1 * _vector(weight, D0, D1, D)[None, :]
        if NORM_BIAS:
            x0, x1 = _add_vector(x0, x1, norm_bias, D, D0, D1)
    if ROPE:
        x0 = _rotate(x0, lines, table, rows, N, 1, 0, D, EVEN_N)
        if D1 > 0:
            x1 = _rotate(x1, lines, table, rows, N, 1, D0, D, EVEN_N)
    return x0, x1


@triton.jit
def _query_or_key(
    qkv, prepared, bias, lines, table, weight, norm_bias, rows,
    N: tl.constexpr, WHICH: tl.constexpr,
    H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    DTYPE: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BIASED: tl.constexpr,
    CENTER: tl.constexpr, ROPE: tl.constexpr,
    PREPARED: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """q' (WHICH = 0) or k' (1) of one head as an operand of a matrix product, loaded from the prologue's result or made here."""
    if PREPARED:
        x0, x1 = _load_pair(prepared + WHICH * H * D, rows, N, 2 * H * D, D, D0, D1, EVEN_N)
    else:
        x0, x1 = _rotated(
            qkv + WHICH * H * D, bias + WHICH * H * D, lines, table, weight, norm_bias, rows,
            N, 3 * H * D, D, D0, D1, EPS, NORM, NORM_BIAS, BIASED, CENTER, ROPE, EVEN_N,
        )  # fmt: skip
    return x0.to(DTYPE), x1.to(DTYPE)


@triton.jit
def _dot(a, b, total, PRECISION: tl.constexpr):
    """total + a b in fp32. Triton's interpreter would multiply the bits of bf16; fp32 holds the same products exactly."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)


@triton.jit
def _scores(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a b^T over the channels of main part and tail; the tail first, so that the long product accumulates onto the short one."""
    if D1 > 0:
        product = _dot(a1, tl.trans(b1), None, PRECISION)
        product = _dot(a0, tl.trans(b0), product, PRECISION)
    else:
        product = _dot(a0, tl.trans(b0), None, PRECISION)
    return product


@triton.jit
def _rowsum_product(a0, a1, b0, b1, D1: tl.constexpr):
    total = tl.sum(a0.to(tl.float32) * b0.to(tl.float32), 1)
    if D1 > 0:
        total += tl.sum(a1.to(tl.float32) * b1.to(tl.float32), 1)
    return total


@triton.jit
def _store_row_terms(
    ROWS, LSE, out, bias, line, rows, g0, g1,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, SCALE: tl.constexpr,
    BIASED: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """ROWS (B, H, 2, N): what each query subtracts, lse in base 2, and delta = rowsum(dO * (O - b)) times SCALE, b the bias of v: dO . b is
    in every dO . v too, and what the softmax passes back is their difference."""
    o0, o1 = _load_pair(out, rows, N, H * D, D, D0, D1, EVEN_N)
    if BIASED:
        o0, o1 = o0.to(tl.float32) - _vector(bias, 0, D0, D)[None, :], o1.to(tl.float32)
        if D1 > 0:
            o1 = o1 - _vector(bias, D0, D1, D)[None, :]
    tl.store(ROWS + 2 * line + rows, _load_rows(LSE + line, rows, N, 0.0, EVEN_N) * LOG2E, mask=rows < N)
    tl.store(ROWS + 2 * line + N + rows, _rowsum_product(o0, o1, g0, g1, D1) * SCALE, mask=rows < N)


@triton.jit
def _block_of_head(N: tl.constexpr, H: tl.constexpr, BLOCK: tl.constexpr):
    """Sample, head and rows of this program: the blocks of a head are neighbours, because they share its keys and values."""
    pid, blocks = tl.program_id(0), tl.cdiv(N, BLOCK)
    return (pid // blocks // H).to(tl.int64), (pid // blocks) % H, (pid % blocks) * BLOCK + tl.arange(0, BLOCK)


@fast_launch
@triton.jit
def _rope_table_kernel(
    POSITIONS, FREQS, TABLE, LINES,
    N: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """TABLE (N, D): cos and sin, side by side, of every angle. LINES (N, 2): the first token of the same row, and of the same column."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    sin, cos = _sine_cosine(_angles(POSITIONS, FREQS, rows, N, 0, D0, D, EVEN_N))
    _store(TABLE, rows, N, tl.reshape(tl.join(cos, sin), [BLOCK, D0]), D, 0, D, EVEN_N)
    if D1 > 0:
        sin, cos = _sine_cosine(_angles(POSITIONS, FREQS, rows, N, D0, D1, D, EVEN_N))
        _store(TABLE, rows, N, tl.reshape(tl.join(cos, sin), [BLOCK, D1]), D, D0, D, EVEN_N)
    for axis in tl.static_range(2):
        own, first = _load_axis(POSITIONS, rows, axis, N, EVEN_N), rows  # NaN equals nothing: it keeps its own line
        for start in range(0, N, CHUNK):
            others = start + tl.arange(0, CHUNK)
            same = own[:, None] == _load_axis(POSITIONS, others, axis, N, N % CHUNK == 0)[None, :]
            first = tl.minimum(first, tl.min(tl.where(same & (others < N)[None, :], others[None, :], N), 1))
        tl.store(LINES + 2 * rows + axis, first, mask=rows < N)


@fast_launch
@triton.jit
def _rope_attention_prologue_kernel(
    QKV, BIAS, TABLE, Q_WEIGHT, K_WEIGHT, Q_BIAS, K_BIAS, OUT, GRAD, LSE, PREPARED, ROWS,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BIASED: tl.constexpr, CENTER: tl.constexpr, ROPE: tl.constexpr,
    WITH_ROWS: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """PREPARED (B, N, 2, H, D) = q', k'; in the backward also ROWS, see _store_row_terms. A program: BLOCK tokens of a head."""
    pid = tl.program_id(0)
    head, blocks = pid % H, tl.cdiv(N, BLOCK)  # neighbours share the tokens, whose heads lie side by side in memory
    block, sample = (pid // H) % blocks, (pid // H // blocks).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    qkv = QKV + sample * N * (3 * H * D) + head * D
    prepared = PREPARED + sample * N * (2 * H * D) + head * D
    bias = BIAS + head * D
    q0, q1 = _rotated(
        qkv, bias, None, TABLE, Q_WEIGHT, Q_BIAS, rows,
        N, 3 * H * D, D, D0, D1, EPS, NORM, NORM_BIAS, BIASED, CENTER, ROPE, EVEN_N,
    )  # fmt: skip
    _store_pair(prepared, rows, N, q0, q1, 2 * H * D, D, D0, D1, EVEN_N)
    k0, k1 = _rotated(
        qkv + H * D, bias + H * D, None, TABLE, K_WEIGHT, K_BIAS, rows,
        N, 3 * H * D, D, D0, D1, EPS, NORM, NORM_BIAS, BIASED, CENTER, ROPE, EVEN_N,
    )  # fmt: skip
    _store_pair(prepared + H * D, rows, N, k0, k1, 2 * H * D, D, D0, D1, EVEN_N)
    if WITH_ROWS:
        offset = sample * N * (H * D) + head * D
        g0, g1 = _load_pair(GRAD + offset, rows, N, H * D, D, D0, D1, EVEN_N)
        line = (sample * H + head) * N
        _store_row_terms(ROWS, LSE, OUT + offset, bias + 2 * H * D, line, rows, g0, g1, N, H, D, D0, D1, SCALE, BIASED, EVEN_N)


@fast_launch
@triton.jit
def _rope_attention_fwd_kernel(
    QKV, PREPARED_QK, BIAS, LINES, TABLE, Q_WEIGHT, K_WEIGHT, Q_BIAS, K_BIAS, OUT, LSE,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    SCALE: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BIASED: tl.constexpr, CENTER: tl.constexpr, ROPE: tl.constexpr,
    PREPARED: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_M queries of one head against all its keys. OUT (B, N, H*D), LSE (B, H, N) in natural logarithms."""
    sample, head, rows = _block_of_head(N, H, BLOCK_M)
    dtype: tl.constexpr = OUT.dtype.element_ty
    qkv, bias = QKV + sample * N * (3 * H * D) + head * D, BIAS + head * D
    prepared = PREPARED_QK + sample * N * (2 * H * D) + head * D
    q0, q1 = _query_or_key(
        qkv, prepared, bias, LINES, TABLE, Q_WEIGHT, Q_BIAS, rows,
        N, 0, H, D, D0, D1, dtype, EPS, NORM, NORM_BIAS, BIASED, CENTER, ROPE, PREPARED, EVEN_N,
    )  # fmt: skip
    highest = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    o0 = tl.zeros([BLOCK_M, D0], tl.float32)
    if D1 > 0:
        o1 = tl.zeros([BLOCK_M, D1], tl.float32)
    for start in range(0, N, BLOCK_N):
        keys = start + tl.arange(0, BLOCK_N)
        k0, k1 = _query_or_key(
            qkv, prepared, bias, LINES, TABLE, K_WEIGHT, K_BIAS, keys,
            N, 1, H, D, D0, D1, dtype, EPS, NORM, NORM_BIAS, BIASED, CENTER, ROPE, PREPARED, EVEN_N,
        )  # fmt: skip
        s = _scores(q0, q1, k0, k1, D1, PRECISION)
        if not EVEN_N:
            s = tl.where((keys < N)[None, :], s, -float("inf"))
        new = tl.maximum(highest, tl.max(s, 1) * SCALE)
        p = tl.exp2(s * SCALE - new[:, None])
        shrink = tl.exp2(highest - new)
        total = total * shrink + tl.sum(p, 1)
        highest = new
        p = p.to(dtype)
        v0, v1 = _load_pair(qkv + 2 * H * D, keys, N, 3 * H * D, D, D0, D1, EVEN_N)
        o0 = _dot(p, v0.to(dtype), o0 * shrink[:, None], PRECISION)
        if D1 > 0:
            o1 = _dot(p, v1.to(dtype), o1 * shrink[:, None], PRECISION)
    inverse = (1.0 / total)[:, None]
    o0 = o0 * inverse
    o1 = o0 if D1 == 0 else o1 * inverse
    if BIASED:  # the weights of a row sum to one: the bias of v is the bias of the result
        o0, o1 = _add_vector(o0, o1, bias + 2 * H * D, D, D0, D1)
    _store_pair(OUT + sample * N * (H * D) + head * D, rows, N, o0, o1, H * D, D, D0, D1, EVEN_N)
    tl.store(LSE + (sample * H + head) * N + rows, (highest + tl.log2(total)) * LN2, mask=rows < N)


@triton.jit
def _column_sum(pointer, x, START: tl.constexpr, D: tl.constexpr):
    columns = START + tl.arange(0, x.shape[1])
    tl.store(pointer + columns, tl.sum(x, 0), mask=columns < D)


@triton.jit
def _store_raw_gradient(
    g0, g1, raw, grad, bias, lines, table, weight, norm_partial, partial, rows,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
    EPS: tl.constexpr, NORM: tl.constexpr, BIASED: tl.constexpr, CENTER: tl.constexpr, ROPE: tl.constexpr, EVEN_N: tl.constexpr,
):  # fmt: skip
    """From the gradient of q', k' or v to that of raw q, k or v: turned back, then through the norm. Sums over the rows: norm_partial
    (2, D) for the norm's weight and bias, partial (D,) for the linear layer's bias."""
    if (NORM or BIASED) and not EVEN_N:  # rows of padding must not reach the sums, not even as 0 * inf
        g0 = tl.where((rows < N)[:, None], g0, 0.0)
        if D1 > 0:
            g1 = tl.where((rows < N)[:, None], g1, 0.0)
    if ROPE:
        g0 = _rotate(g0, lines, table, rows, N, -1, 0, D, EVEN_N)
        if D1 > 0:
            g1 = _rotate(g1, lines, table, rows, N, -1, D0, D, EVEN_N)
    if NORM:
        _column_sum(norm_partial + D, g0, 0, D)  # before x takes registers
        if D1 > 0:
            _column_sum(norm_partial + D, g1, D0, D)
        x0, x1 = _load_pair(raw, rows, N, 3 * H * D, D, D0, D1, EVEN_N)
        x0, x1 = x0.to(tl.float32), x1.to(tl.float32)
        if BIASED:
            x0, x1 = _add_vector(x0, x1, bias, D, D0, D1)
        x0, x1, rstd = _standardise(x0, x1, D, D0, D1, EPS, CENTER)
        _column_sum(norm_partial, g0 * x0, 0, D)
        g0 = g0 * _vector(weight, 0, D0, D)[None, :]
        slope, mean = tl.sum(g0 * x0, 1), tl.sum(g0, 1)
        if D1 > 0:
            _column_sum(norm_partial, g1 * x1, D0, D)
            g1 = g1 * _vector(weight, D0, D1, D)[None, :]
            slope += tl.sum(g1 * x1, 1)
            mean += tl.sum(g1, 1)
        g0 = g0 - x0 * (slope / D)[:, None]
        if D1 > 0:
            g1 = g1 - x1 * (slope / D)[:, None]
        if CENTER:
            g0 = g0 - (mean / D)[:, None]
            if D1 > 0:
                g1 = g1 - (mean / D)[:, None]
        g0 = g0 * rstd[:, None]
        if D1 > 0:
            g1 = g1 * rstd[:, None]
    if BIASED:
        _column_sum(partial, g0, 0, D)
        if D1 > 0:
            _column_sum(partial, g1, D0, D)
    _store_pair(grad, rows, N, g0, g1, 3 * H * D, D, D0, D1, EVEN_N)


@fast_launch
@triton.jit
def _rope_attention_bwd_kernel(
    QKV, PREPARED_QK, BIAS, LINES, TABLE, Q_WEIGHT, K_WEIGHT, GRAD, ROWS, GRAD_QKV, PARTIAL,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK: tl.constexpr, INNER: tl.constexpr,
    SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr, EPS: tl.constexpr, NORM: tl.constexpr, NORM_BIAS: tl.constexpr, BIASED: tl.constexpr,
    CENTER: tl.constexpr, ROPE: tl.constexpr, EVEN_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK tokens of one head, first as keys (dK, dV), then as queries (dQ), each against all others in steps of INNER."""
    sample, head, rows = _block_of_head(N, H, BLOCK)
    dtype: tl.constexpr = PREPARED_QK.dtype.element_ty
    qkv, bias = QKV + sample * N * (3 * H * D) + head * D, BIAS + head * D
    prepared = PREPARED_QK + sample * N * (2 * H * D) + head * D
    grad_qkv = GRAD_QKV + sample * N * (3 * H * D) + head * D
    offset, line = sample * N * (H * D) + head * D, (sample * H + head) * 2 * N
    norm_partial = PARTIAL + tl.program_id(0).to(tl.int64) * ((4 * NORM + 3 * BIASED) * D)
    partial = norm_partial + 4 * NORM * D

    k0, k1 = _load_pair(prepared + H * D, rows, N, 2 * H * D, D, D0, D1, EVEN_N)
    v0, v1 = _load_pair(qkv + 2 * H * D, rows, N, 3 * H * D, D, D0, D1, EVEN_N)
    v0, v1 = v0.to(dtype), v1.to(dtype)
    dk0, dv0 = tl.zeros([BLOCK, D0], tl.float32), tl.zeros([BLOCK, D0], tl.float32)
    dk1, dv1 = dk0, dv0
    if D1 > 0:
        dk1, dv1 = tl.zeros([BLOCK, D1], tl.float32), tl.zeros([BLOCK, D1], tl.float32)
    for start in range(0, N, INNER):
        queries = start + tl.arange(0, INNER)
        q0, q1 = _load_pair(prepared, queries, N, 2 * H * D, D, D0, D1, EVEN_N)
        g0, g1 = _load_pair(GRAD + offset, queries, N, H * D, D, D0, D1, EVEN_N)
        lse = _load_rows(ROWS + line, queries, N, float("inf"), EVEN_N)  # inf: queries of padding weigh exp2(-inf) = 0
        delta = _load_rows(ROWS + line + N, queries, N, 0.0, EVEN_N)
        s = _scores(k0, k1, q0, q1, D1, PRECISION)  # transposed: keys x queries
        p = tl.exp2(s * LOG2_SCALE - lse[None, :])
        weights = p.to(dtype)
        dv0 = _dot(weights, g0, dv0, PRECISION)
        if D1 > 0:
            dv1 = _dot(weights, g1, dv1, PRECISION)
        dp = _scores(v0, v1, g0, g1, D1, PRECISION)
        ds = (p * (dp * SCALE - delta[None, :])).to(dtype)
        dk0 = _dot(ds, q0, dk0, PRECISION)
        if D1 > 0:
            dk1 = _dot(ds, q1, dk1, PRECISION)
    _store_raw_gradient(
        dv0, dv1, qkv, grad_qkv + 2 * H * D, bias, LINES, TABLE, K_WEIGHT, norm_partial, partial + 2 * D, rows, N,
        H, D, D0, D1, EPS, False, BIASED, CENTER, False, EVEN_N,
    )  # fmt: skip
    _store_raw_gradient(
        dk0, dk1, qkv + H * D, grad_qkv + H * D, bias + H * D, LINES, TABLE, K_WEIGHT, norm_partial + 2 * D, partial + D,
        rows, N, H, D, D0, D1, EPS, NORM, BIASED, CENTER, ROPE, EVEN_N,
    )  # fmt: skip

    # Names of their own: a name keeps its shape through a loop.
    own_q0, own_q1 = _load_pair(prepared, rows, N, 2 * H * D, D, D0, D1, EVEN_N)
    own_g0, own_g1 = _load_pair(GRAD + offset, rows, N, H * D, D, D0, D1, EVEN_N)
    own_lse = _load_rows(ROWS + line, rows, N, float("inf"), EVEN_N)
    own_delta = _load_rows(ROWS + line + N, rows, N, 0.0, EVEN_N)
    dq0 = tl.zeros([BLOCK, D0], tl.float32)
    dq1 = dq0
    if D1 > 0:
        dq1 = tl.zeros([BLOCK, D1], tl.float32)
    for start in range(0, N, INNER):
        keys = start + tl.arange(0, INNER)
        kj0, kj1 = _load_pair(prepared + H * D, keys, N, 2 * H * D, D, D0, D1, EVEN_N)
        vj0, vj1 = _load_pair(qkv + 2 * H * D, keys, N, 3 * H * D, D, D0, D1, EVEN_N)
        s = _scores(own_q0, own_q1, kj0, kj1, D1, PRECISION)
        if not EVEN_N:  # a key of padding scores 0, and exp2(0 - lse) may overflow
            s = tl.where((keys < N)[None, :], s, -float("inf"))
        p = tl.exp2(s * LOG2_SCALE - own_lse[:, None])
        dp = _scores(own_g0, own_g1, vj0.to(dtype), vj1.to(dtype), D1, PRECISION)
        ds = (p * (dp * SCALE - own_delta[:, None])).to(dtype)
        dq0 = _dot(ds, kj0, dq0, PRECISION)
        if D1 > 0:
            dq1 = _dot(ds, kj1, dq1, PRECISION)
    _store_raw_gradient(
        dq0, dq1, qkv, grad_qkv, bias, LINES, TABLE, Q_WEIGHT, norm_partial, partial,
        rows, N, H, D, D0, D1, EPS, NORM, BIASED, CENTER, ROPE, EVEN_N,
    )  # fmt: skip


@fast_launch
@triton.jit
def _rope_attention_bwd_head_kernel(
    QKV, BIAS, TABLE, OUT, GRAD, LSE, ROWS, GRAD_QKV, PARTIAL,
    N: tl.constexpr, H: tl.constexpr, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, KEYS: tl.constexpr,
    SCALE: tl.constexpr, LOG2_SCALE: tl.constexpr, EPS: tl.constexpr, BIASED: tl.constexpr, ROPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: a whole head, without QK-norm. Its queries and dO stay in shared memory, dQ in registers; keys pass by, KEYS at a time.

    What keeps all that in 255 registers of 256 threads: q' goes through memory, into the place of its gradient, because only what is
    loaded can be multiplied out of shared memory; ROWS, too, go through memory; and nothing moves out of the loop.
    """
    sample, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    dtype: tl.constexpr = GRAD_QKV.dtype.element_ty
    qkv, bias = QKV + sample * N * (3 * H * D) + head * D, BIAS + head * D
    grad_qkv = GRAD_QKV + sample * N * (3 * H * D) + head * D
    offset, line = sample * N * (H * D) + head * D, (sample * H + head) * N
    queries = tl.arange(0, N)
    g0, g1 = _load_pair(GRAD + offset, queries, N, H * D, D, D0, D1, True)
    _store_row_terms(ROWS, LSE, OUT + offset, bias + 2 * H * D, line, queries, g0, g1, N, H, D, D0, D1, SCALE, BIASED, True)
    x0, x1 = _rotated(
        qkv, bias, None, TABLE, bias, bias, queries, N, 3 * H * D, D, D0, D1, EPS, False, False, BIASED, False, ROPE, True
    )
    _store_pair(grad_qkv, queries, N, x0, x1, 3 * H * D, D, D0, D1, True)
    tl.debug_barrier()  # what this program wrote, its other threads read
    q0, q1 = _load_pair(grad_qkv, queries, N, 3 * H * D, D, D0, D1, True)
    dq0 = tl.zeros([N, D0], tl.float32)
    dq1 = dq0
    if D1 > 0:
        dq1 = tl.zeros([N, D1], tl.float32)
    keys = tl.arange(0, KEYS)
    # The second index of a program is 0, which the compiler does not know. Of a known number of passes it keeps more addresses in
    # registers; and rows that seem to be others it addresses again after the loop, in place of keeping the addresses of q' through it.
    zero = tl.program_id(1)
    for block in tl.range(0, N // KEYS + zero, disable_licm=True):
        first = block * KEYS
        raw, grad, table = qkv + first * (3 * H * D), grad_qkv + first * (3 * H * D), TABLE + first * D
        y0, y1 = _rotated(
            raw + H * D, bias + H * D, None, table, bias, bias, keys,
            N, 3 * H * D, D, D0, D1, EPS, False, False, BIASED, False, ROPE, True,
        )  # fmt: skip
        k0, k1 = y0.to(dtype), y1.to(dtype)
        v0, v1 = _load_pair(raw + 2 * H * D, keys, N, 3 * H * D, D, D0, D1, True)
        dp = _scores(g0, g1, v0, v1, D1, PRECISION) * SCALE - tl.load(ROWS + 2 * line + N + queries)[:, None]
        p = tl.exp2(_scores(q0, q1, k0, k1, D1, PRECISION) * LOG2_SCALE - tl.load(ROWS + 2 * line + queries)[:, None])
        ds = (p * dp).to(dtype)
        weights = tl.trans(p.to(dtype))
        dq0 = _dot(ds, k0, dq0, PRECISION)
        dv0 = _dot(weights, g0, None, PRECISION)
        dv1 = dv0
        if D1 > 0:
            dq1 = _dot(ds, k1, dq1, PRECISION)
            dv1 = _dot(weights, g1, None, PRECISION)
        _store_pair(grad + 2 * H * D, keys, N, dv0, dv1, 3 * H * D, D, D0, D1, True)
        ds_t = tl.trans(ds)
        dk0 = _dot(ds_t, q0, None, PRECISION)
        dk1 = dk0
        if D1 > 0:
            dk1 = _dot(ds_t, q1, None, PRECISION)
        _store_raw_gradient(
            dk0, dk1, raw + H * D, grad + H * D, bias, None, table, bias, PARTIAL, PARTIAL, keys,
            N, H, D, D0, D1, EPS, False, False, False, ROPE, True,
        )  # fmt: skip
    _store_raw_gradient(
        dq0, dq1, qkv, grad_qkv, bias, None, TABLE, bias, PARTIAL, PARTIAL, zero + queries,
        N, H, D, D0, D1, EPS, False, False, False, ROPE, True,
    )  # fmt: skip
    if BIASED:  # Column sums of the gradients as stored, by tensor cores: sums of registers took a quarter of all instructions.
        tl.debug_barrier()
        ones = tl.full([KEYS, KEYS], 1.0, tl.float32).to(dtype)
        for which in range(3 + zero):
            sum0 = tl.zeros([KEYS, D0], tl.float32)
            sum1 = sum0
            if D1 > 0:
                sum1 = tl.zeros([KEYS, D1], tl.float32)
            for start in tl.static_range(0, N, KEYS):
                z0, z1 = _load_pair(grad_qkv + which * H * D, start + keys, N, 3 * H * D, D, D0, D1, True)
                sum0 = _dot(ones, z0, sum0, PRECISION)
                if D1 > 0:
                    sum1 = _dot(ones, z1, sum1, PRECISION)
            partial = PARTIAL + (tl.program_id(0).to(tl.int64) * 3 + which) * D
            _store_pair(partial, keys, 1, sum0, sum1, D, D, D0, D1, False)  # every row is the sum: one is stored



def head_split(head_dim: int) -> tuple[int, int]:
    """Channels of the main part and of the padded tail (0: none); both are powers of two of 16 or more, as matrix instructions ask."""
    main = max(16, 1 << (head_dim.bit_length() - 1))
    return main, 0 if main >= head_dim else max(16, next_power_of_2(head_dim - main))


def _shape_class(step: str, n: int, head_dim: int, dtype: torch.dtype, norm: bool) -> str:
    """Row of the tables: which way ("short" and "resident" rotate inside the kernel, "head" is what one program can hold of a backward),
    "norm" where that costs registers, channels."""
    width = sum(head_split(head_dim))
    bound = next(bound for bound in (80, 128, 256) if width <= bound)
    if dtype == torch.float32:
        return f"fp32 {bound}"
    if step == "backward":
        way = "head" if n == RESIDENT_TOKENS and bound == 80 and not norm else "flash"
    else:
        way = "flash" if n > RESIDENT_TOKENS else "short" if n <= SHORT_TOKENS and bound == 80 else "resident"
    return f"{way} {'norm ' if norm and (way == 'resident' or step == 'backward') and bound == 80 else ''}{bound}"


def _prepares(shape_class: str, n: int) -> bool:
    """Whether q' and k' of the forward are made by the prologue; those of a backward of two passes always are."""
    return n > RESIDENT_TOKENS or shape_class.startswith("flash")


# Static choices first, then candidates that are timed where they run. Chosen with the offline compiler: no spill at the model's shapes,
# blocks of 128 so that L2 is read little, and then two programs on a multiprocessor where registers allow it. On sm_90 an H100 had its
# say: of "resident 80" it took the second at Dh = 72 and the third at 64, where the first takes 4 and 10 % longer; with QK-norm the
# second, which spills, so that the audit does not let it be first.
# On sm_90 no forward with a tail of 16 channels has 64 queries for 8 warps. In fp32 such a kernel died of an illegal memory access: a
# product read shared memory that is not its own (compute-sanitizer). The cause is unknown; ptxas spills uniform registers, which hold the
# products' descriptors, three times as often there as in its neighbours, all of which were right.
def _forward(m: int, n: int, warps: int, stages: int = 1) -> Config:
    return Config(dict(BLOCK_M=m, BLOCK_N=n), warps, stages)


def _backward(block: int, inner: int, warps: int, stages: int = 1) -> Config:
    """The prologue, then two passes."""
    return Config(dict(BLOCK=block, INNER=inner), warps, stages)


def _backward_head(keys: int, warps: int) -> Config:
    """One program a head."""
    return Config(dict(KEYS=keys), warps)


FORWARD = {
    (80, "short 80"): [_forward(64, 32, 4), _forward(128, 32, 8)],
    (80, "resident 80"): [_forward(128, 32, 8), _forward(64, 32, 4)],
    (80, "resident norm 80"): [_forward(128, 32, 8), _forward(64, 32, 4)],
    (80, "resident 128"): [_forward(64, 32, 8)],
    (80, "resident 256"): [_forward(64, 32, 8)],
    (80, "flash 80"): [_forward(128, 64, 8, 3), _forward(128, 64, 4, 2), _forward(128, 128, 8, 2)],
    (80, "flash 128"): [_forward(128, 64, 8, 2)],
    (80, "flash 256"): [_forward(64, 32, 8, 2)],
    (80, "fp32 80"): [_forward(64, 32, 8)],
    (80, "fp32 128"): [_forward(64, 32, 8)],
    (80, "fp32 256"): [_forward(32, 32, 8)],
    (90, "short 80"): [_forward(64, 64, 4), _forward(64, 32, 4), _forward(128, 64, 8)],
    (90, "resident 80"): [_forward(256, 64, 16), _forward(128, 64, 4), _forward(128, 64, 8)],
    (90, "resident norm 80"): [_forward(128, 64, 8), _forward(128, 128, 8)],
    (90, "resident 128"): [_forward(128, 64, 8), _forward(128, 128, 8)],
    (90, "resident 256"): [_forward(128, 32, 8)],
    (90, "flash 80"): [_forward(128, 64, 8, 3), _forward(128, 64, 4, 2)],
    (90, "flash 128"): [_forward(128, 64, 8, 2)],
    (90, "flash 256"): [_forward(128, 32, 8, 2)],
    (90, "fp32 80"): [_forward(64, 32, 4), _forward(128, 32, 8)],
    (100, "resident 80"): [_forward(128, 64, 8), _forward(128, 64, 4), _forward(128, 128, 8)],
}
BACKWARD = {
    (80, "head 80"): [_backward(128, 32, 8, 2), _backward(64, 32, 8, 2)],
    (80, "flash 80"): [_backward(128, 32, 8, 2), _backward(64, 32, 8, 2)],
    (80, "flash norm 80"): [_backward(64, 32, 8, 2)],
    (80, "flash 128"): [_backward(64, 32, 8)],
    (80, "flash 256"): [_backward(32, 32, 8)],
    (80, "fp32 80"): [_backward(32, 16, 4)],
    (80, "fp32 128"): [_backward(32, 16, 4)],
    (80, "fp32 256"): [_backward(32, 16, 8)],
    (90, "head 80"): [_backward_head(64, 8), _backward(128, 64, 8, 2)],
    (90, "flash 80"): [_backward(128, 64, 8, 2), _backward(128, 32, 8, 2)],
    (90, "flash norm 80"): [_backward(128, 64, 8, 2), _backward(128, 32, 8, 2)],
    (90, "flash 128"): [_backward(64, 64, 8)],
    (100, "head 80"): [_backward(128, 64, 8, 2), _backward(128, 32, 8, 2)],
    (100, "flash norm 80"): [_backward(128, 32, 8), _backward(64, 32, 8, 2)],
}
HEAD_CONSTANTS = ("N", "H", "D", "D0", "D1", "EPS", "BIASED", "ROPE")  # of _constexprs, those of one program a head
PROLOGUE = Config(dict(BLOCK=64), 4, 1)  # the tail, 64 x 16, is then 16 bytes a thread too
ROPE_TABLE = Config(dict(BLOCK=16, CHUNK=256), 4, 1)


def _constexprs(n, heads, head_dim, table, bias, q_weight, q_bias, eps, center, blocks):
    """What every kernel is specialised on; nothing of it depends on the batch."""
    main, tail = head_split(head_dim)
    even = all(n % block == 0 for block in blocks)
    flags = dict(NORM=q_weight is not None, NORM_BIAS=q_bias is not None, BIASED=bias is not None, CENTER=center, ROPE=table is not None)
    return dict(N=n, H=heads, D=head_dim, D0=main, D1=tail, EPS=eps, EVEN_N=even) | flags


def _precision(dtype: torch.dtype) -> str:
    """Of products of fp32: three tf32 products, as close to fp32 as the sums are. Without meaning for the 16-bit dtypes."""
    return "tf32x3" if dtype == torch.float32 else "ieee"


def _rope_table(positions, freqs, head_dim, dtype):
    """Lines (N, 2) and table (N, D) of _rope_table_kernel. For bf16 the table is fp16, with an eighth of bf16's rounding error."""
    n, (main, tail) = len(positions), head_split(head_dim)
    table = torch.empty((n, head_dim), dtype=torch.float16 if dtype == torch.bfloat16 else torch.float32, device=positions.device)
    lines = torch.empty((n, 2), dtype=torch.int32, device=positions.device)
    block = ROPE_TABLE.blocks["BLOCK"]
    _rope_table_kernel[(cdiv(n, block),)](
        positions.contiguous(), freqs.contiguous(), table, lines,
        N=n, D=head_dim, D0=main, D1=tail, EVEN_N=n % block == 0, **ROPE_TABLE.launch(),
    )  # fmt: skip
    return lines, table


def _prologue(qkv, pointers, constexprs, dtype, out=None, grad=None, lse=None):
    """q', k' as (B, N, 2, H, D) in dtype, and, given out, grad and lse, what _store_row_terms writes, (B, H, 2, N)."""
    batch, n, _, heads, head_dim = qkv.shape
    prepared = torch.empty((batch, n, 2, heads, head_dim), dtype=dtype, device=qkv.device)
    rows = None if out is None else torch.empty((batch, heads, 2, n), dtype=torch.float32, device=qkv.device)
    grid = (batch * heads * cdiv(n, PROLOGUE.blocks["BLOCK"]),)
    bias, _, *pointers = pointers
    given = [placeholder(qkv) if a is None else a for a in (out, grad, lse)]
    _rope_attention_prologue_kernel[grid](
        qkv, bias, *pointers, *given, prepared, placeholder(prepared) if rows is None else rows,
        SCALE=1 / math.sqrt(head_dim), WITH_ROWS=rows is not None, **constexprs(PROLOGUE), **PROLOGUE.launch(),
    )  # fmt: skip
    return prepared, rows


def _operands(qkv, positions, freqs, parameters, eps, center, dtype):
    """What the launchers share: BIAS to K_BIAS of the kernels, a placeholder for what is None, and the constexprs given a Config."""
    _, n, _, heads, head_dim = qkv.shape
    q_weight, _, q_bias, _, bias = parameters
    lines, table = (None, None) if positions is None else _rope_table(positions, freqs, head_dim, dtype)
    absent = placeholder(qkv)
    pointers = [absent if a is None else a.contiguous() for a in (bias, lines, table, *parameters[:4])]

    def constexprs(config):
        return _constexprs(n, heads, head_dim, table, bias, q_weight, q_bias, eps, center, config.blocks.values())

    return pointers, constexprs


@planned
def rope_attention_fwd(qkv, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center, out_dtype):
    """out (B, N, H*D) in out_dtype and lse (B, H, N) in fp32 of the operator lightningdit::rope_attention. D: a multiple of 8 up to 256."""
    batch, n, _, heads, head_dim = qkv.shape
    qkv, parameters = qkv.contiguous(), (q_weight, k_weight, q_bias, k_bias, bias)
    out = torch.empty((batch, n, heads * head_dim), dtype=out_dtype, device=qkv.device)
    lse = torch.empty((batch, heads, n), dtype=torch.float32, device=qkv.device)
    if out.numel() == 0:
        return out, lse
    shape_class = _shape_class("forward", n, head_dim, out_dtype, q_weight is not None)
    prepare = _prepares(shape_class, n)
    pointers, constexprs = _operands(qkv, positions, freqs, parameters, eps, center, out_dtype)
    prepared = _prologue(qkv, pointers, constexprs, out_dtype)[0] if prepare else placeholder(qkv)

    def launch(config):
        grid = (batch * heads * cdiv(n, config.blocks["BLOCK_M"]),)
        _rope_attention_fwd_kernel[grid](
            qkv, prepared, *pointers, out, lse,
            SCALE=LOG2E.value / math.sqrt(head_dim), PREPARED=prepare, PRECISION=_precision(out_dtype),
            **constexprs(config), **config.launch(),
        )  # fmt: skip

    launch(pick("rope_attention_fwd", FORWARD, qkv.device, shape_class, (n, heads, head_dim, str(out_dtype)), launch))
    return out, lse


def _norm_sums(partial):
    """Of partial sums (B, H, blocks, rows, D), those of the norm as sum_partials takes them: over heads, too."""
    return partial.flatten(0, 2)[:, None, None, :4]


def _bias_sums(partial):
    """Those of the linear layer's bias: each head has its own."""
    return partial[:, :, :, -3:]


@planned
def rope_attention_bwd(grad, qkv, out, lse, positions, freqs, q_weight, k_weight, q_bias, k_bias, bias, eps, center):
    """Gradients of qkv, q_weight, k_weight, q_bias, k_bias and bias, each in its dtype; empty for what is None."""
    batch, n, _, heads, head_dim = qkv.shape
    grad, qkv, parameters = grad.contiguous(), qkv.contiguous(), (q_weight, k_weight, q_bias, k_bias, bias)
    grad_qkv = torch.empty_like(qkv)
    shape_class = _shape_class("backward", n, head_dim, out.dtype, q_weight is not None)
    if qkv.dtype != out.dtype:
        shape_class = shape_class.replace("head", "flash")  # one program a head keeps q' in grad_qkv
    sums = 4 * (q_weight is not None) + 3 * (bias is not None)  # rows of every program: q_weight, q_bias, k_weight, k_bias; q, k, v of bias
    partial = qkv.new_empty((batch, heads, 0, sums, head_dim), dtype=torch.float32)
    if out.numel():
        pointers, constexprs = _operands(qkv, positions, freqs, parameters, eps, center, out.dtype)
        scales = dict(SCALE=1 / math.sqrt(head_dim), LOG2_SCALE=LOG2E.value / math.sqrt(head_dim), PRECISION=_precision(out.dtype))

        def launch(config):
            if "KEYS" in config.blocks:
                partial = torch.empty((batch, heads, 1, sums, head_dim), dtype=torch.float32, device=qkv.device)
                rows = torch.empty((batch, heads, 2, n), dtype=torch.float32, device=qkv.device)
                constants = {name: value for name, value in constexprs(config).items() if name in HEAD_CONSTANTS}
                _rope_attention_bwd_head_kernel[(batch * heads,)](
                    qkv, pointers[0], pointers[2], out, grad, lse, rows, grad_qkv, partial, **scales, **constants, **config.launch()
                )
                return partial
            prepared, rows = _prologue(qkv, pointers, constexprs, out.dtype, out, grad, lse)
            blocks = cdiv(n, config.blocks["BLOCK"])
            partial = torch.empty((batch, heads, blocks, sums, head_dim), dtype=torch.float32, device=qkv.device)
            _rope_attention_bwd_kernel[(batch * heads * blocks,)](
                qkv, prepared, *pointers[:5], grad, rows, grad_qkv, partial, **scales, **constexprs(config), **config.launch()
            )
            return partial

        partial = launch(pick("rope_attention_bwd", BACKWARD, qkv.device, shape_class, (n, heads, head_dim, str(out.dtype)), launch))
    gradients = [None if a is None else torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in parameters]
    if q_weight is not None:  # over heads as well
        of_q, of_k, of_q_bias, of_k_bias = gradients[:4]
        sum_partials(_norm_sums(partial), of_q, of_q_bias, of_k, of_k_bias)
    if bias is not None:
        sum_partials(_bias_sums(partial), gradients[4])
    return grad_qkv, *(qkv.new_empty(0) if a is None else a for a in gradients)


def audit_cases() -> list[dict]:
    """What the offline audit compiles: every kernel at the model's head dimensions (72 of XL, 64 of the other sizes) and numbers of tokens
    (16 heads), in bf16, with the static choice of each architecture. 64 tokens differ from 256 in the forward only.

    The qkv layer's bias is given everywhere, as in the model. The fp32 classes are left out: tf32x3 takes three products of split
    operands, which pass through registers, and their backward spills; fp32 attention is there to be checked against, not to be fast.
    """
    archs, cases = (80, 90, 100), []
    for n, head_dim, norm in [(n, head_dim, norm) for n in (64, 256, 1024) for head_dim in (72, 64) for norm in (False, True)]:
        label, large = f"N={n} D={head_dim}{' norm' if norm else ''}", n > SHORT_TOKENS
        scale = LOG2E.value / math.sqrt(head_dim)
        precision = dict(PRECISION=_precision(torch.bfloat16))
        prepare = _prepares(_shape_class("forward", n, head_dim, torch.bfloat16, norm), n)
        for arch in archs:
            for step, kernel, table, flags in (
                ("forward", _rope_attention_fwd_kernel, FORWARD, dict(SCALE=scale, PREPARED=prepare)),
                ("backward", _rope_attention_bwd_kernel, BACKWARD, dict(SCALE=1 / math.sqrt(head_dim), LOG2_SCALE=scale)),
            ):
                if large or step == "forward":
                    shape_class = _shape_class(step, n, head_dim, torch.bfloat16, norm)
                    config = table[max(known for known, name in table if name == shape_class and known <= arch), shape_class][0]
                    if "KEYS" in config.blocks:
                        kernel = _rope_attention_bwd_head_kernel
                    name = f"rope_attention_{step} {label}"
                    cases.append(_case(name, kernel, config, n, head_dim, norm, flags | precision, "attention", (arch,)))
                if large and step == "backward":
                    blocks = cdiv(n, config.blocks.get("BLOCK", n))
                    shape = (2, 16, blocks, 7 if norm else 3, head_dim)
                    partial = _bias_sums(torch.empty(shape, device="meta"))
                    cases.append(sum_case(f"sum_bias {label} sm_{arch}", partial, ("*fp32",), (arch,)))
        if large and norm:
            partial = _norm_sums(torch.empty((2, 16, 1, 7, head_dim), device="meta"))
            cases.append(sum_case(f"sum_norm {label}", partial, ("*fp32", None, "*fp32", None)))
        for step, delta in (("forward", False), ("backward", True)):
            if large and (delta or n > RESIDENT_TOKENS):
                name, flags = f"rope_attention_prologue_{step} {label}", dict(WITH_ROWS=delta, SCALE=1 / math.sqrt(head_dim))
                cases.append(_case(name, _rope_attention_prologue_kernel, PROLOGUE, n, head_dim, norm, flags, "memory", archs))
        if large and not norm:
            cases.append(_case(f"rope_table {label}", _rope_table_kernel, ROPE_TABLE, n, head_dim, norm, {}, "small", archs))
    return cases


def _case(name, kernel, config, n, head_dim, norm, flags, kind, archs):
    present = "present"  # stands for a tensor: only whether it is None matters
    shared = _constexprs(n, 16, head_dim, present, present, present if norm else None, None, 1e-6, False, config.blocks.values())
    constexprs = {name: value for name, value in (shared | flags | config.blocks).items() if name in kernel.arg_names}
    types = dict.fromkeys(("POSITIONS", "FREQS", "BIAS", "LSE", "ROWS", "PARTIAL"), "*fp32") | dict(TABLE="*fp16", LINES="*i32")
    if norm:
        types |= dict(Q_WEIGHT="*fp32", K_WEIGHT="*fp32")  # parameters; without them q stands for them
    if not flags.get("WITH_ROWS", True):
        types |= dict(LSE="*bf16", ROWS="*bf16")  # qkv, q' and k' stand for them
    signature = {a: "constexpr" if a in constexprs else types.get(a, "*bf16") for a in kernel.arg_names}
    return dict(
        name=f"{name} sm_{archs[0]}" if len(archs) == 1 else name, kernel=kernel, signature=signature, constexprs=constexprs,
        divisible=[a for a, kind_of in signature.items() if kind_of != "constexpr"],
        num_warps=config.num_warps, num_stages=config.num_stages,
        archs=archs, kind=kind,
    )  # fmt: skip


def workloads(tokens: int = 32768, head_dim: int = 72) -> list[dict]:
    """What training launches, for lightningdit_kernels.traffic: XL/1 at 256 and at 1,024 tokens an image, 16 heads."""
    found, heads = [], 16
    for side in (16, 32):
        n, index = side * side, torch.arange(side, dtype=torch.float32)
        qkv = torch.empty(tokens // n, n, 3, heads, head_dim, dtype=torch.bfloat16)
        grad, out = (torch.empty(tokens // n, n, heads * head_dim, dtype=qkv.dtype) for _ in range(2))
        lse, bias = torch.empty(tokens // n, heads, n), torch.empty(3, heads, head_dim)
        freqs = 10_000.0 ** -(torch.arange(head_dim // 4) / (head_dim // 4))
        rest = (torch.cartesian_prod(index, index), freqs, None, None, None, None, bias, 1e-6, False)
        forward, backward = (rope_attention_fwd, qkv, *rest, qkv.dtype), (rope_attention_bwd, grad, qkv, out, lse, *rest)
        # Heads of 72 channels begin inside a sector, every other one: two of them, in blocks of 128 tokens.
        counted = dict(programs=2 * n // 128, whole=("_rope_table_kernel",))
        found += [
            dict(name=f"attention {n} forward", launch=functools.partial(*forward), reads=(qkv, bias), **counted),
            dict(name=f"attention {n} backward", launch=functools.partial(*backward), reads=(grad, qkv, bias, out, lse), **counted),
        ]
    return found
