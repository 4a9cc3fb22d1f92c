"""Pictures of sampling: what stands in which cell."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import cli, flow, pictures, sampler
from lightningdit import config as configuration
from lightningdit.config import DiTConfig
from lightningdit.log import image_grid
from lightningdit.model import LightningDiT
from lightningdit.tokenizer.vavae import load_tokenizer

ROOT = Path(__file__).resolve().parent.parent

SETTINGS = dict(latent_shape=(4, 4, 4), num_classes=5, num_steps=6, shift=0.5, guidance_scale=2.0, guidance_interval=(0.2, 0.9))


class Decoder:
    def decode_uint8(self, latents):
        return (latents * 20 + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = LightningDiT(input_size=4, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=5, use_rmsnorm=True).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def images(model, labels, seeds, **changes):
    return sampler.sample_images(model, Decoder(), labels=labels, seeds=seeds, **SETTINGS | changes)


@pytest.mark.parametrize("method", ["euler", "unipc"])
def test_strip_goes_from_noise_to_the_image(model, method):
    strip = pictures.denoising_strip(model, Decoder(), labels=[1, 3], seeds=[4, 9], columns=7, **SETTINGS, method=method)
    assert strip.shape == (4, 7, 4, 4, 4)
    assert torch.equal(strip[[0, 2], 0], Decoder().decode_uint8(sampler.initial_noise([4, 9], (4, 4, 4))))
    assert torch.equal(strip[[0, 2], -1], images(model, [1, 3], [4, 9], method=method)) and torch.equal(strip[0, -1], strip[1, -1])
    predict = sampler.GuidedModel(model, torch.tensor([1, 3]), 5, 2.0, (0.2, 0.9))
    noise = sampler.initial_noise([4, 9], (4, 4, 4))
    with torch.no_grad():
        data = flow.data_from(predict(noise, 0.0), noise, torch.tensor(0.0))
    assert (strip[[1, 3], 0].int() - Decoder().decode_uint8(data).int()).abs().max() <= 1  # in another batch: rounding


def test_sweep_has_a_scale_a_column(model):
    sweep = pictures.guidance_sweep(model, Decoder(), labels=[1, 3], seeds=[4, 9], scales=[1.0, 2.0, 5.0], **SETTINGS)
    for column, scale in enumerate([1.0, 2.0, 5.0]):
        assert torch.equal(sweep[:, column], images(model, [1, 3], [4, 9], guidance_scale=scale))
    assert not torch.equal(sweep[:, 0], sweep[:, 2])


def test_interpolation_of_seeds_ends_at_both(model):
    rows = pictures.seed_interpolation(model, Decoder(), labels=[1, 3], seeds=[4, 9], columns=5, **SETTINGS)
    assert torch.equal(rows[:, 0], images(model, [1, 3], [4, 9]))
    assert (rows[:, -1].int() - images(model, [1, 3], [5, 10]).int()).abs().max() <= 1
    steps = (rows[:, 1:].int() - rows[:, :-1].int()).abs().float().mean((1, 2, 3, 4))
    whole = (rows[:, -1].int() - rows[:, 0].int()).abs().float().mean((1, 2, 3))
    assert (steps < whole).all() and (steps > 0).all()


def test_interpolation_of_classes_ends_at_both(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = pictures.class_interpolation(model, Decoder(), labels=[1, 3], seeds=[4, 9], columns=5, **SETTINGS)
    for i, (first, second) in enumerate([(1, 3), (3, 1)]):
        assert torch.equal(rows[i, 0], images(model, [first], [4 + 5 * i])[0])
        assert torch.equal(rows[i, -1], images(model, [second], [4 + 5 * i])[0])
        assert len(torch.unique(rows[i].flatten(1), dim=0)) == 5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_slerp_keeps_the_norm():
    a, b = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(pictures.slerp(a, b, 0.0), a, atol=1e-6) and torch.allclose(pictures.slerp(a, b, 1.0), b, atol=1e-6)
    assert float(pictures.slerp(a, b, 0.5).norm()) == pytest.approx(float(a.norm() + b.norm()) / 2, rel=1e-5)
    assert torch.equal(pictures.slerp(a, a, 0.3), a)


def test_command(model, tmp_path, monkeypatch):
    settings = configuration.load(DiTConfig, ROOT / "train" / "configs" / "digits.yaml")
    settings.data.num_classes, settings.model.depth, settings.model.hidden_size, settings.sample.num_steps = 10, 1, 48, 4
    settings.precision = "fp32"  # as the comparison below
    torch.manual_seed(0)
    model = LightningDiT(**settings.model_arguments()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    decoder = load_tokenizer("digits")
    monkeypatch.setattr(cli, "load_run", lambda *a: (settings, model, decoder, None))
    seen = {}
    for show in ("strip", "guidance", "seeds", "classes"):
        out = tmp_path / f"{show}.png"
        options = ["--show", show, "--num", "2", "--columns", "5", "--scales", "1", "2", "4", "--out", str(out)]
        assert cli.main(["sample", "--checkpoint", "run", *options]) == 0
        seen[show] = np.asarray(Image.open(out))
    tile = 50  # 48 pixels and a gap
    assert {show: ((h + 2) // tile, (w + 2) // tile) for show, (h, w, _) in ((show, picture.shape) for show, picture in seen.items())} == {
        "strip": (4, 5), "guidance": (2, 3), "seeds": (2, 5), "classes": (2, 5)}
    assert np.array_equal(seen["strip"][:48, -48:], seen["seeds"][:48, :48])  # the same image
    out = tmp_path / "images.png"
    assert cli.main(["sample", "--checkpoint", "run", "--classes", "7,3", "--seed", "5", "--num", "5", "--out", str(out)]) == 0
    images = sampler.sample_images(model, decoder, labels=[7, 3, 7, 3, 7], seeds=range(5, 10), **settings.sampling_arguments())
    assert len(torch.unique(images, dim=0)) == 5
    assert np.array_equal(np.asarray(Image.open(out)), image_grid(images, columns=2))  # a column a class


def test_what_cannot_be_shown(model, tmp_path):
    with pytest.raises(ValueError, match="method: got 'dopri5', expected one of euler"):
        pictures.denoising_strip(model, Decoder(), labels=[1], seeds=[4], **SETTINGS, method="dopri5")
    with pytest.raises(ValueError, match="columns: got 1"):
        pictures.seed_interpolation(model, Decoder(), labels=[1], seeds=[4], columns=1, **SETTINGS)
    for options, message in ((["--show", "strip", "--out", "a.npz"], "show: got 'strip', expected images for a.npz"),
                             (["--columns", "1"], "columns: got 1")):
        with pytest.raises(SystemExit, match=re.escape(message)):
            cli.main(["sample", "--checkpoint", str(tmp_path), *options])
