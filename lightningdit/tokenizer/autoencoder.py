"""The KL autoencoder of latent diffusion (LDM): pixels to the moments of a Gaussian over latents, and latents back to pixels.

Module names, and with them the state dict, are the official ones (`encoder.down.0.block.1.conv2.weight`). The VA-VAE has this very
architecture; the MAR-VAE leaves the attention out of the decoder's upsampling levels.

B batch, C channels, H x W pixels, z latent channels. The factor between pixels and latents is 2 ** (len(ch_mult) - 1).
Source: LDM, arXiv:2112.10752; VA-VAE, arXiv:2501.01423; MAR, arXiv:2406.11838.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit_kernels import group_norm_silu


class Posterior:
    """Diagonal Gaussian over latents, from moments (B, 2z, h, w) = [mean | logvar] or from the two separately.

    Attributes: mean, logvar (clamped to [-30, 20]), std; each (B, z, h, w).
    """

    def __init__(self, mean, logvar):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    @classmethod
    def from_moments(cls, moments):
        return cls(*moments.chunk(2, dim=1))

    @property
    def std(self):
        return torch.exp(0.5 * self.logvar)

    def sample(self, generator=None):
        """mean + std * noise, noise from `generator` (on the mean's device) or from the global one."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=self.mean.dtype, device=self.mean.device)
        return self.mean + self.std * noise

    def mode(self):
        return self.mean

    def kl(self):
        """KL(posterior || N(0, 1)), summed over each image: (B,), nats, in fp32 or better."""
        mean, logvar = self._widened()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar).flatten(1).sum(1)

    def nll(self, x):
        """-log density at x (B, z, h, w), summed over each image: (B,), nats, in fp32 or better."""
        mean, logvar = self._widened()
        return 0.5 * (math.log(2 * math.pi) + logvar + (x - mean).square() / logvar.exp()).flatten(1).sum(1)

    def _widened(self):
        dtype = torch.promote_types(self.mean.dtype, torch.float32)  # sums over an image lose too much in bf16
        return self.mean.to(dtype), self.logvar.to(dtype)


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the 1x1 convolutions around the latent.

    Args:
        in_channels, out_channels: image channels.
        ch: width of the first level; ch_mult: factor on it, one number a level. Between levels the image is halved.
        num_res_blocks: residual blocks a level in the encoder; the decoder has one more.
        z_channels: channels of the encoder's output; embed_dim: channels of the latent (in every published model the same).
        attn_resolutions: levels at these sides, counted from `resolution`, have self-attention. They are chosen when the model is built,
            so an image of another size passes through the same modules.
        resolution: side in pixels from which the levels' sides are counted.
        decoder_attention: False leaves attention out of the decoder's levels (MAR); its middle keeps it.
        num_groups: groups of every GroupNorm; must divide every width.
        middle_attention: False leaves attention out of the middle of encoder and decoder.
        quant_conv: False leaves out the 1x1 convolutions around the latent (Stable Diffusion 3, FLUX); needs embed_dim = z_channels.
    Raises: ValueError, naming the argument, for settings that cannot be built.
    """

    def __init__(self, in_channels=3, out_channels=3, ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, z_channels=32, embed_dim=32,
                 attn_resolutions=(16,), resolution=256, decoder_attention=True, num_groups=32, middle_attention=True, quant_conv=True):
        super().__init__()
        sizes = dict(in_channels=in_channels, out_channels=out_channels, ch=ch, num_res_blocks=num_res_blocks, z_channels=z_channels,
                     embed_dim=embed_dim, resolution=resolution, num_groups=num_groups)
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, expected a positive integer")
        if not ch_mult or any(not isinstance(m, int) or m < 1 for m in ch_mult):
            raise ValueError(f"ch_mult: got {ch_mult!r}, expected at least one positive integer")
        for m in ch_mult:
            if ch * m % num_groups:
                raise ValueError(f"num_groups: got {num_groups}, expected a divisor of every width; ch * {m} is {ch * m}")
        self.downsample = 2 ** (len(ch_mult) - 1)
        if resolution % self.downsample:
            raise ValueError(f"resolution: got {resolution}, expected a multiple of {self.downsample} (ch_mult has {len(ch_mult)} levels)")
        if not quant_conv and embed_dim != z_channels:
            raise ValueError(f"embed_dim: got {embed_dim}, expected z_channels, {z_channels}, where there is no quant_conv")
        self.config = dict(sizes, ch_mult=list(ch_mult), attn_resolutions=list(attn_resolutions), decoder_attention=decoder_attention,
                           middle_attention=middle_attention, quant_conv=quant_conv)
        levels = dict(ch=ch, ch_mult=tuple(ch_mult), num_res_blocks=num_res_blocks, resolution=resolution, num_groups=num_groups,
                      middle_attention=middle_attention)
        self.encoder = Encoder(in_channels, 2 * z_channels, attn_resolutions=attn_resolutions, **levels)
        self.decoder = Decoder(z_channels, out_channels, attn_resolutions=attn_resolutions if decoder_attention else (), **levels)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * embed_dim, 1) if quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(embed_dim, z_channels, 1) if quant_conv else nn.Identity()

    def encode(self, x):
        """x (B, in_channels, H, W) in [-1, 1], H and W multiples of f = `downsample` -> Posterior over (B, embed_dim, H / f, W / f)."""
        height, width = _image_size("x", x, self.config["in_channels"])
        if height % self.downsample or width % self.downsample:
            raise ValueError(f"x: got {height}x{width} pixels, expected multiples of {self.downsample}")
        return Posterior.from_moments(self.quant_conv(self.encoder(x)))

    def decode(self, z):
        """z (B, embed_dim, h, w) -> pixels (B, out_channels, downsample * h, downsample * w), about [-1, 1], not clamped."""
        _image_size("z", z, self.config["embed_dim"])
        return self.decoder(self.post_quant_conv(z))


class Encoder(nn.Module):
    def __init__(self, in_channels, out_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, num_groups,
                 middle_attention):
        super().__init__()
        self.conv_in = nn.Conv2d(in_channels, ch, 3, padding=1)
        self.down = nn.ModuleList()
        width = ch
        for i, m in enumerate(ch_mult):
            level = Level(width, ch * m, num_res_blocks, resolution >> i in attn_resolutions, num_groups)
            width = ch * m
            if i < len(ch_mult) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
        self.mid = Middle(width, num_groups, middle_attention)
        self.norm_out = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        return self.conv_out(_norm_silu(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    def __init__(self, in_channels, out_channels, ch, ch_mult, num_res_blocks, attn_resolutions, resolution, num_groups,
                 middle_attention):
        super().__init__()
        width = ch * ch_mult[-1]
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        self.mid = Middle(width, num_groups, middle_attention)
        levels = []
        for i in reversed(range(len(ch_mult))):
            level = Level(width, ch * ch_mult[i], num_res_blocks + 1, resolution >> i in attn_resolutions, num_groups)
            width = ch * ch_mult[i]
            if i > 0:
                level.upsample = Upsample(width)
            levels.append(level)
        self.up = nn.ModuleList(reversed(levels))  # up.0 is the finest level, as down.0 is
        self.norm_out = nn.GroupNorm(num_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, out_channels, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(_norm_silu(self.norm_out, h))


class Level(nn.Module):
    """Residual blocks at one resolution, each followed by attention where the level has it."""

    def __init__(self, in_channels, out_channels, num_blocks, attention, num_groups):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(in_channels if i == 0 else out_channels, out_channels, num_groups) for i in range(num_blocks))
        self.attn = nn.ModuleList(AttnBlock(out_channels, num_groups) for _ in range(num_blocks if attention else 0))

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            if self.attn:
                h = self.attn[i](h)
        return h


class Middle(nn.Module):
    def __init__(self, channels, num_groups, attention):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups) if attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, h):
        return self.block_2(self.attn_1(self.block_1(h)))


class ResnetBlock(nn.Module):
    def __init__(self, in_channels, out_channels, num_groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(num_groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(num_groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(_norm_silu(self.norm1, x))
        h = self.conv2(_norm_silu(self.norm2, h))
        return (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x) + h


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions."""

    def __init__(self, channels, num_groups):
        super().__init__()
        self.norm = nn.GroupNorm(num_groups, channels, eps=1e-6)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x):
        h = self.norm(x).contiguous(memory_format=torch.channels_last)  # pixels' channels side by side, as the products want them
        q, k, v = (conv(h).flatten(2).mT[:, None] for conv in (self.q, self.k, self.v))  # (B, 1, H W, C): the fused kernels want 4-D
        h = F.scaled_dot_product_attention(q, k, v)  # scale C ** -0.5
        return x + self.proj_out(h.mT.reshape(x.shape))


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # right and bottom only, as in the published weights


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def _norm_silu(norm, x):
    """silu(norm(x)) in one op; `norm` stays an nn.GroupNorm so that the state dict keeps its official names."""
    return group_norm_silu(x, norm.weight, norm.bias, norm.num_groups, norm.eps)


def _image_size(name, x, channels):
    if x.ndim != 4 or x.shape[1] != channels or not x.is_floating_point():
        raise ValueError(f"{name}: got {tuple(x.shape)} {x.dtype}, expected (B, {channels}, H, W), floating point")
    return x.shape[2:]
