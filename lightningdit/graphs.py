"""CUDA graphs: warm up what will be captured, and capture it so that a failure breaks nothing."""

import contextlib
import functools
from collections.abc import Callable

import torch

WARM_UPS = 3  # calls before a capture: compilation, tuning of kernels, workspaces
_pool = None  # of all graphs of the process, which are replayed one after the other


@functools.cache
def _stream(device: int) -> torch.cuda.Stream:
    """For warm-up and capture. cuBLAS allocates a workspace at the first call on a stream and keeps
    it: in a capture it would be in the graphs' pool, which could then not be used again once its
    graphs are freed.
    """
    return torch.cuda.Stream(device)


def warm_up(run: Callable[[], object]) -> None:
    """Calls run() WARM_UPS times on the stream on which it will be captured."""
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UPS):
            run()
    torch.cuda.current_stream().wait_stream(stream)


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of run(). A tensor that run() makes and somebody holds has its own memory; the
    memory of all others is overwritten when another graph is replayed.

    A capture that fails raises, and leaves the current stream, the default generator, the
    allocator, other graphs and the pool of the next capture in order. PyTorch leaves its own stream
    the current one, and the generator's state, with all graphs that were captured with it, waiting
    for the end of the capture ("Offset increment outside graph capture"): so each capture gets a
    state for itself. Before 2.12 it also leaves the allocator recording to the pool, and while it
    does, cached memory is not given back, not even to an allocation that needs it.
    """
    global _pool
    _pool = _pool or torch.cuda.graph_pool_handle()
    device = torch.cuda.current_device()  # first: before CUDA is initialised no generator is there
    generator = torch.cuda.default_generators[device]
    before = generator.graphsafe_get_state()
    generator.graphsafe_set_state(generator.clone_state())
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.current_stream()):
            with torch.cuda.graph(graph, pool=_pool, stream=_stream(device)):
                run()
    except Exception:
        # RuntimeError: it is not recording. The capture had not begun, or PyTorch has ended it.
        with contextlib.suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(device, _pool)
            torch._C._cuda_releasePool(device, _pool)
        _pool = None
        generator.graphsafe_set_state(before)
        raise
    return graph
