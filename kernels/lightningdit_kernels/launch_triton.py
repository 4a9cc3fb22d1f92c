"""Launches that are prepared once: the second launch of a variant of a kernel does without Triton's binder.

Triton's `kernel[grid](...)` classifies every argument, writes the classes and the options as text, looks the compiled variant up by that,
and lets its launcher ask the driver about every pointer. Here types, dtypes and scalars are the key, and the launcher gets addresses.
Whatever is out of the ordinary takes Triton's way, which is slower and never wrong.
"""

import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
import triton.language as tl
from torch._subclasses.functional_tensor import FunctionalTensor
from triton import knobs
from triton.compiler import CompiledKernel

from lightningdit_kernels import graph_triton

MOST_VARIANTS = 1024  # of one layout: scalars are part of the key, and a batch may have any size
TENSORS = (torch.Tensor, torch.nn.Parameter)  # another subclass may have no address
SCALARS = (type(None), bool, int, float)
CONSTANTS = (*SCALARS, str, tuple, tl.dtype)

_address, _device, _dtype = torch.Tensor.data_ptr, torch.Tensor.get_device, operator.attrgetter("dtype")
_current_device = getattr(torch._C, "_cuda_getDevice", None)  # without a check whether CUDA was initialised: there are tensors
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)
_runtime, _compilation = knobs.runtime, knobs.compilation


class _Watching(threading.local):
    """.by: who notes what this thread launches, for plans_triton."""

    by = None


watching = _Watching()


def fast_launch(kernel: Any) -> Any:
    """Decorates what `@triton.jit` returns: a kernel whose variants are prepared. One of the interpreter is left as it is."""
    if isinstance(kernel, triton.JITFunction):
        kernel.__class__, kernel.layouts = PreparedFunction, {}
    return kernel


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up. That of Triton is for kernels, too: it takes 4 us on the host."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is not below n >= 1."""
    return 1 << (n - 1).bit_length()


def is_watched() -> bool:
    """Whether somebody set a knob of Triton, or wants to see every launch."""
    return bool(_runtime.__dict__ or _compilation.__dict__ or _runtime.launch_enter_hook.calls or _runtime.launch_exit_hook.calls)


@dataclass(frozen=True)
class _Layout:
    """Where the tensors are among arguments of these types, and what launches the variants of such a call."""

    tensors: Callable[[tuple], tuple]
    scalars: Callable[[tuple], tuple]
    doubtful: Callable[[tuple], tuple] | None  # among scalars, constants and options: floats and tuples, whose equality says too little
    positions: tuple[int, ...]  # of the tensors
    variants: dict[tuple, tuple] = field(default_factory=dict)


def is_changed(variant: tuple) -> bool:
    """Whether a global that the kernel uses was set since it was compiled."""
    return any(where.get(name) is not value for where, name, value in variant[-1])


def enqueue(variant: tuple, grid: tuple, positions: tuple[int, ...], addresses: list[int], device: int) -> None:
    """Launches a variant on the device's current stream, with addresses at these positions of its arguments."""
    _, run, function, metadata, filled, _ = variant
    filled = filled.copy()
    for position, address in zip(positions, addresses, strict=True):
        filled[position] = address
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, _current_stream(device), function, metadata, None, None, None, *filled)


class PreparedFunction(triton.JITFunction):
    """A kernel that keeps what launches its variants: CompiledKernel.run, with the arguments that triton 3.6 to 3.9 give it.

    A variant of Triton depends on the device; the dtype of a tensor, and whether its address is a multiple of 16; whether an integer is 1
    or a multiple of 16, and how wide it is; constants, options and knobs. The key here has all of it: only aligned tensors on the
    current device are looked up, integers go by their value, and hooks, or knobs that a program has set, send every launch to Triton.
    Environment variables are those of the first launch.
    """

    def __getitem__(self, grid):
        return functools.partial(self._launch, grid)

    def _launch(self, grid, /, *arguments, **constants):
        values = (*constants.values(),)
        kinds = (*map(type, arguments), *constants, *map(type, values))
        layout = self.layouts.get(kinds, _layout)
        if layout is _layout:
            layout = self.layouts[kinds] = _layout(arguments, values)
        if layout is None and FunctionalTensor in kinds:
            return graph_triton.launch(self, grid, arguments, constants)
        if layout is None or is_watched() or self.pre_run_hooks or type(grid) is not tuple:
            return self.run(*arguments, grid=grid, warmup=False, **constants)
        tensors = layout.tensors(arguments)
        addresses, devices = [*map(_address, tensors)], [*map(_device, tensors)]
        device = devices[0]
        if functools.reduce(operator.or_, addresses) & 15 or devices.count(device) != len(devices) or device != _current_device():
            return self.run(*arguments, grid=grid, warmup=False, **constants)
        key = (device, *map(_dtype, tensors), *layout.scalars(arguments), *values)
        if layout.doubtful is not None:  # 0.0 equals -0.0, and (1, 2) equals (True, 2.0)
            key += (*map(repr, layout.doubtful(key)),)
        variant = layout.variants.get(key)
        if variant is None:
            return self._first(layout, key, grid, arguments, constants)
        if is_changed(variant):  # which Triton refuses
            return self.run(*arguments, grid=grid, warmup=False, **constants)
        if watching.by is not None:
            watching.by.launches.append((self, grid, variant, layout.positions, addresses))
        enqueue(variant, grid, layout.positions, addresses, device)
        return variant[0]

    def run(self, *arguments, **options):
        """Triton's way, which no plan has."""
        if watching.by is not None:
            watching.by.prepared = False
        return super().run(*arguments, **options)

    def _first(self, layout, key, grid, arguments, constants):
        """Launches as Triton does, and keeps what it launched."""
        kernel = self.run(*arguments, grid=grid, warmup=False, **constants)
        if isinstance(kernel, CompiledKernel):
            given = dict(zip(self.arg_names, arguments, strict=False)) | constants
            filled = [given[p.name] if p.name in given else p.default for p in self.params]
            for position in layout.positions:
                filled[position] = None  # a tensor would stay in memory
            names = tuple((where, name, where[name]) for (name, _), (_, where) in self.used_global_vals.items())
            if len(layout.variants) >= MOST_VARIANTS:
                layout.variants.clear()
            # With the kernel itself: from triton 3.9 on its module is unloaded with it.
            layout.variants[key] = kernel, kernel.run, kernel.function, kernel.packed_metadata, filled, names
        return kernel


def _layout(arguments: tuple, values: tuple) -> _Layout | None:
    """The layout of a call; None if no tensor is among its arguments, or something of a type that Triton may treat specially."""
    positions = tuple(i for i, argument in enumerate(arguments) if type(argument) in TENSORS)
    others = tuple(i for i in range(len(arguments)) if i not in positions)
    known = all(type(arguments[i]) in SCALARS for i in others) and all(type(value) in CONSTANTS for value in values)
    if not positions or not known:
        return None
    scalars = (*(arguments[i] for i in others), *values)
    doubtful = tuple(i for i, value in enumerate(scalars, 1 + len(positions)) if type(value) in (float, tuple))  # positions in the key
    return _Layout(_pick(positions), _pick(others), _pick(doubtful) if doubtful else None, positions)


def _pick(positions: tuple[int, ...]) -> Callable[[tuple], tuple]:
    """itemgetter, but a tuple for one position and for none, too."""
    if len(positions) > 1:
        return operator.itemgetter(*positions)
    return lambda values: tuple(values[i] for i in positions)
