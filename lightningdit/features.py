"""Feature extractors by name: uint8 images to the vectors that metrics.py compares.

    extractor = load_extractor("inception", weights="weights-inception-2015-12-05-6726825d.pth")
    extractor(images)  # uint8 (B, H, W, C) -> {"pool": (B, D), ...}, fp32

An extractor is a callable with the attributes `name`, `sha256` (of its weights) and `channels` (of the images it takes). "pool" is what
Frechet distance, KID, precision and recall are taken of; "spatial", where there is one, serves sFID; "logits" the Inception score.
"""
import hashlib
import io
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import nn

from .checkpoint import load_weights
from .images import MODES, to_pixels
from .tokenizer.foundation import BUNDLED, SmallEncoder, download_timm, load_timm
from .tokenizer.vavae import load_state

INCEPTION_URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
DINOV2 = "vit_large_patch14_dinov2.lvd142m"
BUILDERS = {}


class Unavailable(ValueError):
    """A network whose weights or package are not here; the message says how to get them."""


def register(name):
    """Decorator: makes builder(weights, random_weights) known to load_extractor under `name`."""

    def add(builder):
        BUILDERS[name] = builder
        return builder

    return add


def load_extractor(name, weights=None, device="cpu", random_weights=False):
    """The frozen extractor of that name, on `device`.

    Args:
        name: "inception", "dinov2", "timm:MODEL" for any timm model, "digits" (bundled), the path of a SmallEncoder file, or a name that
            somebody registered.
        weights: a file (.safetensors, .pth or .pt, read with weights_only) instead of the download.
        random_weights: seeded random weights, for tests: the name then says so.
    Raises: ValueError for an unknown name; Unavailable where weights or a package are missing.
    """
    kind, _, model = str(name).partition(":")
    if kind == "timm" and model:
        extractor = TimmFeatures(model, weights, random_weights)
    elif name in BUILDERS:
        extractor = BUILDERS[name](weights, random_weights)
    elif Path(name).is_file():
        extractor = EncoderFeatures(name)
    else:
        raise ValueError(f"extractor: got {name!r}, expected {', '.join(sorted(BUILDERS))}, timm:MODEL, or the file of a small encoder")
    return extractor.requires_grad_(False).eval().to(device)


class Extractor(nn.Module):
    """What the three below share: the check of the images, no gradient, no TF32 (it costs the third digit of a feature)."""

    def __init__(self, name, network, channels=3, random_weights=False):
        super().__init__()
        self.name, self.network, self.channels = f"{name}-random" if random_weights else name, network, channels
        digest = hashlib.sha256()
        for key, tensor in network.state_dict().items():
            digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode() + tensor.contiguous().cpu().numpy().tobytes())
        self.sha256 = digest.hexdigest()

    @torch.no_grad()
    def forward(self, images):
        """images: uint8 (B, H, W, C). Returns: {"pool": (B, D) and perhaps "spatial", "logits"}, fp32."""
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in MODES:
            raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, H, W, 1 or 3)")
        if images.shape[3] > self.channels:
            raise ValueError(f"images: got {images.shape[3]} channels, but {self.name} takes {self.channels}")
        images = images.expand(-1, -1, -1, self.channels).contiguous()  # of one layout: the resize rounds differently for others
        device = next(self.parameters()).device
        with torch.backends.cudnn.flags(allow_tf32=False), torch.autocast(device.type, enabled=False):
            return {name: values.float() for name, values in self.extract(images.to(device)).items()}


@register("inception")
class InceptionFeatures(Extractor):
    """The Inception network of 2015 in TensorFlow, as FID is defined on, in torch-fidelity's port.

    The port itself resizes to 299 x 299 as TensorFlow 1 does (bilinear, corners not aligned, no antialiasing) and takes (x - 128) / 128.
    "pool": pool_3 (2048). "spatial": the first 7 channels of mixed_6/conv, 17 x 17 x 7 = 2023, flattened in TensorFlow's order, channels
    last. "logits": 1008, without the bias, of which ADM takes the Inception score.
    """

    def __init__(self, weights=None, random_weights=False):
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ImportError as error:
            raise Unavailable(f"extractor inception needs torch-fidelity: pip install torch-fidelity ({error})") from None

        class Port(FeatureExtractorInceptionV3):
            def load_state_dict(self, state, **options):  # its constructor unpickles a file without restraint: it gets an empty one
                return super().load_state_dict(state, **options) if state else None

        empty = io.BytesIO()
        torch.save({}, empty)
        empty.seek(0)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = Port("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=empty)
        if random_weights:
            for module in network.modules():
                if isinstance(module, nn.Conv2d):  # PyTorch's own initialisation lets 40 layers fade to 1e-8
                    nn.init.kaiming_normal_(module.weight, generator=torch.Generator().manual_seed(0))
        else:
            load_state(network, _inception_weights(weights), weights or INCEPTION_URL)
        super().__init__("inception", network, random_weights=random_weights)
        network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)  # mixed_6/conv: TensorFlow counts 6a to 6d as mixed_3 to 6

    def _keep_spatial(self, module, inputs, output):
        self.spatial = output[:, :7].permute(0, 2, 3, 1).flatten(1)

    def extract(self, images):
        pool, logits = self.network(images.permute(0, 3, 1, 2))
        return dict(pool=pool, spatial=self.__dict__.pop("spatial"), logits=logits)


class TimmFeatures(Extractor):
    """The pooled features of a timm model, whatever it pools (the class token, or a mean), with its own input size and normalisation.

    Images are resized by Pillow's bicubic filter, rounded to uint8 as there.
    """

    def __init__(self, model, weights=None, random_weights=False, name=None, image_size=None):
        name = name or f"timm:{model}"
        try:
            import timm
        except ImportError as error:
            raise Unavailable(f"extractor {name} needs timm: pip install timm ({error})") from None
        if not timm.is_model(model.partition(".")[0]):
            raise ValueError(f"extractor: timm knows no model {model!r}; timm.list_models() has them")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = timm.create_model(model, num_classes=0)
        if weights is None and not random_weights:
            try:
                weights = download_timm(network, model)
            except FileNotFoundError as error:
                raise Unavailable(f"extractor {name}: {error}") from None
        if weights is not None:
            load_timm(network, weights, model)
        super().__init__(name, network, random_weights=random_weights)
        config = timm.data.resolve_model_data_config(network)
        self.size = (image_size, image_size) if image_size else config["input_size"][1:]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(config[key]).view(1, 3, 1, 1))
        if image_size:
            _resize_positions(network, image_size)

    def extract(self, images):
        pixels = images.permute(0, 3, 1, 2).float()
        if pixels.shape[2:] != self.size:
            pixels = F.interpolate(pixels, self.size, mode="bicubic", antialias=True).round().clamp(0, 255)
        return dict(pool=self.network((pixels / 255 - self.mean) / self.std))


@register("dinov2")
def dinov2(weights=None, random_weights=False):
    """ViT-L/14 of DINOv2 at 224 pixels, its class token: the features of FD-DINOv2, arXiv:2306.04675."""
    return TimmFeatures(DINOV2, weights, random_weights, name="dinov2", image_size=224)


class EncoderFeatures(Extractor):
    """A SmallEncoder: the mean over positions that its classifier sees, and the classifier's logits."""

    def __init__(self, path, weights=None):
        encoder = SmallEncoder.load(weights or path)
        super().__init__(str(path) if path in BUNDLED else Path(path).stem, encoder, channels=encoder.config["in_channels"])

    def extract(self, images):
        pool = F.silu(self.network.feature_map(to_pixels(images))).mean((2, 3))
        return dict(pool=pool, logits=self.network.classifier(pool))


@register("digits")
def digits(weights=None, random_weights=False):
    """The bundled encoder of the digits: the whole evaluation runs offline on it. Its distances are comparable with each other only."""
    if random_weights:
        raise ValueError("random_weights: got True, but the encoder of the digits is bundled")
    return EncoderFeatures("digits", weights)


def _resize_positions(network, image_size):
    """Gives a ViT another input size as DINOv2's own code does: bicubic, no antialiasing, scale (side + 0.1) / trained side.

    timm's interpolation is antialiased, which changes every feature, and with them FD-DINOv2.
    """
    patch, table = network.patch_embed.patch_size[0], network.pos_embed.detach()
    trained, side = network.patch_embed.grid_size[0], image_size // patch
    prefix, grid = table[:, :-trained * trained], table[:, -trained * trained:]
    grid = grid.reshape(1, trained, trained, -1).permute(0, 3, 1, 2)
    if side != trained:
        grid = F.interpolate(grid, scale_factor=(side + 0.1) / trained, mode="bicubic")
    network.pos_embed = nn.Parameter(torch.cat([prefix, grid.permute(0, 2, 3, 1).flatten(1, 2)], dim=1))
    network.patch_embed.img_size, network.patch_embed.grid_size = (image_size, image_size), (side, side)


def _inception_weights(weights):
    if weights is not None:
        return load_weights(weights)
    try:
        return torch.hub.load_state_dict_from_url(INCEPTION_URL, map_location="cpu", weights_only=True, check_hash=True)
    except (URLError, OSError, RuntimeError) as error:
        raise Unavailable(f"extractor inception: no weights here, and {INCEPTION_URL} could not be read ({error}); download it elsewhere "
                          f"and name the file, or put it into {Path(torch.hub.get_dir()) / 'checkpoints'}") from None
