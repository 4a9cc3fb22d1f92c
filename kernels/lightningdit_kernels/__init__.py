"""The ops under LightningDiT and VA-VAE. Every function has its definition beside it as `<name>_ref`, in plain PyTorch."""

from lightningdit_kernels import native, tuning
from lightningdit_kernels.alignment import alignment_losses, marginal_cosine_loss, marginal_distance_matrix_loss
from lightningdit_kernels.attention import MEASURED, rope_attention
from lightningdit_kernels.groupnorm import group_norm_silu
from lightningdit_kernels.library import triton_available
from lightningdit_kernels.linear import LIBRARIES
from lightningdit_kernels.norm import TRITON_MAX_WIDTH, gated_residual_rms_norm_modulate, rms_norm_modulate
from lightningdit_kernels.swiglu import swiglu

__all__ = [
    "alignment_losses",
    "backends",
    "gated_residual_rms_norm_modulate",
    "group_norm_silu",
    "marginal_cosine_loss",
    "marginal_distance_matrix_loss",
    "rms_norm_modulate",
    "rope_attention",
    "swiglu",
]


def backends() -> dict[str, dict[str, str]]:
    """What serves each op on this machine: op -> dict(cpu=, cuda=, why=). `python -m lightningdit_kernels` prints it as a table.

    "native" is the C++ library, "triton" the GPU kernels, "reference" the op's definition in plain PyTorch, which torch.compile may fuse.
    """
    rows = {op: dict(cpu="reference", cuda="reference", why="defined in plain PyTorch only") for op in __all__ if op != "backends"}
    cpu = f"CPU: {native.about}" + ("; fp32, bf16 and fp16, under torch.compile too; else reference" if native.available else "")
    cuda = "CUDA: Triton; fp32, bf16 and fp16; else reference" if triton_available else "CUDA: triton is not installed"
    serves = dict(cpu="native" if native.available else "reference", cuda="triton" if triton_available else "reference")
    for op in ("gated_residual_rms_norm_modulate", "group_norm_silu", "rms_norm_modulate", "swiglu"):
        rows[op] = serves | dict(why=f"{cpu}. {cuda}" + (f", as are rows wider than {TRITON_MAX_WIDTH}" if "rms_norm" in op else ""))
    for op in ("alignment_losses", "marginal_cosine_loss", "marginal_distance_matrix_loss"):
        rows[op] = serves | dict(why=f"{cpu}. {cuda}; neither has an N x N matrix in memory")
    measured = sorted({entry["choice"] for entry in tuning.choices_here() if entry["op"] == "linear"})
    rows["linear"] = dict(cpu=" and ".join(measured) or " or ".join(LIBRARIES), cuda="cuBLAS",
                          why="CPU: fp32 by the faster of MKL and oneDNN, timed at the first call; else as torch.nn.functional.linear")
    named = "backend='triton' (fp32, bf16, fp16), 'flash_attn' and 'xformers' serve when named"
    if not triton_available:
        auto, how = "sdpa", "triton is not installed"
    elif reason := tuning.unmeasured():
        auto = "the starting guess, else sdpa" if MEASURED else "sdpa"
        how = f"backend='auto' takes the starting guess, for {len(MEASURED)} of (GPU, N, Dh), else sdpa: nothing is timed ({reason})"
    else:
        kept = [entry["choice"] for entry in tuning.choices_here() if entry["op"] == "rope_attention"]
        auto = " and ".join(sorted(set(kept))) or "triton or sdpa"
        how = "backend='auto' takes what was faster forward and backward, timed at the first call for each shape (bf16 and fp16), of which "
        how += f"{len(kept)} are kept on disk; else sdpa"
    rows["rope_attention"] = dict(cpu=serves["cpu"], cuda=auto, why=f"{cpu}. CUDA: {how}; {named}")
    return rows
