"""swiglu against eager PyTorch, torch.compile and Liger: pytest bench --benchmark-only. harness.py says how it is measured."""

from bench.harness import Case, parametrize, run_case


@parametrize("swiglu")
def bench_swiglu(benchmark, settings, op, dtype, shapes):
    run_case(benchmark, Case(op, shapes, dtype, settings.device), settings)
