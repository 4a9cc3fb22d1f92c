"""swiglu against silu and a product in fp64."""

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import native, swiglu
from lightningdit_kernels.swiglu import swiglu_backward_ref, swiglu_ref
from lightningdit_kernels.testing import assert_matches_truth, poisoned_memory, random_tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_native = pytest.mark.skipif(not native.available, reason=native.about)


def eager(packed, bias=None):
    packed = packed if bias is None else packed + bias
    hidden = packed.shape[-1] // 2
    return nnf.silu(packed[..., :hidden]) * packed[..., hidden:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 16, 256), (3, 63, 74), (5, 14), (2,), (0, 4), (3, 0), (1, 5000)], ids=str)
def test_matches_truth(shape, dtype, backend):
    packed, bias = 3 * random_tensor(*shape, dtype=dtype), random_tensor(shape[-1], dtype=dtype, seed=1)
    assert_matches_truth(swiglu, eager, dict(packed=packed))
    assert_matches_truth(swiglu, eager, dict(packed=packed, bias=bias))
    assert_matches_truth(swiglu, eager, dict(packed=packed, bias=bias), frozen=("packed",))


def test_non_contiguous(backend):
    assert_matches_truth(swiglu, eager, dict(packed=random_tensor(12, 5, 3).transpose(0, 2)))
    assert_matches_truth(swiglu, eager, dict(packed=random_tensor(4, 5, 24)[::2, 1:, ::2]))


def test_extreme_values_stay_finite(backend):
    gate = torch.tensor([-3e38, -1e4, -104.0, -88.0, -0.0, 0.0, 88.0, 1e4])
    packed = torch.cat([gate, torch.full_like(gate, 2.0)]).requires_grad_()
    out = swiglu(packed)
    out.sum().backward()
    assert torch.allclose(out.double(), eager(packed.double()), rtol=1e-6, atol=1e-37)
    assert packed.grad.isfinite().all()


def test_fp32_to_bf16_rounds_once(backend):
    """Inside autocast an fp32 packed is computed in fp32; only the result is bf16, and the gradient is fp32 again."""
    packed = random_tensor(3, 7, 66).requires_grad_()
    grad = random_tensor(3, 7, 33, dtype=torch.bfloat16, seed=1)
    out = torch.ops.lightningdit.swiglu(packed, None, torch.bfloat16)
    out.backward(grad)
    assert out.dtype == torch.bfloat16 and packed.grad.dtype == torch.float32
    truth = packed.detach().double().requires_grad_()
    eager(truth).backward(grad.double())
    assert (out.double() - eager(truth)).abs().max() <= eager(truth).abs().max() * 2**-8
    assert (packed.grad.double() - truth.grad).abs().max() <= 1e-6 * truth.grad.abs().max()


@needs_native
def test_native_is_within_a_few_ulp_everywhere(backend):
    """Elementwise, not only relative to the largest value: 4 units in the last place of fp32.

    Below -88.72 exp(-gate) overflows in fp32 and silu becomes 0, in PyTorch too: off by at most 2.7e-37.
    """
    gate = torch.cat([torch.linspace(-104, 104, 20_001), torch.logspace(-30, 0, 2_000), -torch.logspace(-30, 0, 2_000)])
    out = swiglu(torch.cat([gate, torch.ones_like(gate)])).double()
    true = nnf.silu(gate.double())
    error = ((out - true).abs() - 2.8e-37).clamp(min=0) / true.abs().clamp(min=1e-300)
    assert error.max() <= 4 * 2**-24, f"worst at {gate[error.argmax()].item()}"


@needs_native
def test_special_values(backend):
    nan, inf = float("nan"), float("inf")
    assert swiglu(torch.tensor([nan, inf, 1.0, 1.0])).isnan().tolist() == [True, False]
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        out = swiglu(torch.tensor([nan, inf, 1.0, nan, 1.0, 1.0, -inf, 0.0], dtype=dtype))
        assert out[0].isnan() and out[1] == inf and out[2] == -inf and out[3].isnan()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_threads_do_not_change_the_result(dtype):
    packed, grad = random_tensor(150, 4096, dtype=dtype), random_tensor(150, 2048, dtype=dtype, seed=1)
    bias = random_tensor(4096, seed=2)
    before, results = torch.get_num_threads(), []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append((swiglu(packed, bias), *torch.ops.lightningdit.swiglu_backward(grad, packed, bias)))
    torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_backward_reference_is_the_gradient_of_the_reference():
    packed = random_tensor(4, 12, dtype=torch.float64).requires_grad_()
    bias = random_tensor(12, dtype=torch.float64, seed=2).requires_grad_()
    grad = random_tensor(4, 6, dtype=torch.float64, seed=1)
    expected = torch.autograd.grad(swiglu_ref(packed, bias, torch.float64), (packed, bias), grad)
    torch.testing.assert_close(swiglu_backward_ref(grad, packed.detach(), bias.detach()), expected)


def test_gradcheck():
    packed, bias = (random_tensor(*shape, dtype=torch.float64).requires_grad_() for shape in ((3, 10), (10,)))
    assert torch.autograd.gradcheck(swiglu, (packed, bias))


def test_bias_of_another_size():
    with pytest.raises(ValueError, match=r"bias has shape \(2,\), expected \(4,\)"):
        swiglu(torch.zeros(3, 4), torch.zeros(2))


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


class TritonSwiglu(torch.autograd.Function):
    """The Triton launchers: on CUDA, or on the CPU in triton's interpreter."""

    @staticmethod
    def forward(ctx, packed, bias):
        from lightningdit_kernels.swiglu_triton import swiglu_fwd

        ctx.save_for_backward(packed, bias)
        return swiglu_fwd(packed, bias, packed.dtype)

    @staticmethod
    def backward(ctx, grad):
        from lightningdit_kernels.swiglu_triton import swiglu_bwd

        return swiglu_bwd(grad, *ctx.saved_tensors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 9, 74), (3, 14), (2,), (0, 4), (3, 0), (1, 2060)], ids=str)
@pytest.mark.usefixtures("few_programs_of_sums")
def test_triton_matches_truth(shape, dtype):
    pytest.importorskip("triton", reason="triton is not installed")
    packed = 3 * random_tensor(*shape, dtype=dtype, device=DEVICE)
    bias = random_tensor(shape[-1], dtype=dtype, seed=1, device=DEVICE)

    def ours(packed, bias=None):
        return TritonSwiglu.apply(packed, bias)

    assert_matches_truth(ours, eager, dict(packed=packed))
    assert_matches_truth(ours, eager, dict(packed=packed, bias=bias))


@pytest.mark.parametrize("rows", [1, 50, 0])
def test_triton_sums_a_gradient_in_fp32_for_an_fp32_bias(rows):
    pytest.importorskip("triton", reason="triton is not installed")
    from lightningdit_kernels.swiglu_triton import swiglu_bwd

    packed, grad = random_tensor(rows, 22, dtype=torch.bfloat16), random_tensor(rows, 11, dtype=torch.bfloat16, seed=1)
    bias = random_tensor(22, seed=2)
    true = swiglu_backward_ref(grad.double(), packed.double(), bias.double())[1]
    arguments = grad.to(DEVICE), packed.to(DEVICE), bias.to(DEVICE)
    with poisoned_memory():
        _, grad_bias = swiglu_bwd(*arguments)
    assert torch.equal(grad_bias, swiglu_bwd(*arguments)[1])
    assert grad_bias.dtype == torch.float32 and grad_bias.shape == (22,)
    torch.testing.assert_close(grad_bias.cpu().double(), true, rtol=0, atol=1e-5)
