"""What the machine can do at best: copy bandwidth and matrix products, square and in the 12 shapes of LightningDiT-XL/1.

Every percentage in the report is of these figures, measured in the same run. M is the number of tokens, batch x 256.
"""

import pytest
import torch

from bench.harness import PRESETS, Monitor, Timer, gpu_state, interleave, rounds_for, short, summary
from lightningdit_kernels.testing import random_tensor

LAYERS = ("qkv", "proj", "w12", "w3")


def gemm_shapes(shapes: str, tokens: int) -> dict[str, tuple[int, int, int]]:
    """(M, N, K) of the products out[M, N] = a[M, K] @ b[K, N]: four linears, each forward, input gradient, weight gradient."""
    width, _, hidden = PRESETS[shapes]
    linears = dict(zip(LAYERS, [(width, 3 * width), (width, width), (width, 2 * hidden), (hidden, width)], strict=True))
    products = {}
    for name, (fan_in, fan_out) in linears.items():
        products[f"{name} forward"] = (tokens, fan_out, fan_in)
        products[f"{name} dgrad"] = (tokens, fan_in, fan_out)
        products[f"{name} wgrad"] = (fan_out, fan_in, tokens)
    return products


def record_timers(benchmark, settings, kind, timers, counted, **more):
    rounds, states = rounds_for(timers, settings), []
    monitor = Monitor() if settings.device == "cuda" else None
    samples = interleave(timers, rounds, benchmark, settings.warmup_s, observe=monitor and (lambda: states.append(monitor.sample())))
    rows = [dict(name=name, **counted[name], **summary(times, counted[name], times)) for name, times in samples.items()]
    for row in rows:
        del row["speedup"], row["speedup_low"], row["speedup_high"]
    rounded = {name: list(map(short, times)) for name, times in samples.items()}
    record = dict(kind=kind, device=settings.device, rows=rows, samples_ms=rounded, **more)
    if settings.device == "cuda":
        record |= dict(after=gpu_state(), monitor=monitor.source)
        record |= dict(rounds={key: [one.get(key) for one in states[-rounds:]] for key in states[-1]})
    benchmark.extra_info.update(record)
    settings.record(record)


def bench_copy(benchmark, settings):
    """Bytes read and written a second by a copy of far more than any cache holds."""
    elements = dict(cuda=2**28, cpu=2**24)[settings.device] if settings.shapes != ("tiny",) else 2**16
    source = [random_tensor(2**16, device=settings.device).repeat(elements // 2**16) for _ in range(2)]
    target = [torch.empty_like(tensor) for tensor in source]
    timers = {"copy": Timer(lambda i: target[i].copy_(source[i]), 2, settings.device, settings.sample_ms)}
    record_timers(benchmark, settings, "copy", timers, {"copy": dict(bytes=2 * 4 * elements, flops=0)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def bench_square_gemm(benchmark, settings, dtype):
    """The product of two square matrices of random numbers, out of caches: zeros would draw less power and clock higher."""
    size = dict(cuda=8192, cpu=1024)[settings.device] if settings.shapes != ("tiny",) else 32
    a, b = (random_tensor(size, size, dtype=dtype, seed=seed, device=settings.device) for seed in (1, 2))
    timers = {f"{size}^3": Timer(lambda i: a @ b, 1, settings.device, settings.sample_ms)}
    counted = {f"{size}^3": dict(bytes=3 * a.numel() * a.element_size(), flops=2 * size**3)}
    record_timers(benchmark, settings, "gemm", timers, counted, dtype=str(dtype).removeprefix("torch."))


def bench_model_gemms(benchmark, settings, shapes, batch):
    """The 12 products of one block, bf16 on CUDA (the training dtype), fp32 on CPU."""
    tokens, dtype = 256 * batch, torch.bfloat16 if settings.device == "cuda" else torch.float32
    timers, counted = {}, {}
    for name, (m, n, k) in gemm_shapes(shapes, tokens).items():
        a, b = (random_tensor(rows, columns, dtype=dtype, seed=1, device=settings.device) for rows, columns in ((m, k), (k, n)))
        # As autograd lays them out: weights are (fan_out, fan_in), so the forward multiplies by a transpose, the weight gradient from one.
        a = a.T.contiguous().T if name.endswith("wgrad") else a
        b = b.T.contiguous().T if name.endswith("forward") else b
        timers[name] = Timer(lambda i, a=a, b=b: a @ b, 1, settings.device, settings.sample_ms)
        counted[name] = dict(bytes=(m * k + k * n + m * n) * a.element_size(), flops=2 * m * n * k)
    more = dict(shapes=shapes, tokens=tokens, dtype=str(dtype).removeprefix("torch."), mnk=gemm_shapes(shapes, tokens))
    record_timers(benchmark, settings, "model_gemms", timers, counted, **more)
