"""rope_attention against eager PyTorch, torch.compile, PyTorch's attention backends, flash-attn 2 to 4 and xformers.

pytest bench --benchmark-only; harness.py says how it is measured. As the model has it, and with QK-norm at the presets' own shapes.
"""

from bench.harness import Case, parametrize, run_case


@parametrize("rope_attention")
def bench_attention(benchmark, settings, op, dtype, shapes, variant):
    run_case(benchmark, Case(op, shapes, dtype, settings.device, variant), settings)
