"""The tokenizer in use: pixels <-> raw latents <-> normalised latents, three spaces that method names keep apart.

    pixels (B, C, H, W) in [-1, 1]
        encode -> Posterior over raw latents;  its sample() or mode() are raw latents (B, z, h, w)
    normalise: normalised = (raw - mean) / std, per channel;  denormalise undoes it
    decode takes NORMALISED latents, which is what a diffusion model makes

Mean and standard deviation lie in the file beside the weights: they are never guessed.
"""

import json
import numbers
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightningdit.checkpoint import save_weights, state_sha256
from lightningdit.images import MODES
from lightningdit.tokenizer import formats
from lightningdit.tokenizer.autoencoder import AutoencoderKL, Posterior

ASSETS = Path(__file__).resolve().parent.parent / "assets"
BUNDLED = {"digits": ASSETS / "digits_tokenizer.safetensors"}


def _preset(channels, ch_mult, **arguments):
    return dict(dict(z_channels=channels, embed_dim=channels, ch_mult=ch_mult), **arguments)


_F16 = (1, 1, 2, 2, 4)  # with attention at 16 x 16
_SMALL = dict(ch=32, num_res_blocks=1, resolution=64, num_groups=8)

# Arguments of AutoencoderKL by name: f pixels a latent position, d channels. The VA-VAE is LDM's own architecture, so f16d16 to f16d64
# serve for both; Stable Diffusion's is ldm-f8d4. The small ones are for images of 64 pixels or fewer and for a CPU.
PRESETS = {
    **{f"f16d{d}": _preset(d, _F16) for d in (16, 32, 64)},
    **{f"mar-f16d{d}": _preset(d, _F16, decoder_attention=False) for d in (16, 32, 64)},
    "ldm-f4d3": _preset(3, (1, 2, 4), attn_resolutions=()),
    "ldm-f8d4": _preset(4, (1, 2, 4, 4), attn_resolutions=()),
    "ldm-f32d64": _preset(64, (1, 1, 2, 2, 4, 4), attn_resolutions=(16, 8)),
    "small-f4d4": _preset(4, (1, 2, 2), attn_resolutions=(), **_SMALL),
    "small-f8d16": _preset(16, (1, 2, 2, 4), attn_resolutions=(8,), **_SMALL),
    "small-f16d32": _preset(32, _F16, attn_resolutions=(4,), **_SMALL),
}


class Tokenizer(nn.Module):
    """A trained autoencoder with the statistics of its latents; frozen, in eval mode.

    It can be cast, to bf16 for one, and then takes pixels and latents of any floating dtype; the statistics stay in fp32.

    Args:
        autoencoder: AutoencoderKL.
        latent_mean, latent_std: (z,) of raw latents over a data set, std unbiased and positive (see latent_statistics); or a number
            for all channels.
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
            try:
                values = torch.as_tensor(values, dtype=torch.float32)
            except (TypeError, ValueError, RuntimeError):
                raise ValueError(f"{name}: got {values!r}, expected {self.latent_channels} numbers") from None
            values = values.repeat(self.latent_channels) if values.ndim == 0 else values
            if values.shape != (self.latent_channels,) or not values.isfinite().all():
                raise ValueError(f"{name}: got {values.tolist()}, expected {self.latent_channels} finite values")
            self.register_buffer(name, values.view(-1, 1, 1))
        if not (self.latent_std > 0).all():
            raise ValueError(f"latent_std: got {self.latent_std.flatten().tolist()}, expected positive values")
        self.requires_grad_(False).eval()

    def encode(self, pixels):
        """pixels (B, C, H, W) in [-1, 1], H and W multiples of `downsample` -> Posterior over raw latents (B, z, h, w)."""
        posterior = self.autoencoder.encode(self._cast(pixels))
        return Posterior(_like(pixels, posterior.mean), _like(pixels, posterior.logvar))

    def normalise(self, raw):
        """Raw latents (B, z, h, w) to normalised ones: mean 0 and standard deviation 1 per channel over the data."""
        return ((raw - self.latent_mean) / self.latent_std).to(raw.dtype)

    def denormalise(self, normalised):
        """The inverse of normalise."""
        return (normalised * self.latent_std + self.latent_mean).to(normalised.dtype)

    def decode(self, normalised):
        """Normalised latents (B, z, h, w) -> pixels (B, C, downsample * h, downsample * w), about [-1, 1], not clamped."""
        return _like(normalised, self.autoencoder.decode(self._cast(self.denormalise(normalised))))

    def _cast(self, x):
        """x in the dtype of the weights; on a CPU channels-last, whatever it was.

        There oneDNN copies a contiguous image to a layout of its own before each convolution and back after it, and a channels-last one
        it takes as it is: 3x3 convolutions of 32 to 128 channels took 0.5 to 1.1 of the time (AVX-512, 2 threads). fp64 is not oneDNN's.
        """
        if not x.is_floating_point() or x.ndim != 4:
            return x  # for encode and decode to refuse
        x = x.to(self.autoencoder.encoder.conv_in.weight.dtype)
        return x.contiguous(memory_format=torch.channels_last) if x.device.type == "cpu" and x.dtype != torch.float64 else x

    def _apply(self, fn, recurse=True):
        statistics = self.latent_mean, self.latent_std
        super()._apply(fn, recurse)
        self.latent_mean, self.latent_std = (values.to(self.latent_mean.device) for values in statistics)
        return self

    def decode_uint8(self, normalised):
        """Normalised latents (B, z, h, w) -> uint8 images (B, H, W, C): clamp(127.5 x + 128, 0, 255), truncated, as the official code."""
        return (127.5 * self.decode(normalised).float() + 128.0).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)

    @property
    def sha256(self):
        """Hash of weights and statistics, for provenance: latents of one tokenizer must not meet another's statistics."""
        return state_sha256(self.state_dict())

    def save(self, path):
        """Writes a .safetensors file with the official weight names; configuration and statistics are in its metadata. Atomic."""
        save_weights(path, self.autoencoder.state_dict(), metadata=header(
            "tokenizer", config=self.autoencoder.config, image_mode=self.image_mode, latent_mean=self.latent_mean.flatten().tolist(),
            latent_std=self.latent_std.flatten().tolist(), provenance=self.provenance))

    def save_diffusers(self, folder):
        """Writes config.json and diffusion_pytorch_model.safetensors, which diffusers.AutoencoderKL.from_pretrained(folder) reads.

        Statistics go into scaling_factor and shift_factor if they are the same for all channels, else into latents_mean and latents_std.
        Provenance has no place there and stays behind.
        Raises: ValueError for an architecture that diffusers cannot build.
        """
        folder, autoencoder = Path(folder), self.autoencoder
        config = formats.write_config(autoencoder.config, self.latent_mean.flatten().tolist(), self.latent_std.flatten().tolist())
        weights = formats.to_diffusers(autoencoder.state_dict(), len(autoencoder.config["ch_mult"]))
        folder.mkdir(parents=True, exist_ok=True)
        save_weights(folder / formats.WEIGHTS_OF_DIFFUSERS[0], weights, metadata={"format": "pt"})
        partial = folder / ".partial_config.json"
        partial.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(partial, folder / "config.json")

    @classmethod
    def load(cls, name_or_path, device="cpu"):
        """load_tokenizer for what needs no further argument: "digits", a .safetensors file of this library, a folder of diffusers."""
        return load_tokenizer(name_or_path, device=device)


def _like(given, result):
    """The result in contiguous memory if `given` was: layouts are chosen inside, and callers get back the one that they came with."""
    return result.contiguous() if given.is_contiguous() else result


def load_tokenizer(name_or_path, *, preset=None, statistics=None, device="cpu"):
    """A tokenizer from whatever it is in.

    Args:
        name_or_path: "digits", the bundled one; a .safetensors file of this library; a checkpoint of the official VA-VAE, LDM or MAR code
            (.pt, .ckpt or .safetensors, read without running anything in it; what only training needs is left out by name, all else must
            fit exactly); or a folder of diffusers' AutoencoderKL (config.json and weights), Stable Diffusion's for one.
        preset: for official checkpoints, a name in PRESETS, or a dictionary of AutoencoderKL's arguments. None: as the weights' shapes say.
        statistics: of raw latents, instead of those in the file; official checkpoints have none. A latents_stats.pt; (mean, std), (z,)
            each; or, without channel normalisation, the number that latents are multiplied by: 0.18215 for Stable Diffusion, 1.0 for raw.
    Returns: Tokenizer, frozen, on `device`.
    Raises: FileNotFoundError; ValueError for a file that is damaged, that would have to run code to be read, whose weights are not the
        architecture's (every key is listed), or without statistics.
    """
    path = BUNDLED.get(str(name_or_path), Path(name_or_path))
    if not path.exists():
        raise FileNotFoundError(f"tokenizer: no file {path}; expected a .safetensors file or one of the bundled: {', '.join(BUNDLED)}")
    given = None if statistics is None else _statistics(statistics)
    official = path.is_file() and not _is_own(path)
    if preset is not None and not official:
        raise ValueError(f"preset: got {preset!r}, expected None, for {path} describes itself")
    stored, provenance = None, dict(source=path.name)
    if official:
        weights = formats.read_official(path)
        arguments = formats.architecture(weights, path) if preset is None else _preset_arguments(preset)
    elif path.is_dir():
        arguments, weights, *stored = formats.read_diffusers(path)
    else:
        weights, about = read_weights(path, "tokenizer")
        arguments, provenance = about.get("config"), about.get("provenance")
        stored = (about["latent_mean"], about["latent_std"]) if {"latent_mean", "latent_std"} <= about.keys() else None
    if given is None and stored is None:
        raise ValueError(f"{path}: no latent statistics, without which latents cannot be normalised. Pass statistics: a latents_stats.pt, "
                         "(mean, std), or the number that multiplies latents (1.0: left raw); `lightningdit export-tokenizer` writes them "
                         "into a file. latent_statistics(raw latents of your data) takes them, as train/vavae.py does")
    try:
        autoencoder = AutoencoderKL(**arguments)
    except (TypeError, ValueError) as error:
        where = f"{path}: its metadata" if preset is None else f"preset: {preset}"
        raise ValueError(f"{where} describes no autoencoder: {error}") from None
    if path.is_dir():
        weights = formats.from_diffusers(weights, autoencoder.state_dict(), len(arguments["ch_mult"]))
    load_state(autoencoder, weights, path)
    return Tokenizer(autoencoder, *(stored if given is None else given), provenance).to(device)


def _is_own(path):
    """Whether a file is for read_weights, by its header; so are files too damaged to tell, and those without an autoencoder's weights."""
    if path.suffix != ".safetensors":
        return False
    try:
        with safe_open(path, "pt") as file:
            return "lightningdit" in (file.metadata() or {}) or not any("encoder." in name for name in file.keys())
    except SafetensorError:
        return True


def _preset_arguments(preset):
    if isinstance(preset, dict):
        return preset
    if preset not in PRESETS:
        raise ValueError(f"preset: got {preset!r}, expected one of {', '.join(PRESETS)}, or a dictionary of AutoencoderKL's arguments")
    return PRESETS[preset]


def _statistics(statistics):
    """(mean, std) of a file, a pair or a multiplier."""
    if isinstance(statistics, (str, Path)):
        return formats.read_statistics(statistics)
    if isinstance(statistics, numbers.Real) and not isinstance(statistics, bool):
        if not 0 < statistics < float("inf"):
            raise ValueError(f"statistics: got {statistics}, expected a positive number to multiply latents by")
        return 0.0, 1.0 / statistics
    if not isinstance(statistics, (tuple, list)) or len(statistics) != 2:
        raise ValueError(f"statistics: got {type(statistics).__name__}, expected a file, (mean, std) or a number")
    return tuple(statistics)


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
