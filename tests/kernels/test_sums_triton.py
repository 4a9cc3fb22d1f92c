"""The sum of partial results in triton's interpreter (on CUDA where there is a device), against sums in fp64."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from lightningdit_kernels import norm_triton, sums_triton
from lightningdit_kernels.sums_triton import sum_case, sum_partials
from lightningdit_kernels.testing import poisoned_memory, random_tensor
from lightningdit_kernels.tuning import Config

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def sums_of(partial, dtypes):
    _, groups, _, _, width = partial.shape
    with poisoned_memory():
        outputs = [None if dtype is None else torch.empty(groups, width, dtype=dtype, device=DEVICE) for dtype in dtypes]
        sum_partials(partial, *outputs)
    return outputs


@pytest.mark.parametrize(
    "shape",
    [(1100, 1, 1, 1, 5), (3, 4, 3, 2, 72), (1, 1, 1, 3, 1), (0, 2, 1, 1, 8), (2, 2, 0, 1, 8)],
    ids=str,
)
def test_matches_fp64(shape):
    partial = random_tensor(*shape, device=DEVICE)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)[: shape[3]]
    true = partial.double().sum((0, 2))
    of_sums = torch.finfo(torch.float32).eps * partial.abs().sum((0, 2)).max()
    again = sums_of(partial, dtypes)
    for i, output in enumerate(sums_of(partial, dtypes)):
        error = (output.double() - true[:, i]).abs().max()
        assert error <= torch.finfo(output.dtype).eps * true.abs().max() + of_sums
        assert torch.equal(output, again[i])


def test_a_part_of_the_columns_and_an_output_that_is_not_wanted():
    """As attention sums its norm's gradients: 7 rows of a head are there, two of the first four are wanted."""
    partial = random_tensor(6, 7, 24, device=DEVICE)[:, None, None, :4]
    outputs = sums_of(partial, (torch.float32, None, torch.float32, None))
    for i in (0, 2):
        torch.testing.assert_close(outputs[i].double(), partial.double().sum((0, 2))[:, i])


def test_one_output_for_all():
    """As attention sums the gradient of its bias: q, k and v of every head."""
    partial = random_tensor(2, 4, 3, 7, 24, device=DEVICE)[:, :, :, -3:]
    with poisoned_memory():
        together = torch.empty(3, 4, 24, device=DEVICE)
        sum_partials(partial, together)
    assert torch.equal(together, torch.stack(sums_of(partial, (torch.float32,) * 3)))


def test_nothing_to_write():
    sum_partials(torch.empty(3, 0, 2, 1, 8, device=DEVICE), torch.empty(0, 8, device=DEVICE))


def test_the_wrong_number_of_outputs():
    with pytest.raises(AssertionError):
        sum_partials(torch.empty(3, 1, 1, 2, 8), torch.empty(1, 8))


def test_the_norm_sums_take_several_tiles_of_samples_and_chunks(monkeypatch):
    """Tiles of 2 samples and 2 chunks give what those of 128 and 8 give, up to the order of the sums."""
    batch, tokens, width = 3, 33, 12  # three chunks of up to 16 tokens
    x, grad_residual, grad_h, y = (random_tensor(batch, tokens, width, seed=i, device=DEVICE) for i in range(4))
    gate, scale = (random_tensor(batch, width, seed=i, device=DEVICE) for i in (4, 5))
    weight, bias = (random_tensor(width, seed=i, device=DEVICE) for i in (6, 7))
    rstd = torch.ones(batch, tokens, 1, device=DEVICE)
    arguments = grad_residual, grad_h, x, y, gate, scale, weight, bias, None, rstd, x.dtype, x.dtype
    expected = norm_triton.norm_bwd(*arguments)
    monkeypatch.setattr(norm_triton, "SUMS", Config(dict(ROWS=2, COLUMNS=8, UNROLL=2), num_warps=1))
    with poisoned_memory():
        results = norm_triton.norm_bwd(*arguments)
    for result, one_tile in zip(results, expected, strict=True):
        torch.testing.assert_close(result, one_tile, rtol=1e-5, atol=1e-4)


def test_audit_case_names_every_argument():
    case = sum_case("sum", torch.empty((2, 1, 1, 1, 8), device="meta"), ("*bf16",))
    assert list(case["signature"]) == sums_triton._sum_kernel.arg_names
    assert case["divisible"] == ["partial", "out_0"]
