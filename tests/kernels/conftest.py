"""Where there is no CUDA device the Triton kernels run in triton's interpreter, on CPU tensors."""

import os
import sys

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # triton reads the variable when it is imported and when a kernel is decorated; later is too late.
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"

if os.environ.get("TRITON_INTERPRET") == "1":  # two gaps of the interpreter of triton 3.6
    import numpy
    from triton.runtime import interpreter

    def _patch_lang_tensor(tensor, scope, original=interpreter._patch_lang_tensor):
        """Loop bounds are arrays of one element, which NumPy 2.4 no longer converts to int."""
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    def _create_dot(self, a, b, *rest, original=interpreter.InterpreterBuilder.create_dot):
        """bf16 numbers are kept as their bits, which tl.dot would multiply."""
        a, b = (interpreter.TensorHandle((x.data.astype(numpy.uint32) << 16).view(numpy.float32), interpreter.tl.float32)
                if x.dtype.scalar == interpreter.tl.bfloat16 else x for x in (a, b))
        return original(self, a, b, *rest)

    interpreter._patch_lang_tensor = _patch_lang_tensor
    interpreter.InterpreterBuilder.create_dot = _create_dot
