"""Triton's interpreter: kernels run on CPU tensors, without a GPU. Mended, and open to an observer.

`switch_on` is for the tests and for lightningdit_kernels.traffic. `observe` reports what a kernel
does: every load and store with its addresses, every matrix product, every trip of a loop.
"""

import contextlib
import functools
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol
from unittest import mock

import numpy as np

VARIABLE = "TRITON_INTERPRET"  # triton reads it when it is imported and when a kernel is decorated


def is_on() -> bool:
    """Whether kernels run in the interpreter in this process."""
    return os.environ.get(VARIABLE) == "1"


def switch_on() -> None:
    """Makes kernels that are decorated from now on run in the interpreter, and mends it.

    Raises: RuntimeError if triton was already imported as a compiler.
    """
    if not is_on() and "triton" in sys.modules:
        raise RuntimeError(f"triton was imported before {VARIABLE} could be set")
    os.environ[VARIABLE] = "1"
    _mend()


@functools.cache  # once a process
def _mend() -> None:
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor
    create_dot = interpreter.InterpreterBuilder.create_dot

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """A loop bound is an array of one element, which int() no longer takes from numpy 2.4 on
        (triton 3.6 fails).
        """
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def widened(x):
        if x.dtype.scalar != interpreter.tl.bfloat16:
            return x
        bits = x.data.astype("uint32") << 16
        return interpreter.TensorHandle(bits.view("float32"), interpreter.tl.float32)

    def create_dot_of_bf16(self, a, b, *rest):
        """The interpreter keeps bf16 as its bits, and would multiply those (triton 3.6 and 3.9)."""
        return create_dot(self, widened(a), widened(b), *rest)

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4
    interpreter.InterpreterBuilder.create_dot = create_dot_of_bf16


class Observer(Protocol):
    """What `observe` calls: for each launch begin, the rest as it happens, end."""

    def begin(
        self, kernel: Any, programs: int, arguments: dict[str, Any], options: dict[str, Any]
    ) -> int:
        """A launch of `programs` programs; arguments by name, options as num_warps. Returns how
        many to run.
        """

    def access(self, kind: str, addresses: np.ndarray, mask: np.ndarray, size: int) -> None:
        """A "load" or "store" of elements of `size` bytes: addresses, and which of them are not
        masked.
        """

    def product(self, m: int, n: int, k: int, passes: int) -> None:
        """A product of (m, k) and (k, n). passes: 3 where fp32 is split into three tf32 products,
        otherwise 1.
        """

    def loop(self, site: tuple, trips: int) -> None:
        """A loop that the compiler keeps was entered. site: the lines of the kernel and of the
        functions it calls.
        """

    def end(self) -> None:
        """The launch is over."""


@contextlib.contextmanager
def observe(observer: Observer) -> Iterator[None]:
    """Inside, every launch is reported to the observer, and as many programs run as it asks for.

    Programs run in the order of their ids, the first axis of the grid fastest. Arguments must be
    CPU tensors; their memory is touched only where a kernel does, so that large ones cost nothing.
    """
    from triton.runtime import interpreter

    if not is_on():
        raise RuntimeError(
            "observe needs the interpreter: call switch_on() before triton is imported"
        )
    builder = interpreter.InterpreterBuilder
    with contextlib.ExitStack() as stack:
        replacements = (
            (builder, "create_masked_load", _observed_load(builder.create_masked_load, observer)),
            (
                builder,
                "create_masked_store",
                _observed_store(builder.create_masked_store, observer),
            ),
            (builder, "create_dot", _observed_dot(interpreter, observer)),
            (
                interpreter,
                "_patch_lang_core",
                _observed_ranges(interpreter._patch_lang_core, observer),
            ),
            (interpreter.InterpretedFunction, "run", _observed_run(interpreter, observer)),
            (interpreter.InterpretedFunction, "__call__", _quick_call(interpreter)),
        )
        for owner, name, replacement in replacements:
            stack.enter_context(mock.patch.object(owner, name, replacement))
        yield


def _observed_load(load: Callable, observer: Observer) -> Callable:
    def create_masked_load(self, pointers, mask, *rest):
        observer.access(
            "load", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8
        )
        return load(self, pointers, mask, *rest)

    return create_masked_load


def _observed_store(store: Callable, observer: Observer) -> Callable:
    def create_masked_store(self, pointers, value, mask, *rest):
        observer.access(
            "store", pointers.data, mask.data, pointers.get_element_ty().primitive_bitwidth // 8
        )
        return store(self, pointers, value, mask, *rest)

    return create_masked_store


def _observed_dot(interpreter: Any, observer: Observer) -> Callable:
    dot = interpreter.InterpreterBuilder.create_dot

    def create_dot(self, a, b, d, precision, *rest):
        split = a.dtype.scalar == interpreter.tl.float32 and str(precision).endswith("TF32x3")
        observer.product(a.data.shape[-2], b.data.shape[-1], a.data.shape[-1], 3 if split else 1)
        return dot(self, a, b, d, precision, *rest)

    return create_dot


# Values of the tl.static_range loops around the current line: each pass is separate code.
_unrolled: list[int] = []


def _observed_ranges(patch_core: Callable, observer: Observer) -> Callable:
    """tl.range and tl.static_range; `range` itself is replaced in the globals of the kernel."""

    def patch(lang, scope):
        patch_core(lang, scope)
        new_range = lang.range

        def observed(*bounds, **options):
            return _reported(new_range(*bounds, **options), observer)

        def unrolled(*bounds, **options):
            for value in new_range(*bounds, **options):
                _unrolled.append(value)
                yield value
                _unrolled.pop()

        scope.set_attr(lang, "range", observed)
        scope.set_attr(lang, "static_range", unrolled)

    return patch


def _reported(steps: range, observer: Observer) -> range:
    """steps, after the observer was told of them. Called by a replacement of range, which a kernel
    calls.
    """
    frame, lines = sys._getframe(2), []
    within = frame.f_globals
    while frame is not None:
        if frame.f_globals is within:
            lines.append(frame.f_lineno)
        frame = frame.f_back
    observer.loop((*reversed(lines), *_unrolled), len(steps))
    return steps


def _observed_run(interpreter: Any, observer: Observer) -> Callable:
    class FirstPrograms(interpreter.GridExecutor):
        def _restore_args_dev(self, *_):
            """Kernels wrote into the CPU tensors themselves; copying them onto themselves would
            touch all memory.
            """

    def run(self, *arguments, grid, warmup, **options):
        if warmup:
            return
        given = dict(zip(self.arg_names, arguments, strict=False)) | options
        size = (*(grid(given) if callable(grid) else grid), 1, 1)[:3]
        known = {name: given[name] for name in self.arg_names if name in given}
        rest = {name: value for name, value in options.items() if name not in known}
        programs = observer.begin(self, math.prod(size), known, rest)
        try:
            with _numbered(interpreter.interpreter_builder, size), _loops_of(self, observer):
                FirstPrograms(self.rewrite(), self.arg_names, (programs,))(*arguments, **options)
        except interpreter.InterpreterError as error:
            raise error.__cause__ or error from None  # triton's says the same with repr()
        finally:
            _unrolled.clear()
            observer.end()

    return run


def _quick_call(interpreter: Any) -> Callable:
    """A kernel's call of another function. triton patches its language again for each, a third of
    all time.
    """
    patched = set()

    def call(self, *arguments, **options):
        names = id(self.fn.__globals__)
        if names not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(names)
        return self.rewrite()(*arguments, **options)

    return call


@contextlib.contextmanager
def _numbered(builder: Any, size: tuple[int, int, int]) -> Iterator[None]:
    """Inside, program i of a line of programs takes itself for program i of a grid of this size."""
    set_dim, set_index = builder.set_grid_dim, builder.set_grid_idx

    def index(i: int, *_: int) -> None:
        set_index(i % size[0], i // size[0] % size[1], i // (size[0] * size[1]))

    with (
        mock.patch.object(builder, "set_grid_dim", lambda *_: set_dim(*size)),
        mock.patch.object(builder, "set_grid_idx", index),
        np.errstate(all="ignore"),
        # numpy's, of NaN in memory that nothing filled
        warnings.catch_warnings(action="ignore", category=RuntimeWarning),
    ):
        yield


@contextlib.contextmanager
def _loops_of(kernel: Any, observer: Observer) -> Iterator[None]:
    """Inside, `range` reports to the observer in the functions of the kernel's module."""

    def observed(*bounds):
        return _reported(range(*bounds), observer)

    names = kernel.fn.__globals__  # not mock.patch.dict: triton adds names that must stay
    names["range"] = observed
    try:
        yield
    finally:
        del names["range"]
