"""The Triton kernels of group_norm_silu, in the interpreter without a GPU, against fp64: both formats, odd sizes, several chunks."""

import pytest
import torch

pytest.importorskip("triton")
from lightningdit_kernels import groupnorm  # noqa: E402
from lightningdit_kernels import groupnorm_triton as triton_kernels  # noqa: E402
from lightningdit_kernels.groupnorm import group_norm_silu_ref  # noqa: E402
from lightningdit_kernels.testing import assert_matches_truth, random_tensor, values_and_gradients  # noqa: E402
from lightningdit_kernels.tuning import Config  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Kernels(torch.autograd.Function):
    """The launchers, tied together as the operator ties them."""

    @staticmethod
    def forward(ctx, x, weight, bias, num_groups, eps, out_dtype):
        ctx.last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        out, *moments = triton_kernels.group_norm_silu_fwd(x, weight, bias, num_groups, eps, out_dtype, ctx.last)
        ctx.save_for_backward(x, weight, bias, *moments)
        ctx.num_groups = num_groups
        assert out.stride() == x.stride(), "the result keeps the memory format"
        return out

    @staticmethod
    def backward(ctx, grad):
        layout = torch.channels_last if ctx.last else torch.contiguous_format
        grads = triton_kernels.group_norm_silu_bwd(grad.contiguous(memory_format=layout), *ctx.saved_tensors, ctx.num_groups, ctx.last)
        assert grads[0].stride() == ctx.saved_tensors[0].stride()
        return *grads, None, None, None


def kernels(x, weight, bias, num_groups, eps=1e-6):
    return Kernels.apply(x, weight, bias, num_groups, eps, x.dtype)


def inputs(shape, num_groups, dtype, layout):
    weight, bias = 1 + random_tensor(shape[1], dtype=dtype, seed=1) / 4, random_tensor(shape[1], dtype=dtype, seed=2)
    x = 3 + 2 * random_tensor(*shape, dtype=dtype)
    return {name: value.to(DEVICE) for name, value in dict(x=x.to(memory_format=layout), weight=weight, bias=bias).items()} | dict(
        num_groups=num_groups)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks so small that a small tensor has several chunks, tiles and channel blocks."""
    table = {
        (80, "channels_last"): [Config(dict(BLOCK_P=4, BLOCK_C=8), num_warps=4)],
        (80, "contiguous"): [Config(dict(BLOCK_P=16, BLOCK_C=2), num_warps=4)],
    }
    monkeypatch.setattr(triton_kernels, "TABLE", table)
    monkeypatch.setattr(triton_kernels, "PROGRAMS", 1)
    monkeypatch.setattr(triton_kernels, "MERGE", Config(dict(BLOCK_K=2), num_warps=4))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("shape, num_groups, dtype", [
    ((1, 12, 7, 9), 3, torch.float32),  # the last tile of a chunk is masked
    ((1, 12, 9, 4), 3, torch.float32),  # the last chunk has empty tiles
    ((1, 16, 8, 8), 4, torch.float32),  # even tiles, several blocks of channels
    ((1, 16, 8, 8), 4, torch.bfloat16),
    ((2, 6, 5, 3), 6, torch.float32),
    ((2, 6, 5, 3), 6, torch.bfloat16),
    ((2, 6, 5, 3), 6, torch.float16),
], ids=str)
def test_matches_truth_in_small_blocks(shape, num_groups, dtype, layout, small_blocks):
    assert_matches_truth(kernels, group_norm_silu_ref, inputs(shape, num_groups, dtype, layout))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "shape, num_groups",
    [
        ((2, 64, 9, 7), 8),
        ((1, 24, 9, 7), 3),
        ((1, 96, 16, 8), 8),
        ((1, 384, 7, 1), 8),
        ((1, 97, 3, 2), 1),
        ((3, 4, 1, 1), 2),
        ((1, 1, 4, 4), 1),
        ((0, 4, 2, 2), 2),
    ],
    ids=str,
)
def test_matches_truth_with_the_table(shape, num_groups, layout):
    assert_matches_truth(kernels, group_norm_silu_ref, inputs(shape, num_groups, torch.float32, layout))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_large_mean_does_not_cancel(layout, small_blocks):
    """At a mean of 1000 standard deviations sum(x^2) - sum(x)^2 / n would lose every digit of the variance. What remains is the rounding
    of the mean to fp32, 3e-5 of a standard deviation, and at each place in the formulas where it enters.
    """
    case = inputs((1, 8, 9, 9), 2, torch.float32, layout)
    case["x"] = (1000 + case["x"] / 2).to(memory_format=layout)
    values = values_and_gradients(kernels, case)
    doubled = {name: value.double() if isinstance(value, torch.Tensor) else value for name, value in case.items()}
    for name, true in values_and_gradients(group_norm_silu_ref, doubled).items():
        assert (values[name] - true).abs().max() <= 2e-4 * true.abs().max(), name


@pytest.mark.parametrize("channels_last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "C, P, even, block_c",
    [
        (128, 65536, True, 128),
        (512, 256, True, 128),
        (384, 1024, True, 128),
        (2048, 1024, True, 128),
        (96, 1024, True, 32),  # 3 blocks without a masked channel
        (96, 1000, False, 32),
        (24, 63, False, 32),
        (97, 1024, False, 128),
        (1, 1, True, 1),
    ],
)
def test_tiles_cover_an_image(C, P, even, block_c, channels_last):
    (config,) = triton_kernels.TABLE[80, "channels_last" if channels_last else "contiguous"]
    options, tiles, chunks, programs = triton_kernels._launch_options(config, C, P, channels_last)
    size = tiles * options["BLOCK_P"]
    assert tiles in (1, 2, 4, 8)
    assert options["BLOCK_P"] * options["BLOCK_C"] <= config.blocks["BLOCK_P"] * config.blocks["BLOCK_C"]
    assert (chunks - 1) * size < P <= chunks * size
    assert programs == chunks * -(-C // options["BLOCK_C"])
    assert options["EVEN"] == (P % size == 0 and C % options["BLOCK_C"] == 0)
    assert options["EVEN"] or P % 16 or C % 32, "images and widths of powers of two are not masked"
    if channels_last:
        assert options["EVEN"] == even
        assert options["BLOCK_C"] == block_c


def test_half_precision_result_of_fp32_input():
    case = inputs((1, 6, 3, 5), 2, torch.float32, torch.contiguous_format)
    out = Kernels.apply(*case.values(), 1e-6, torch.bfloat16)
    expected = group_norm_silu_ref(**case)
    assert out.dtype == torch.bfloat16
    assert (out.float() - expected).abs().max() <= 2**-7 * expected.abs().max()


def test_an_image_beyond_32_bits_is_refused():
    x = torch.empty(1, 2, 2**15, 2**15, dtype=torch.bfloat16, device="meta")
    with pytest.raises(ValueError, match="2147483648 values an image, expected fewer than 2.31"):
        groupnorm._cuda(x, torch.ones(2), torch.zeros(2), 1, 1e-6, x.dtype)
