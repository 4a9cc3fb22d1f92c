"""What holds for every op: torch.compile takes it whole, once, for any batch, under autocast too."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils import _pytree as pytree

import lightningdit_kernels as kernels
from lightningdit_kernels.testing import random_tensor

N, D, H, DH = 6, 16, 2, 8
OPS = [name for name in kernels.__all__ if name != "backends"]


def inputs_of(op, batch):
    tokens = [random_tensor(batch, N, D, seed=seed).requires_grad_() for seed in (1, 2)]
    samples = [random_tensor(batch, D, seed=seed) for seed in (3, 4, 5)]
    positions, freqs = torch.cartesian_prod(torch.arange(2), torch.arange(3)), random_tensor(DH // 4).abs()
    qkv, ones = random_tensor(batch, N, 3, H, DH).requires_grad_(), torch.ones(DH)
    image = random_tensor(batch, D, 4, 4).requires_grad_()
    return {
        "rms_norm_modulate": (tokens[0], *samples[:2], torch.ones(D)),
        "gated_residual_rms_norm_modulate": (*tokens, *samples, torch.ones(D), 1e-6, True),
        "rope_attention": (qkv, positions, freqs, ones, ones),
        "swiglu": (tokens[0],),
        "marginal_cosine_loss": tuple(tokens),
        "marginal_distance_matrix_loss": tuple(tokens),
        "group_norm_silu": (image, torch.ones(D), torch.zeros(D), 4),
    }[op]


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_and_once_for_any_batch(op):
    function = getattr(kernels, op)
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=frames)
    for batch in (5, 7, 9, 11):  # sizes that no other dimension has: equal sizes would share one symbol
        for enabled in (False, True):
            expected_inputs, inputs = inputs_of(op, batch), inputs_of(op, batch)
            for tensor in inputs:
                if isinstance(tensor, torch.Tensor) and len(tensor) == batch:
                    torch._dynamo.mark_dynamic(tensor, 0)  # raises if anything specialises on the batch
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                expected, got = function(*expected_inputs), compiled(*inputs)
            for want, have in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
                torch.testing.assert_close(have, want)
            pytree.tree_leaves(expected)[-1].float().square().sum().backward()
            pytree.tree_leaves(got)[-1].float().square().sum().backward()
            torch.testing.assert_close(inputs[0].grad, expected_inputs[0].grad)
    assert frames.frame_count == 2, "one graph with autocast and one without"
