"""Calls of a launcher that are played back: which buffers it makes and what it launches depends on the form of its arguments alone.

A launcher is Python that makes outputs, chooses tiles and launches two or three kernels. The form of a call is the dtypes, shapes and
strides of its tensors, and its other arguments. The first call of a form chooses tiles and compiles; the second is watched, and from the
third on its plan is carried out: the same buffers, the same launches, with the addresses of the day. Whatever is out of the ordinary is
left to the launcher, which is slower and never wrong.
"""

import functools
import operator
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightningdit_kernels.launch_triton import TENSORS, _address, _current_device, _device, enqueue, is_changed, is_watched, watching
from lightningdit_kernels.tuning import process_group

MOST_PLANS = 1024  # of a launcher: batches may have any size
VALUES = (type(None), bool, int, float, torch.dtype)
_aten = torch.ops.aten
BUFFERS = (_aten.empty.memory_format, _aten.empty_strided.default, _aten.empty_like.default, _aten.new_empty.default)
_one_watch = threading.Lock()  # modes have flags of the whole process
WATCHES = 3  # of a form, in which a kernel took Triton's way: a variant may be new to it, but not for ever
NEVER = "the launcher does what no plan can have"


class _Watch(TorchDispatchMode):
    """Notes the buffers that a launcher makes, what it launches, and whether that is all."""

    def __init__(self):
        super().__init__()
        self.buffers, self.launches, self.kept, self.prepared, self.known = [], [], [], True, True

    @classmethod
    def _should_skip_dynamo(cls):
        return False  # or PyTorch imports the compiler, which takes seconds

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        if not (self.prepared and self.known):  # timing of candidates, too: nothing of it is kept
            self.buffers.clear(), self.launches.clear(), self.kept.clear()
        elif function in BUFFERS:
            self.buffers.append(result)
        else:  # a view by its memory: below autograd `contiguous` comes as one operator, which copies or does not
            memory = {a.untyped_storage().data_ptr() for a in arguments if isinstance(a, torch.Tensor)}
            results = result if isinstance(result, (tuple, list)) else [result]
            self.known &= all(isinstance(r, torch.Tensor) and r.untyped_storage().data_ptr() in memory for r in results)
            self.kept.append(result)  # its address may not become a buffer's
        return result

    def __enter__(self):
        watching.by = self
        return super().__enter__()

    def __exit__(self, *error):
        watching.by = None
        return super().__exit__(*error)


@dataclass(frozen=True)
class _Plan:
    """buffers: size, stride and dtype. launches: kernel, grid, what launch_triton keeps of a variant, positions of addresses, and for each
    its (source, offset); a source is the place of a tensor among arguments and buffers. results: None or the place of one."""

    buffers: tuple
    launches: tuple
    results: tuple | int | None


def planned(launcher: Callable) -> Callable:
    """Decorates a launcher of positional arguments that returns a tensor, or a tuple of tensors and None.

    It may launch prepared kernels and make empty buffers, views of them too, and nothing else; where in an argument a kernel begins to
    read must be where that begins; and what it does must follow from the form of the call.
    """
    plans: dict[tuple, _Plan | int | str] = {}  # by form; of one without a plan how often it may be watched, or NEVER

    @functools.wraps(launcher)
    def call(*arguments):
        tensors, form = [], []
        for argument in arguments:
            kind = type(argument)
            if kind in TENSORS:
                tensors.append(argument)
                form.append((argument.dtype, argument.shape, argument.stride()))
            elif kind in VALUES:
                form.append((kind, repr(argument) if kind is float else argument))  # 0.0 equals -0.0
            else:
                return launcher(*arguments)
        addresses, devices = [*map(_address, tensors)], [*map(_device, tensors)]
        device = devices[0]
        ordinary = device >= 0 and devices.count(device) == len(devices) and device == _current_device()
        if not ordinary or functools.reduce(operator.or_, addresses) & 15 or is_watched() or watching.by is not None:
            return launcher(*arguments)
        form = (device, id(process_group()), *form)  # processes of a group agree on tiles
        plan = plans.get(form)
        if type(plan) is not _Plan or any(kernel.pre_run_hooks or is_changed(variant) for kernel, _, variant, _, _ in plan.launches):
            return _first_calls(launcher, arguments, tensors, addresses, plans, form)
        like = tensors[0].device
        buffers = [torch.empty_strided(size, stride, dtype=dtype, device=like) for size, stride, dtype in plan.buffers]
        addresses += map(_address, buffers)
        for _, grid, variant, positions, sources in plan.launches:
            enqueue(variant, grid, positions, [addresses[source] + offset for source, offset in sources], device)
        tensors += buffers
        if type(plan.results) is int:
            return tensors[plan.results]
        return tuple([None if place is None else tensors[place] for place in plan.results])

    call.plans = plans
    return call


def _first_calls(launcher, arguments, tensors, addresses, plans, form):
    """Calls the launcher, and makes a plan of the second call: one with no two arguments at one address, nor in a capture."""
    plan, capturing = plans.get(form), torch.cuda.is_current_stream_capturing()
    if type(plan) is not int or capturing or len({*addresses}) < len(addresses) or not _one_watch.acquire(blocking=False):
        results = launcher(*arguments)
        if plan is None and not capturing:  # a capture chooses nothing that is kept, nor does a call that raises
            if len(plans) >= MOST_PLANS:
                plans.clear()
            plans[form] = WATCHES
        return results
    try:
        with _Watch() as watch:
            results = launcher(*arguments)
    finally:
        _one_watch.release()
    if watch.prepared and watch.known:
        plans[form] = _plan_of(watch, tensors, results)
    else:
        plans[form] = plan - 1 if watch.known and plan > 1 else NEVER
    return results


def _plan_of(watch, tensors, results):
    """The plan of what was watched; NEVER if some address or result is unknown."""
    everything = [*tensors, *watch.buffers]
    begins = [tensor.data_ptr() for tensor in everything]
    ends = [begin + tensor.untyped_storage().nbytes() for begin, tensor in zip(begins[len(tensors) :], watch.buffers, strict=True)]

    def source(address):
        """An argument that begins there, or the buffer in which it lies."""
        if address in begins[: len(tensors)]:
            return begins.index(address), 0
        inside = [place for place, end in enumerate(ends, len(tensors)) if address == begins[place] or begins[place] < address < end]
        return (inside[0], address - begins[inside[0]]) if inside else None

    launches = []
    for kernel, grid, variant, positions, launched in watch.launches:
        sources = [*map(source, launched)]
        if None in sources:
            return NEVER
        launches.append((kernel, grid, variant, positions, sources))
    places, free = [], [*range(len(tensors), len(everything)), *range(len(tensors))]
    for result in results if isinstance(results, tuple) else [results]:
        place = None if result is None else next((place for place in free if _place(everything[place]) == _place(result)), -1)
        if place == -1:
            return NEVER
        if place is not None:
            free.remove(place)  # no two results are one, not even empty ones
        places.append(place)
    results = tuple(places) if isinstance(results, tuple) else places[0]
    return _Plan(tuple((b.shape, b.stride(), b.dtype) for b in watch.buffers), tuple(launches), results)


def _place(tensor):
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
