"""Where there is no CUDA device the Triton kernels run in triton's interpreter, on CPU tensors; and the CPU backends of an op."""

import pytest
import torch

from lightningdit_kernels import interpreter, native

if interpreter.is_on() or not torch.cuda.is_available():
    interpreter.switch_on()  # before a test imports triton: later is too late


@pytest.fixture(params=["baseline", "AVX2", "AVX-512", "reference"])
def backend(request, monkeypatch):
    """Every way in which this machine can compute the op."""
    if request.param == "reference":
        monkeypatch.setattr(native, "available", False)
        yield request.param
        return
    if not native.available:
        pytest.skip(native.about)
    wanted = {name: level for level, name in native.LEVELS.items()}[request.param]
    highest = native.library.lightningdit_level()
    if native.library.lightningdit_set_level(wanted) != wanted:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    native.library.lightningdit_set_level(highest)


@pytest.fixture(params=[True, False], ids=["native", "reference"])
def kernels_or_reference(request, monkeypatch):
    """With the native library and without; its value says which."""
    if request.param and not native.available:
        pytest.skip(native.about)
    monkeypatch.setattr(native, "available", request.param)
    return request.param


@pytest.fixture
def few_programs_of_sums(monkeypatch):
    """Sums of partial results in blocks of 64 columns for 8: interpreting a program takes 0.1 s, and a norm of 1,152 columns has 432."""
    if interpreter.is_on():
        from lightningdit_kernels import norm_triton, sums_triton, tuning

        wide = tuning.Config(sums_triton.SUMS.blocks | dict(COLUMNS=64), sums_triton.SUMS.num_warps)
        for module in (norm_triton, sums_triton):
            monkeypatch.setattr(module, "SUMS", wide)
