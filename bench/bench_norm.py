"""The norms against eager PyTorch, torch.compile, quack, Liger and NVIDIA apex: pytest bench --benchmark-only.

harness.py says how it is measured. In one dtype at the presets' own shapes, and as in training, with an fp32 residual stream next to bf16.
"""

from bench.harness import Case, parametrize, run_case


@parametrize("rms_norm_modulate", "gated_residual_rms_norm_modulate")
def bench_norm(benchmark, settings, op, dtype, shapes, variant):
    run_case(benchmark, Case(op, shapes, dtype, settings.device, variant), settings)
