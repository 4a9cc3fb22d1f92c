"""The margin losses against eager PyTorch and torch.compile: pytest bench --benchmark-only. harness.py says how it is measured."""

from bench.harness import Case, parametrize, run_case


@parametrize("alignment_losses", "marginal_cosine_loss", "marginal_distance_matrix_loss")
def bench_alignment(benchmark, settings, op, dtype, shapes):
    run_case(benchmark, Case(op, shapes, dtype, settings.device), settings)
