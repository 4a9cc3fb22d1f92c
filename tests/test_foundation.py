"""Foundation models as frozen targets: which features, in which order, of which pixels; and what is refused. All weights are random."""

import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench.fuzz import examples, tally
from lightningdit.tokenizer.foundation import FOUNDATION_MODELS, SmallEncoder, load_encoder

timm = pytest.importorskip("timm")

VIT, CONVNET, DINOV2, DINOV3 = "test_vit", "test_convnext", "vit_small_patch14_dinov2", "vit_small_patch16_dinov3"


def timm_model(name, path, **arguments):
    """A timm model with nothing left at its initial zeros, and its weights in a file."""
    torch.manual_seed(0)
    model = timm.create_model(name, **arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, path)
    return model.eval()


@pytest.fixture
def pixels():
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.fixture
def file(tmp_path):
    return tmp_path / "weights.safetensors"


@torch.no_grad()
def official_features(model, x, size):
    """What the VA-VAE aligns with, as a feature map: pixels in [-1, 1], resized for DINOv2, forward_features without the class token."""
    tokens = model.forward_features(F.interpolate(x, size=size, mode="bilinear", align_corners=False))[:, model.num_prefix_tokens:]
    return tokens.reshape(len(x), 4, 4, -1).permute(0, 3, 1, 2)


# what features are


@pytest.mark.parametrize("name, size", [(VIT, 64), (DINOV2, 56)])
def test_features_are_those_of_the_official_code(file, pixels, name, size):
    """64 pixels of a tokenizer with 16 pixels a latent, at patch 16 and patch 14: as 256 pixels for MAE, and for DINOv2, which sees 224."""
    model = timm_model(name, file, dynamic_img_size=True)
    encoder = load_encoder(name, weights=file, grid=4, image_size=64, normalisation="official")
    features = encoder.features(pixels)
    assert encoder.input_size == (size, size) and features.shape == (2, 16, encoder.feature_channels) and not features.requires_grad
    expected = official_features(model, pixels, (size, size))
    for row in range(4):
        for column in range(4):
            torch.testing.assert_close(features[:, 4 * row + column], expected[:, :, row, column])


def test_class_and_register_tokens_are_dropped(file, pixels):
    model = timm_model(DINOV3, file)
    encoder = load_encoder(DINOV3, weights=file, grid=4)
    mean, std = (torch.tensor(model.pretrained_cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    assert model.num_prefix_tokens == 5
    model.set_input_size(img_size=(64, 64))
    with torch.no_grad():
        expected = model.forward_features(((pixels + 1) / 2 - mean) / std)[:, 5:]
    torch.testing.assert_close(encoder.features(pixels), expected, rtol=1e-4, atol=1e-5)
    unnormalised = load_encoder(DINOV3, weights=file, grid=4, normalisation="official").features(pixels)
    assert (encoder.features(pixels) - unnormalised).abs().max() > 1e-2


@pytest.mark.parametrize("name, layer", [(CONVNET, -1), (CONVNET, 2), ("test_resnet", -2), ("test_efficientnet", -1)])
def test_convnets(file, name, layer):
    model = timm_model(name, file)
    x = torch.rand(2, 3, 64, 96) * 2 - 1
    encoder = load_encoder(name, weights=file, image_size=(64, 96), layer=layer, normalisation="official")
    with torch.no_grad():
        final, maps = model.forward_intermediates(x, norm=True)
    torch.testing.assert_close(encoder.features(x), maps[layer].flatten(2).mT)
    assert encoder.grid == maps[layer].shape[2:] and encoder.feature_channels == maps[layer].shape[1]
    if name == CONVNET and layer == -1:
        with torch.no_grad():
            torch.testing.assert_close(encoder.features(x), model.forward_features(x).flatten(2).mT)


def test_layers_of_a_vit(file, pixels):
    model = timm_model(VIT, file, dynamic_img_size=True)
    with torch.no_grad():
        maps = model.forward_intermediates(pixels, norm=True, intermediates_only=True)
    for layer in (0, 2, -1, -2):
        encoder = load_encoder(VIT, weights=file, grid=4, layer=layer, normalisation="official")
        torch.testing.assert_close(encoder.features(pixels), maps[layer].flatten(2).mT)
    assert sum(p.numel() for p in load_encoder(VIT, weights=file, grid=4, layer=0).parameters()) < 0.5 * sum(
        p.numel() for p in model.parameters())


def test_other_grids(file, pixels):
    timm_model(VIT, file)
    assert load_encoder(VIT, weights=file).grid == (10, 10)  # the 160 pixels it was trained on
    assert load_encoder(VIT, weights=file, image_size=64).grid == (4, 4)
    wide = load_encoder(VIT, weights=file, grid=(2, 6))
    assert wide.input_size == (32, 96) and wide.features(pixels).shape == (2, 12, 64)
    maps = load_encoder(VIT, weights=file, input_size=96).features(pixels).mT.unflatten(2, (6, 6))
    expected = F.interpolate(maps, size=(4, 4), mode="bilinear", align_corners=False).flatten(2).mT
    interpolated = load_encoder(VIT, weights=file, input_size=96, grid=4, interpolate=True)
    torch.testing.assert_close(interpolated.features(pixels), expected)
    convnet = load_encoder(CONVNET, weights="random", input_size=96, grid=4, interpolate=True)
    assert convnet.features(pixels).shape == (2, 16, 64)


def test_gray_images_are_shown_in_three_channels(pixels):
    encoder = load_encoder(VIT, weights="random", grid=4)
    assert torch.equal(encoder.features(pixels[:, :1]), encoder.features(pixels[:, :1].repeat(1, 3, 1, 1)))


def test_random_weights_say_so(capsys):
    load_encoder(VIT, weights="random", grid=4)
    assert "with random weights is for tests and timing" in capsys.readouterr().err


def test_frozen_and_of_the_dtype_asked_for(file, pixels):
    timm_model(VIT, file)
    encoder = load_encoder(VIT, weights=file, grid=4)
    torch.nn.Sequential(encoder).train()
    assert not any(module.training for module in encoder.modules()) and not any(p.requires_grad for p in encoder.parameters())
    expected = encoder.features(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(encoder.features(pixels), expected)
    half = load_encoder(VIT, weights=file, grid=4, dtype=torch.bfloat16).features(pixels)
    assert half.dtype == torch.bfloat16 and F.cosine_similarity(half.float(), expected, dim=-1).min() > 0.99
    assert torch.equal(load_encoder(VIT, weights=file, grid=4, dtype=torch.bfloat16).features(pixels.bfloat16()).isfinite(),
                       torch.ones(2, 16, 64, dtype=torch.bool))


def test_compiled(file, pixels, monkeypatch):
    timm_model(VIT, file)
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda function: compiled.append(function) or torch._dynamo.optimize("eager")(function))
    encoder = load_encoder(VIT, weights=file, grid=4, compile=True)
    torch.testing.assert_close(encoder.features(pixels), load_encoder(VIT, weights=file, grid=4).features(pixels))
    assert len(compiled) == 1


@pytest.mark.parametrize("name", FOUNDATION_MODELS)
def test_short_names(name):
    """Each is a name that timm has weights for, and its token and image size are what the table says."""
    timm_name, patch, size = FOUNDATION_MODELS[name]
    settings_of_timm = timm.get_pretrained_cfg(timm_name)
    assert settings_of_timm.input_size == (3, size, size) and settings_of_timm.hf_hub_id
    with torch.device("meta"):
        model = timm.create_model(timm_name, num_classes=0)
    assert model.feature_info[-1]["reduction"] == patch


# weights


def test_weights_that_do_not_fit(file, tmp_path):
    timm_model(VIT, file)
    weights = load_file(file)
    for change, message in [
        (lambda w: w.pop("blocks.3.attn.qkv.bias"), "missing: blocks.3.attn.qkv.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unexpected: extra"),
        (lambda w: w.update({"norm.weight": torch.zeros(3)}), r"misshaped: norm.weight \(3,\) instead of \(64,\)"),
    ]:
        changed = dict(weights)
        change(changed)
        torch.save({"model": changed}, tmp_path / "w.pth")
        with pytest.raises(ValueError, match=message):
            load_encoder(VIT, weights=tmp_path / "w.pth", grid=4)
    torch.save({"model": weights}, tmp_path / "w.pth")  # the layout of the original MAE and CLIP-like files
    load_encoder(VIT, weights=tmp_path / "w.pth", grid=4)
    for content in ([1, 2], {"model": [1]}, {}):
        torch.save(content, tmp_path / "w.pth")
        with pytest.raises(ValueError, match="no weights that timm can read|missing: "):
            load_encoder(VIT, weights=tmp_path / "w.pth", grid=4)


def test_original_dinov2_files(file, tmp_path, pixels):
    """Meta's own have a mask token, and positions for 37 x 37 tokens."""
    timm_model(DINOV2, file)
    torch.save(load_file(file) | {"mask_token": torch.zeros(1, 384)}, tmp_path / "w.pth")
    original = load_encoder(DINOV2, weights=tmp_path / "w.pth", grid=4)
    assert torch.equal(original.features(pixels), load_encoder(DINOV2, weights=file, grid=4).features(pixels))


def test_published_weights_come_from_the_hub(file, pixels, monkeypatch):
    import huggingface_hub

    timm_model(VIT, file)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *arguments: asked.append(arguments) or str(file))
    encoder = load_encoder("hf-hub:timm/test_vit.r160_in1k", grid=4)
    assert torch.equal(encoder.features(pixels), load_encoder(VIT, weights=file, grid=4).features(pixels))
    assert asked == [("timm/test_vit.r160_in1k", "model.safetensors")]


class Malicious:
    def __reduce__(self):
        return print, ("run",)


def test_a_file_that_would_run_code_is_refused(tmp_path, capsys):
    torch.save({"model": Malicious()}, tmp_path / "w.pth")
    with pytest.raises(ValueError, match="weights_only=True\\) refuses it.*print"):
        load_encoder(VIT, weights=tmp_path / "w.pth", grid=4)
    assert "run" not in capsys.readouterr().out


@pytest.mark.fuzz
@examples(20)
@given(data=st.binary(max_size=200), suffix=st.sampled_from(["safetensors", "pth"]))
def test_any_bytes_are_refused_in_words(tmp_path, data, suffix):
    (tmp_path / f"w.{suffix}").write_bytes(data)
    with pytest.raises(ValueError, match="w\\."):
        load_encoder(VIT, weights=tmp_path / f"w.{suffix}", grid=4)
    tally("foundation models", "refused")


def test_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"model.safetensors of huggingface.co/timm/test_vit.r160_in1k .*weights=FILE"):
        load_encoder("test_vit.r160_in1k", grid=4)
    with pytest.raises(ValueError, match="no published ones for test_vit4"):
        load_encoder("test_vit4", grid=4)


def test_without_timm():
    code = ("import sys; sys.modules['timm'] = None\n"
            "from lightningdit.tokenizer.foundation import load_encoder\n"
            "load_encoder('digits')\n"
            "try: load_encoder('dinov2-s')\n"
            "except ImportError as error: print(error)")
    assert "pip install timm" in subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name, arguments, message", [
    ("dinov2-x", {}, "name_or_path: got 'dinov2-x'.*dinov2-"), ("hf-hub:someone/model", {}, "timm has no such model"),
    ("vit_large_patch14_dinov2.lvd", {}, "name_or_path: got 'vit_large_patch14_dinov2.lvd'"),
    (VIT, dict(normalisation="imagenet"), "normalisation: got 'imagenet'"),
    (VIT, dict(layer=6), "layer: got 6.*6"), (VIT, dict(layer=1.0), "layer: got 1.0"), (VIT, dict(grid=0), "grid: got 0"),
    (VIT, dict(input_size=100), "input_size: got .100, 100., expected multiples of 16"),
    (VIT, dict(input_size=96, grid=4), "grid: got .4, 4., but .96, 96. pixels.*interpolate=True"),
    (VIT, dict(image_size=(1, 2, 3)), "image_size: got .1, 2, 3."), ("digits", dict(layer=1), "small encoder"),
    ("digits", dict(image_size=32, grid=3), "grid: got 3"), (VIT, dict(weights="nowhere.pth"), None),
])
def test_what_cannot_be(name, arguments, message):
    with pytest.raises(ValueError if message else FileNotFoundError, match=message or "no file nowhere.pth"):
        load_encoder(name, **dict(dict(weights=None if name == "digits" else "random"), **arguments))


@pytest.mark.parametrize("x, message", [
    (torch.zeros(2, 3, 32, 32), r"expected \(64, 64\)"), (torch.zeros(2, 4, 64, 64), "3 or 1"),
    (torch.zeros(2, 3, 64, 64, dtype=torch.uint8), "uint8"), (torch.zeros(3, 64, 64), "3 or 1"),
])
def test_impossible_pixels(x, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(VIT, weights="random", image_size=64).features(x)


def test_the_small_encoder_by_the_same_door(tmp_path):
    torch.manual_seed(0)
    SmallEncoder(in_channels=3, num_classes=5, downsample=4, width=8).save(tmp_path / "e.safetensors")
    x = torch.rand(2, 3, 32, 32)
    encoder = load_encoder(tmp_path / "e.safetensors", image_size=32, grid=8)
    assert torch.equal(encoder.features(x), SmallEncoder.load(tmp_path / "e.safetensors").features(x))
    half = load_encoder(tmp_path / "e.safetensors", dtype=torch.bfloat16).features(x)
    assert half.dtype == torch.bfloat16 and F.cosine_similarity(half.float(), encoder.features(x), dim=-1).min() > 0.99
