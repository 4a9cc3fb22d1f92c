"""Where there is no CUDA device the Triton kernels run in triton's interpreter, on CPU tensors."""

import os
import sys

import torch

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
