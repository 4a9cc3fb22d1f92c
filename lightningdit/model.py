"""LightningDiT: a diffusion transformer on a square grid of latents, whole in this file.

Flags and parameter names are the official ones (arXiv:2501.01423), so official YAML flags and checkpoints map one to one. With every
flag off it is the plain DiT / SiT (arXiv:2212.09748, arXiv:2401.08740), the paper's baseline.

B batch, N tokens, D hidden size, H heads, Dh head dim, F MLP width, C latent channels, P patch size, S latent positions a side.
"""
import dataclasses
import functools
import math
import re
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from lightningdit_kernels import gated_residual_rms_norm_modulate, rms_norm_modulate, rope_attention, swiglu
from lightningdit_kernels.library import result_dtype
from lightningdit_kernels.linear import linear

# Depth, hidden size, heads. Sources: DiT for S, B, L and XL, the official code for 1p0B and 1p6B.
SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
    "1p0B": (24, 1536, 24),
    "1p6B": (28, 1792, 28),
}
PRESETS = {
    f"{size}/{patch_size}": dict(depth=depth, hidden_size=hidden_size, num_heads=num_heads, patch_size=patch_size)
    for size, (depth, hidden_size, num_heads) in SIZES.items() for patch_size in (1, 2)
}


# Checkpointing "selective" keeps what these compute, matrix products and attention, and recomputes the rest: norms with modulation and
# SwiGLU, 10 FLOP or so a value. "full" keeps what goes into a block.
PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default, torch.ops.aten._scaled_mm.default,
            torch.ops.lightningdit.onednn_linear.default}
# Attention is an operator of many names: ours, PyTorch's for flash, memory-efficient and cuDNN's attention, one for CPUs and one for each
# new device, flash_attn::_flash_attn_forward, xformers_flash::flash_fwd, xformers::efficient_attention_forward_cutlass.
ATTENTION, BACKWARD = re.compile("attention|attn|flash"), re.compile("backward|bwd")
CHECKPOINTING = ("none", "selective", "full")


@functools.cache
def is_attention(op):
    """Whether an operator computes attention: its forward pass, whose outputs are the result and what its backward pass needs."""
    name = op.name()
    return ATTENTION.search(name) is not None and BACKWARD.search(name) is None


def _keep_products(context, op, *arguments, **options):
    return CheckpointPolicy.MUST_SAVE if op in PRODUCTS or is_attention(op) else CheckpointPolicy.PREFER_RECOMPUTE


class Branch(NamedTuple):
    """The output of attention or MLP that is still to be added to the residual stream: gate * (y + bias)."""

    y: torch.Tensor  # (B, N, D)
    bias: torch.Tensor | None  # (D,)
    gate: torch.Tensor | None = None  # (B, D)


def without_bias(layer, x):
    """(layer(x) without its bias, the bias), for the op that follows: it adds the bias, and sums its gradient on the way.

    A layer that was replaced (LoRA, float8) or is watched by hooks is called as it is, and keeps its bias. One with `split_k` > 1 may have
    its weight's gradient summed from that many parts.
    """
    hooks = layer._forward_hooks or layer._forward_pre_hooks or layer._backward_hooks or layer._backward_pre_hooks
    if type(layer) in (Linear, nn.Linear) and not hooks:
        parts = gradient_parts(x.shape[:-1].numel(), layer.weight.shape, getattr(layer, "split_k", 1)) if torch.is_grad_enabled() else 1
        product = linear(x, layer.weight) if parts == 1 else SplitLinear.apply(x.to(result_dtype(x)), layer.weight, parts)
        return product, layer.bias
    return layer(x), None


def gradient_parts(rows, shape, most):
    """In how many equal parts of its rows a weight's gradient of this shape is computed, a power of two up to `most`.

    A GPU of 132 multiprocessors that each take a tile of 128 x 128 needs ceil(parts * tiles / 132) / parts rounds of a whole product's
    time. This is the smallest number within 5 % of the best: 4 of XL's (1152, 1152) with 81 tiles, 1 of (3456, 1152) with 243.
    """
    tiles = math.ceil(shape[0] / 128) * math.ceil(shape[1] / 128)
    rounds = {1: float(math.ceil(tiles / 132))}
    parts = 2
    while parts <= most and rows and rows % parts == 0:
        rounds[parts] = math.ceil(parts * tiles / 132) / parts
        parts *= 2
    return next(parts for parts, time in rounds.items() if time <= 1.05 * min(rounds.values()))


class SplitLinear(torch.autograd.Function):
    """x (..., I) times weight (O, I) transposed; the gradient to the weight is the sum of `parts` products, each over its part of the rows.

    The product's dtype is x's. The parts are added in fp32 and in a fixed order, and the gradient of an fp32 weight under autocast is not
    rounded to bf16 on its way (on CUDA; elsewhere each part is).
    """

    @staticmethod
    def forward(ctx, x, weight, parts):
        ctx.parts, ctx.dtype = parts, weight.dtype
        weight = weight.to(x.dtype)
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        rows = (tensor.reshape(ctx.parts, -1, tensor.shape[-1]) for tensor in (grad, x))
        return grad @ weight, sum_of_products(*rows).to(ctx.dtype), None


def sum_of_products(a, b):
    """(K, M, O), (K, M, I) -> (O, I): the sum over K of a^T b, in fp32 (fp64 for fp64)."""
    if a.is_cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.bmm(a.mT, b, out_dtype=torch.float32).sum(0)
    return torch.bmm(a.mT, b).sum(0, dtype=torch.promote_types(a.dtype, torch.float32))


# The linear layers of a block that see every token. Those of adaLN see one row an image.
TOKEN_LAYERS = ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3", "mlp.fc1", "mlp.fc2")


def to_float8(model, emulate=False):
    """Replaces the linear layers of attention and MLP in a model's blocks by torchao's float8 ones, in place; each keeps its parameters.

    Activations and weights are rounded to e4m3, gradients to e5m2, with one scale a tensor taken from its largest value each time. What
    lies outside the blocks, and adaLN, stay as they are.

    Args: emulate: round so, but multiply in the dtype of the input, on any device; for tests, and for losses without such a GPU.
    Raises: ImportError without torchao; ValueError for a width that is no multiple of 16.
    Source: FP8 formats, arXiv:2209.05433; torchao.float8, recipe "tensorwise".
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ImportError as error:
        raise ImportError(f"precision = fp8 needs `pip install torchao`: {error}") from error
    layers = {f"{i}.{name}": layer for i, block in enumerate(model.blocks) for name, layer in block.named_modules() if name in TOKEN_LAYERS}
    for name, layer in layers.items():
        if layer.in_features % 16 or layer.out_features % 16:
            raise ValueError(f"blocks.{name}: got {layer.in_features} inputs and {layer.out_features} outputs, expected multiples of 16 "
                             "for precision = fp8")
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("tensorwise"), emulate=emulate)
    convert_to_float8_training(model.blocks, config=config, module_filter_fn=lambda layer, name: name in layers)


def add_and_norm(norm, x, branch, scale, shift):
    """The residual stream (B, N, D) with the branch added, if there is one, and its modulated norm (B, N, D), in one fused op."""
    rest = dict(weight=norm.weight, eps=norm.eps, center=norm.center)
    if branch is None:
        return x, rms_norm_modulate(x, scale, shift, **rest)
    return gated_residual_rms_norm_modulate(x, branch.y, branch.gate, scale, shift, bias=branch.bias, **rest)


class Linear(nn.Linear):
    """nn.Linear whose fp32 products on a CPU are computed by the library that is faster there."""

    def forward(self, x):
        return linear(x, self.weight, self.bias)


class RMSNorm(nn.Module):
    """Holds the learnable weight (D,) and eps of an RMS norm; the norm itself is computed inside the fused ops."""

    center = False

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.bias, self.eps = nn.Parameter(torch.ones(dim)), None, eps


class LayerNorm(nn.LayerNorm):
    """LayerNorm that is computed inside the fused ops: RMS norm of the centered row."""

    center = True


class PatchEmbed(nn.Module):
    """(B, C, S, S) latents -> (B, N, D) tokens, N = (S / P)^2, row by row."""

    def __init__(self, patch_size, in_channels, hidden_size):
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_channels, hidden_size, kernel_size=patch_size, stride=patch_size)

    def forward(self, x):
        B, C, S, _ = x.shape
        P, n = self.patch_size, S // self.patch_size
        patches = x.reshape(B, C, n, P, n, P).permute(0, 2, 4, 1, 3, 5).reshape(B, n * n, C * P * P)
        return linear(patches, self.proj.weight.flatten(1), self.proj.bias)  # the convolution as one matrix product


class TimestepEmbedder(nn.Module):
    """(B,) times in [0, 1], not multiplied by 1000 -> (B, D), through 256 features [cos | sin]."""

    def __init__(self, hidden_size, num_features=256, max_period=10_000):
        super().__init__()
        self.mlp = nn.Sequential(Linear(num_features, hidden_size), nn.SiLU(), Linear(hidden_size, hidden_size))
        self.num_features, self.max_period = num_features, max_period

    def forward(self, t):
        half = self.num_features // 2
        freqs = torch.exp(-math.log(self.max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
        angles = t[:, None].float() * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class LabelEmbedder(nn.Module):
    """(B,) class labels -> (B, D). With dropout_prob > 0 the table has one more row, the null label num_classes."""

    def __init__(self, num_classes, hidden_size, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), hidden_size)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def forward(self, y, drop_labels=None):
        if drop_labels is None and self.training and self.dropout_prob > 0:
            drop_labels = torch.rand(y.shape, device=y.device) < self.dropout_prob
        if drop_labels is not None:
            y = torch.where(drop_labels, self.num_classes, y)
        return self.embedding_table(y)


class RotaryEmbedding(nn.Module):
    """2-D RoPE (arXiv:2104.09864) of a grid: the first half of a head's channels turns with the row, the second with the column.

    The attention op computes its angles from `positions` and `freqs`. The full tables are kept only because they are
    in every official checkpoint.
    """

    def __init__(self, head_dim, grid_size, theta=10_000):
        super().__init__()
        half = head_dim // 2
        freqs = theta ** -(torch.arange(0, half, 2, dtype=torch.float32) / half)  # (Dh / 4,)
        index = torch.arange(grid_size, dtype=torch.float32)
        positions = torch.cartesian_prod(index, index)  # (N, 2): row, column
        angles = (positions[:, :, None] * freqs).flatten(1).repeat_interleave(2, dim=1)  # (N, Dh)
        self.register_buffer("freqs", freqs, persistent=False)
        self.register_buffer("positions", positions, persistent=False)
        self.register_buffer("freqs_cos", angles.cos())
        self.register_buffer("freqs_sin", angles.sin())


class Attention(nn.Module):
    """(B, N, D) -> (y (B, N, D), the bias that is still to be added to it)."""

    def __init__(self, hidden_size, num_heads, use_qknorm, use_rmsnorm):
        super().__init__()
        head_dim = hidden_size // num_heads
        self.num_heads, self.use_qknorm = num_heads, use_qknorm
        self.qkv = Linear(hidden_size, 3 * hidden_size)
        norm = RMSNorm if use_rmsnorm else LayerNorm  # LayerNorm's default eps of 1e-5 is the official value here
        self.q_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.k_norm = norm(head_dim) if use_qknorm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x, rope=None):
        B, N, D = x.shape
        heads = 3, self.num_heads, D // self.num_heads
        qkv, bias = without_bias(self.qkv, x)
        qk_norm = {}
        if self.use_qknorm:
            qk_norm = dict(q_weight=self.q_norm.weight, k_weight=self.k_norm.weight, q_bias=self.q_norm.bias, k_bias=self.k_norm.bias,
                           eps=self.q_norm.eps, center=self.q_norm.center)
        if rope is not None:
            qk_norm.update(positions=rope.positions, freqs=rope.freqs)
        out = rope_attention(qkv.view(B, N, *heads), bias=None if bias is None else bias.view(heads), **qk_norm)
        return without_bias(self.proj, out)


class SwiGLU(nn.Module):
    """w3(silu(gate) * up), [gate | up] from one packed linear layer (arXiv:2002.05202), and the bias that is still to be added."""

    def __init__(self, hidden_size, width):
        super().__init__()
        self.w12 = Linear(hidden_size, 2 * width)
        self.w3 = Linear(width, hidden_size)

    def forward(self, x):
        return without_bias(self.w3, swiglu(*without_bias(self.w12, x)))


class Mlp(nn.Module):
    """The plain DiT's MLP, GELU with the tanh approximation, and the bias that is still to be added."""

    def __init__(self, hidden_size, width):
        super().__init__()
        self.fc1 = Linear(hidden_size, width)
        self.fc2 = Linear(width, hidden_size)

    def forward(self, x):
        return without_bias(self.fc2, F.gelu(self.fc1(x), approximate="tanh"))


class LightningDiTBlock(nn.Module):
    """One transformer block: x += gate * attn(modulate(norm1(x))), then x += gate * mlp(modulate(norm2(x))).

    The block takes the residual stream x (B, N, D) with the branch that is still to be added to it (None before the first block), and
    returns the same two: the sum then fuses with the norm that follows it, across the block boundary too.
    """

    def __init__(self, hidden_size, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift, checkpointing="none"):
        super().__init__()
        norm = RMSNorm if use_rmsnorm else lambda dim: LayerNorm(dim, elementwise_affine=False, eps=1e-6)
        self.norm1, self.norm2 = norm(hidden_size), norm(hidden_size)
        self.attn = Attention(hidden_size, num_heads, use_qknorm, use_rmsnorm)
        width = int(hidden_size * mlp_ratio)
        self.mlp = SwiGLU(hidden_size, int(2 / 3 * width)) if use_swiglu else Mlp(hidden_size, width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, (4 if wo_shift else 6) * hidden_size))
        self.wo_shift, self.checkpointing = wo_shift, checkpointing

    def forward(self, x, branch, c, rope=None, modulation=None):
        # Inside the block, and so inside what is compiled and what FSDP2 gathers weights for.
        if self.checkpointing == "none" or not (self.training and torch.is_grad_enabled()):
            return self._forward(x, branch, c, rope, modulation)
        contexts = {}
        if self.checkpointing == "selective":
            contexts = dict(context_fn=functools.partial(create_selective_checkpoint_contexts, _keep_products))
        return checkpoint(self._forward, x, branch, c, rope, modulation, use_reentrant=False, preserve_rng_state=False, **contexts)

    def _forward(self, x, branch, c, rope, modulation):
        modulation = self.adaLN_modulation(c) if modulation is None else modulation
        if self.wo_shift:
            scale1, gate1, scale2, gate2 = modulation.chunk(4, dim=1)  # (B, D) each
            shift1 = shift2 = None
        else:
            shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, dim=1)
        x, h = add_and_norm(self.norm1, x, branch, scale1, shift1)
        x, h = add_and_norm(self.norm2, x, Branch(*self.attn(h, rope), gate1), scale2, shift2)
        y, bias = self.mlp(h)
        # A copy: FSDP2 frees the parameters of a block when it returns, and the next block still reads this one.
        return x, Branch(y, None if bias is None else bias.clone(), gate2)


class FinalLayer(nn.Module):
    """Adds the last branch, norm and modulation (always with a shift), linear to P * P * C values a token."""

    def __init__(self, hidden_size, patch_size, out_channels, use_rmsnorm):
        super().__init__()
        self.norm_final = RMSNorm(hidden_size) if use_rmsnorm else LayerNorm(hidden_size, elementwise_affine=False, eps=1e-6)
        self.linear = Linear(hidden_size, patch_size * patch_size * out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), Linear(hidden_size, 2 * hidden_size))

    def forward(self, x, branch, c, modulation=None):
        shift, scale = (self.adaLN_modulation(c) if modulation is None else modulation).chunk(2, dim=1)
        _, h = add_and_norm(self.norm_final, x, branch, scale, shift)
        return self.linear(h)


class LightningDiT(nn.Module):
    """Predicts the velocity (or noise, or score) of noisy latents.

    Args:
        input_size: latent positions a side, S. patch_size: P, a divisor of S. in_channels: latent channels, C.
        hidden_size, depth, num_heads, mlp_ratio: the transformer's shape; PRESETS names the usual ones.
        num_classes: labels 0 .. num_classes - 1; num_classes itself is the null label where class_dropout_prob > 0.
        class_dropout_prob: probability of replacing a label by the null label in training.
        learn_sigma: the network emits 2C channels, of which the second half is dropped (kept for old checkpoints).
        use_qknorm, use_swiglu, use_rope, use_rmsnorm, wo_shift: the paper's architecture flags; wo_shift drops the shift in blocks only.
        use_checkpoint: keep fewer activations of each block and recompute the others in the backward pass.
        checkpoint_policy: which to keep then; "full": only what goes into the block, "selective": also matrix products and attention.
        bf16_residual: keep the residual stream in the autocast dtype, not in fp32. Nothing changes without autocast.
        batch_adaln: compute the modulations of all blocks in one matrix product. Not for sharded parameters.
        split_k: most parts in which the gradients of the blocks' weights are computed, see gradient_parts; 1: none.
    Raises: ValueError for a shape that does not divide, or an unknown policy.
    Source: arXiv:2501.01423, Table 2 for the flags.
    """

    def __init__(self, input_size=16, patch_size=1, in_channels=32, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,
                 num_classes=1000, class_dropout_prob=0.1, learn_sigma=False, use_qknorm=False, use_swiglu=False, use_rope=False,
                 use_rmsnorm=False, wo_shift=False, use_checkpoint=False, checkpoint_policy="full",
                 bf16_residual=False, batch_adaln=False, split_k=1):
        super().__init__()
        if input_size % patch_size:
            raise ValueError(f"input_size: got {input_size}, expected a multiple of patch_size = {patch_size}")
        if hidden_size % num_heads or hidden_size % 4:
            raise ValueError(f"hidden_size: got {hidden_size}, expected a multiple of num_heads = {num_heads} and of 4")
        head_dim, grid_size = hidden_size // num_heads, input_size // patch_size
        if use_rope and head_dim % 4:
            raise ValueError(f"hidden_size / num_heads: got {head_dim}, expected a multiple of 4 with use_rope")
        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        if checkpoint_policy not in CHECKPOINTING[1:]:
            raise ValueError(f"checkpoint_policy: got {checkpoint_policy!r}, expected one of {', '.join(CHECKPOINTING[1:])}")
        if split_k < 1:
            raise ValueError(f"split_k: got {split_k}, expected a positive number; 1 is none")
        self.num_classes, self.learn_sigma, self.bf16_residual, self.batch_adaln = num_classes, learn_sigma, bf16_residual, batch_adaln
        self.checkpointing = checkpoint_policy if use_checkpoint else "none"
        self.out_channels = 2 * in_channels if learn_sigma else in_channels
        self.x_embedder = PatchEmbed(patch_size, in_channels, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size, class_dropout_prob)
        self.pos_embed = nn.Parameter(sincos_pos_embed(hidden_size, grid_size), requires_grad=False)  # (1, N, D)
        self.feat_rope = RotaryEmbedding(head_dim, grid_size) if use_rope else None
        self.blocks = nn.ModuleList(
            LightningDiTBlock(hidden_size, num_heads, mlp_ratio, use_qknorm, use_swiglu, use_rmsnorm, wo_shift, self.checkpointing)
            for _ in range(depth))
        for block in self.blocks:
            for name, layer in block.named_modules():
                if name in TOKEN_LAYERS:
                    layer.split_k = split_k
        self.final_layer = FinalLayer(hidden_size, patch_size, self.out_channels, use_rmsnorm)
        self.initialize_weights()

    def initialize_weights(self):
        """Xavier for every linear layer (packed ones as one matrix), N(0, 0.02) for embeddings, zero for adaLN and the output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.view(self.x_embedder.proj.out_channels, -1))
        nn.init.zeros_(self.x_embedder.proj.bias)
        for weight in (self.y_embedder.embedding_table.weight, self.t_embedder.mlp[0].weight, self.t_embedder.mlp[2].weight):
            nn.init.normal_(weight, std=0.02)
        modulations = [module.adaLN_modulation[-1] for module in (*self.blocks, self.final_layer)]
        for layer in (*modulations, self.final_layer.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def modulations(self, t, y):
        """All adaLN modulations at times t (U,) for labels y (U,): (U, M), the blocks' one after another, then the final layer's."""
        c = self.t_embedder(t) + self.y_embedder(y)
        return torch.cat([layer.adaLN_modulation(c) for layer in (*self.blocks, self.final_layer)], dim=1)

    def block_modulations(self, c):
        """The adaLN modulations (B, 6D) of every block for c (B, D), by one matrix product with all weights, cast first and then joined."""
        layers = [block.adaLN_modulation[-1] for block in self.blocks]
        dtype = result_dtype(layers[0].weight)
        weight, bias = (torch.cat([getattr(layer, name).to(dtype) for layer in layers]) for name in ("weight", "bias"))
        return linear(F.silu(c), weight, bias).chunk(len(layers), dim=1)

    def forward(self, x, t, y, drop_labels=None, modulations=None):
        """
        Args:
            x: (B, C, S, S) noisy latents. t: (B,) times, 0 noise and 1 data. y: (B,) int64 labels.
            drop_labels: (B,) bool, True where the null label replaces y. None: drawn at random in training, nowhere in evaluation.
            modulations: (B, M), rows of `self.modulations(t, y)` computed before, in the place of t and y; for sampling.
        Returns: (B, C, S, S) prediction.
        """
        B, S, P = x.shape[0], self.input_size, self.patch_size
        if tuple(x.shape[1:]) != (self.in_channels, S, S):
            raise ValueError(f"x: got shape {tuple(x.shape)}, expected (B, {self.in_channels}, {S}, {S})")
        if t.shape != (B,) or y.shape != (B,):
            raise ValueError(f"t, y: got shapes {tuple(t.shape)} and {tuple(y.shape)}, expected ({B},) each")
        # Under bf16 autocast the patches are bf16 and pos_embed is fp32, so the residual stream is fp32 from here to the final layer.
        x, branch = self.x_embedder(x) + self.pos_embed, None  # (B, N, D)
        if self.bf16_residual:
            x = x.to(result_dtype(x))
        c, given = None, [None] * (len(self.blocks) + 1)
        if modulations is None:
            c = self.t_embedder(t) + self.y_embedder(y, drop_labels)  # (B, D)
            if self.batch_adaln:
                given[:-1] = self.block_modulations(c)
        else:
            given = modulations.split([layer.adaLN_modulation[-1].out_features for layer in (*self.blocks, self.final_layer)], dim=1)
        for block, modulation in zip(self.blocks, given[:-1], strict=True):
            x, branch = block(x, branch, c, self.feat_rope, modulation)
        x = self.final_layer(x, branch, c, given[-1])  # (B, N, P * P * out_channels)
        n = S // P
        x = x.view(B, n, n, P, P, self.out_channels).permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_channels, S, S)
        return x[:, : self.in_channels]

    def load_weights(self, state):
        """Loads a state dict of the official layout, of this or of another resolution.

        `pos_embed` of another grid is interpolated (bicubic); the RoPE tables are rebuilt for this grid, never loaded.
        Raises: ValueError that lists every missing, unexpected and misshaped key; the model is then unchanged.
        """
        state, own = dict(state), self.state_dict()
        for key in [key for key in state if key.startswith("feat_rope.")]:
            if self.feat_rope is not None:
                state.pop(key)
        position = state.get("pos_embed")
        if position is not None and position.ndim == 3 and position.shape[1] != self.pos_embed.shape[1]:
            side, new_side = math.isqrt(position.shape[1]), math.isqrt(self.pos_embed.shape[1])
            if side * side == position.shape[1]:
                grid = position.float().view(1, side, side, -1).permute(0, 3, 1, 2)
                grid = F.interpolate(grid, size=(new_side, new_side), mode="bicubic", align_corners=False)
                state["pos_embed"] = grid.flatten(2).transpose(1, 2)
        expected = {key: value for key, value in own.items() if not key.startswith("feat_rope.")}
        problems = [f"missing {key} {tuple(value.shape)}" for key, value in expected.items() if key not in state]
        problems += [f"unexpected {key} {tuple(value.shape)}" for key, value in state.items() if key not in expected]
        problems += [f"misshaped {key}: got {tuple(state[key].shape)}, expected {tuple(value.shape)}"
                     for key, value in expected.items() if key in state and state[key].shape != value.shape]
        if problems:
            raise ValueError(f"state dict does not fit this model, {len(problems)} problems:\n  " + "\n  ".join(problems))
        self.load_state_dict(state, strict=False)


def sincos_pos_embed(dim, grid_size):
    """Fixed sin-cos embedding (1, N, dim): the first half encodes the column, the second the row, each as [sin | cos].

    Source: MAE, arXiv:2111.06377, App. A.
    """
    omega = 10_000 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = torch.arange(grid_size, dtype=torch.float64)[:, None] * omega  # (grid, dim / 4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (grid, dim / 2)
    column = axis[None].expand(grid_size, -1, -1)
    row = axis[:, None].expand(-1, grid_size, -1)
    return torch.cat([column, row], dim=-1).reshape(1, grid_size * grid_size, dim).float()


def forward_flops(model):
    """Floating-point operations of one image's forward pass: 2 a multiply-add, linear layers and attention, nothing else.

    A training step counts three times this (backward = twice forward, recomputation not counted).
    """
    N = model.pos_embed.shape[1]
    flops = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            a_row_per_image = "adaLN_modulation" in name or name.startswith("t_embedder")
            flops += 2 * module.in_features * module.out_features * (1 if a_row_per_image else N)
    flops += 2 * N * model.x_embedder.proj.weight.numel()
    flops += len(model.blocks) * 4 * N * N * model.pos_embed.shape[2]
    return flops
