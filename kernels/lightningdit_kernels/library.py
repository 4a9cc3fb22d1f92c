"""What every op shares: the dtype rules, the checks of arguments, the registration with PyTorch.

Statistics and products are accumulated in fp32 (fp64 for fp64 inputs). Results come in the input's dtype, or, inside
torch.autocast, in the autocast dtype, because a matrix product is what consumes them.
"""

import functools
import importlib.util
import sys
from collections.abc import Callable

import torch

triton_available = importlib.util.find_spec("triton") is not None  # a plain bool, which torch.compile can read
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def accumulation_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype in which sums over x are taken."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def result_dtype(x: torch.Tensor) -> torch.dtype:
    """x.dtype, or the autocast dtype where autocast is on for x's device. Like autocast itself it leaves fp64 alone."""
    if x.dtype != torch.float64 and x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def triton_serves(*dtypes: torch.dtype) -> bool:
    """Whether Triton is installed and the kernels know these dtypes. fp64 is left to the definitions."""
    return triton_available and torch.float64 not in dtypes


def check_floating(op: str, **tensors: torch.Tensor | None) -> None:
    """ValueError unless every given tensor is floating point and all lie on one device. None is skipped."""
    device = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if tensor.dtype not in FLOATS:
            raise ValueError(f"{op}: {name} has dtype {tensor.dtype}, expected fp32, bf16, fp16 or fp64")
        if device is not None and tensor.device != device:
            raise ValueError(f"{op}: {name} is on {tensor.device}, expected {device} like the arguments before it")
        device = tensor.device


def check_shape(op: str, expected: tuple[int, ...], why: str, **tensors: torch.Tensor | None) -> None:
    """ValueError unless every given tensor has this shape. None is skipped."""
    for name, tensor in tensors.items():
        if tensor is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected} ({why})")


# The namespace of the operators, torch.ops.lightningdit. Dropping this object would unregister them.
LIBRARY = torch.library.Library("lightningdit", "DEF")
CUDA: dict[str, Callable] = {}  # what serves each operator there: without a GPU the tests give it CPU tensors, in triton's interpreter


def define(schema: str, reference: Callable, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None) -> None:
    """Defines an operator: reference serves every device, cpu and cuda take its place on theirs, fake makes empty outputs for tracing."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    if cuda is not None:
        CUDA[name] = cuda
    for key, implementation in (("CompositeExplicitAutograd", reference), ("CPU", cpu), ("CUDA", cuda and _on_its_device(cuda))):
        if implementation is not None:
            LIBRARY.impl(name, _hidden(implementation), key)
    torch.library.register_fake(f"lightningdit::{name}", fake, lib=LIBRARY)


def _hidden(function: Callable) -> Callable:
    """The function, hidden from torch.compile, which would trace into it and free tensors that it knows by their address alone.

    As torch.library.register_kernel does, but a process that compiles nothing does not import the compiler, which takes over a second.
    """
    hidden = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*arguments):
        return (hidden if "torch._dynamo" in sys.modules else function)(*arguments)

    return call


def _on_its_device(function: Callable) -> Callable:
    """The function, with the GPU of its first tensor as the current one: Triton launches on the current GPU, whatever tensors it gets."""

    @functools.wraps(function)
    def guarded(*arguments):
        tensor = next(argument for argument in arguments if isinstance(argument, torch.Tensor))
        with torch.cuda.device_of(tensor):
            return function(*arguments)

    return guarded


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Gives operator `name` its backward; `name`_backward, the operator that backward calls, refuses to be differentiated again."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name} is differentiable once: its gradient was differentiated (create_graph=True?)")

    torch.library.register_autograd(f"lightningdit::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_autograd(f"lightningdit::{name}_backward", refuse, lib=LIBRARY)
