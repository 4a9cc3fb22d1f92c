"""features.py: the extractors, with random weights where the real ones are not at hand; what is tested is everything but them."""
import io

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import features
from lightningdit.features import INCEPTION_URL, Unavailable, load_extractor
from lightningdit.images import digits, to_pixels
from lightningdit.tokenizer.foundation import SmallEncoder


def pictures(n=3, size=40, channels=3, seed=0):
    return torch.randint(0, 256, (n, size, size, channels), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


@pytest.fixture(scope="module")
def inception():
    return load_extractor("inception", random_weights=True)


@pytest.fixture(scope="module")
def inception_file(inception, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.network.state_dict(), path)
    return path


def test_inception_is_torch_fidelitys(inception, inception_file):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=inception_file)
    pool, logits = theirs(pictures().permute(0, 3, 1, 2))
    ours = load_extractor("inception", weights=inception_file)
    found = ours(pictures())
    assert (ours.name, inception.name) == ("inception", "inception-random") and ours.sha256 == inception.sha256
    assert found["pool"].shape == (3, 2048) and found["logits"].shape == (3, 1008)
    assert torch.equal(found["pool"], pool) and torch.equal(found["logits"], logits)
    assert found["pool"].std(0).mean() > 1e-3  # it tells even pictures of noise apart


def test_spatial_features_are_mixed_6_channels_last(inception):
    """By a way of its own: the network's modules one after the other, up to the first convolution of TensorFlow's mixed_6."""
    from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

    n = inception.network
    x = interpolate_bilinear_2d_like_tensorflow1x(pictures(1).permute(0, 3, 1, 2).float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    before = [n.Conv2d_1a_3x3, n.Conv2d_2a_3x3, n.Conv2d_2b_3x3, n.MaxPool_1, n.Conv2d_3b_1x1, n.Conv2d_4a_3x3, n.MaxPool_2]
    for module in [*before, n.Mixed_5b, n.Mixed_5c, n.Mixed_5d, n.Mixed_6a, n.Mixed_6b, n.Mixed_6c]:
        x = module(x)
    c = n.Mixed_6d.branch1x1
    x = torch.relu(c.bn(c.conv(x)))[0].numpy()  # (192, 17, 17)
    expected = [x[channel, i, j] for i in range(17) for j in range(17) for channel in range(7)]
    found = inception(pictures(1))["spatial"]
    assert found.shape == (1, 2023) and np.allclose(found[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_a_missing_download_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(Unavailable, match=f"inception: no weights here, and {INCEPTION_URL} could not be read .no network.; download it"):
        load_extractor("inception")


def test_timm_weights_that_are_not_there(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    with pytest.raises(Unavailable, match="extractor timm:vit_tiny_patch16_224: .* is not in the local cache .*weights=FILE"):
        load_extractor("timm:vit_tiny_patch16_224")


def test_hostile_and_foreign_weights_are_refused(tmp_path):
    class Hostile:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"a": Hostile()}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match="hostile.pth"):
        load_extractor("inception", weights=tmp_path / "hostile.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="missing: .*misshaped: fc.weight"):
        load_extractor("inception", weights=tmp_path / "foreign.pth")
    with pytest.raises(ValueError, match="no file"):
        load_extractor("inception", weights=tmp_path / "nowhere.pth")


def test_timm_models_with_their_own_preprocessing(tmp_path):
    import timm

    extractor = load_extractor("timm:vit_tiny_patch16_224", random_weights=True)
    torch.save(extractor.network.state_dict(), tmp_path / "vit.pth")
    again = load_extractor("timm:vit_tiny_patch16_224", weights=tmp_path / "vit.pth")
    assert (extractor.name, again.name) == ("timm:vit_tiny_patch16_224-random", "timm:vit_tiny_patch16_224")
    found = again(pictures())["pool"]
    assert found.shape == (3, 192) and torch.equal(found, extractor(pictures())["pool"])
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(extractor.network) | dict(crop_pct=1.0))  # on PIL images
    pixels = torch.stack([transform(Image.fromarray(image.numpy())) for image in pictures()])
    with torch.no_grad():
        expected = extractor.network(pixels)
    assert (found - expected).norm() < 2e-2 * expected.norm()  # Pillow rounds between its two passes, torch does not


def test_dinov2_positions_are_interpolated_as_its_own_code_does(monkeypatch):
    monkeypatch.setattr(features, "DINOV2", "vit_small_patch14_dinov2.lvd142m")  # the large one takes 1.2 GB
    extractor = load_extractor("dinov2", random_weights=True)
    assert extractor.name == "dinov2-random" and extractor.size == (224, 224)
    network = features.TimmFeatures("vit_small_patch14_dinov2.lvd142m", random_weights=True).network  # as timm makes it, 518 pixels
    table = network.pos_embed.detach()
    grid = table[:, 1:].reshape(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = torch.nn.functional.interpolate(grid, scale_factor=(16.1 / 37, 16.1 / 37), mode="bicubic")
    assert torch.equal(extractor.network.pos_embed, torch.cat([table[:, :1], grid.flatten(2).mT], dim=1))
    found = extractor(pictures(1))["pool"]
    assert found.shape == (1, 384) and found.isfinite().all()


def test_the_bundled_encoder_offline():
    images, labels = digits()
    extractor, encoder = load_extractor("digits"), SmallEncoder.load("digits")
    found = extractor(images[:200])
    assert torch.allclose(found["logits"], encoder(to_pixels(images[:200])), atol=1e-5)
    assert (found["logits"].argmax(1) == labels[:200]).float().mean() > 0.95
    assert torch.allclose(found["pool"] @ encoder.classifier.weight.T + encoder.classifier.bias, found["logits"], atol=1e-5)


def test_any_encoder_file_and_any_registered_name(tmp_path, monkeypatch):
    encoder = SmallEncoder(3, 5, 4, width=8)
    encoder.save(tmp_path / "mine.safetensors")
    extractor = load_extractor(tmp_path / "mine.safetensors")
    assert extractor.name == "mine" and extractor(pictures())["pool"].shape == (3, 32)

    monkeypatch.setattr(features, "BUILDERS", dict(features.BUILDERS))

    @features.register("mean colour")
    class MeanColour(features.Extractor):
        def __init__(self, weights=None, random_weights=False):
            super().__init__("mean colour", torch.nn.Conv2d(3, 3, 1))

        def extract(self, images):
            return dict(pool=images.float().mean((1, 2)))

    assert torch.allclose(load_extractor("mean colour")(pictures())["pool"], pictures().float().mean((1, 2)))
    with pytest.raises(ValueError, match="got 'vgg', expected digits, dinov2, inception, mean colour, timm:MODEL"):
        load_extractor("vgg")
    with pytest.raises(ValueError, match="timm knows no model 'nonsense'"):
        load_extractor("timm:nonsense")


@pytest.mark.parametrize("images, message", [
    (pictures().float(), "got torch.float32"), (pictures()[0], r"shape \(40, 40, 3\)"), (pictures(channels=4), "expected uint8"),
    (pictures(channels=3), "got 3 channels, but digits takes 1"),
])
def test_what_is_no_image(images, message):
    with pytest.raises(ValueError, match=message):
        load_extractor("digits")(images)


def test_gray_images_serve_a_colour_network():
    buffer = io.BytesIO()
    Image.fromarray(pictures(1, channels=1)[0, :, :, 0].numpy()).save(buffer, "png")
    colour = torch.from_numpy(np.asarray(Image.open(buffer).convert("RGB")).copy())[None]
    extractor = load_extractor("timm:vit_tiny_patch16_224", random_weights=True)
    assert torch.equal(extractor(pictures(1, channels=1))["pool"], extractor(colour)["pool"])
