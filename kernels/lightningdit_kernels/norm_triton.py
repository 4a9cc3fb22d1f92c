"""The norm ops on CUDA: one pass over memory forward, one pass and a small reduction backward.

B samples, N tokens a sample, D width. A program owns some rows (tokens) of one sample, so that gate, scale, shift and weight are
loaded once, and holds whole rows in registers. D is cut into power-of-two pieces, 1152 = 1024 + 128: one block of 2048 would leave 44 %
of the lanes idle. The backward also sums over tokens; each program writes the partial sums of its rows, and a second kernel adds
them over tokens and over samples, in fixed order. No atomics: equal inputs give equal bits.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from lightningdit_kernels.launch_triton import cdiv, fast_launch, next_power_of_2
from lightningdit_kernels.plans_triton import planned
from lightningdit_kernels.sums_triton import SUMS, add_rows
from lightningdit_kernels.tuning import Config, pick

# Shape class: the largest power of two in D, at 256 columns a warp: a lane then holds one 16-byte vector of bf16 in a row, and keeps
# the sums over tokens of its own columns. One row at a time: at D = 1152 with an fp32 residual the backward takes 118 registers on sm_90
# (125 with the bias gradient), so that four programs share a multiprocessor with 55 KB of loads under way; two rows at a time take 218.
_WARPS = {16: 1, 32: 1, 64: 1, 128: 1, 256: 1, 512: 2, 1024: 4, 2048: 8, 4096: 16}
CONFIGS = {
    (80, str(width)): [Config(dict(ROWS=1), warps), Config(dict(ROWS=1), min(2 * warps, 32)), Config(dict(ROWS=2), warps)]
    for width, warps in _WARPS.items()
}
# AHEAD: the next row's x and grad_h are loaded while this row is reduced. Registers on sm_90 at D = 1152, with the bias gradient: for a
# 16-bit stream 127 instead of 112, so that four programs still share a multiprocessor; for an fp32 stream 147 instead of 125, and three
# are left. An fp32 stream also needs it least: if a program waits 0.9 us for a row and works on it for 0.5, four programs ask for 1.8
# times what memory delivers; of a 16-bit stream for 1.2 times. Rows below 512 columns (128 become 151) and those without grad_residual
# (127 become 166; one norm of a model) keep their programs without it.
_AHEAD = " 16-bit stream"
BACKWARD = {
    (80, f"{width}{stream}"): [
        Config(dict(ROWS=rows, AHEAD=ahead), num_warps)
        for rows, ahead, num_warps in (
            (1, int(stream == _AHEAD), warps),
            (1, int(stream != _AHEAD), warps),
            (1, 0, min(2 * warps, 32)),
            (2, 0, warps),
        )
    ]
    for width, warps in _WARPS.items()
    for stream in ("", _AHEAD)
    if width >= 512 or not stream
}


def pieces(width: int) -> tuple[int, ...]:
    """Powers of two that cover width with little waste: the largest one in it, and the smallest one that holds the rest."""
    main = max(16, 1 << (width.bit_length() - 1))
    return (main,) if width <= main else (main, max(16, next_power_of_2(width - main)))


@triton.jit
def _columns(PIECES: tl.constexpr):
    """One [1, piece] tensor of column numbers for every piece."""
    columns = ()
    start: tl.constexpr = 0
    for i in tl.static_range(len(PIECES)):
        columns = columns + ((start + tl.arange(0, PIECES[i]))[None, :],)
        start += PIECES[i]
    return columns


@triton.jit
def _load(pointer, rows, valid, columns, D: tl.constexpr):
    """Rows [ROWS, 1] of a (rows, D) tensor as tiles, one for every piece, in the tensor's dtype."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        tiles = tiles + (tl.load(pointer + rows * D + columns[i], mask=valid & (columns[i] < D), other=0.0),)
    return tiles


@triton.jit
def _load_modulation(pointer, columns, offset: tl.constexpr, default: tl.constexpr, D: tl.constexpr):
    """offset + a (D,) vector in fp32, one [1, piece] tile for every piece; without a pointer, the constant `default`."""
    tiles = ()
    for i in tl.static_range(len(columns)):
        if pointer is None:
            tiles = tiles + (tl.full([1, 1], default, tl.float32),)
        else:
            tiles = tiles + (offset + tl.load(pointer + columns[i], mask=columns[i] < D, other=0.0).to(tl.float32),)
    return tiles


@triton.jit
def _row_sum(tiles, LANES: tl.constexpr):
    """Sums over all columns, [ROWS, 1]. Every piece is first folded to LANES columns inside its threads, so that threads exchange once."""
    folded = tl.sum(tl.reshape(tiles[0], [tiles[0].shape[0], LANES, tiles[0].shape[1] // LANES]), 2)
    for i in tl.static_range(1, len(tiles)):
        folded += tl.sum(tl.reshape(tiles[i], [tiles[0].shape[0], LANES, tiles[i].shape[1] // LANES]), 2)
    return tl.sum(folded, 1, keep_dims=True)


@fast_launch
@triton.jit(do_not_specialize=["N", "chunks", "chunk_rows"])
def _norm_fwd_kernel(
    x, y, gate, scale, shift, weight, bias, residual, h, mean, rstd, N, chunks, chunk_rows, gate_stride, scale_stride, shift_stride,
    EPS: tl.constexpr, D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """Writes x' = x + gate * (y + bias) (with y), rstd (and mean, to centre) and h.

    What may be None: y with residual, gate, shift, weight, bias, mean.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_rows
    columns = _columns(PIECES)
    scales = _load_modulation(scale + sample * scale_stride, columns, 1.0, 1.0, D)
    weights = _load_modulation(weight, columns, 0.0, 1.0, D)
    shifts = _load_modulation(None if shift is None else shift + sample * shift_stride, columns, 0.0, 0.0, D)
    gates = _load_modulation(None if gate is None else gate + sample * gate_stride, columns, 0.0, 1.0, D)
    biases = _load_modulation(bias, columns, 0.0, 0.0, D)
    LANES: tl.constexpr = min(THREADS, PIECES[len(PIECES) - 1])
    base = (sample * N + first) * D
    count = min(chunk_rows, N - first)
    # Without a branch, rows of 1,024 columns take 40 registers (forward on sm_80, bf16) or 64 (backward on sm_90, fp32), and one value is
    # spilled if constants are moved out of the loop.
    for start in tl.range(0, count, ROWS, disable_licm=y is None and len(PIECES) == 1):
        rows = start + tl.arange(0, ROWS)[:, None]
        valid = rows < count
        tiles = _load(x + base, rows, valid, columns, D)
        if y is not None:
            branches = _load(y + base, rows, valid, columns, D)
        xs, squares = (), ()
        for i in tl.static_range(len(PIECES)):
            tile = tiles[i].to(tl.float32)
            if y is not None:  # the norm sees x' as it is stored, since that is what the backward recomputes from
                branch = branches[i].to(tl.float32)
                if bias is not None:
                    branch += biases[i]
                stored = (tile + gates[i] * branch).to(residual.dtype.element_ty)
                tl.store(residual + base + rows * D + columns[i], stored, mask=valid & (columns[i] < D))
                tile = stored.to(tl.float32)
            xs, squares = xs + (tile,), squares + (tile * tile,)
        if mean is not None:
            average = _row_sum(xs, LANES) * (1.0 / D)
            tl.store(mean + sample * N + first + rows, average, mask=valid)
            centred, squares = (), ()
            for i in tl.static_range(len(PIECES)):
                tile = tl.where(columns[i] < D, xs[i] - average, 0.0)
                centred, squares = centred + (tile,), squares + (tile * tile,)
            xs = centred
        r = tl.rsqrt(_row_sum(squares, LANES) * (1.0 / D) + EPS)
        tl.store(rstd + sample * N + first + rows, r, mask=valid)
        for i in tl.static_range(len(PIECES)):
            out = xs[i] * r * (scales[i] * weights[i]) + shifts[i]
            tl.store(h + base + rows * D + columns[i], out.to(h.dtype.element_ty), mask=valid & (columns[i] < D))


@triton.jit
def _zeros(PIECES: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr):
    """Accumulators of a sum over rows. A piece whose columns occupy every thread is summed over rows as it comes (all rows of a column
    are in one thread); of a narrower one the rows are spread over warps, and stay apart until the end."""
    totals = ()
    for i in tl.static_range(len(PIECES)):
        totals = totals + (tl.full([1 if PIECES[i] >= 8 * THREADS else ROWS, PIECES[i]], 0.0, tl.float32),)
    return totals


@triton.jit
def _add_rows(total, tile):
    return total + (tl.sum(tile, 0, keep_dims=True) if total.shape[0] == 1 else tile)


@triton.jit
def _store_sums(partial, totals, columns, D: tl.constexpr):
    for i in tl.static_range(len(columns)):
        tl.store(partial + columns[i], tl.sum(totals[i], 0, keep_dims=True), mask=columns[i] < D)


@triton.jit
def _load_reduced(residual, grad_h, rstd, mean, rows, count, columns, D: tl.constexpr):
    """What the reductions of these rows need: tiles of x' and dh, rstd, and the mean, or again rstd where there is none."""
    valid = rows < count
    r = tl.load(rstd + rows, mask=valid, other=0.0)
    average = r
    if mean is not None:
        average = tl.load(mean + rows, mask=valid, other=0.0)
    return _load(residual, rows, valid, columns, D), _load(grad_h, rows, valid, columns, D), r, average


@fast_launch
@triton.jit(do_not_specialize=["N", "chunks", "chunk_rows"])
def _norm_bwd_kernel(
    grad_residual, grad_h, residual, y, gate, scale, weight, mean, rstd, dx, dy, sum_scale, sum_shift, sum_gate, sum_branch,
    N, chunks, chunk_rows, gate_stride, scale_stride, D: tl.constexpr, PIECES: tl.constexpr, ROWS: tl.constexpr, THREADS: tl.constexpr,
    AHEAD: tl.constexpr,
):  # fmt: skip
    """Writes dx, dy and the sums over this program's rows of dh * x_hat, dh, dx * y and dx. What is None is neither read nor written.

    x_hat = (x' - mean) * rstd, a = dh * (1 + scale) * weight,
    dx = grad_residual + rstd * (a - mean(a) - x_hat * mean(a * x_hat)), dy = gate * dx.
    """
    sample = (tl.program_id(0) // chunks).to(tl.int64)
    first = tl.program_id(0) % chunks * chunk_rows
    columns = _columns(PIECES)
    factors = _load_modulation(scale + sample * scale_stride, columns, 1.0, 1.0, D)
    weights = _load_modulation(weight, columns, 0.0, 1.0, D)
    gates = _load_modulation(None if gate is None else gate + sample * gate_stride, columns, 0.0, 1.0, D)
    scale_totals, shift_totals = _zeros(PIECES, ROWS, THREADS), _zeros(PIECES, ROWS, THREADS)
    gate_totals, branch_totals = _zeros(PIECES, ROWS, THREADS), _zeros(PIECES, ROWS, THREADS)
    LANES: tl.constexpr = min(THREADS, PIECES[len(PIECES) - 1])
    base = (sample * N + first) * D
    count = min(chunk_rows, N - first)
    first_row = sample * N + first
    mean = None if mean is None else mean + first_row
    if AHEAD:
        next_xs, next_grads, next_r, next_average = _load_reduced(
            residual + base, grad_h + base, rstd + first_row, mean, tl.arange(0, ROWS)[:, None], count, columns, D
        )
    for start in tl.range(0, count, ROWS, disable_licm=y is None and len(PIECES) == 1):
        rows = start + tl.arange(0, ROWS)[:, None]
        valid = rows < count
        # Everything is loaded before the reductions, whose barriers no load can pass.
        if AHEAD:
            xs, grads, r, average = next_xs, next_grads, next_r, next_average
            next_xs, next_grads, next_r, next_average = _load_reduced(
                residual + base, grad_h + base, rstd + first_row, mean, rows + ROWS, count, columns, D
            )
        else:
            xs, grads, r, average = _load_reduced(residual + base, grad_h + base, rstd + first_row, mean, rows, count, columns, D)
        if grad_residual is not None:
            incoming = _load(grad_residual + base, rows, valid, columns, D)
        if sum_gate is not None:
            branches = _load(y + base, rows, valid, columns, D)
        x_hats, a_s, products = (), (), ()
        new_scale, new_shift = (), ()
        for i in tl.static_range(len(PIECES)):
            x_hat = xs[i].to(tl.float32)
            if mean is not None:
                x_hat = tl.where(columns[i] < D, x_hat - average, 0.0)
            x_hat *= r
            grad = grads[i].to(tl.float32)
            a = grad * (factors[i] * weights[i])
            new_scale = new_scale + (_add_rows(scale_totals[i], grad * x_hat),)
            new_shift = new_shift + (_add_rows(shift_totals[i], grad) if sum_shift is not None else shift_totals[i],)
            x_hats, a_s, products = x_hats + (x_hat,), a_s + (a,), products + (a * x_hat,)
        scale_totals, shift_totals = new_scale, new_shift
        a_dot = _row_sum(products, LANES) * (1.0 / D)
        if mean is not None:
            a_mean = _row_sum(a_s, LANES) * (1.0 / D)
        new_gate, new_branch = (), ()
        for i in tl.static_range(len(PIECES)):
            d = a_s[i] - x_hats[i] * a_dot
            if mean is not None:
                d -= a_mean
            d *= r
            if grad_residual is not None:
                d += incoming[i].to(tl.float32)
            mask = valid & (columns[i] < D)
            tl.store(dx + base + rows * D + columns[i], d.to(dx.dtype.element_ty), mask=mask)
            if dy is not None:
                tl.store(dy + base + rows * D + columns[i], (gates[i] * d).to(dy.dtype.element_ty), mask=mask)
            new_gate = new_gate + (_add_rows(gate_totals[i], d * branches[i].to(tl.float32)) if sum_gate is not None else gate_totals[i],)
            new_branch = new_branch + (_add_rows(branch_totals[i], d) if sum_branch is not None else branch_totals[i],)
        gate_totals, branch_totals = new_gate, new_branch
    offset = tl.program_id(0).to(tl.int64) * D
    _store_sums(sum_scale + offset, scale_totals, columns, D)
    if sum_shift is not None:
        _store_sums(sum_shift + offset, shift_totals, columns, D)
    if sum_gate is not None:
        _store_sums(sum_gate + offset, gate_totals, columns, D)
    if sum_branch is not None:
        _store_sums(sum_branch + offset, branch_totals, columns, D)


@triton.jit
def _sum_tokens(partial, samples, B, chunks, columns, D: tl.constexpr, UNROLL: tl.constexpr):
    """Partial sums (B, chunks, D) of these samples [ROWS, 1] and columns [1, COLUMNS], added over their chunks."""
    end = tl.where(samples < B, (samples + 1) * chunks, 0)
    return add_rows(partial, samples * chunks, 1, end, chunks, columns, columns < D, 1, D, 0, UNROLL)


@triton.jit
def _load_vectors(pointer, samples, B, stride, columns, default: tl.constexpr, D: tl.constexpr):
    """Rows of a (B, D) tensor in fp32; without a pointer, the constant `default`."""
    if pointer is None:
        tile = tl.full([1, 1], default, tl.float32)
    else:
        tile = tl.load(pointer + samples.to(tl.int64) * stride + columns, mask=(samples < B) & (columns < D), other=0.0).to(tl.float32)
    return tile


@fast_launch
@triton.jit(do_not_specialize=["B", "chunks"])
def _norm_sums_kernel(
    sum_scale, sum_shift, sum_gate, sum_branch, gate, scale, weight, bias, dscale, dshift, dgate, dweight, dbias,
    B, chunks, gate_stride, scale_stride, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Adds the partial sums (B, chunks, D): over the chunks of a sample for dscale, dshift, dgate, then over samples for dweight, dbias.

    A program owns columns of all samples, so that nothing is left for a second launch: one of scale and weight, one of shift, one of gate
    and bias. dgate = sum dx * y + bias * sum dx, dbias = sum over samples of gate * sum dx: one sum for both, which comes with bias.
    dweight = sum over samples of (1 + scale) * sum dh * x_hat, dscale = weight * sum dh * x_hat: one sum for both, again.
    """
    which = tl.program_id(0)
    columns = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    weights, biases = _load_modulation(weight, (columns,), 0.0, 1.0, D)[0], _load_modulation(bias, (columns,), 0.0, 0.0, D)[0]
    over_samples = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, B, ROWS):
        samples = first + tl.arange(0, ROWS)[:, None]
        own, mask = samples.to(tl.int64) * D + columns, (samples < B) & (columns < D)
        if which == 0:
            total = _sum_tokens(sum_scale, samples, B, chunks, columns, D, UNROLL)
            tl.store(dscale + own, (weights * total).to(dscale.dtype.element_ty), mask=mask)
            if dweight is not None:
                over_samples += (1.0 + _load_vectors(scale, samples, B, scale_stride, columns, 0.0, D)) * total
        elif which == 1:
            if sum_shift is not None:
                total = _sum_tokens(sum_shift, samples, B, chunks, columns, D, UNROLL)
                tl.store(dshift + own, total.to(dshift.dtype.element_ty), mask=mask)
        else:
            branch = 0.0
            if sum_branch is not None:
                branch = _sum_tokens(sum_branch, samples, B, chunks, columns, D, UNROLL)
                over_samples += _load_vectors(gate, samples, B, gate_stride, columns, 1.0, D) * branch
            if sum_gate is not None:
                total = _sum_tokens(sum_gate, samples, B, chunks, columns, D, UNROLL) + biases * branch
                tl.store(dgate + own, total.to(dgate.dtype.element_ty), mask=mask)
    if which == 0:
        if dweight is not None:
            tl.store(dweight + columns, tl.sum(over_samples, 0, keep_dims=True).to(dweight.dtype.element_ty), mask=columns < D)
    elif which == 2:
        if dbias is not None:
            tl.store(dbias + columns, tl.sum(over_samples, 0, keep_dims=True).to(dbias.dtype.element_ty), mask=columns < D)


def _chunks(batch: int, tokens: int, programs: int, least: int) -> tuple[int, int]:
    """(chunks a sample, tokens a chunk): about `programs` programs in all, of at least `least` tokens. It depends on shapes only."""
    size = max(least, cdiv(tokens * batch, programs))
    size = max(1, min(size, tokens))
    return max(1, cdiv(tokens, size)), size


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _by_sample(vector: Tensor | None) -> tuple[Tensor | None, int]:
    """A (B, D) tensor with dense rows (a chunk of adaLN's output as it is), and the distance of its rows."""
    if vector is None:
        return None, 0
    vector = vector if vector.stride(-1) == 1 else vector.contiguous()
    return vector, vector.stride(0)


def _constants(width: int, config: Config) -> dict:
    return dict(D=width, PIECES=pieces(width), THREADS=32 * config.num_warps)


def _backward_class(width: int, stream: torch.dtype, with_grad_residual: bool) -> str:
    """Row of BACKWARD."""
    shape_class = f"{pieces(width)[0]}{_AHEAD if stream.itemsize == 2 and with_grad_residual else ''}"
    return shape_class if (80, shape_class) in BACKWARD else str(pieces(width)[0])


@planned
def norm_fwd(x, y, gate, scale, shift, weight, bias, eps: float, center: bool, out_dtype: torch.dtype):
    """Launches the forward: arguments as in norm.norm_forward_ref. Returns x' (None without y), h, mean (None unless center), rstd."""
    x, (B, N, D) = x.contiguous(), x.shape
    y, weight, bias = map(_dense, (y, weight, bias))
    (gate, gate_stride), (scale, scale_stride), (shift, shift_stride) = map(_by_sample, (gate, scale, shift))
    residual = None if y is None else torch.empty_like(x)
    h = torch.empty_like(x, dtype=out_dtype)
    rstd = x.new_empty((B, N, 1), dtype=torch.float32)
    mean = torch.empty_like(rstd) if center else None
    chunks, chunk_rows = _chunks(B, N, programs=4096, least=4)

    def launch(config):
        _norm_fwd_kernel[(B * chunks,)](
            x, y, gate, scale, shift, weight, bias, residual, h, mean, rstd, N, chunks, chunk_rows,
            gate_stride, scale_stride, shift_stride, EPS=eps, **_constants(D, config), **config.launch(),
        )  # fmt: skip

    if x.numel():
        key = D, str(x.dtype), str(out_dtype), y is None, bias is None
        launch(pick("norm_fwd", CONFIGS, x.device, str(pieces(D)[0]), key, launch))
    return residual, h, mean, rstd


@planned
def norm_bwd(
    grad_residual, grad_h, residual, y, gate, scale, weight, bias, mean, rstd, branch_dtype=None, shift_dtype=None
) -> tuple[Tensor | None, ...]:
    """Launches the backward.

    Args:
        grad_residual, grad_h: gradients to x' and h. No grad_residual means zero.
        residual, mean, rstd: what the forward wrote (residual is x where there was no y).
        y: the branch, if the gradient to gate is wanted.
        branch_dtype, shift_dtype: dtypes of dy and dshift, None for those that are not wanted.
    Returns: dx, dy, dgate, dscale, dshift, dweight, dbias; None for what was not wanted or has no tensor.
    """
    grad_h, residual, (B, N, D) = grad_h.contiguous(), residual.contiguous(), residual.shape
    grad_residual, y, weight, bias = map(_dense, (grad_residual, y, weight, bias))
    (gate, gate_stride), (scale, scale_stride) = map(_by_sample, (gate, scale))
    chunks, chunk_rows = _chunks(B, N, programs=1024, least=16)
    new = functools.partial(torch.empty, device=residual.device, dtype=torch.float32)
    dx = torch.empty_like(residual)
    dy = None if branch_dtype is None else torch.empty_like(residual, dtype=branch_dtype)
    wanted = (True, shift_dtype is not None, y is not None, bias is not None)
    sums = [new((B, chunks, D)) if want else None for want in wanted]
    dscale = new((B, D), dtype=scale.dtype)
    dshift = new((B, D), dtype=shift_dtype) if shift_dtype is not None else None
    dgate = new((B, D), dtype=gate.dtype) if y is not None else None
    dweight, dbias = (None if vector is None else torch.empty_like(vector) for vector in (weight, bias))

    def launch(config):
        _norm_bwd_kernel[(B * chunks,)](
            grad_residual, grad_h, residual, y, gate, scale, weight, mean, rstd, dx, dy, *sums,
            N, chunks, chunk_rows, gate_stride, scale_stride, **_constants(D, config), **config.launch(),
        )  # fmt: skip

    if B * N * D:
        shape_class = _backward_class(D, residual.dtype, grad_residual is not None)
        key = D, str(residual.dtype), str(grad_h.dtype), str(branch_dtype), grad_residual is None, *wanted
        launch(pick("norm_bwd", BACKWARD, residual.device, shape_class, key, launch))  # overwrites all: launching again is harmless
    if D:
        kinds = 3 if y is not None or bias is not None else 2
        _norm_sums_kernel[(kinds, cdiv(D, SUMS.blocks["COLUMNS"]))](
            *sums, gate, scale, weight, bias, dscale, dshift, dgate, dweight, dbias, B, chunks if N else 0, gate_stride, scale_stride,
            D=D, **SUMS.launch(),
        )  # fmt: skip
    return dx, dy, dgate, dscale, dshift, dweight, dbias


def audit_cases() -> list[dict]:
    """Every static configuration at the model's widths, S to 1p6B: bf16 activations, residual stream in fp32 and in bf16.

    A model's first norm has no branch, and nothing reads the x' of its last one, so that no gradient of it comes back.
    """
    cases = []

    def case(name, kernel, signature, constexprs, sizes, **options):
        signature = {argument: kind for argument, kind in signature.items() if argument not in constexprs}
        divisible = [argument for argument in signature if argument not in sizes]
        options = dict(kind="memory", num_stages=1, archs=(80, 90, 100)) | options
        cases.append(dict(name=name, kernel=kernel, signature=signature, constexprs=constexprs, divisible=divisible, **options))

    for width in (384, 768, 1024, 1152, 1536, 1792):
        sizes = dict(N="i32", chunks="i32", chunk_rows="i32")
        vectors = dict(gate="*bf16", scale="*bf16", weight="*fp32", gate_stride="i32", scale_stride="i32")
        sums = dict(sum_scale="*fp32", sum_shift="*fp32", sum_gate="*fp32")
        no_bias, no_branch = dict(sum_branch=None), dict(y=None, gate=None, sum_gate=None, sum_branch=None)
        for stream in ("fp32", "bf16"):
            common = vectors | sizes | dict(y="*bf16", rstd="*fp32", residual=f"*{stream}")
            forward = common | dict(x=f"*{stream}", h="*bf16", shift="*bf16", shift_stride="i32", bias="*fp32")
            backward = common | sums | dict(grad_residual=f"*{stream}", grad_h="*bf16", dx=f"*{stream}", dy="*bf16", sum_branch="*fp32")
            for name, kernel, signature, rest in (
                ("fwd", _norm_fwd_kernel, forward, dict(bias=None, EPS=1e-6)),
                ("fwd+bias", _norm_fwd_kernel, forward, dict(EPS=1e-6)),
                ("fwd without branch", _norm_fwd_kernel, forward, dict(y=None, gate=None, bias=None, residual=None, EPS=1e-6)),
                ("bwd", _norm_bwd_kernel, backward, no_bias),
                ("bwd+bias", _norm_bwd_kernel, backward, {}),
                ("bwd+bias without grad_residual", _norm_bwd_kernel, backward, dict(grad_residual=None)),
                ("bwd without branch", _norm_bwd_kernel, backward, no_branch | dict(grad_residual=None, dy=None)),
            ):
                if kernel is _norm_fwd_kernel:
                    config = CONFIGS[80, str(pieces(width)[0])][0]
                else:
                    dtype = torch.float32 if stream == "fp32" else torch.bfloat16
                    config = BACKWARD[80, _backward_class(width, dtype, "grad_residual" not in rest)][0]
                constants = _constants(width, config) | config.blocks | rest | dict(mean=None)
                case(f"norm_{name} D={width} residual {stream}", kernel, signature, constants, sizes, num_warps=config.num_warps)
        gradients = dict(dscale="*bf16", dshift="*bf16", dgate="*bf16", dweight="*fp32", dbias="*fp32")
        sizes = dict(B="i32", chunks="i32")
        signature = vectors | sums | gradients | dict(sum_branch="*fp32", bias="*fp32") | sizes
        constants = dict(D=width, **SUMS.blocks)
        rest = dict(gate=None, bias=None, sum_gate=None, sum_branch=None, dgate=None, dbias=None)
        for name, constexprs in (("norm_sums", constants), ("norm_sums without branch", constants | rest)):
            case(f"{name} D={width}", _norm_sums_kernel, signature, constexprs, sizes, num_warps=SUMS.num_warps, kind="small")
    return cases


def workloads(tokens: int = 32768, width: int = 1152) -> list[dict]:
    """What training launches, for lightningdit_kernels.traffic: XL/1 at 256 tokens an image, the residual stream in fp32 and in bf16.

    First the norms inside a model, then its first one, which has no branch, and the backward of its last one, as in audit_cases.
    """
    shape, bf16 = (tokens // 256, 256, width), torch.bfloat16
    gate, scale, shift = torch.empty(shape[0], 6 * width, dtype=bf16).chunk(6, 1)[:3]  # of adaLN's output, as in the model
    weight, bias, rstd = torch.empty(width), torch.empty(width), torch.empty(*shape[:2], 1)
    y, grad_h = torch.empty(shape, dtype=bf16), torch.empty(shape, dtype=bf16)
    found = []

    def add(name, function, reads, *rest):
        programs = 2 if "without branch" in name else 3  # one of each kind of _norm_sums_kernel
        found.append(dict(name=f"norm {name}", launch=functools.partial(function, *reads, *rest), reads=reads, programs=programs))

    streams = {"fp32": torch.float32, "bf16": bf16}
    for name, stream in streams.items():
        x, grad = torch.empty(shape, dtype=stream), torch.empty(shape, dtype=stream)
        add(f"forward {name}", norm_fwd, (x, y, gate, scale, shift, weight, bias), 1e-6, False, bf16)
        add(f"backward {name}", norm_bwd, (grad, grad_h, x, y, gate, scale, weight, bias, None, rstd), bf16, bf16)
    for name, stream in streams.items():
        x = torch.empty(shape, dtype=stream)
        first = (None, grad_h, x, None, None, scale, weight, None, None, rstd)
        add(f"forward {name} without branch", norm_fwd, (x, None, None, scale, shift, weight, None), 1e-6, False, bf16)
        add(f"backward {name} without branch", norm_bwd, first, None, bf16)
        last = (None, grad_h, x, y, gate, scale, weight, bias, None, rstd)
        add(f"backward {name} without grad_residual", norm_bwd, last, bf16, bf16)
    return found
