"""Whether something fits the memory of a device is tried: what runs, with all that will be there, and room to spare."""

import contextlib
import gc
import re
from collections.abc import Callable, Iterable, Iterator

import torch

# Bytes that a trial leaves free for what it does not see and that does not grow with the card: the
# code of compiled kernels, workspaces of cuBLAS and NCCL, fragmentation by what comes and goes.
SPARE = 3 * 2**30


def largest_by_trial(
    sizes: Iterable[int],
    attempt: Callable[[int], object],
    device: torch.device | str,
    spare: int = SPARE,
) -> int:
    """The first of `sizes` for which attempt(size) does not run out of memory, else 0.

    Before each attempt, what nobody holds any more is freed: reference cycles that the caller left
    behind do not make a size fail. So is what failed attempts held; other exceptions pass through.

    Args: spare: bytes of a CUDA device that stay free beside it; no matter on other devices.
    """
    for size in sizes:
        free_memory(device)  # not in the handler, where the traceback holds the tensors of the attempt
        try:
            with ballast(spare, device):
                attempt(size)
            return size
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
    free_memory(device)
    return 0


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device is full: by PyTorch, or by CUDA, cuBLAS and Triton, which allocate, too."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    words = r"out of memory|CUBLAS_STATUS_ALLOC_FAILED"
    return isinstance(error, RuntimeError) and re.search(words, str(error)) is not None


def free_memory(device: torch.device | str) -> None:
    """Frees what nobody holds any more, and gives what PyTorch has cached back to the device."""
    gc.collect()
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()


@contextlib.contextmanager
def ballast(size: int, device: torch.device | str) -> Iterator[None]:
    """Inside, `size` bytes of a CUDA device are taken; on other devices nothing is.

    Raises: torch.OutOfMemoryError where they are not free.
    """
    taken = None
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()  # taken from the device, not from pieces that a pass could use
        taken = torch.empty(size, dtype=torch.uint8, device=device)
    try:
        yield
    finally:
        if taken is not None:
            del taken
            torch.cuda.empty_cache()
