"""What every op shares: the dtype rules, the checks of arguments, the registration with PyTorch.

Statistics and products are accumulated in fp32 (fp64 for fp64 inputs). Results come in the input's dtype, or, inside
torch.autocast, in the autocast dtype, because a matrix product is what consumes them.
"""

import functools
import importlib.util
import os
import re
from collections.abc import Callable

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, get_eval_frame_callback, set_code_exec_strategy
from torch._library.autograd import Info, make_autograd_impl
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.compiler import config as compiler_config

from lightningdit_kernels.tuning import sources_hash

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


def _tag_graphs() -> None:
    """Has PyTorch keep compiled graphs on disk for these sources alone: it knows an operator by name, and our launches are in its graph."""
    others = re.sub(r" lightningdit_kernels/\w+", "", compiler_config.cache_key_tag)
    timed = os.environ.get("LIGHTNINGDIT_AUTOTUNE") != "0"
    compiler_config.cache_key_tag = f"{others} lightningdit_kernels/{sources_hash()[:16]}{'' if timed else '_untimed'}"


# The namespace of the operators, torch.ops.lightningdit. Dropping this object would unregister them.
LIBRARY = torch.library.Library("lightningdit", "DEF")
CUDA: dict[str, Callable] = {}  # what serves each operator there: without a GPU the tests give it CPU tensors, in triton's interpreter
_ON_CUDA: dict[str, Callable] = {}  # the same as it is registered


def define(schema: str, reference: Callable, fake: Callable, cpu: Callable | None = None, cuda: Callable | None = None) -> None:
    """Defines an operator: reference serves every device, cpu and cuda take its place on theirs, fake makes empty outputs for tracing."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    if cuda is not None:
        CUDA[name] = cuda
        _ON_CUDA[name] = _hidden(_on_its_device(cuda))
        LIBRARY.impl(name, _ON_CUDA[name], "CUDA")
        if triton_available:
            torch.library.register_torch_dispatch(f"lightningdit::{name}", FunctionalTensorMode, _in_a_graph(cuda), lib=LIBRARY)
    for key, implementation in (("CompositeExplicitAutograd", reference), ("CPU", cpu)):
        if implementation is not None:
            LIBRARY.impl(name, _hidden(implementation), key)

    def traced(*arguments):
        _tag_graphs()  # here, since from torch 2.15 on a thread does not see the tag of another
        return fake(*arguments)

    torch.library.register_fake(f"lightningdit::{name}", functools.wraps(fake)(traced), lib=LIBRARY)


def _in_a_graph(function: Callable) -> Callable:
    """A torch_dispatch rule by which torch.compile sees what function launches. Triton is imported by the first call."""

    @functools.cache
    def rule():
        from lightningdit_kernels.graph_triton import torch_dispatch_rule

        return torch_dispatch_rule(function)

    return lambda *arguments: rule()(*arguments)


def _hidden(function: Callable) -> Callable:
    """The function, hidden from torch.compile, which would trace into it and free tensors that it knows by their address alone.

    As torch.library.register_kernel does, but a process that compiles nothing does not import the compiler, which takes over a second, and
    where the compiler looks at no frame, as inside of what it compiled, the function is called without a detour of 5 us.
    """
    hidden = torch._disable_dynamo(function)

    @functools.wraps(function)
    def call(*arguments):
        return (function if get_eval_frame_callback() is None else hidden)(*arguments)

    _not_traced(call)
    return call


def _not_traced(function: Callable) -> None:
    """torch.compile runs this function as it is, and looks at what it calls."""
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.DEFAULT))


def _on_its_device(function: Callable) -> Callable:
    """The function, with the GPU of its first tensor as the current one: Triton launches on the current GPU, whatever tensors it gets."""

    @functools.wraps(function)
    def guarded(*arguments):
        for tensor in arguments:
            if isinstance(tensor, torch.Tensor):
                break
        if tensor.get_device() == torch.cuda.current_device():
            return function(*arguments)
        with torch.cuda.device_of(tensor):
            return function(*arguments)

    return guarded


def differentiable(name: str, setup_context: Callable, backward: Callable) -> None:
    """Gives operator `name` its backward; `name`_backward, the operator that backward calls, refuses to be differentiated again."""

    def refuse(ctx, *grads):
        raise RuntimeError(f"{name} is differentiable once: its gradient was differentiated (create_graph=True?)")

    _register_autograd(name, setup_context, backward)
    _register_autograd(f"{name}_backward", None, refuse)


def _register_autograd(name: str, setup_context: Callable | None, backward: Callable) -> None:
    """torch.library.register_autograd, with a short way for calls that want no gradient: those of a backward and of a compiled graph.

    PyTorch's takes 10 us for them. Where only CUDA's kernel is left, it is called at once.
    """
    operator = getattr(torch.ops.lightningdit, name).default
    with_gradient = make_autograd_impl(operator, Info(backward, setup_context))
    on_cuda = _ON_CUDA.get(name)
    left_to_cuda = {}  # by the keys of a call: whether no mode, functional wrapper or other layer is between it and CUDA's kernel

    def call(keyset, *arguments):
        if torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments):
            return with_gradient(keyset, *arguments)
        keys = keyset.raw_repr()
        if keys not in left_to_cuda:
            next_key = (keyset & torch._C._after_autograd_keyset).highestPriorityTypeId()
            left_to_cuda[keys] = on_cuda is not None and next_key == torch._C.DispatchKey.CUDA
        if left_to_cuda[keys]:
            return on_cuda(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    _not_traced(call)
    LIBRARY.impl(name, call, "Autograd", with_keyset=True)
