"""Frozen encoders whose features the latents are aligned with: vision foundation models from timm, and a small one trained on the data.

The interface is one method: features(pixels (B, C, H, W) in [-1, 1]) -> (B, N, F), without gradient, one token a latent position, row by
row; and one attribute, feature_channels = F. `load_encoder` finds either kind by name.
"""

import difflib
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from lightningdit.checkpoint import read_file, save_weights
from lightningdit.optional import optional
from lightningdit.tokenizer.vavae import ASSETS, header, load_state, read_weights
from lightningdit_kernels import group_norm_silu

BUNDLED = {"digits": ASSETS / "digits_encoder.safetensors"}

# Short name -> (timm name, pixels a token, side of the images it was trained on). SigLIP 2 comes without its pooling head, which features
# never pass. The VA-VAE's two are dinov2-l and mae-l.
FOUNDATION_MODELS = {
    "dinov2-s": ("vit_small_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-b": ("vit_base_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-l": ("vit_large_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-g": ("vit_giant_patch14_dinov2.lvd142m", 14, 518),
    "dinov2-reg-s": ("vit_small_patch14_reg4_dinov2.lvd142m", 14, 518),
    "dinov2-reg-b": ("vit_base_patch14_reg4_dinov2.lvd142m", 14, 518),
    "dinov2-reg-l": ("vit_large_patch14_reg4_dinov2.lvd142m", 14, 518),
    "dinov2-reg-g": ("vit_giant_patch14_reg4_dinov2.lvd142m", 14, 518),
    "dinov3-s": ("vit_small_patch16_dinov3.lvd1689m", 16, 256),
    "dinov3-b": ("vit_base_patch16_dinov3.lvd1689m", 16, 256),
    "dinov3-l": ("vit_large_patch16_dinov3.lvd1689m", 16, 256),
    "dinov3-h+": ("vit_huge_plus_patch16_dinov3.lvd1689m", 16, 256),
    "dinov3-7b": ("vit_7b_patch16_dinov3.lvd1689m", 16, 256),
    "dinov3-convnext-t": ("convnext_tiny.dinov3_lvd1689m", 32, 224),
    "dinov3-convnext-s": ("convnext_small.dinov3_lvd1689m", 32, 224),
    "dinov3-convnext-b": ("convnext_base.dinov3_lvd1689m", 32, 224),
    "dinov3-convnext-l": ("convnext_large.dinov3_lvd1689m", 32, 224),
    "mae-b": ("vit_base_patch16_224.mae", 16, 224),
    "mae-l": ("vit_large_patch16_224.mae", 16, 224),
    "mae-h": ("vit_huge_patch14_224.mae", 14, 224),
    "siglip2-b": ("vit_base_patch16_siglip_gap_256.v2_webli", 16, 256),
    "siglip2-l": ("vit_large_patch16_siglip_gap_256.v2_webli", 16, 256),
    "siglip2-so400m": ("vit_so400m_patch16_siglip_gap_256.v2_webli", 16, 256),
    "siglip2-g": ("vit_giantopt_patch16_siglip_gap_256.v2_webli", 16, 256),
    "clip-b": ("vit_base_patch16_clip_quickgelu_224.openai", 16, 224),
    "clip-l": ("vit_large_patch14_clip_quickgelu_224.openai", 14, 224),
    "clip-h": ("vit_huge_patch14_clip_224.laion2b", 14, 224),
    "clip-g": ("vit_giant_patch14_clip_224.laion2b", 14, 224),
}


def load_encoder(name_or_path, *, weights=None, image_size=None, grid=None, input_size=None, normalisation="model", layer=-1,
                 interpolate=False, compile=False, device="cpu", dtype=torch.float32):
    """A frozen encoder by name: the bundled "digits", a SmallEncoder's .safetensors file, or any ViT or convnet of timm.

    The model sees its images at `input_size`; a token covers `reduction` pixels of it (a ViT's patch, a convnet's stride), so the features
    lie on a grid of input_size / reduction. Name the latents' `grid` and the input size follows: 16 x 16 latents need 224 pixels of
    DINOv2 (patch 14) and 256 of MAE-L (patch 16), which are the sizes that the VA-VAE was trained with.

    Args:
        name_or_path: a short name of FOUNDATION_MODELS ("dinov2-l"), a name of timm ("convnext_tiny.dinov3_lvd1689m"), "digits", or a file.
        weights: None for the published ones, from the Hugging Face hub or its cache; a .safetensors, .pth or .pt file (torch.load with
            weights_only=True; the layouts that timm itself reads, original DINOv2, MAE and CLIP files among them); or "random", for tests.
        image_size: side, or (height, width), of the pixels to come; others are then refused. None: any size, resized to input_size.
        grid: side, or (height, width), of the latents. input_size: likewise, of what the model sees. With neither, the model sees the
            pixels as they are (image_size), or the size that it was trained on.
        normalisation: "model": the mean and standard deviation that the model was trained with; "official": the VA-VAE's official code
            leaves pixels in [-1, 1].
        layer: block of a ViT or stage of a convnet, from 0, or from the end if negative; through the model's final norm where that fits.
            The layers behind it are cut off.
        interpolate: where grid and input_size disagree, resize the feature map (bilinear) instead of raising an error.
        compile: run the model through torch.compile.
        dtype: of weights and features, whatever autocast says outside.
    Returns: FoundationEncoder or SmallEncoder, frozen, in eval mode, on `device`.
    Raises: ImportError without timm; FileNotFoundError for files that are absent, here or on the hub; ValueError for an unknown name,
        sizes that do not fit each other, and weights that are damaged or of another model.
    """
    name = str(name_or_path)
    if normalisation not in ("model", "official"):
        raise ValueError(f"normalisation: got {normalisation!r}, expected 'model' or 'official'")
    if name in BUNDLED or name.endswith(".safetensors"):
        if weights is not None or input_size is not None or layer != -1:
            raise ValueError(f"name_or_path: got {name}, a small encoder; weights, input_size and layer are for timm's models")
        return _check_small(SmallEncoder.load(name_or_path, device).to(dtype), image_size, grid)
    if not isinstance(layer, int) or isinstance(layer, bool):
        raise ValueError(f"layer: got {layer!r}, expected an integer")
    timm = _timm()
    timm_name = FOUNDATION_MODELS.get(name, (name,))[0].removeprefix("hf-hub:timm/")
    try:
        if not timm.is_model(timm_name):  # timm would ask the hub for some names
            raise RuntimeError("timm has no such model")
        model = timm.create_model(timm_name, num_classes=0)
    except RuntimeError as error:
        near = difflib.get_close_matches(name, [*FOUNDATION_MODELS, *timm.list_models()], n=5, cutoff=0.5)
        known = ", ".join(near or FOUNDATION_MODELS)
        raise ValueError(f"name_or_path: got {name!r} ({error}); expected a name of timm's or of this library, such as {known}") from None
    if not hasattr(model, "forward_intermediates"):
        raise ValueError(f"name_or_path: {timm_name} has no feature maps, for timm gives it no forward_intermediates")
    reduction = _reduction(model, layer)
    input_size, grid = _sizes(model, reduction, image_size, grid, input_size, interpolate)
    if weights is None:
        weights = download_timm(model, timm_name)
    if weights == "random":
        print(f"note: {timm_name} with random weights is for tests and timing; to align latents with it teaches nothing", file=sys.stderr)
    else:
        load_timm(model, weights, timm_name)
    if hasattr(model, "set_input_size"):  # position embeddings are interpolated once, in fp32
        model.set_input_size(img_size=input_size)
    channels = model.feature_info[layer]["num_chs"]
    if hasattr(model, "prune_intermediate_layers"):
        model.prune_intermediate_layers([layer])
        layer = -1
    size = None if image_size is None else _pair("image_size", image_size)
    encoder = FoundationEncoder(model.to(dtype), timm_name, channels, input_size, grid, normalisation, layer, size).to(device)
    if compile:
        encoder.model.forward_intermediates = torch.compile(encoder.model.forward_intermediates)
    return encoder


class FoundationEncoder(nn.Module):
    """A timm model as a frozen target; made by load_encoder, which explains the arguments. Class and register tokens are dropped.

    Attributes: feature_channels F; grid (h, w), N = h * w; input_size (height, width) that the model sees.
    """

    def __init__(self, model, name, feature_channels, input_size, grid, normalisation, layer=-1, image_size=None):
        super().__init__()
        self.model, self.name, self.feature_channels, self.input_size, self.grid = model, name, feature_channels, input_size, grid
        self.normalisation, self.layer, self.image_size = normalisation, layer, image_size
        self.is_vit = hasattr(model, "patch_embed") and hasattr(model, "num_prefix_tokens")
        mean, std = ((model.pretrained_cfg[key] for key in ("mean", "std")) if normalisation == "model" else ((0.5,) * 3, (0.5,) * 3))
        self.register_buffer("pixel_mean", torch.tensor(mean).mul(2).sub(1).view(-1, 1, 1), persistent=False)  # in [-1, 1]
        self.register_buffer("pixel_std", torch.tensor(std).mul(2).view(-1, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode=True):
        """Stays in eval mode whatever the module around it does."""
        return super().train(False)

    @torch.no_grad()
    def features(self, pixels):
        """pixels (B, 3 or 1, H, W) in [-1, 1] -> (B, N, F), row by row, in the encoder's dtype; gray images are shown in three channels.

        Images of another size than input_size are resized: bilinear, without antialiasing, as the official code does.
        """
        if pixels.ndim != 4 or pixels.shape[1] not in (1, 3) or not pixels.is_floating_point():
            raise ValueError(f"pixels: got {tuple(pixels.shape)} {pixels.dtype}, expected (B, 3 or 1, H, W), floating point")
        if self.image_size is not None and tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"pixels: got {tuple(pixels.shape[2:])}, expected {self.image_size}, the encoder's image_size")
        parameter = next(self.model.parameters())
        with torch.autocast(pixels.device.type, enabled=False):
            x = pixels.float().expand(-1, 3, -1, -1)
            if tuple(x.shape[2:]) != self.input_size:
                x = F.interpolate(x, size=self.input_size, mode="bilinear", align_corners=False)
            if self.normalisation == "model":
                x = (x - self.pixel_mean) / self.pixel_std
            (maps,) = self.model.forward_intermediates(x.to(parameter.dtype), indices=[self.layer], norm=True, stop_early=True,
                                                       output_fmt="NLC" if self.is_vit else "NCHW", intermediates_only=True)
            own_grid = maps.shape[2:] if not self.is_vit else self.model.patch_embed.grid_size
            if tuple(own_grid) != self.grid:
                maps = maps.mT.unflatten(2, own_grid) if self.is_vit else maps
                maps = F.interpolate(maps, size=self.grid, mode="bilinear", align_corners=False)
            return (maps if maps.ndim == 3 else maps.flatten(2).mT).contiguous()


def _timm():
    with optional("a foundation model"):
        import timm
    return timm


def _pair(name, size):
    """(height, width) of a side or a pair of sides."""
    pair = (size, size) if isinstance(size, int) and not isinstance(size, bool) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"{name}: got {size!r}, expected a positive integer or two, (height, width)")
    return tuple(pair)


def _reduction(model, layer):
    """Pixels a feature position of that layer, each way."""
    try:
        return model.feature_info[layer]["reduction"]
    except (IndexError, KeyError):
        raise ValueError(f"layer: got {layer}, expected one of the model's {len(model.feature_info)}, from the front or from -1") from None


def _sizes(model, reduction, image_size, grid, input_size, interpolate):
    """(input_size, grid) as pairs, from those that are given; see load_encoder."""
    if input_size is not None:
        input_size = _pair("input_size", input_size)
    elif grid is not None:
        input_size = tuple(side * reduction for side in _pair("grid", grid))
    else:
        input_size = _pair("image_size", model.pretrained_cfg["input_size"][-1] if image_size is None else image_size)
    if any(side % reduction for side in input_size):
        raise ValueError(f"input_size: got {input_size}, expected multiples of {reduction} pixels, the size of a token; "
                         "or name the grid of the latents, and the input size follows")
    own_grid = tuple(side // reduction for side in input_size)
    grid = own_grid if grid is None else _pair("grid", grid)
    if grid != own_grid and not interpolate:
        raise ValueError(f"grid: got {grid}, but {input_size} pixels at {reduction} a token make {own_grid}; leave input_size out, "
                         "or ask for interpolate=True")
    return input_size, grid


def download_timm(model, name):
    """Path of the published weights, from the cache or the hub."""
    import huggingface_hub

    repository = model.pretrained_cfg.get("hf_hub_id")
    if not repository:
        raise ValueError(f"weights: timm knows no published ones for {name}; expected a file, or a name with its data, such as "
                         "vit_large_patch14_dinov2.lvd142m")
    file = model.pretrained_cfg.get("hf_hub_filename") or "model.safetensors"
    try:
        return huggingface_hub.hf_hub_download(repository, file)
    except Exception as error:  # connection, proxy and hub errors have no common type
        raise FileNotFoundError(f"weights: {name} is not in the local cache and the Hugging Face hub does not give it "
                                f"({type(error).__name__}). Without a network, bring {file} of huggingface.co/{repository} from a "
                                "machine that has one, and pass weights=FILE") from None


def load_timm(model, path, name):
    """Fills a timm model from a file, strictly; a classifier that comes with it is left out."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"weights: no file {path}; expected a .safetensors or PyTorch file, None (published), or 'random'")
    tensors = read_file(path)
    # What timm.create_model(pretrained=True) itself applies: renames original layouts, and resamples positions of another image size.
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    try:
        tensors = convert(tensors, model) if convert else tensors.get("model", tensors)
        tensors = dict(tensors)
    except Exception as error:  # whatever a foreign layout makes it stumble over
        raise ValueError(f"{path}: holds no weights that timm can read as {name} ({type(error).__name__}: {error})") from None
    own, classifiers = model.state_dict(), model.pretrained_cfg.get("classifier") or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else classifiers
    for key in list(tensors):
        if key not in own and key.startswith(tuple(f"{classifier}." for classifier in classifiers)):
            del tensors[key]
    load_state(model, tensors, path)


def _check_small(encoder, image_size, grid):
    if image_size is not None and grid is not None:
        own = tuple(side // encoder.config["downsample"] for side in _pair("image_size", image_size))
        if own != _pair("grid", grid):
            raise ValueError(f"grid: got {grid}, but this encoder makes {own} of {image_size} pixels")
    return encoder


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
        return self.feature_map(pixels.to(self.conv_in.weight.dtype)).flatten(2).mT

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
