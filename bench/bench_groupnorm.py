"""group_norm_silu against eager PyTorch, torch.compile, NVIDIA apex: pytest bench --benchmark-only. harness.py says how it is measured."""

from bench.harness import Case, parametrize, run_case


@parametrize("group_norm_silu")
def bench_groupnorm(benchmark, settings, op, dtype, shapes):
    run_case(benchmark, Case(op, shapes, dtype, settings.device), settings)
