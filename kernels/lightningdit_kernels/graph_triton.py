"""What torch.compile sees of an operator on CUDA: its buffers and launches. Inductor then launches our kernels itself.

An operator that a compiled graph calls costs its host 40 us: PyTorch's way into Python, and ours to two or three launches. Of a graph
that has the launches themselves nothing of that is left. torch.library.triton_op does the same, for operators that it makes.

torch 2.11 drops all options of a launch but warps and stages, and with them COMPILE_OPTIONS; torch 2.15 keeps them.
"""

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensor
from triton import knobs

from lightningdit_kernels.tuning import in_thread, process_group, unmeasured, warn_once


def torch_dispatch_rule(function: Callable) -> Callable:
    """For torch.library.register_torch_dispatch with FunctionalTensorMode: an operator that function serves on CUDA is what it launches.

    Where sizes are symbols the operator stays what it is: tiles and grids are chosen by number. So it does where tiles cannot be timed for
    want of memory, because PyTorch would keep a graph with those of the starting guess, and in torch.export, whose programs are for any
    machine.
    """
    tried = set()

    def rule(mode, operator, types, arguments, options):
        tensors = [argument for argument in arguments if isinstance(argument, Tensor)]
        known = not options and all(map(_known, tensors)) and not any(isinstance(a, (torch.SymInt, torch.SymFloat)) for a in arguments)
        if not known or not torch.cuda.is_available() or knobs.runtime.interpret or _exporting():
            return mode.__torch_dispatch__(operator, types, arguments, options)
        form = (id(process_group()), *map(_form, arguments))
        if form not in tried and not unmeasured():
            if not _choose_tiles(operator, function, arguments):
                return mode.__torch_dispatch__(operator, types, arguments, options)
            tried.add(form)
        with mode:
            return function(*arguments)

    return rule


def _known(tensor: Tensor) -> bool:
    """Whether it stands for a CUDA tensor whose sizes are numbers."""
    numbers = all(type(n) is int for n in (*tensor.shape, *tensor.stride()))
    return type(tensor) is FunctionalTensor and tensor.device.type == "cuda" and numbers


def _form(argument: Any) -> Any:
    return (argument.device, argument.dtype, argument.shape, argument.stride()) if isinstance(argument, Tensor) else argument


def _exporting() -> bool:
    from torch.export._trace import custom_triton_ops_decomposition_disabled  # which takes a second, and which a compiler has imported

    return custom_triton_ops_decomposition_disabled()


def _choose_tiles(operator, function, arguments) -> bool:
    """Calls function on random tensors like the arguments, for its tiles: nothing can be timed on those of a trace.

    Returns whether the memory sufficed.
    """
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))

    def work():
        generator = torch.Generator(device).manual_seed(0)  # the caller's random numbers stay what they are

        def like(tensor):
            extent = 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
            values = torch.randn(extent, generator=generator, dtype=tensor.dtype, device=device)
            return values.as_strided(tensor.shape, tensor.stride())

        function(*(like(argument) if isinstance(argument, Tensor) else argument for argument in arguments))

    try:
        in_thread(work, device)
        return True
    except torch.OutOfMemoryError:
        warn_once(f"{operator}: not enough memory to time its configurations; the compiled graph calls it as it is")
        torch.cuda.empty_cache()
        return False


def placeholder(tensor: Tensor) -> Tensor:
    """What to give a kernel for a pointer that it does not read: the tensor, whose dtype counts, or in a trace a small one like it.

    Inductor may store a value once for each argument that it is.
    """
    return tensor.new_empty(1) if type(tensor) is FunctionalTensor else tensor


def launch(kernel: Any, grid: tuple, arguments: tuple, constants: dict) -> None:
    """Adds the launch to the graph that is traced."""
    _remember_analyses()
    torch.library.wrap_triton(kernel)[grid](*arguments, **constants)


@functools.cache
def _remember_analyses() -> None:
    """Has PyTorch find out once what a kernel writes.

    It translates the kernel for that, which takes 0.1 to 0.5 s, up to five times a launch: in the passes of AOTAutograd and of Inductor.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    for name in ("identify_mutated_tensors", "identify_accessed_tensors"):  # up to torch 2.11, and by 2.15
        if analyse := getattr(triton_kernel_wrap, name, None):
            setattr(triton_kernel_wrap, name, _remembered(analyse))


def _remembered(analyse: Callable) -> Callable:
    from lightningdit_kernels.launch_triton import PreparedFunction

    known = {}

    @functools.wraps(analyse)
    def call(kernel, arguments, *rest):
        function = getattr(kernel, "fn", None)  # of the Autotuner that PyTorch wraps a kernel with options in
        if type(function) is not PreparedFunction:
            return analyse(kernel, arguments, *rest)
        values = ((name, getattr(value, "dtype", repr(value))) for name, value in sorted(arguments.items()))
        key = function, tuple(values)
        if key not in known:
            known[key] = analyse(kernel, arguments, *rest)
        return copy.copy(known[key])

    return call
