"""The margin losses on CUDA: tiles of the two similarity matrices live in registers, never the matrices.

B images, N tokens, C channels of z, E channels of f. Sums are fp32. Products of fp32 tokens are tf32x3: three tf32 products of leading and
trailing parts, 2^-22 relative, which compile to HMMA.1688.F32.TF32 on sm_80, HGMMA.F32.TF32 on sm_90 and UTCHMMA (tcgen05) on sm_100.
Products of bf16 or fp16 tokens are exact in fp32, so the tensor cores take them as they are, and the cosines are scaled afterwards. Either
way a cosine is off by about 1e-6, far below any margin: the gradient is a step there.

Forward: one program per pair of token blocks i <= j, for the similarity is symmetric. Backward: a program owns the tokens of one block i,
recomputes its rows of the similarities block by block, keeps of them S = sign(cos_z - cos_f) outside the margin, two bits each in
registers, and adds sum_j S_ij z_j / |z_j| for one block of channels after the other.
No atomics: each program has outputs of its own, and partial losses are summed in the order of the programs.
"""

import functools

import torch
import triton
import triton.language as tl

from lightningdit_kernels.launch_triton import cdiv, fast_launch
from lightningdit_kernels.tuning import Config, pick

# The clamps of torch.nn.functional.cosine_similarity and normalize, and of the pivots of a Gram matrix.
COSINE_EPS, NORMALIZE_EPS, PIVOT_EPS = 1e-8, 1e-12, 1e-15

# Per architecture and shape class: "fp32" and "half" are dtypes; of the backward "bf16" is z and f in bf16, and "long" is more tokens than
# LONG. Chosen by what the audit shows: no spill, then the least instructions. On an H100 "half" of the forward was timed, no other row.
LONG = dict(bf16=256, any=1024)
ROWS = {(80, "any"): [Config(dict(ROWS=4, BLOCK_C=512), num_warps=4), Config(dict(ROWS=8, BLOCK_C=256), num_warps=4)]}
LARGEST_FACTOR = 64  # latent channels whose Gram matrix one program holds in registers: 64 x 128 doubles take 64 of each of 256 threads
FACTOR = {(80, "any"): [Config(dict(BLOCK_R=32), num_warps=4)], (80, "wide"): [Config(dict(BLOCK_R=64), num_warps=8)]}
PROJECT = {(80, "any"): [Config(dict(BLOCK_M=64, BLOCK_K=32, BLOCK_N=32), num_warps=4, num_stages=3)]}
FORWARD = {
    (80, "fp32"): [Config(dict(BLOCK_N=64, BLOCK_K=16), num_warps=4, num_stages=2)],
    (80, "half"): [Config(dict(BLOCK_N=64, BLOCK_K=64), num_warps=4, num_stages=3)],
    (90, "fp32"): [Config(dict(BLOCK_N=64, BLOCK_K=32), num_warps=8, num_stages=2)],
    (90, "half"): [Config(dict(BLOCK_N=128, BLOCK_K=64), num_warps=8, num_stages=3),
                   Config(dict(BLOCK_N=64, BLOCK_K=64), num_warps=4, num_stages=3)],
    (100, "half"): [Config(dict(BLOCK_N=64, BLOCK_K=64), num_warps=4, num_stages=3)],
}
_BACKWARD_80 = [Config(dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=64, BLOCK_C=64), num_warps=8, num_stages=2)]
_BACKWARD_80_ANY = [Config(dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=16, BLOCK_C=64), num_warps=4, num_stages=2)]
_BACKWARD_100 = [Config(dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, BLOCK_C=64), num_warps=8, num_stages=3)]
BACKWARD = {
    (80, "bf16"): _BACKWARD_80,
    (80, "bf16 long"): _BACKWARD_80,
    (80, "any"): _BACKWARD_80_ANY,
    (80, "any long"): _BACKWARD_80_ANY,
    (90, "bf16"): [Config(dict(BLOCK_M=64, BLOCK_N=256, BLOCK_K=64, BLOCK_C=64), num_warps=8, num_stages=3)],
    (90, "bf16 long"): [Config(dict(BLOCK_M=64, BLOCK_N=128, BLOCK_K=64, BLOCK_C=128), num_warps=8, num_stages=3)],
    (90, "any"): [Config(dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_C=64), num_warps=4, num_stages=2)],
    (90, "any long"): [Config(dict(BLOCK_M=64, BLOCK_N=32, BLOCK_K=32, BLOCK_C=64), num_warps=8, num_stages=2)],
    (100, "bf16"): _BACKWARD_100,
    (100, "bf16 long"): _BACKWARD_100,
    (100, "any long"): [Config(dict(BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, BLOCK_C=64), num_warps=8, num_stages=2)],
}


@fast_launch
@triton.jit(do_not_specialize=["rows"])
def _inverse_norm_kernel(x, inverse, rows, C, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """inverse (rows,) = 1 / max(|x_i|, EPS) of x (rows, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        tile = tl.load(x + row[:, None] * C + column[None, :], mask=inside[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
        squares += tile * tile
    tl.store(inverse + row, 1.0 / tl.maximum(tl.sqrt(tl.sum(squares, 1)), EPS), mask=inside)


@triton.jit
def _cosine_sums(z, f, row, inside, C, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """z.z, f.f and z.f of every row."""
    zz, ff, zf = tl.zeros([ROWS, BLOCK_C], tl.float32), tl.zeros([ROWS, BLOCK_C], tl.float32), tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < C)[None, :]
        a = tl.load(z + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
        b = tl.load(f + row[:, None] * C + column[None, :], mask=mask, other=0.0).to(tl.float32)
        zz += a * a
        ff += b * b
        zf += a * b
    return tl.sum(zz, 1), tl.sum(ff, 1), tl.sum(zf, 1)


@fast_launch
@triton.jit(do_not_specialize=["rows"])
def _marginal_cosine_fwd_kernel(z, f, partial, rows, C, target, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    zz, ff, zf = _cosine_sums(z, f, row, inside, C, ROWS, BLOCK_C)
    cosine = zf / tl.maximum(tl.sqrt(zz), EPS) / tl.maximum(tl.sqrt(ff), EPS)
    cost = tl.where(inside, tl.maximum(target - cosine, 0.0, propagate_nan=tl.PropagateNan.ALL), 0.0)
    tl.store(partial + tl.program_id(0), tl.sum(cost, 0) / rows)


@fast_launch
@triton.jit(do_not_specialize=["rows"])
def _marginal_cosine_bwd_kernel(grad, z, f, grad_z, rows, C, target, EPS: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """dz_i = -grad / rows * (f_hat - cos z_hat) / |z| for the tokens that pay."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < rows
    zz, ff, zf = _cosine_sums(z, f, row, inside, C, ROWS, BLOCK_C)
    norm = tl.sqrt(zz)
    z_inverse, f_inverse = 1.0 / tl.maximum(norm, EPS), 1.0 / tl.maximum(tl.sqrt(ff), EPS)
    cosine = zf * z_inverse * f_inverse
    factor = tl.where(target - cosine > 0.0, -tl.load(grad) / rows, 0.0) * z_inverse
    on_f = factor * f_inverse
    on_z = tl.where(norm > EPS, -factor * cosine * z_inverse, 0.0)  # below the clamp the norm is a constant
    for start in range(0, C, BLOCK_C):
        column = start + tl.arange(0, BLOCK_C)
        mask = inside[:, None] & (column < C)[None, :]
        offset = row[:, None] * C + column[None, :]
        a = tl.load(z + offset, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(f + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_z + offset, (on_f[:, None] * b + on_z[:, None] * a).to(grad_z.dtype.element_ty), mask=mask)


@triton.jit
def _products(x, i, j, N, C, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """x_i . x_j of the tokens i (BLOCK_M,) and j (BLOCK_N,) of one image x (N, C)."""
    product = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + i[:, None] * C + k[None, :], mask=(i < N)[:, None] & (k < C)[None, :], other=0.0)
        b = tl.load(x + j[:, None] * C + k[None, :], mask=(j < N)[:, None] & (k < C)[None, :], other=0.0)
        product = tl.dot(a, b.T, product, input_precision="tf32x3")
    return product


@fast_launch
@triton.jit
def _marginal_distance_matrix_fwd_kernel(z, f, z_inverse, f_inverse, partial, N, C, E, pairs, scale, margin,
                                         BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    image, pair = (tl.program_id(0) // pairs).to(tl.int64), tl.program_id(0) % pairs
    block_j = 0
    while (block_j + 1) * (block_j + 2) // 2 <= pair:  # pairs in the order (0, 0), (0, 1), (1, 1), (0, 2), ...
        block_j += 1
    block_i = pair - block_j * (block_j + 1) // 2
    i, j = block_i * BLOCK_N + tl.arange(0, BLOCK_N), block_j * BLOCK_N + tl.arange(0, BLOCK_N)
    z_i, z_j = (tl.load(z_inverse + image * N + i, mask=i < N, other=0.0), tl.load(z_inverse + image * N + j, mask=j < N, other=0.0))
    f_i, f_j = (tl.load(f_inverse + image * N + i, mask=i < N, other=0.0), tl.load(f_inverse + image * N + j, mask=j < N, other=0.0))
    z_cosine = _products(z + image * N * C, i, j, N, C, BLOCK_N, BLOCK_N, BLOCK_K) * (z_i[:, None] * z_j[None, :])
    f_cosine = _products(f + image * N * E, i, j, N, E, BLOCK_N, BLOCK_N, BLOCK_K) * (f_i[:, None] * f_j[None, :])
    cost = tl.maximum(tl.abs(z_cosine - f_cosine) - margin, 0.0, propagate_nan=tl.PropagateNan.ALL)
    cost = tl.where((i < N)[:, None] & (j < N)[None, :], cost, 0.0)
    total = tl.sum(cost) * scale
    tl.store(partial + tl.program_id(0), tl.where(block_i == block_j, total, 2.0 * total))


@triton.jit
def _add_product(sign, x, total, EXACT: tl.constexpr):
    """total + sign @ x for sign in {-1, 0, 1}, exact in bf16: x in bf16 parts, 16 bits of it or, where EXACT, all 24.

    Hopper's tf32 product would want x transposed in shared memory; its bf16 product takes either order, and twice as much at once.
    """
    high = x.to(tl.bfloat16)
    rest = x - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    if EXACT:
        total = tl.dot(sign, (rest - middle.to(tl.float32)).to(tl.bfloat16), total)
    return tl.dot(sign, high, tl.dot(sign, middle, total))


@triton.jit
def _sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, j, N, C, E, margin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                BLOCK_K: tl.constexpr):
    """1 where cos_z - cos_f of tokens i and j is above the margin, 2 where it is below -margin, else 0; and sum_j S_ij cos(z_i, z_j)."""
    in_j = j < N
    z_j, f_j = tl.load(z_inverse + j, mask=in_j, other=0.0), tl.load(f_inverse + j, mask=in_j, other=0.0)
    z_cosine = _products(z, i, j, N, C, BLOCK_M, BLOCK_N, BLOCK_K) * (z_i[:, None] * z_j[None, :])
    difference = z_cosine - _products(f, i, j, N, E, BLOCK_M, BLOCK_N, BLOCK_K) * (f_i[:, None] * f_j[None, :])
    code = tl.where((tl.abs(difference) - margin > 0.0) & in_j[None, :], tl.where(difference > 0.0, 1, 2), 0)
    return code, tl.sum(tl.where(code == 0, 0.0, tl.where(code == 1, z_cosine, -z_cosine)), 1)


@triton.jit
def _all_sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, first, N, C, E, margin, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
                    BLOCK_K: tl.constexpr):
    """The codes of the 16 blocks of tokens from `first` on, two bits each in one integer, and sum_j S_ij cos(z_i, z_j) over them."""
    codes, along = tl.zeros([BLOCK_M, BLOCK_N], tl.int32), tl.zeros([BLOCK_M], tl.float32)
    for block in range(0, tl.minimum(tl.cdiv(N - first, BLOCK_N), 16)):
        j = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        code, part = _sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, j, N, C, E, margin, BLOCK_M, BLOCK_N, BLOCK_K)
        codes |= code << 2 * block
        along += part
    return codes, along


@triton.jit
def _left_factors(code, z_j, SCALED: tl.constexpr):
    """The sign that code stands for in bf16, twice; or, where SCALED, sign * z_j in two bf16 parts."""
    sign = ((code & 1) - (code >> 1 & 1)).to(tl.float32)
    if SCALED:
        sign *= z_j[None, :]
    high = sign.to(tl.bfloat16)
    return high, (sign - high.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def _add_signed(high, middle, z, z_j, j, c, N, C, total, SCALED: tl.constexpr):
    """total (tokens i, channels c) + sum_j S_ij z_j / |z_j|. Scaled signs leave bf16 tokens to the tensor cores as they are in memory."""
    tile = tl.load(z + j[:, None] * C + c[None, :], mask=(j < N)[:, None] & (c < C)[None, :], other=0.0)
    if SCALED:
        return tl.dot(high, tile, tl.dot(middle, tile, total))
    return _add_product(high, tile.to(tl.float32) * z_j[:, None], total, z.dtype.element_ty == tl.float32)


@triton.jit
def _add_all_signed(codes, z, z_inverse, first, c, N, C, total, SCALED: tl.constexpr, BLOCK_N: tl.constexpr):
    """The same of the tokens whose codes _all_sign_codes has computed."""
    for block in range(0, tl.minimum(tl.cdiv(N - first, BLOCK_N), 16)):
        j = first + block * BLOCK_N + tl.arange(0, BLOCK_N)
        z_j = tl.load(z_inverse + j, mask=j < N, other=0.0)
        high, middle = _left_factors(codes >> 2 * block, z_j, SCALED)
        total = _add_signed(high, middle, z, z_j, j, c, N, C, total, SCALED)
    return total


@fast_launch
@triton.jit
def _marginal_distance_matrix_bwd_kernel(grad, z, f, z_inverse, f_inverse, grad_z, N, C, E, scale, margin, EPS: tl.constexpr,
                                         BLOCKS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
                                         BLOCK_C: tl.constexpr):
    """dz_i = (g_i - z_hat_i (z_hat_i . g_i)) / |z_i|, g_i = 2 grad / (B N^2) sum_j S_ij z_hat_j.

    A program has BLOCK_M tokens i and holds their signs S_ij, two bits each, while it goes through the channels. BLOCKS of tokens j: 1;
    2: up to 16, whose signs are as many registers; 3: more, where the signs of 16 at a time are computed for every block of channels.
    """
    SCALED: tl.constexpr = z.dtype.element_ty == tl.bfloat16
    blocks = tl.cdiv(N, BLOCK_M)
    image, i = (tl.program_id(0) // blocks).to(tl.int64), (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    z += image * N * C
    f += image * N * E
    z_inverse += image * N
    f_inverse += image * N
    grad_z += image * N * C
    in_i = i < N
    z_i, f_i = tl.load(z_inverse + i, mask=in_i, other=0.0), tl.load(f_inverse + i, mask=in_i, other=0.0)
    factor = tl.load(grad) * scale * z_i
    j = tl.arange(0, BLOCK_N)
    if BLOCKS == 1:
        codes, along = _sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, j, N, C, E, margin, BLOCK_M, BLOCK_N, BLOCK_K)
        z_j = tl.load(z_inverse + j, mask=j < N, other=0.0)
        high, middle = _left_factors(codes, z_j, SCALED)
    else:
        codes, along = _all_sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, 0, N, C, E, margin, BLOCK_M, BLOCK_N, BLOCK_K)
    if BLOCKS == 3:
        for first in range(16 * BLOCK_N, N, 16 * BLOCK_N):
            along += _all_sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, first, N, C, E, margin, BLOCK_M, BLOCK_N, BLOCK_K)[1]
    shrink = tl.where(z_i * EPS < 0.999, along * z_i, 0.0)
    for start in range(0, C, BLOCK_C):
        c = start + tl.arange(0, BLOCK_C)
        total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
        if BLOCKS == 1:
            total = _add_signed(high, middle, z, z_j, j, c, N, C, total, SCALED)
        elif BLOCKS == 2:
            total = _add_all_signed(codes, z, z_inverse, 0, c, N, C, total, SCALED, BLOCK_N)
        else:
            for first in range(0, N, 16 * BLOCK_N):
                codes, _ = _all_sign_codes(z, f, z_inverse, f_inverse, i, z_i, f_i, first, N, C, E, margin, BLOCK_M, BLOCK_N, BLOCK_K)
                total = _add_all_signed(codes, z, z_inverse, first, c, N, C, total, SCALED, BLOCK_N)
        own, mask = i[:, None] * C + c[None, :], in_i[:, None] & (c < C)[None, :]
        towards = tl.load(z + own, mask=mask, other=0.0).to(tl.float32)
        tl.store(grad_z + own, ((total - shrink[:, None] * towards) * factor[:, None]).to(grad_z.dtype.element_ty), mask=mask)


@fast_launch
@triton.jit(do_not_specialize=["rows"])
def _project_kernel(x, q, out, norm, rows, C, K, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """out (rows, K) = x (rows, C) @ q (C, K) and norm (rows,) = |x_i|, in one pass over x for K up to BLOCK_N."""
    row, column = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    product, squares = tl.zeros([BLOCK_M, BLOCK_N], tl.float32), tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for start in range(0, C, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(x + row[:, None] * C + k[None, :], mask=(row < rows)[:, None] & (k < C)[None, :], other=0.0).to(tl.float32)
        b = tl.load(q + k[:, None] * K + column[None, :], mask=(k < C)[:, None] & (column < K)[None, :], other=0.0)
        squares += a * a
        product = tl.dot(a, b, product, input_precision="tf32x3")
    tl.store(out + row[:, None] * K + column[None, :], product, mask=(row < rows)[:, None] & (column < K)[None, :])
    if tl.program_id(1) == 0:
        tl.store(norm + row, tl.sqrt(tl.sum(squares, 1)), mask=row < rows)


@fast_launch
@triton.jit
def _factor_kernel(gram, L, inverse, r, EPS: tl.constexpr, BLOCK_R: tl.constexpr):
    """L and L^-1 of gram = L L^T, (r, r): Gauss makes (gram | 1) into (L^T | L^-1). A row of these whose pivot is rounding is zero."""
    i, k = tl.arange(0, BLOCK_R)[:, None], tl.arange(0, BLOCK_R)[None, :]
    left = tl.load(gram + i * r + k, mask=(i < r) & (k < r), other=0.0)
    right = tl.where(i == k, 1.0, 0.0).to(tl.float64)
    least = EPS * tl.sum(tl.where(i == k, left, 0.0), 0)
    for j in range(r):
        row, column = tl.sum(tl.where(i == j, left, 0.0), 0), tl.sum(tl.where(k == j, left, 0.0), 1)
        own = tl.arange(0, BLOCK_R) == j
        pivot, enough = tl.sum(tl.where(own, row, 0.0), 0), tl.sum(tl.where(own, least, 0.0), 0)
        scale = tl.where(pivot <= enough, 0.0, 1.0 / tl.sqrt(pivot))  # what is not a number stays so
        row, column, solved = row * scale, column * scale, tl.sum(tl.where(i == j, right, 0.0), 0) * scale
        left -= column[:, None] * row[None, :]
        right -= column[:, None] * solved[None, :]
        at = tl.arange(0, BLOCK_R)
        tl.store(L + at * r + j, tl.where(at >= j, row, 0.0), mask=at < r)
        tl.store(inverse + j * r + at, solved, mask=at < r)


def _key(*tensors):
    return [*(size for tensor in tensors for size in tensor.shape[-2:]), *(str(tensor.dtype) for tensor in tensors)]


def marginal_cosine_loss_fwd(z, f, margin):
    """z, f (B, N, C) contiguous -> the loss, a scalar in fp32."""
    rows, C = z.shape[0] * z.shape[1], z.shape[2]

    def launch(config):
        partial = z.new_empty(cdiv(rows, config.blocks["ROWS"]), dtype=torch.float32)
        _marginal_cosine_fwd_kernel[(len(partial),)](z, f, partial, rows, C, 1 - margin, EPS=COSINE_EPS, **config.launch())
        return partial.sum()

    return launch(pick("marginal_cosine_loss", ROWS, z.device, "any", _key(z, f)[1:], launch))


def marginal_cosine_loss_bwd(grad, z, f, margin):
    """grad scalar, z, f (B, N, C) contiguous -> the gradient to z, in z.dtype."""
    rows, C = z.shape[0] * z.shape[1], z.shape[2]

    def launch(config):
        grad_z = torch.empty_like(z)
        grid = (cdiv(rows, config.blocks["ROWS"]),)
        _marginal_cosine_bwd_kernel[grid](grad, z, f, grad_z, rows, C, 1 - margin, EPS=COSINE_EPS, **config.launch())
        return grad_z

    return launch(pick("marginal_cosine_loss_backward", ROWS, z.device, "any", _key(z, f)[1:], launch))


def _inverse_norm(x):
    rows, C = x.shape[0] * x.shape[1], x.shape[2]
    inverse = x.new_empty(x.shape[:2], dtype=torch.float32)
    config = pick("inverse_norm", ROWS, x.device, "any", ())
    grid = (cdiv(rows, config.blocks["ROWS"]),)
    _inverse_norm_kernel[grid](x, inverse, rows, C, EPS=NORMALIZE_EPS, **config.launch())
    return inverse


def marginal_distance_matrix_loss_fwd(z, f, margin):
    """z (B, N, C), f (B, N, E) contiguous -> (loss, 1 / |z_i| (B, N), 1 / |f_i| (B, N)), all fp32."""
    B, N, C = z.shape
    z_inverse, f_inverse = _inverse_norm(z), _inverse_norm(f)

    def launch(config):
        blocks = cdiv(N, config.blocks["BLOCK_N"])
        pairs = blocks * (blocks + 1) // 2
        partial = z.new_empty(B * pairs, dtype=torch.float32)
        _marginal_distance_matrix_fwd_kernel[(B * pairs,)](
            z, f, z_inverse, f_inverse, partial, N, C, f.shape[2], pairs, 1 / (B * N * N), margin, **config.launch())
        return partial.sum()

    dtypes = "fp32" if torch.float32 in (z.dtype, f.dtype) else "half"
    return launch(pick("marginal_distance_matrix_loss", FORWARD, z.device, dtypes, _key(z, f), launch)), z_inverse, f_inverse


def _blocks(N, config):
    """BLOCKS of the backward's kernel."""
    blocks = cdiv(N, config.blocks["BLOCK_N"])
    return 1 if blocks == 1 else 2 if blocks <= 16 else 3


def marginal_distance_matrix_loss_bwd(grad, z, f, z_inverse, f_inverse, margin):
    """grad scalar, z (B, N, C), f (B, N, E) contiguous, both inverse norms of the forward -> the gradient to z, in z.dtype."""
    B, N, C = z.shape

    def launch(config):
        grad_z = torch.empty_like(z)
        _marginal_distance_matrix_bwd_kernel[(B * cdiv(N, config.blocks["BLOCK_M"]),)](
            grad, z, f, z_inverse, f_inverse, grad_z, N, C, f.shape[2], 2 / (B * N * N), margin, EPS=NORMALIZE_EPS,
            BLOCKS=_blocks(N, config), **config.launch())
        return grad_z

    dtypes = "bf16" if z.dtype == f.dtype == torch.bfloat16 else "any"
    shape_class = f"{dtypes} long" if N > LONG[dtypes] else dtypes
    return launch(pick("marginal_distance_matrix_loss_backward", BACKWARD, z.device, shape_class, _key(z, f), launch))


def project(x, q):
    """x (B, N, C) contiguous, q (C, K) fp32 contiguous -> (x @ q (B, N, K), |x_i| (B, N)), fp32."""
    rows, C, K = x.shape[0] * x.shape[1], x.shape[2], q.shape[1]

    def launch(config):
        out, norm = x.new_empty(*x.shape[:2], K, dtype=torch.float32), x.new_empty(x.shape[:2], dtype=torch.float32)
        grid = (cdiv(rows, config.blocks["BLOCK_M"]), cdiv(K, config.blocks["BLOCK_N"]))
        _project_kernel[grid](x, q, out, norm, rows, C, K, **config.launch())
        return out, norm

    return launch(pick("alignment_project", PROJECT, x.device, "any", _key(x)[1:] + [K], launch))


def factor(weight):
    """weight (C, r), r at most LARGEST_FACTOR -> (L (r, r), q (C, r)), fp64, weight = q L^T. Nothing in it waits for the GPU."""
    wide = weight.double()
    gram = wide.mT @ wide
    L, inverse = torch.empty_like(gram), torch.empty_like(gram)
    config = pick("alignment_factor", FACTOR, weight.device, "any" if len(gram) <= 32 else "wide", ())
    _factor_kernel[(1,)](gram, L, inverse, len(gram), EPS=PIVOT_EPS, **config.launch())
    return L, wide @ inverse.mT


def audit_cases():
    """Every kernel and configuration at the shapes of the VA-VAE: 256 tokens, 1024 features, 32 latent channels."""
    cases = []

    def add(kernel, table, signature, kind, constexprs=None, shape_class=None, **rest):
        for (arch, row), configs in table.items():
            if shape_class not in (None, row):
                continue
            others = [other for other, same in table if same == row and other > arch]
            archs = tuple(a for a in (80, 90, 100) if a >= arch and a < min(others, default=1000))
            for config in configs:
                sizes = ",".join(str(value) for value in config.blocks.values())
                name = f"{kernel.fn.__name__.strip('_')} {rest.get('dtype', '')} {sizes} in {config.num_warps} warps"
                if any(case["name"] == name and case["num_stages"] != config.num_stages for case in cases):
                    name += f" and {config.num_stages} stages"
                if same := [case for case in cases if case["name"] == name]:  # a later choice of one architecture, the first of another
                    same[0]["archs"] = tuple(sorted({*same[0]["archs"], *archs}))
                    continue
                constants = constexprs(config) if callable(constexprs) else constexprs or {}
                constants = {**constants, **config.blocks}
                cases.append(dict(name=name, kernel=kernel,
                                  signature={**signature, **{key: "constexpr" for key in constants}}, constexprs=constants,
                                  divisible=[key for key, value in signature.items() if value[0] == "*" or key in "CENKr"],
                                  num_warps=config.num_warps, num_stages=config.num_stages, archs=archs, kind=kind,
                                  **{key: value for key, value in rest.items() if key != "dtype"}))

    for dtype in ("fp32", "bf16"):
        tokens, group = f"*{dtype}", "fp32" if dtype == "fp32" else "half"
        norms = dict(rows="i32", C="i32")
        losses = dict(target="fp32")
        matrix = dict(z=tokens, f=tokens, z_inverse="*fp32", f_inverse="*fp32")
        sizes = dict(N="i32", C="i32", E="i32")
        add(_inverse_norm_kernel, ROWS, dict(x=tokens, inverse="*fp32", **norms), "memory", dict(EPS=NORMALIZE_EPS), dtype=dtype)
        add(_marginal_cosine_fwd_kernel, ROWS, dict(z=tokens, f=tokens, partial="*fp32", **norms, **losses), "memory",
            dict(EPS=COSINE_EPS), dtype=dtype)
        add(_marginal_cosine_bwd_kernel, ROWS, dict(grad="*fp32", z=tokens, f=tokens, grad_z=tokens, **norms, **losses), "memory",
            dict(EPS=COSINE_EPS), dtype=dtype)
        add(_marginal_distance_matrix_fwd_kernel, FORWARD,
            dict(**matrix, partial="*fp32", **sizes, pairs="i32", scale="fp32", margin="fp32"), "matmul", None, group, dtype=dtype)
        add(_project_kernel, PROJECT, dict(x=tokens, q="*fp32", out="*fp32", norm="*fp32", **norms, K="i32"), "matmul", dtype=dtype)
    add(_factor_kernel, FACTOR, dict(gram="*fp64", L="*fp64", inverse="*fp64", r="i32"), "small", dict(EPS=PIVOT_EPS), dtype="fp64",
        fp64=True, reason="a Gram matrix has the square of the weight's condition number")
    # Latents are fp32 in every run; the features are those of the frozen encoder, bf16 where training is.
    sizes = dict(N="i32", C="i32", E="i32", scale="fp32", margin="fp32")
    for z, f in (("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16")):
        matrix = dict(z=f"*{z}", f=f"*{f}", z_inverse="*fp32", f_inverse="*fp32")
        dtypes, label = "bf16" if z == "bf16" else "any", z if z == f else f"{z} {f} features"
        if z != f:
            add(_marginal_distance_matrix_fwd_kernel, FORWARD, dict(**matrix, partial="*fp32", **sizes, pairs="i32"), "matmul",
                None, "fp32", dtype=label)
        for shape_class, N in ((dtypes, 256), (f"{dtypes} long", 4 * LONG[dtypes])):
            add(_marginal_distance_matrix_bwd_kernel, BACKWARD, dict(grad="*fp32", **matrix, grad_z=f"*{z}", **sizes), "matmul",
                lambda config, N=N: dict(EPS=NORMALIZE_EPS, BLOCKS=_blocks(N, config)), shape_class,
                dtype=f"{label}{shape_class.removeprefix(dtypes)}")
    return cases


def workloads(images: int = 8):
    """What training the VA-VAE launches, for lightningdit_kernels.traffic: 256 tokens, 32 latent channels, 1024 features. First the
    low-rank form, which is the usual one, with fp32 features; then the losses of projected latents; then the low-rank form with bf16
    features, as bf16 training has it. The projection of latents is the same."""
    grad, weight = torch.empty(()), torch.empty(1024, 32)
    found = []

    def add(name, function, *tensors, margin=()):
        found.append(dict(name=name, launch=functools.partial(function, *tensors, *margin), reads=tensors))

    def add_distance(name, z, f):
        inverses = torch.empty(images, 256), torch.empty(images, 256)
        add(f"distance loss forward {name}", marginal_distance_matrix_loss_fwd, z, f, margin=(0.25,))
        add(f"distance loss backward {name}", marginal_distance_matrix_loss_bwd, grad, z, f, *inverses, margin=(0.25,))

    def tokens(channels, dtype=torch.float32):
        return torch.empty(images, 256, channels, dtype=dtype)

    add("factor of the weight", factor, weight)
    add("projection of features", project, tokens(1024), weight)
    add_distance("fp32 narrow", tokens(32), tokens(1024))
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        z, f = tokens(1024, dtype), tokens(1024, dtype)
        add(f"cosine loss forward {name}", marginal_cosine_loss_fwd, z, f, margin=(0.5,))
        add(f"cosine loss backward {name}", marginal_cosine_loss_bwd, grad, z, f, margin=(0.5,))
        add_distance(name, z, f)
    add("projection of bf16 features", project, tokens(1024, torch.bfloat16), weight)
    add_distance("fp32 narrow bf16 features", tokens(32), tokens(1024, torch.bfloat16))
    return found
