"""swiglu against silu and a product in fp64."""

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import swiglu
from lightningdit_kernels.testing import assert_matches_truth, random_tensor


def eager(packed):
    hidden = packed.shape[-1] // 2
    return nnf.silu(packed[..., :hidden]) * packed[..., hidden:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 256), (3, 63, 74), (5, 14), (2,), (0, 4), (3, 0)], ids=str)
def test_matches_truth(shape, dtype):
    assert_matches_truth(swiglu, eager, dict(packed=3 * random_tensor(*shape, dtype=dtype)))


def test_non_contiguous():
    assert_matches_truth(swiglu, eager, dict(packed=random_tensor(12, 5, 3).transpose(0, 2)))
    assert_matches_truth(swiglu, eager, dict(packed=random_tensor(4, 5, 24)[::2, 1:, ::2]))


def test_extreme_values_stay_finite():
    gate = torch.tensor([-3e38, -1e4, -104.0, -88.0, -0.0, 0.0, 88.0, 1e4])
    packed = torch.cat([gate, torch.full_like(gate, 2.0)]).requires_grad_()
    out = swiglu(packed)
    out.sum().backward()
    assert torch.allclose(out.double(), eager(packed.double()), rtol=1e-6, atol=1e-37)
    assert packed.grad.isfinite().all()


def test_autocast_gives_the_autocast_dtype():
    packed = random_tensor(3, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert swiglu(packed).dtype == torch.bfloat16


def test_gradcheck():
    assert torch.autograd.gradcheck(swiglu, random_tensor(3, 10, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize(
    "packed, message",
    [
        (torch.zeros(2, 5), r"packed has shape \(2, 5\), expected an even last dimension"),
        (torch.tensor(1.0), r"packed has shape \(\)"),
        (torch.zeros(2, 4, dtype=torch.int32), "packed has dtype torch.int32"),
    ],
)
def test_bad_input(packed, message):
    with pytest.raises(ValueError, match=message):
        swiglu(packed)
