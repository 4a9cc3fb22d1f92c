"""Frozen encoders whose features the latents are aligned with.

The interface is one method: features(pixels (B, C, H, W) in [-1, 1]) -> (B, N, F), without gradient, one token a latent position, row by
row; and one attribute, feature_channels = F.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit.checkpoint import save_weights
from lightningdit.tokenizer.vavae import ASSETS, header, load_state, read_weights
from lightningdit_kernels import group_norm_silu

BUNDLED = {"digits": ASSETS / "digits_encoder.safetensors"}


class SmallEncoder(nn.Module):
    """A small convolutional classifier, trained on the classes of the data set itself, that stands in for a foundation model.

    Features are the last feature map, on the tokenizer's latent grid, before it is pooled for the classifier.

    Args:
        in_channels: image channels. num_classes: of the classifier.
        downsample: pixels a feature position, each way; a power of two.
        width: channels of the first layer, doubled with each halving up to 8 times; a multiple of 8.
    """

    def __init__(self, in_channels, num_classes, downsample, width=24):
        super().__init__()
        if downsample < 1 or downsample & (downsample - 1):
            raise ValueError(f"downsample: got {downsample}, expected a power of two")
        if width < 8 or width % 8:
            raise ValueError(f"width: got {width}, expected a multiple of 8")
        self.config = dict(in_channels=in_channels, num_classes=num_classes, downsample=downsample, width=width)
        self.conv_in = nn.Conv2d(in_channels, width, 3, padding=1)
        halvings = downsample.bit_length() - 1
        widths = [width * min(2**i, 8) for i in range(halvings + 1)]
        layers = []
        for i in range(halvings):
            layers += [NormConv(widths[i], widths[i]), NormConv(widths[i], widths[i + 1], stride=2)]
        self.layers = nn.Sequential(*layers, NormConv(widths[-1], widths[-1]))
        self.norm = nn.GroupNorm(8, widths[-1])
        self.classifier = nn.Linear(widths[-1], num_classes)
        self.feature_channels = widths[-1]

    def feature_map(self, pixels):
        return self.norm(self.layers(self.conv_in(pixels)))  # (B, F, h, w)

    def forward(self, pixels):
        """pixels (B, C, H, W) in [-1, 1] -> logits (B, num_classes)."""
        return self.classifier(F.silu(self.feature_map(pixels)).mean((2, 3)))

    @torch.no_grad()
    def features(self, pixels):
        return self.feature_map(pixels).flatten(2).mT

    def save(self, path, provenance=None):
        save_weights(path, self.state_dict(), metadata=header("encoder", config=self.config, provenance=provenance or {}))

    @classmethod
    def load(cls, name_or_path, device="cpu"):
        """The bundled encoder "digits" or one in a .safetensors file, frozen. Raises: FileNotFoundError, ValueError."""
        path = BUNDLED.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise FileNotFoundError(f"encoder: no file {path}; expected a .safetensors file or one of the bundled: {', '.join(BUNDLED)}")
        weights, about = read_weights(path, "encoder")
        try:
            encoder = cls(**about["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its metadata describes no encoder: {error}") from None
        load_state(encoder, weights, path)
        return encoder.requires_grad_(False).eval().to(device)


class NormConv(nn.Module):
    def __init__(self, in_channels, out_channels, stride=1):
        super().__init__()
        self.norm = nn.GroupNorm(8, in_channels)
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1)

    def forward(self, x):
        return self.conv(group_norm_silu(x, self.norm.weight, self.norm.bias, self.norm.num_groups, self.norm.eps))
