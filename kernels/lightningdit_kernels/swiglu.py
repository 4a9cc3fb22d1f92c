"""SwiGLU's activation on the packed [gate | up] output of one linear layer. F hidden size of the feed-forward."""

import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels.library import accumulation_dtype, check_floating, result_dtype


def swiglu_ref(packed):
    """The definition of swiglu in plain PyTorch."""
    gate, up = packed.to(accumulation_dtype(packed)).chunk(2, dim=-1)
    return (nnf.silu(gate) * up).to(result_dtype(packed))


def swiglu(packed: Tensor) -> Tensor:
    """silu(gate) * up, with gate = packed[..., :F] and up = packed[..., F:], computed in fp32.

    Args:
        packed: (..., 2F), fp32, bf16, fp16 or fp64.
    Returns: (..., F) in packed.dtype, or in the autocast dtype inside torch.autocast.
    Raises: ValueError if the last dimension is odd or missing, or the dtype is another.
    Source: GLU variants, arXiv:2002.05202.
    """
    check_floating("swiglu", packed=packed)
    if packed.dim() == 0 or packed.shape[-1] % 2:
        raise ValueError(f"swiglu: packed has shape {tuple(packed.shape)}, expected an even last dimension (gate and up)")
    return swiglu_ref(packed)
