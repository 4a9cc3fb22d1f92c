"""The audit compiles the kernels for every size of the model. The kernels do not import the model, so this test compares the two."""

import contextlib

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="triton is not installed")

from lightningdit import model as model_module
from lightningdit.model import PRESETS, LightningDiT
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.losses import LatentProjection
from lightningdit_kernels import attention, attention_triton, interpreter, library, native, norm_triton, swiglu_triton, traffic
from lightningdit_kernels.groupnorm import group_norm_silu
from lightningdit_kernels.library import result_dtype
from lightningdit_kernels.machine_code import OPS, cases_of


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
    """Values of a size in the kernels that have it: the sum over partial results has another."""
    return {case["constexprs"][constexpr] for case in module.audit_cases() if constexpr in case["constexprs"]}


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


GROUP_NORM = {
    f"_{name}_kernel"
    for name in ("moments", "merge_moments", "group_norm_silu_fwd", "grad_sums", "merge_grad_sums", "group_norm_silu_bwd")
}


class Launches:
    """The observer of a step: runs no program, and notes kernels with the audit case that compiles them."""

    def __init__(self):
        self.found, self.cases = [], [case for op in OPS for case in cases_of(op)]

    def begin(self, kernel, programs, arguments, options):
        spec = traffic.specification(kernel, arguments, options)
        self.found.append((kernel.fn.__name__, traffic.case_of(self.cases, kernel, spec)))
        return 0

    def end(self):
        pass


@pytest.fixture
def launches(monkeypatch):
    """What the Triton launchers launch for CPU tensors. Layers give dtypes and shapes of products but multiply next to nothing."""
    if not interpreter.is_on():
        pytest.skip("kernels are compiled here")

    def linear(x, weight, bias=None):
        return (x[..., :1] * weight[:, 0]).to(result_dtype(x))

    def conv2d(x, weight, bias=None, stride=(1, 1), padding=(0, 0), *_):
        height, width = ((size + 2 * padding[0] - weight.shape[2]) // stride[0] + 1 for size in x.shape[2:])
        pixels = x[:, :1, :: stride[0], :: stride[0]][:, :, :height, :width]
        return (pixels * weight[:, :1, :1, :1].flatten().view(-1, 1, 1)).to(result_dtype(x), memory_format=torch.channels_last)

    monkeypatch.setattr(F, "linear", linear)
    monkeypatch.setattr(F, "conv2d", conv2d)
    monkeypatch.setattr(model_module, "rope_attention", attention.fused)
    monkeypatch.setattr(native, "available", False)
    observer = Launches()
    with contextlib.ExitStack() as stack:
        implementations = stack.enter_context(torch.library._scoped_library("lightningdit", "IMPL"))
        for name, function in library.CUDA.items():
            implementations.impl(name, function, "CPU", allow_override=True)
        stack.enter_context(interpreter.observe(observer))
        yield observer.found


def assert_compiled(launches, kernels):
    assert {kernel for kernel, _ in launches} == kernels
    assert sorted({kernel for kernel, case in launches if case is None}) == []


@pytest.mark.parametrize("bf16_residual", [False, True], ids=["fp32 residual", "bf16 residual"])
@pytest.mark.parametrize("use_qknorm", [False, True], ids=["", "QK-norm"])
def test_a_training_step_launches_what_the_audit_compiles(launches, use_qknorm, bf16_residual):
    """Two blocks of XL/1 in bf16: with them come the first and the last norm of a model."""
    flags = dict(use_qknorm=use_qknorm, use_swiglu=True, use_rope=True, use_rmsnorm=True, bf16_residual=bf16_residual)
    with torch.device("meta"):
        model = LightningDiT(**PRESETS["XL/1"] | dict(depth=2), **flags)
    model = model.to_empty(device="cpu")
    with torch.autocast("cpu", torch.bfloat16):
        velocity = model(torch.zeros(2, 32, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.int64))
    velocity.sum().backward()
    kernels = {f"_{name}_kernel" for name in ("norm_fwd", "norm_bwd", "norm_sums", "swiglu_fwd", "swiglu_bwd", "sum", "rope_table")}
    steps = ("fwd", "prologue", "bwd") if use_qknorm else ("fwd", "bwd_head")
    attention_kernels = {f"_rope_attention_{name}_kernel" for name in steps}
    assert_compiled(launches, kernels | attention_kernels)


@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_launches_what_the_audit_compiles(launches, features):
    """Latents are fp32 under autocast too; the frozen encoder's features are what its dtype is."""
    z = torch.zeros(2, 32, 16, 16, requires_grad=True)
    LatentProjection(32, 1024).alignment_loss(z, torch.zeros(2, 256, 1024, dtype=features)).backward()
    steps = {f"_marginal_distance_matrix_{step}_kernel" for step in ("fwd", "bwd")}
    assert_compiled(launches, steps | {"_factor_kernel", "_project_kernel", "_inverse_norm_kernel"})


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
def test_the_autoencoder_launches_what_the_audit_compiles(launches, bf16):
    """Of the VA-VAE's widths, on small images; channels last, as training has them."""
    autoencoder = AutoencoderKL(ch_mult=(1, 2, 4), num_res_blocks=1, resolution=32, middle_attention=False)
    autoencoder, images = (x.to(memory_format=torch.channels_last) for x in (autoencoder, torch.zeros(2, 3, 32, 32)))
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        decoded = autoencoder.decode(autoencoder.encode(images).mode())
    decoded.float().sum().backward()
    assert_compiled(launches, GROUP_NORM)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("C, size", [(128, 256), (256, 32), (512, 16)])
def test_contiguous_group_norm_launches_what_the_audit_compiles(launches, C, size, dtype):
    """At the VA-VAE's widths. On small images a tile has several channels."""
    x = torch.empty(1, C, size, size, dtype=dtype, requires_grad=True)
    group_norm_silu(x, torch.ones(C), torch.zeros(C), 32).sum().backward()
    assert_compiled(launches, GROUP_NORM)
