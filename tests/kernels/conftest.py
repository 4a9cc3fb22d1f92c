"""Where there is no CUDA device the Triton kernels run in triton's interpreter, on CPU tensors; and the CPU backends of an op."""

import os
import sys

import pytest
import torch

from lightningdit_kernels import native

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # triton reads the variable when it is imported and when a kernel is decorated; later is too late.
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    patch_tensor = interpreter._patch_lang_tensor

    def patch_tensor_for_numpy_2_4(tensor, scope):
        """A loop bound is an array of one element, which int() no longer takes from numpy 2.4 on (triton 3.6 does not know yet)."""
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor_for_numpy_2_4

    create_dot = interpreter.InterpreterBuilder.create_dot

    def create_dot_of_bf16(self, a, b, *rest):
        """The interpreter keeps bf16 as its bits, and would multiply those."""

        def widened(x):
            if x.dtype.scalar != interpreter.tl.bfloat16:
                return x
            return interpreter.TensorHandle((x.data.astype("uint32") << 16).view("float32"), interpreter.tl.float32)

        return create_dot(self, widened(a), widened(b), *rest)

    interpreter.InterpreterBuilder.create_dot = create_dot_of_bf16


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
