"""The tokenizer in use: pixels <-> raw latents <-> normalised latents, three spaces that method names keep apart.

    pixels (B, C, H, W) in [-1, 1]
        encode -> Posterior over raw latents;  its sample() or mode() are raw latents (B, z, h, w)
    normalise: normalised = (raw - mean) / std, per channel;  denormalise undoes it
    decode takes NORMALISED latents, which is what a diffusion model makes

Mean and standard deviation lie in the file beside the weights: they are never guessed.
"""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightningdit.checkpoint import save_weights
from lightningdit.images import MODES
from lightningdit.tokenizer.autoencoder import AutoencoderKL

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = {"digits": ASSETS / "digits_tokenizer.safetensors"}


class Tokenizer(nn.Module):
    """A trained autoencoder with the statistics of its latents; frozen, in eval mode.

    Args:
        autoencoder: AutoencoderKL.
        latent_mean, latent_std: (z,) of raw latents over a data set, std unbiased and positive (see latent_statistics).
        provenance: what made it, as JSON-able values; stored in the file, not part of the hash.
    Attributes: downsample (pixels a latent position, each way), latent_channels, image_channels, image_mode ("L" or "RGB"), sha256.
    Raises: ValueError for statistics that do not fit.
    """

    def __init__(self, autoencoder, latent_mean, latent_std, provenance=None):
        super().__init__()
        self.autoencoder = autoencoder
        self.latent_channels = autoencoder.config["embed_dim"]
        self.image_channels = autoencoder.config["in_channels"]
        self.downsample = autoencoder.downsample
        self.provenance = dict(provenance or {})
        if self.image_channels not in MODES:
            raise ValueError(f"autoencoder: got {self.image_channels} image channels, expected 1 (grayscale) or 3 (RGB)")
        self.image_mode = MODES[self.image_channels]
        for name, values in (("latent_mean", latent_mean), ("latent_std", latent_std)):
            values = torch.as_tensor(values, dtype=torch.float32)
            if values.shape != (self.latent_channels,) or not values.isfinite().all():
                raise ValueError(f"{name}: got {values.tolist()}, expected {self.latent_channels} finite values")
            self.register_buffer(name, values.view(-1, 1, 1))
        if not (self.latent_std > 0).all():
            raise ValueError(f"latent_std: got {self.latent_std.flatten().tolist()}, expected positive values")
        self.requires_grad_(False).eval()

    def encode(self, pixels):
        """pixels (B, C, H, W) in [-1, 1], H and W multiples of `downsample` -> Posterior over raw latents (B, z, h, w)."""
        return self.autoencoder.encode(pixels)

    def normalise(self, raw):
        """Raw latents (B, z, h, w) to normalised ones: mean 0 and standard deviation 1 per channel over the data."""
        return ((raw - self.latent_mean) / self.latent_std).to(raw.dtype)

    def denormalise(self, normalised):
        """The inverse of normalise."""
        return (normalised * self.latent_std + self.latent_mean).to(normalised.dtype)

    def decode(self, normalised):
        """Normalised latents (B, z, h, w) -> pixels (B, C, downsample * h, downsample * w), about [-1, 1], not clamped."""
        return self.autoencoder.decode(self.denormalise(normalised))

    def decode_uint8(self, normalised):
        """Normalised latents (B, z, h, w) -> uint8 images (B, H, W, C): clamp(127.5 x + 128, 0, 255), truncated, as the official code."""
        return (127.5 * self.decode(normalised).float() + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    @property
    def sha256(self):
        """Hash of weights and statistics, for provenance: latents of one tokenizer must not meet another's statistics."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def save(self, path):
        """Writes a .safetensors file with the official weight names; configuration and statistics are in its metadata. Atomic."""
        save_weights(path, self.autoencoder.state_dict(), metadata=header(
            "tokenizer", config=self.autoencoder.config, image_mode=self.image_mode, latent_mean=self.latent_mean.flatten().tolist(),
            latent_std=self.latent_std.flatten().tolist(), provenance=self.provenance))

    @classmethod
    def load(cls, name_or_path, device="cpu"):
        """The tokenizer bundled under that name ("digits") or in that .safetensors file.

        Raises: FileNotFoundError; ValueError for a file that is damaged, of another kind, or without statistics.
        """
        path = BUNDLED.get(str(name_or_path), Path(name_or_path))
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: no file {path}; expected a .safetensors file or one of the bundled: {', '.join(BUNDLED)}")
        weights, about = read_weights(path, "tokenizer")
        if "latent_mean" not in about or "latent_std" not in about:
            raise ValueError(f"{path}: no latent statistics (latent_mean, latent_std), without which latents cannot be normalised. Take "
                             "them with latent_statistics(raw latents of your data) and save Tokenizer(autoencoder, mean, std), as "
                             "train/vavae.py does")
        try:
            autoencoder = AutoencoderKL(**about["config"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: its metadata describes no autoencoder: {error}") from None
        load_state(autoencoder, weights, path)
        return cls(autoencoder, about["latent_mean"], about["latent_std"], about.get("provenance")).to(device)


def latent_statistics(raw):
    """Per-channel mean and unbiased standard deviation of raw latents (B, z, h, w), samples of the posteriors: two tensors (z,)."""
    if raw.ndim != 4 or raw.shape[0] * raw.shape[2] * raw.shape[3] < 2:
        raise ValueError(f"raw: got shape {tuple(raw.shape)}, expected (B, z, h, w) with at least two values a channel")
    raw = raw.double()
    return raw.mean((0, 2, 3)).float(), raw.std((0, 2, 3)).float()


def header(kind, **about):
    """Metadata for a weights file. One key only: several would be written in random order, and equal weights would give unequal bytes."""
    return {"lightningdit": json.dumps(dict(kind=kind, **about), sort_keys=True)}


def read_weights(path, kind):
    """Reads a .safetensors file with such a header: (tensors by name, what was stored about them)."""
    try:
        with safe_open(path, "pt") as file:
            about = json.loads((file.metadata() or {}).get("lightningdit", "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{path}: not a whole .safetensors file: {error}") from None
    if not isinstance(about, dict) or about.get("kind") != kind:
        got = f"kind {about.get('kind')!r}" if isinstance(about, dict) else "no 'lightningdit' metadata"
        raise ValueError(f"{path}: got {got}, expected a {kind} file written by this library")
    return tensors, about


def load_state(module, tensors, path):
    """module.load_state_dict, strict, with an error that lists what is missing, unexpected or of another shape."""
    own = module.state_dict()
    problems = {
        "missing": sorted(own.keys() - tensors.keys()),
        "unexpected": sorted(tensors.keys() - own.keys()),
        "misshaped": [f"{name} {tuple(tensors[name].shape)} instead of {tuple(own[name].shape)}"
                      for name in own if name in tensors and tensors[name].shape != own[name].shape],
    }
    if any(problems.values()):
        raise ValueError(f"{path}: " + "; ".join(f"{what}: {', '.join(names)}" for what, names in problems.items() if names))
    module.load_state_dict(tensors)
