"""train/vavae.py: short runs on the digits and on a folder, and the assets that a long one made."""

import json
import os
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit.images import digits, to_pixels
from lightningdit.metrics import classifier_accuracy
from lightningdit.tokenizer import foundation, vavae
from lightningdit.tokenizer.foundation import SmallEncoder
from lightningdit.tokenizer.vavae import Tokenizer

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parent.parent / "train" / "vavae.py"))
STEPS = 60
SHORT = ["--steps", str(STEPS), "--batch-size", "32", "--encoder.steps", "60", "--encoder.batch-size", "64", "--encoder.lr", "5e-3",
         "--encoder.width", "8", "--autoencoder.ch", "8", "--optim.lr", "5e-3", "--optim.warmup", "5", "--loss.vf-weight", "1",
         "--log-every", "10"]


@pytest.fixture(scope="module", autouse=True)
def threads():
    """The recipe sets one thread for the whole process; the tests after these get back what they had."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def train(run, *arguments):
    SCRIPT["main"](["--run", str(run), *SHORT, *arguments])
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vavae")
    train(folder)
    return folder


def test_losses_fall_and_are_logged(run):
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    steps, report = [line for line in lines if "loss" in line], lines[-1]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"rec_loss", "nll_loss", "kl_loss", "vf_loss", "vf_weight", "lr"} <= steps[0].keys()
    for name, factor in (("rec_loss", 0.7), ("vf_loss", 0.9)):
        assert np.mean([line[name] for line in steps[-5:]]) < factor * np.mean([line[name] for line in steps[:5]]), name
    assert report["psnr_db"] > 10 and report["encoder_accuracy"] > 0.3  # chance is 0.1


def test_what_it_writes(run):
    tokenizer, encoder = Tokenizer.load(run / "tokenizer.safetensors"), SmallEncoder.load(run / "encoder.safetensors")
    assert (tokenizer.downsample, tokenizer.latent_channels, tokenizer.image_channels) == (2, 4, 1)
    assert tokenizer.provenance["steps"] == STEPS
    pixels = to_pixels(digits()[0])
    latents = tokenizer.normalise(tokenizer.encode(pixels).sample(torch.Generator().manual_seed(0)))
    assert latents.mean((0, 2, 3)).abs().max() < 0.1 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.1
    assert encoder.features(pixels[:2]).shape == (2, 16, encoder.feature_channels)
    for name, rows in (("reconstructions.png", 3), ("latent_map.png", 3)):
        picture = np.asarray(Image.open(run / name))
        assert picture.shape[0] > rows * 8 and picture.std() > 20
    assert (run / "config.yaml").is_file() and (run / "environment.json").is_file()


def test_same_seed_same_bytes(run, tmp_path):
    train(tmp_path / "again")
    train(tmp_path / "other", "--seed", "1", "--steps", "6")
    for name in ("tokenizer.safetensors", "encoder.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name
    tokenizers = [Tokenizer.load(folder / "tokenizer.safetensors").sha256 for folder in (run, tmp_path / "again", tmp_path / "other")]
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


def test_without_alignment(tmp_path):
    lines = train(tmp_path / "run", "--loss.vf-weight", "0", "--steps", "4")
    assert "vf_loss" not in lines[0] and lines[0]["rec_loss"] > 0


def test_own_images(tmp_path):
    rng = np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(40):
            array = np.clip(rng.normal(60 + 130 * label, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(array).save(tmp_path / "data" / name / f"{i}.png")
    lines = train(tmp_path / "run", "--data.path", str(tmp_path / "data"), "--data.image-size", "16", "--data.channels", "3",
                  "--autoencoder.ch-mult", "1", "1", "2", "--steps", "30")
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.safetensors")
    assert (tokenizer.downsample, tokenizer.image_channels, tokenizer.image_mode) == (4, 3, "RGB")
    assert lines[-1]["encoder_accuracy"] > 0.9 and lines[-1]["psnr_db"] > 10 and "classifier_originals" not in lines[-1]


@pytest.mark.parametrize("arguments, message", [
    (["--data.image-size", "16"], "data.path"), (["--data.path", "nowhere", "--data.image-size", "16"], "nowhere"),
    (["--autoencoder.num-groups", "3"], "autoencoder.num_groups"), (["--loss.kl-weight", "-1"], "loss.kl_weight"),
    (["--data.path", "nowhere", "--data.image-size", "9"], "data.image_size: got 9"),
])
def test_impossible_settings_leave_no_run(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops(tmp_path):
    with pytest.raises(SystemExit, match="autoencoder's loss is .* at step 10"):
        train(tmp_path / "run", "--optim.lr", "1e30", "--steps", "10", "--encoder.steps", "2")
    assert not (tmp_path / "run" / "tokenizer.safetensors").exists()


# the bundled assets


def test_bundled_assets_are_small():
    assert sum(os.path.getsize(path) for path in (*vavae.BUNDLED.values(), *foundation.BUNDLED.values())) < 2e6


def test_bundled_tokenizer_does_what_its_file_says():
    tokenizer = Tokenizer.load("digits")
    images, labels = digits()
    held_out, kept = SCRIPT["split"](len(images), 0.1, tokenizer.provenance["seed"])
    latents = tokenizer.normalise(tokenizer.encode(to_pixels(images)).mean)
    reconstructions = tokenizer.decode_uint8(latents)
    psnr_db = SCRIPT["psnr"](images[held_out], reconstructions[held_out])
    assert abs(psnr_db - tokenizer.provenance["psnr_db"]) < 0.05 and psnr_db > 27
    mse = (images[held_out].double() - reconstructions[held_out].double()).square().mean((1, 2, 3))
    assert psnr_db == pytest.approx((10 * torch.log10(255**2 / mse)).mean().item(), abs=1e-3)
    assert latents.mean((0, 2, 3)).abs().max() < 0.15 and (latents.std((0, 2, 3)) - 1).abs().max() < 0.15
    assert classifier_accuracy(reconstructions[held_out], labels[held_out], images[kept], labels[kept]) > 0.97
    noisy = latents[held_out] + 0.3 * torch.randn(latents[held_out].shape, generator=torch.Generator().manual_seed(0))
    assert classifier_accuracy(tokenizer.decode_uint8(noisy), labels[held_out], images[kept], labels[kept]) > 0.9


def test_bundled_encoder_knows_the_digits():
    encoder = SmallEncoder.load("digits")
    images, labels = digits()
    held_out, _ = SCRIPT["split"](len(images), 0.1, Tokenizer.load("digits").provenance["seed"])
    with torch.no_grad():
        predicted = encoder(to_pixels(images[held_out])).argmax(1)
    assert (predicted == labels[held_out]).float().mean() > 0.97
