"""The margin losses against eager PyTorch and torch.compile: pytest bench --benchmark-only. harness.py says how it is measured."""

import pytest
import torch

from bench.harness import Case, parametrize, run_case


@parametrize("alignment_losses", "marginal_cosine_loss", "marginal_distance_matrix_loss")
def bench_alignment(benchmark, settings, op, dtype, shapes, variant):
    run_case(benchmark, Case(op, shapes, dtype, settings.device, variant), settings)


@pytest.mark.parametrize("op", ["marginal_distance_matrix_loss", "alignment_losses"])
def bench_long_alignment(benchmark, settings, op, shapes):
    """1,024 tokens, where an N x N matrix would tell: the column of peak memory."""
    if not settings.long_rows:
        pytest.skip("--tokens names the numbers of tokens")
    point = "B2/N64" if shapes.startswith("tiny") else f"B{32 if settings.device == 'cuda' else 4}/N1024"
    run_case(benchmark, Case(op, f"{shapes.partition('/')[0]}/{point}", torch.float32, settings.device), settings)
