"""Autoencoders in the files of others: checkpoints of the official VA-VAE, LDM and MAR code, and folders of diffusers' AutoencoderKL.

The architecture is one and the same; names of weights, and where scaling and statistics are written, differ. Readers give the arguments of
our AutoencoderKL and weights under our names, which are the official ones.
"""

import json
import re
from pathlib import Path

import torch

from lightningdit.checkpoint import CheckpointError, read_file

# What training leaves in a checkpoint besides the autoencoder: the frozen target, the projection onto it, LPIPS and discriminator, EMA.
TRAINING_ONLY = ("foundation_model.", "linear_proj.", "loss.", "discriminator.", "model_ema.", "ema.", "logvar", "colorize")
WRAPPERS = re.compile(r"^(?:module\.|_orig_mod\.)+")  # of DistributedDataParallel and torch.compile
PARTS = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0", "downsample": "downsamplers.0",
         "upsample": "upsamplers.0", "nin_shortcut": "conv_shortcut", "norm_out": "conv_norm_out"}  # ours -> diffusers'
DEPRECATED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # diffusers' before 0.18 -> diffusers' today
WEIGHTS_OF_DIFFUSERS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")


def read_official(path):
    """Autoencoder weights of a Lightning checkpoint ("state_dict": VA-VAE, LDM, Stable Diffusion's first stage), of MAR ("model"), or bare.

    What only training needs is left out by name; everything else is kept, for a strict load to judge.
    Raises: ValueError for a file that is damaged, holds no state dict, or would have to run code to be read.
    """
    state = read_file(path)
    if isinstance(state, dict):
        state = next((state[entry] for entry in ("state_dict", "model") if entry in state), state)
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise CheckpointError(f"checkpoint {path}: holds no state dict, neither as 'state_dict' or 'model' nor by itself")
    state = {WRAPPERS.sub("", name): value for name, value in state.items()}
    if any(name.startswith("first_stage_model.") for name in state):  # a whole latent diffusion model
        state = {name.removeprefix("first_stage_model."): value for name, value in state.items() if name.startswith("first_stage_model.")}
    state = {name: value for name, value in state.items() if not name.startswith(TRAINING_ONLY)}
    if strange := [name for name, value in state.items() if not torch.is_tensor(value)]:
        raise CheckpointError(f"checkpoint {path}: expected tensors, got {type(state[strange[0]]).__name__} in {', '.join(strange)}")
    return state


def architecture(weights, path):
    """Arguments of AutoencoderKL that these weights tell: widths, levels, blocks, channels, where attention is. Groups are 32, as in every
    published autoencoder, and levels are counted from 256 pixels.

    Raises: ValueError if the weights do not tell.
    """
    def shape(name, dim):
        if name not in weights or weights[name].ndim != 4:
            raise ValueError(f"{path}: the weights do not tell their architecture, for want of {name} (4-D); name it by preset=")
        return weights[name].shape[dim]

    def has(prefix):
        return any(name.startswith(prefix) for name in weights)

    ch, levels, blocks = shape("encoder.conv_in.weight", 0), 0, 0
    while has(f"encoder.down.{levels}."):
        levels += 1
    while has(f"encoder.down.0.block.{blocks}."):
        blocks += 1
    widths = [shape(f"encoder.down.{i}.block.0.conv1.weight", 0) for i in range(levels)]
    if not widths or ch % 32 or any(width % ch for width in widths):
        raise ValueError(f"{path}: the weights do not tell their architecture: got widths {widths} after {ch} channels, expected multiples "
                         "of a multiple of 32; name it by preset=")
    quantised = has("quant_conv.") or has("post_quant_conv.")
    z_channels = shape("encoder.conv_out.weight", 0) // 2
    return dict(in_channels=shape("encoder.conv_in.weight", 1), out_channels=shape("decoder.conv_out.weight", 0), ch=ch,
                ch_mult=tuple(width // ch for width in widths), num_res_blocks=blocks, z_channels=z_channels,
                embed_dim=shape("post_quant_conv.weight", 1) if quantised else z_channels, resolution=256,
                attn_resolutions=tuple(256 >> i for i in range(levels) if has(f"encoder.down.{i}.attn.")),
                decoder_attention=any(has(f"decoder.up.{i}.attn.") for i in range(levels)) or not any(
                    has(f"encoder.down.{i}.attn.") for i in range(levels)),
                middle_attention=has("encoder.mid.attn_1."), quant_conv=quantised)


def read_statistics(path):
    """(mean, std), flat tensors, of an official latents_stats.pt: {"mean": (1, z, 1, 1), "std": (1, z, 1, 1)} of raw latents."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"statistics: no file {path}")
    stored = read_file(path)
    if not isinstance(stored, dict) or not all(torch.is_tensor(stored.get(name)) for name in ("mean", "std")):
        raise ValueError(f"statistics: {path} holds no tensors 'mean' and 'std', as latents_stats.pt does")
    return stored["mean"].flatten(), stored["std"].flatten()


# diffusers


def read_diffusers(folder):
    """A folder with the config.json and weights of diffusers' AutoencoderKL, or a pipeline's with vae/ in it.

    Returns: (arguments of AutoencoderKL, weights, mean, std). diffusers' normalised latents are (raw - latents_mean) / latents_std *
        scaling_factor, or (raw - shift_factor) * scaling_factor; mean and std (lists) say the same as (raw - mean) / std.
    Raises: FileNotFoundError; ValueError naming the setting that our AutoencoderKL has no counterpart of.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() and (folder / "vae" / "config.json").is_file():
        folder = folder / "vae"
    file = next((folder / name for name in WEIGHTS_OF_DIFFUSERS if (folder / name).is_file()), None)
    if file is None or not (folder / "config.json").is_file():
        raise FileNotFoundError(f"tokenizer: {folder} is a folder, but not one of diffusers: expected config.json and "
                                f"{' or '.join(WEIGHTS_OF_DIFFUSERS)} in it")
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        arguments = _arguments(config)
        mean, std = _scaling(config, arguments["embed_dim"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: describes no AutoencoderKL that can be read: {error}") from None
    return arguments, read_file(file), mean, std


def write_config(arguments, mean, std):
    """config.json of diffusers' AutoencoderKL, as a dictionary, for arguments of ours and the latents' statistics (lists).

    Raises: ValueError for an architecture that diffusers cannot build.
    """
    a = arguments
    if a["ch_mult"][0] != 1 or a["embed_dim"] != a["z_channels"]:
        raise ValueError("tokenizer: diffusers' AutoencoderKL can only have ch_mult[0] = 1 and embed_dim = z_channels, got "
                         f"ch_mult {a['ch_mult']}, embed_dim {a['embed_dim']}, z_channels {a['z_channels']}")
    attention = [a["resolution"] >> i in a["attn_resolutions"] for i in range(len(a["ch_mult"]))]
    down = ["AttnDownEncoderBlock2D" if here else "DownEncoderBlock2D" for here in attention]
    up = ["AttnUpDecoderBlock2D" if here and a["decoder_attention"] else "UpDecoderBlock2D" for here in reversed(attention)]
    config = dict(
        _class_name="AutoencoderKL", act_fn="silu", in_channels=a["in_channels"], out_channels=a["out_channels"],
        down_block_types=down, up_block_types=up, block_out_channels=[a["ch"] * m for m in a["ch_mult"]],
        layers_per_block=a["num_res_blocks"], latent_channels=a["embed_dim"], norm_num_groups=a["num_groups"],
        sample_size=a["resolution"], mid_block_add_attention=a["middle_attention"], use_quant_conv=a["quant_conv"],
        use_post_quant_conv=a["quant_conv"])
    if len(set(mean)) == len(set(std)) == 1:  # one number for all channels, as diffusers' pipelines of every age understand it
        return config | dict(scaling_factor=_shortest_reciprocal(std[0])) | (dict(shift_factor=mean[0]) if mean[0] else {})
    return config | dict(scaling_factor=1.0, latents_mean=mean, latents_std=std)


def to_diffusers(weights, levels):
    """Our weights under diffusers' names. Its attention is of linear layers, (C, C), ours of 1x1 convolutions, (C, C, 1, 1)."""
    names = {name: diffusers_name(name, levels) for name in weights}
    return {name: weights[own].flatten(1) if _is_linear(own) else weights[own] for own, name in names.items()}


def from_diffusers(weights, own, levels):
    """The inverse. `own`: the state dict to be filled, whose names say what to look for; others stay as they are, for a strict load."""
    ours = {diffusers_name(name, levels): name for name in own}
    renamed = {}
    for name, tensor in weights.items():
        for old, new in DEPRECATED.items():
            name = name.replace(f".{old}.", f".{new}.")
        name = ours.get(name, name)
        renamed[name] = tensor[..., None, None] if _is_linear(name) and tensor.ndim == 2 else tensor
    return renamed


def diffusers_name(name, levels):
    """encoder.down.0.block.1.conv1.weight -> encoder.down_blocks.0.resnets.1.conv1.weight. Its decoder counts levels from the coarsest."""
    name = re.sub(r"^(\w+)\.down\.(\d+)\.", r"\1.down_blocks.\2.", name)
    name = re.sub(r"^(\w+)\.up\.(\d+)\.", lambda match: f"{match[1]}.up_blocks.{levels - 1 - int(match[2])}.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda match: f".mid_block.resnets.{int(match[1]) - 1}.", name)
    name = re.sub(r"\.attn\.(\d+)\.", r".attentions.\1.", name.replace(".mid.attn_1.", ".mid_block.attentions.0."))
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    for own, other in PARTS.items():
        name = name.replace(f".{own}.", f".{other}.")
    return name


def _is_linear(name):
    """Whether diffusers has a linear layer where we have this 1x1 convolution."""
    return re.search(r"\.attn(?:\.\d+|_1)\.(?:q|k|v|proj_out)\.weight$", name) is not None


def _arguments(config):
    def expect(name, default, *allowed):
        if (got := config.get(name, default)) not in allowed:
            raise ValueError(f"{name}: got {got!r}, expected {' or '.join(map(repr, allowed))}")
        return got

    expect("_class_name", None, "AutoencoderKL")
    expect("act_fn", "silu", "silu", "swish")
    widths = config["block_out_channels"]
    if any(width % widths[0] for width in widths):
        raise ValueError(f"block_out_channels: got {widths}, expected multiples of the first")
    if len(config["down_block_types"]) != len(widths) or len(config["up_block_types"]) != len(widths):
        raise ValueError(f"down_block_types and up_block_types: expected {len(widths)} each, as in block_out_channels")
    down = [_attention(kind, "AttnDownEncoderBlock2D", "DownEncoderBlock2D") for kind in config["down_block_types"]]
    up = [_attention(kind, "AttnUpDecoderBlock2D", "UpDecoderBlock2D") for kind in reversed(config["up_block_types"])]
    if any(up) and up != down:
        raise ValueError(f"up_block_types: got attention at levels {up}, expected as in down_block_types, {down}, or nowhere")
    downsample, side = 2 ** (len(widths) - 1), config.get("sample_size")
    resolution = side if isinstance(side, int) and side > 0 and side % downsample == 0 else 16 * downsample
    quant_conv = expect("use_quant_conv", True, True, False)
    expect("use_post_quant_conv", True, quant_conv)
    return dict(in_channels=config.get("in_channels", 3), out_channels=config.get("out_channels", 3), ch=widths[0],
                ch_mult=tuple(width // widths[0] for width in widths), num_res_blocks=config.get("layers_per_block", 1),
                z_channels=config.get("latent_channels", 4), embed_dim=config.get("latent_channels", 4),
                attn_resolutions=tuple(resolution >> i for i, here in enumerate(down) if here), resolution=resolution,
                decoder_attention=any(up) or not any(down), num_groups=config.get("norm_num_groups", 32),
                middle_attention=expect("mid_block_add_attention", True, True, False), quant_conv=quant_conv)


def _attention(kind, with_attention, without):
    if kind not in (with_attention, without):
        raise ValueError(f"block type: got {kind!r}, expected {with_attention} or {without}")
    return kind == with_attention


def _scaling(config, channels):
    """(mean, std) lists from a diffusers configuration. Where it is silent, diffusers' own default holds: 0.18215, of its first models."""
    scale, shift = config.get("scaling_factor", 0.18215), config.get("shift_factor")
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if (mean is None) != (std is None) or (mean is not None and shift):
        raise ValueError("latents_mean and latents_std: expected both or neither, and no shift_factor beside them")
    if mean is None:
        mean, std = [shift or 0.0] * channels, [1.0] * channels
    if not scale > 0:
        raise ValueError(f"scaling_factor: got {scale}, expected a positive number")
    return [float(value) for value in mean], [value / scale for value in std]


def _shortest_reciprocal(std):
    """1 / std with as few digits as give the same std back in fp32: 0.18215 rather than 0.18214999931."""
    for digits in range(1, 18):
        scale = float(f"{1 / std:.{digits}g}")
        if torch.tensor(1 / scale).item() == std:
            return scale
    return 1 / std
