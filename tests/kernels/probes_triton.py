"""Kernels on which the audit is tried: each is named for what the audit must find."""

import triton
import triton.language as tl


@triton.jit
def _copy_kernel(x, out, size, stride, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + offsets, tl.load(x + offsets * stride, mask=offsets < size), mask=offsets < size)


@triton.jit
def _loop_kernel(x, table, out, size, stride, BLOCK: tl.constexpr):
    """One wide load outside of the loop, narrow ones inside."""
    columns = tl.arange(0, BLOCK)
    total = tl.load(table + columns)
    for start in range(0, size, BLOCK):
        total += tl.load(x + (start + columns) * stride)
    tl.store(out + columns, total)


@triton.jit
def _sort_kernel(x, out, BLOCK: tl.constexpr):
    """Holds BLOCK / threads numbers a thread through many steps."""
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, tl.cumsum(tl.load(x + columns)) + tl.cumsum(tl.load(x + BLOCK + columns), reverse=True))


@triton.jit
def _product_kernel(a, b, out, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    rows, columns, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    product = tl.dot(tl.load(a + rows[:, None] * K + inner), tl.load(b + inner[:, None] * N + columns))
    tl.store(out + rows[:, None] * N + columns, product)


@triton.jit
def _double_kernel(x, out, scale, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    tl.store(out + columns, (tl.load(x + columns) * scale).to(tl.float32))


@triton.jit
def _atomic_kernel(x, out, BLOCK: tl.constexpr):
    tl.atomic_add(out + tl.arange(0, BLOCK), tl.load(x + tl.arange(0, BLOCK)))


def audit_cases():
    copy = dict(
        kernel=_copy_kernel,
        signature=dict(x="*fp32", out="*fp32", size="i32", stride="constexpr"),
        constexprs=dict(stride=1, BLOCK=1024),
        divisible=["x", "out", "size"],
        num_warps=4,
        num_stages=1,
        kind="memory",
        archs=(90,),
    )
    pair = dict(x="*fp32", out="*fp32")
    loop = copy | dict(kernel=_loop_kernel, signature=pair | dict(table="*fp32", size="i32"), divisible=["x", "table", "out"])
    block = copy | dict(signature=pair, constexprs=dict(BLOCK=512), divisible=["x", "out"], kind="small")
    matrices = copy | dict(kernel=_product_kernel, divisible=["a", "b", "out"], kind="matmul")
    half = dict(a="*bf16", b="*bf16", out="*fp32")
    tile = dict(M=64, N=64, K=64)
    small = matrices | dict(signature=half, constexprs=tile | dict(M=16), num_warps=1)
    strided = dict(stride=2, BLOCK=1024)
    return [
        copy | dict(name="wide", archs=(80, 90, 100)),
        copy | dict(name="narrow", constexprs=strided),
        copy | dict(name="narrow, excused", constexprs=strided, wide=False, reason="a probe"),
        loop | dict(name="wide loop", constexprs=dict(stride=1, BLOCK=1024)),
        loop | dict(name="narrow loop", constexprs=dict(stride=3, BLOCK=1024)),
        block | dict(name="spill", kernel=_sort_kernel, constexprs=dict(BLOCK=8192), num_warps=1),
        block | dict(name="double", kernel=_double_kernel, signature=pair | dict(scale="fp64")),
        block | dict(name="atomic", kernel=_atomic_kernel),
        matrices | dict(name="warpgroup product", signature=half, constexprs=tile, archs=(80, 90, 100)),
        small | dict(name="warp product"),
        small | dict(name="warp product, excused", hgmma=False, reason="a probe"),
        matrices | dict(name="too much shared memory", signature=half, constexprs=tile | dict(K=1024), archs=(80,)),
        matrices | dict(name="does not compile", signature=half, constexprs=tile | dict(K=48)),
    ]
