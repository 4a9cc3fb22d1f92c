"""The audit compiles the kernels for every size of the model. The kernels do not import the model, so this test compares the two."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lightningdit.model import PRESETS, LightningDiT
from lightningdit_kernels import attention_triton, norm_triton, swiglu_triton


def sizes_of(preset):
    """Width, hidden size of the feed-forward layer and head dimension of a preset's blocks."""
    with torch.device("meta"):
        model = LightningDiT(**PRESETS[preset] | dict(depth=1), use_swiglu=True)
    block = model.blocks[0]
    return dict(
        D=block.mlp.w3.out_features,
        F=block.mlp.w3.in_features,
        head_dim=block.attn.qkv.in_features // PRESETS[preset]["num_heads"],
    )


def audited(module, constexpr):
    return {case["constexprs"][constexpr] for case in module.audit_cases()}


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_is_audited(preset):
    sizes = sizes_of(preset)
    assert sizes["D"] in audited(norm_triton, "D")
    assert sizes["F"] in audited(swiglu_triton, "F")
    assert sizes["head_dim"] in audited(attention_triton, "D")


def test_only_presets_are_audited():
    """A width that no preset has any more would cost compilations for nothing."""
    presets = [sizes_of(preset) for preset in PRESETS]
    assert audited(norm_triton, "D") == {sizes["D"] for sizes in presets}
    assert audited(swiglu_triton, "F") == {sizes["F"] for sizes in presets}
    assert audited(attention_triton, "D") == {sizes["head_dim"] for sizes in presets}
