"""The two margin losses that align a tokenizer's latents with the features of a vision foundation model.

B images, N tokens, C channels. Both losses are means; the caller adds and weights them.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape


def marginal_cosine_loss_ref(z, f, margin=0.5):
    """The definition of marginal_cosine_loss in plain PyTorch."""
    acc = accumulation_dtype(z)
    cosine = nnf.cosine_similarity(z.to(acc), f.detach().to(acc), dim=-1)  # (B, N)
    return nnf.relu(1 - margin - cosine).mean()


def marginal_distance_matrix_loss_ref(z, f, margin=0.25):
    """The definition of marginal_distance_matrix_loss in plain PyTorch."""
    acc = accumulation_dtype(z)
    # The gradient is a step function of |Gz - Gf| - margin: half-precision products would move tokens across the step.
    with torch.autocast(z.device.type, enabled=False):
        z_hat = nnf.normalize(z.to(acc), dim=-1)
        f_hat = nnf.normalize(f.detach().to(acc), dim=-1)
        distance = (z_hat @ z_hat.mT - f_hat @ f_hat.mT).abs()  # (B, N, N)
        return nnf.relu(distance - margin).mean()


def marginal_cosine_loss(z: Tensor, f: Tensor, margin: float = 0.5) -> Tensor:
    """mean over B and N of relu(1 - margin - cos(z_i, f_i)).

    Args:
        z: (B, N, C), projected latents, fp32, bf16, fp16 or fp64.
        f: (B, N, C), features of the frozen foundation model. No gradient flows to them.
        margin: similarity above 1 - margin costs nothing.
    Returns: scalar, fp32 (fp64 for fp64 z).
    Raises: ValueError if the shapes differ, are empty or not of three dimensions, or the dtype is another.
    Source: VA-VAE, arXiv:2501.01423, equation of the marginal cosine similarity loss.
    """
    _check("marginal_cosine_loss", z, f)
    return marginal_cosine_loss_ref(z, f, margin)


def marginal_distance_matrix_loss(z: Tensor, f: Tensor, margin: float = 0.25) -> Tensor:
    """mean over B and the N x N token pairs of one image of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    Args:
        z: (B, N, C), projected latents, fp32, bf16, fp16 or fp64.
        f: (B, N, C'), features of the frozen foundation model; C' may differ from C. No gradient flows to them.
        margin: differences of similarity below it cost nothing.
    Returns: scalar, fp32 (fp64 for fp64 z).
    Raises: ValueError if B or N differ, a dimension is empty, or the dtype is another.
    Source: VA-VAE, arXiv:2501.01423, equation of the marginal distance matrix similarity loss.
    """
    _check("marginal_distance_matrix_loss", z, f, same_channels=False)
    return marginal_distance_matrix_loss_ref(z, f, margin)


def _check(op, z, f, same_channels=True):
    check_floating(op, z=z, f=f)
    for name, tensor in (("z", z), ("f", f)):
        if tensor.dim() != 3 or tensor.numel() == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (B, N, C), none of them zero")
    channels = z.shape[2] if same_channels else f.shape[2]
    check_shape(op, (z.shape[0], z.shape[1], channels), "the shape of z", f=f)
