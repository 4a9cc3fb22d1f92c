"""Who takes part in a benchmark: eager PyTorch, torch.compile, ours, and the peers that are installed, all with the op's signature.

A peer that has only a part of an op gets the rest from torch.compile, which is how one would use it; one that has no backward takes part in
the forward alone. Peers that cannot run here are listed with the reason; nothing is left out silently. docs/peers.md has the versions.
"""

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as nnf
from torch.nn.attention import (
    SDPBackend,
    activate_flash_attention_impl,
    current_flash_attention_impl,
    restore_flash_attention_impl,
    sdpa_kernel,
)
from torch.torch_version import TorchVersion

from lightningdit_kernels import backends
from lightningdit_kernels.attention import head_norm_ref, rope_ref
from lightningdit_kernels.library import result_dtype
from lightningdit_kernels.testing import DEFINITIONS, OPS

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Provider:
    """One contestant for one op. build() imports what it needs and returns a function with the op's signature."""

    name: str
    build: Callable[[], Callable]
    module: str | None = None  # whose absence makes it unavailable
    package: str | None = None  # the distribution that pip installs it from
    least: str = ""  # the oldest version of it that the adapter is written for
    also: tuple[tuple[str, str, str], ...] = ()  # what else it needs: (module, package, oldest version)
    cudnn: str = ""  # the oldest cuDNN that it is for, where PyTorch's cuDNN does the work
    devices: tuple[str, ...] = ("cpu", "cuda")
    half_only: tuple[str, ...] = ()  # the devices on which it takes no fp32
    proof: str = ""  # a regular expression: what a profile of it shows, and of nobody else
    pad: int = 0  # the head dimension to which it pads with zeros
    width_of: int = 0  # it takes widths that are multiples of this
    forward_only: bool = False  # it has no backward: only its forward is gated and timed, without gradients
    # A second call after a failure would end the process: PyTorch 2.11 uses the cuDNN plan that it could not build, a null pointer.
    fails_once: bool = False

    def unavailable(self, device: str, dtype: torch.dtype, head_dim: int | None = None, width: int | None = None) -> str:
        """Why it cannot take part with tensors of this device type, dtype, head dimension and width, or ""."""
        if device not in self.devices:
            return f"needs {' or '.join(self.devices)}"
        if device in self.half_only and dtype not in HALF:
            return f"does not take {str(dtype).removeprefix('torch.')}"
        if self.pad and head_dim is not None and (head_dim >= self.pad or head_dim % 16 == 0):
            return f"head dimension {head_dim} needs no padding to {self.pad}"
        if self.width_of and width is not None and width % self.width_of:
            return f"width {width} is no multiple of {self.width_of}"
        if self.package == "apex":
            return apex_missing()
        if self.cudnn:
            version = _cudnn_version()
            return _older("cuDNN", version, self.cudnn) if version else "cuDNN is not installed (PyTorch's wheels for CUDA bring it)"
        own = [(self.module, self.package, self.least)] if self.module else []
        return next(filter(None, (_missing(*needed) for needed in (*own, *self.also))), "")

    @property
    def version(self) -> str:
        """Of the package, of cuDNN, or of torch where it is PyTorch's own."""
        if self.cudnn:
            return _cudnn_version() or "unknown"
        return _installed(self.package) if self.package else torch.__version__


def _installed(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _missing(module: str, package: str, least: str) -> str:
    """Why a module of a package cannot be used, or ""."""
    if not _exists(module):
        return f"{module} is not installed (pip install {package})"
    return _older(package, _installed(package), least) if least else ""


def _older(name: str, version: str, least: str) -> str:
    known = version != "unknown"  # a module without the metadata of its distribution
    return "" if known and TorchVersion(version) >= least else f"{name} is version {version}, expected {least} or newer"


def _cudnn_version() -> str:
    version = torch.backends.cudnn.version()  # 91900 is 9.19.0
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}" if version else ""


def _exists(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent of the module is missing
        return False


def apex_missing() -> str:
    """Why NVIDIA's apex cannot be used, or "". PyPI's apex is another project of that name and is told apart by its contents."""
    advice = "NVIDIA's is built from github.com/NVIDIA/apex"
    if not _exists("apex"):
        return f"apex is not installed; {advice}"
    if not _exists("apex.normalization"):
        return f"the installed apex is PyPI's, another project; {advice}"
    return ""


def _compiled(function):
    return torch.compile(function, fullgraph=True, dynamic=False)


# Plain compositions, as one would write them without this library. Where parameters are fp32 and activations are not, they are what
# autocast makes of the official code: a linear layer's bias in the activations' dtype, norms in fp32, and their result rounded for the
# matrix product that takes it.


def eager_norm(x, scale, shift=None, weight=None, eps=1e-6):
    return _modulate(nnf.rms_norm(x, x.shape[-1:], weight, eps), scale, shift)


def _modulate(h, scale, shift):
    out_dtype = result_dtype(h)
    h = h * (1 + scale[:, None])
    return (h if shift is None else h + shift[:, None]).to(out_dtype)


def _biased(y, bias):
    return y if bias is None else y + bias.to(y.dtype)


def _add(x, y, gate, bias):
    return x + gate[:, None] * _biased(y, bias)


def eager_gated_norm(x, y, gate, scale, shift=None, weight=None, eps=1e-6, bias=None):
    x = _add(x, y, gate, bias)
    return x, eager_norm(x, scale, shift, weight, eps)


def eager_swiglu(packed, bias=None):
    gate, up = _biased(packed, bias).chunk(2, dim=-1)
    return nnf.silu(gate) * up


def eager_group_norm_silu(x, weight, bias, num_groups, eps=1e-6):
    return nnf.silu(nnf.group_norm(x.to(weight.dtype), num_groups, weight, bias, eps)).to(x.dtype)


EAGER = DEFINITIONS | {
    "rms_norm_modulate": eager_norm,
    "gated_residual_rms_norm_modulate": eager_gated_norm,
    "swiglu": eager_swiglu,
    "group_norm_silu": eager_group_norm_silu,
}


# Peers of rms_norm_modulate and gated_residual_rms_norm_modulate: their RMSNorm between compiled pieces.


def _norm_with(rms_norm: Callable, gated: bool) -> Callable:
    modulate, add = _compiled(_modulate), _compiled(_add)

    def plain(x, scale, shift=None, weight=None, eps=1e-6):
        return modulate(rms_norm(x, weight, eps), scale, shift)

    def with_residual(x, y, gate, scale, shift=None, weight=None, eps=1e-6, bias=None):
        x = add(x, y, gate, bias)
        return x, plain(x, scale, shift, weight, eps)

    return with_residual if gated else plain


def _quack_norm(gated):
    from quack.rmsnorm import rmsnorm

    return _norm_with(lambda x, weight, eps: rmsnorm(x.flatten(0, 1), weight, eps=eps).view_as(x), gated)


def _liger_norm(gated):
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return _norm_with(lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False), gated)


def _liger_cutedsl_norm(gated):
    # By its module: LIGER_KERNEL_IMPL=cutedsl would replace the ops of all of liger_kernel.ops, for "liger" as well.
    from liger_kernel.ops.cutedsl.ops.rms_norm import LigerRMSNormFunction

    return _norm_with(lambda x, weight, eps: LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False), gated)


def _sglang_norm(gated):
    """The whole op is its kernel but for the branch's bias and dtype: it writes both results in the dtype of its second argument."""
    from sglang.kernels.ops.diffusion.norm.scale_residual_norm_cutedsl import (
        fused_norm_scale_shift,
        fused_scale_residual_norm_scale_shift,
    )

    branch = _compiled(lambda y, bias, dtype: _biased(y, bias).to(dtype))
    zero = functools.cache(lambda device, dtype: torch.zeros(1, device=device, dtype=dtype))  # it has no "no shift"

    def plain(x, scale, shift=None, weight=None, eps=1e-6):
        shift = zero(scale.device, scale.dtype) if shift is None else shift
        return fused_norm_scale_shift(x, weight, None, scale, shift, "rms", eps).to(result_dtype(x))

    def with_residual(x, y, gate, scale, shift=None, weight=None, eps=1e-6, bias=None):
        shift = zero(scale.device, scale.dtype) if shift is None else shift
        if bias is not None or y.dtype != x.dtype:
            y = branch(y, bias, x.dtype)
        normed, x = fused_scale_residual_norm_scale_shift(x, y, gate, weight, None, scale, shift, "rms", eps)
        return x, normed.to(result_dtype(x))

    return with_residual if gated else plain


def _apex_norm(gated):
    from apex.normalization.fused_layer_norm import fused_rms_norm_affine

    return _norm_with(lambda x, weight, eps: fused_rms_norm_affine(x, weight, x.shape[-1:], eps), gated)


# Peers of rope_attention: compiled RoPE and QK-norm, then their attention on q, k, v of (B, N, H, Dh).


def _rotate(qkv, positions, freqs, q_weight, k_weight, bias, eps):
    q, k, v = (qkv.float() if bias is None else qkv.float() + bias).unbind(2)
    if q_weight is not None:
        q, k = head_norm_ref(q, q_weight, None, eps, False), head_norm_ref(k, k_weight, None, eps, False)
    return tuple(a.to(qkv.dtype) for a in (rope_ref(q, positions, freqs), rope_ref(k, positions, freqs), v))


_rotation = functools.cache(lambda: _compiled(_rotate))  # one compilation for all


def _attention_with(attend: Callable, pad: int = 0) -> Callable:
    """attend(q, k, v, scale) after the rotation. pad: zeros up to this head dimension, which change neither scores nor outputs."""
    rotate = _rotation()

    def function(qkv, positions, freqs, q_weight=None, k_weight=None, bias=None, eps=1e-6):
        head_dim = qkv.shape[-1]
        q, k, v = rotate(qkv, positions, freqs, q_weight, k_weight, bias, eps)
        if pad:
            q, k, v = (nnf.pad(x, (0, pad - head_dim)) for x in (q, k, v))
        out = attend(q, k, v, head_dim**-0.5)
        return (out[0] if isinstance(out, tuple) else out)[..., :head_dim].flatten(2)

    return function


def _sdpa(backend, pad=0):
    def attend(q, k, v, scale):
        with sdpa_kernel(backend):
            return nnf.scaled_dot_product_attention(*(a.transpose(1, 2) for a in (q, k, v)), scale=scale).transpose(1, 2)

    return _attention_with(attend, pad)


@contextlib.contextmanager
def flash_attention_impl(name: str):
    """PyTorch's flash attention is this implementation inside, in all of the process, and afterwards what it was before."""
    before = current_flash_attention_impl()
    try:
        activate_flash_attention_impl(name)
        assert current_flash_attention_impl() == name, f"activated {name}, got {current_flash_attention_impl()}"
        yield
    finally:
        if current_flash_attention_impl() is not None:
            restore_flash_attention_impl()
        if before is not None:
            activate_flash_attention_impl(before)


class Fa4Attention(torch.autograd.Function):
    """PyTorch's flash attention operators with FA4 behind them, on q, k, v of (B, H, N, Dh).

    A separate function, since autograd calls the backward when the forward's switch is long undone: FA2's would take FA4's logsumexp.
    """

    @staticmethod
    def forward(ctx, q, k, v, scale):
        with flash_attention_impl("FA4"):
            out, logsumexp, starts_q, starts_k, most_q, most_k, seed, offset, _ = torch.ops.aten._scaled_dot_product_flash_attention(
                q, k, v, 0.0, False, False, scale=scale)
        ctx.save_for_backward(q, k, v, out, logsumexp, starts_q, starts_k, seed, offset)
        ctx.sizes, ctx.scale = (most_q, most_k), scale
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, seed, offset = ctx.saved_tensors
        with flash_attention_impl("FA4"):
            gradients = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad, *tensors, *ctx.sizes, 0.0, False, seed, offset, scale=ctx.scale)
        return *gradients, None


def _sdpa_fa4(pad=0):
    return _attention_with(
        lambda q, k, v, scale: Fa4Attention.apply(*(a.transpose(1, 2) for a in (q, k, v)), scale).transpose(1, 2), pad)


def _function(module, name, pad=0):
    attention, scale_name = getattr(importlib.import_module(module), name), "scale" if module.startswith("xformers") else "softmax_scale"
    return _attention_with(lambda q, k, v, scale: attention(q, k, v, **{scale_name: scale}), pad)


def _padded(provider: Provider, build: Callable, to: int) -> Provider:
    return replace(provider, name=f"{provider.name}, padded to {to}", build=functools.partial(build, pad=to), pad=to)


# Peers of swiglu and group_norm_silu.


def _liger_swiglu():
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def function(packed, bias=None):
        return LigerSiLUMulFunction.apply(*_biased(packed, bias).chunk(2, dim=-1))

    return function


def _apex_group_norm():
    from apex.contrib.group_norm import GroupNorm

    def function(x, weight, bias, num_groups, eps=1e-6):
        module = GroupNorm(num_groups, x.shape[1], eps=eps, act="silu").to(x.device, x.dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        return torch.func.functional_call(module, dict(weight=weight.to(x.dtype), bias=bias.to(x.dtype)), (x,))

    return function


def _peers(op: str) -> list[Provider]:
    cuda, half = dict(devices=("cuda",)), dict(devices=("cuda",), half_only=("cuda",))
    match op:
        case "rms_norm_modulate" | "gated_residual_rms_norm_modulate":
            gated = op.startswith("gated")
            return [
                Provider("quack", functools.partial(_quack_norm, gated), "quack", "quack-kernels", **cuda),
                Provider("liger", functools.partial(_liger_norm, gated), "liger_kernel", "liger-kernel", proof="Liger", **cuda),
                # From 0.8.3 on its backward is one kernel for dx and dw, and one for dw's sum (linkedin/Liger-Kernel#1349, #1395).
                Provider("liger cutedsl", functools.partial(_liger_cutedsl_norm, gated), "liger_kernel", "liger-kernel", "0.8.3",
                         (("cutlass", "nvidia-cutlass-dsl", "4.6.0"),), proof="Liger", **cuda),
                # Its module's place in 0.5.21 and 0.5.23; it was another one in 0.5.18, and another in 0.5.9 to 0.5.15.
                Provider("sglang", functools.partial(_sglang_norm, gated), "sglang", "sglang", "0.5.21",
                         (("cutlass", "nvidia-cutlass-dsl", ""),), proof="sglang::", width_of=256, forward_only=True, **cuda),
                Provider("apex", functools.partial(_apex_norm, gated), "apex", "apex", **cuda),
            ]
        case "rope_attention":
            fa2, fa3, fa4 = "flash_attn.flash_attn_interface", "flash_attn_interface", "flash_attn.cute"
            names = {fa2: "flash_attn_func", fa3: "flash_attn_func", fa4: "flash_attn_func", "xformers.ops": "memory_efficient_attention"}
            build = {module: functools.partial(_function, module, name) for module, name in names.items()}
            own = ("triton", "sdpa", "flash_attn", "xformers")
            ours = {name: functools.partial(functools.partial, OPS[op], backend=name) for name in own}
            fused = [
                Provider("sdpa cudnn", functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION), proof="product_cudnn_attention", **half,
                         fails_once=True, cudnn="9.19"),
                # PyTorch 2.11 unpacks two results of FA4's forward, which returns five; 2.15 takes the first two.
                Provider("sdpa FA4", _sdpa_fa4, "flash_attn.cute", "flash-attn-4", "4.0.0b36", (("torch", "torch", "2.15"),),
                         proof="Fa4Attention", **half),
                Provider("flash-attn 2", build[fa2], fa2, "flash-attn", **half),
                Provider("flash-attn 3", build[fa3], fa3, "flash-attn-3", **half),
                Provider("flash-attn 4", build[fa4], fa4, "flash-attn-4", **half),
            ]
            return [
                Provider("ours triton", ours["triton"], "triton", "triton", devices=("cuda",)),
                Provider("ours sdpa", ours["sdpa"], proof="scaled_dot_product", devices=("cuda",)),
                Provider("ours flash_attn", ours["flash_attn"], "flash_attn", "flash-attn", proof="flash", **half),
                Provider("ours xformers", ours["xformers"], "xformers.ops", "xformers", **half),
                Provider("sdpa math", functools.partial(_sdpa, SDPBackend.MATH), proof="product_attention_math"),
                Provider("sdpa flash", functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION), proof="product_flash_attention",
                         half_only=("cuda",)),
                Provider("sdpa efficient", functools.partial(_sdpa, SDPBackend.EFFICIENT_ATTENTION), proof="efficient_attention", **cuda),
                *fused,
                *(_padded(provider, provider.build, to) for provider in fused for to in (80, 96)),
                Provider("xformers", build["xformers.ops"], "xformers.ops", "xformers", **half),
            ]
        case "swiglu":
            return [Provider("liger", _liger_swiglu, "liger_kernel", "liger-kernel", proof="Liger", **cuda)]
        case "group_norm_silu":
            return [Provider("apex", _apex_group_norm, "apex", "apex", **half)]
    return []


def providers(op: str) -> list[Provider]:
    """Everybody for this op. "compiled" is torch.compile of the op's definition; "ours" is the public function."""
    if op not in OPS:
        raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")
    return [
        Provider("eager", lambda: EAGER[op]),
        Provider("compiled", lambda: _compiled(DEFINITIONS[op])),
        Provider("ours", lambda: OPS[op]),
        *_peers(op),
    ]


def serving(op: str, device: str) -> str:
    """Which backend of ours serves the op on a device type: "native", "triton" or "reference"."""
    return backends()[op][device]
