"""A linear layer in fp32 on a CPU, by whichever of PyTorch's two libraries is faster on the machine at hand.

PyTorch gives fp32 products to MKL, which takes twice as long as oneDNN on AMD's processors, and about as long on Intel's. The three
products of a layer (forward, gradient to the input, gradient to the weight) are timed with both, for small and for large weights, at
the first call; tuning.choose keeps the answers on disk. They do not depend on the number of rows: a row of the result is the same
whatever rows are beside it, as far as either library keeps to that.

M rows, I inputs, O outputs.
"""

import functools
import statistics
import time

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from lightningdit_kernels import tuning
from lightningdit_kernels.library import define, result_dtype

LIBRARIES = ("MKL", "oneDNN")
PRODUCTS = ("forward", "gradient to the input", "gradient to the weight")
# Rows, inputs and outputs of what is timed, by class: milliseconds each. A weight is large from LARGE values on.
SIZES = {"small": (1024, 192, 512), "large": (256, 768, 2304)}
LARGE = 2**18
# The share of its time that the starting guess must lose: noise shall not choose, or a run would resume with other last bits.
DRAW = 0.15
ROUNDS = 9
AVAILABLE = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x W^T + b, as torch.nn.functional.linear, and that function itself everywhere but for fp32 on a CPU.

    Args:
        x: (..., I). weight: (O, I). bias: (O,) or None.
    Returns: (..., O), in x.dtype or the autocast dtype. Where oneDNN serves it is differentiable once, and unknown to torch.func, as the
        fused ops are.
    """
    if not _is_ours(x, weight, bias) or (chosen := libraries(*weight.shape)) == (LIBRARIES[0],) * 3:
        return F.linear(x, weight, bias)
    return _Linear.apply(x, weight, bias, chosen)


def _is_ours(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    plain = type(weight) in (torch.Tensor, torch.nn.Parameter) and x.device.type == weight.device.type == "cpu"
    fp32 = plain and result_dtype(x) is torch.float32 and x.dtype is weight.dtype is torch.float32
    # What does not fit gets F.linear's error: oneDNN would read past the end.
    fits = fp32 and weight.ndim == 2 and x.ndim > 0 and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    return fits and x.numel() > 0 and AVAILABLE and not torch.compiler.is_exporting()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, chosen):
        ctx.save_for_backward(x, weight)
        ctx.chosen, ctx.biased = chosen, bias is not None
        return _multiply(chosen[0], x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows, dx, dw, db = grad.reshape(-1, grad.shape[-1]), None, None, None
        if ctx.needs_input_grad[0]:
            dx = _multiply(ctx.chosen[1], rows, weight.t()).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = _multiply(ctx.chosen[2], rows.t(), x.reshape(-1, x.shape[-1]).t())
        if ctx.biased and ctx.needs_input_grad[2]:
            db = rows.sum(0)
        return dx, dw, db, None


def _multiply(library: str, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a (M, I) times b (O, I) transposed, both with any strides, plus bias."""
    return F.linear(a, b, bias) if library == LIBRARIES[0] else torch.ops.lightningdit.onednn_linear(a, b, bias)


def libraries(outputs: int, inputs: int) -> tuple[str, ...]:
    """Who computes each of PRODUCTS for a weight of this shape. torch.compile takes the answer for a constant."""
    size = "large" if outputs * inputs >= LARGE else "small"
    return _of_class(size, torch.get_num_threads(), id(tuning.process_group()), tuning.unmeasured())


# As torch.compiler.assume_constant_result does, which imports the compiler.
libraries._dynamo_marked_constant = True


@functools.cache
def _of_class(size: str, threads: int, group: int, unmeasured: str) -> tuple[str, ...]:
    """The group and why nothing is measured are there for the cache: tuning.choose looks at them itself."""
    return tuple(_choose(product, size, threads) for product in PRODUCTS)


def _choose(product: str, size: str, threads: int) -> str:
    device = torch.device("cpu")
    candidates = LIBRARIES if "Intel" in tuning.device_name(device) else LIBRARIES[::-1]  # the starting guess first
    key = product.replace(" ", "_"), size, f"{threads}_threads"
    return tuning.choose("linear", candidates, device, key, lambda: tuning.in_thread(lambda: _measure(product, size), device), draw=DRAW)


@torch.no_grad()
def _measure(product: str, size: str) -> dict[str, float]:
    rows, inputs, outputs = SIZES[size]
    x, weight, grad = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(rows, outputs)
    operands = dict(zip(PRODUCTS, ((x, weight), (grad, weight.t()), (grad.t(), x.t())), strict=True))[product]
    taken = {library: [] for library in LIBRARIES}
    for turn in range(1 + ROUNDS):
        for library, times_ms in taken.items():  # in turns, so that a clock that rises or falls meets both alike
            begin = time.perf_counter()
            _multiply(library, *operands)
            if turn:  # the first starts the threads and makes the libraries' kernels
                times_ms.append(1e3 * (time.perf_counter() - begin))
    return {library: statistics.median(times_ms) for library, times_ms in taken.items()}


def _onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


define("onednn_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", F.linear, _fake, cpu=_onednn)
