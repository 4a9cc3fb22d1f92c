"""Every op on CUDA against its definition: as close to fp64 as the definition is in the same dtype, and bitwise repeatable."""

import pytest
import torch

import lightningdit_kernels as kernels
from lightningdit_kernels.alignment import marginal_cosine_loss_ref, marginal_distance_matrix_loss_ref
from lightningdit_kernels.attention import rope_attention_ref
from lightningdit_kernels.groupnorm import group_norm_silu_ref
from lightningdit_kernels.norm import gated_residual_rms_norm_modulate_ref, rms_norm_modulate_ref
from lightningdit_kernels.swiglu import swiglu_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

DEFINITIONS = {
    "gated_residual_rms_norm_modulate": gated_residual_rms_norm_modulate_ref,
    "group_norm_silu": group_norm_silu_ref,
    "marginal_cosine_loss": marginal_cosine_loss_ref,
    "marginal_distance_matrix_loss": marginal_distance_matrix_loss_ref,
    "rms_norm_modulate": rms_norm_modulate_ref,
    "rope_attention": rope_attention_ref,
    "swiglu": lambda packed: swiglu_ref(packed, packed.dtype),
}


def inputs_of(op, batch, rows, columns, width, heads, dtype):
    def tensor(*shape, seed):
        return random_tensor(*shape, dtype=dtype, seed=seed, device="cuda")

    tokens = rows * columns
    x, y = tensor(batch, tokens, width, seed=1), tensor(batch, tokens, width, seed=2)
    modulation = dict(scale=tensor(batch, width, seed=3), shift=tensor(batch, width, seed=4), weight=tensor(width, seed=5))
    head_dim = width // heads
    rope = dict(
        positions=torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).cuda(),
        freqs=10_000.0 ** -(torch.arange(head_dim // 4, device="cuda") / (head_dim // 4)),
        q_weight=tensor(head_dim, seed=6),
        k_weight=tensor(head_dim, seed=7),
    )
    image = tensor(batch, width, rows, columns, seed=8)
    return {
        "gated_residual_rms_norm_modulate": dict(x=x, y=y, gate=tensor(batch, width, seed=9)) | modulation,
        "group_norm_silu": dict(x=image, weight=tensor(width, seed=10), bias=tensor(width, seed=11), num_groups=4),
        "marginal_cosine_loss": dict(z=x, f=y, margin=0.5),
        "marginal_distance_matrix_loss": dict(z=x, f=y, margin=0.05),
        "rms_norm_modulate": dict(x=x) | modulation,
        "rope_attention": dict(qkv=tensor(batch, tokens, 3, heads, head_dim, seed=12)) | rope,
        "swiglu": dict(packed=tensor(batch, tokens, 2 * width, seed=13)),
    }[op]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 16, 1152, 16), (3, 7, 9, 144, 2)], ids=["xl", "odd"])
@pytest.mark.parametrize("op", DEFINITIONS)
def test_cuda_matches_truth(op, shape, dtype):
    inputs = inputs_of(op, *shape, dtype)
    assert_matches_truth(getattr(kernels, op), DEFINITIONS[op], inputs, frozen=("freqs", "f"))


def test_every_op_has_its_definition_here():
    assert DEFINITIONS.keys() == set(kernels.__all__) - {"backends"}
