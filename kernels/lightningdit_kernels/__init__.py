"""The ops under LightningDiT and VA-VAE. Every function has its definition beside it as `<name>_ref`, in plain PyTorch."""

from lightningdit_kernels.alignment import marginal_cosine_loss, marginal_distance_matrix_loss
from lightningdit_kernels.attention import rope_attention
from lightningdit_kernels.groupnorm import group_norm_silu
from lightningdit_kernels.norm import gated_residual_rms_norm_modulate, rms_norm_modulate
from lightningdit_kernels.swiglu import swiglu

__all__ = [
    "gated_residual_rms_norm_modulate",
    "group_norm_silu",
    "marginal_cosine_loss",
    "marginal_distance_matrix_loss",
    "rms_norm_modulate",
    "rope_attention",
    "swiglu",
]
