"""Where there is no CUDA device the Triton kernels run in triton's interpreter, on CPU tensors."""

import os
import sys

import torch

if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
    # triton reads the variable when it is imported and when a kernel is decorated; later is too late.
    assert "triton" not in sys.modules, "triton was imported before TRITON_INTERPRET could be set"
    os.environ["TRITON_INTERPRET"] = "1"
