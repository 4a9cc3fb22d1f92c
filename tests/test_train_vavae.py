"""train/vavae.py: short runs on the digits and on a folder, stages, interruption, processes, and the assets that a long run made."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit.checkpoint import load_tensors
from lightningdit.config import ConfigError, VAVAEConfig, load
from lightningdit.distributed import generator_for, seed_for
from lightningdit.images import digits, to_pixels
from lightningdit.latents import batch_indices
from lightningdit.log import read_log
from lightningdit.metrics import classifier_accuracy, psnr
from lightningdit.optim import lr_at
from lightningdit.tokenizer import foundation, vavae
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.data import TokenizerImages, split
from lightningdit.tokenizer.foundation import SmallEncoder
from lightningdit.tokenizer.losses import LatentProjection, generator_loss
from lightningdit.tokenizer.vavae import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "train" / "configs"
SCRIPT = runpy.run_path(str(ROOT / "train" / "vavae.py"))
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


def train(run, *arguments, short=SHORT):
    SCRIPT["main"](["--run", str(run), *short, *map(str, arguments)])
    return read_log(run)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vavae")
    train(folder)
    return folder


def test_losses_fall_and_are_logged(run):
    lines = read_log(run)
    steps, report = [line for line in lines if "loss" in line], lines[-1]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert {"rec_loss", "nll_loss", "kl_loss", "vf_loss", "vf_weight", "lr", "images_per_second"} <= steps[0].keys()
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
    for name, rows in (("reconstructions", 3), ("latent_map", 3)):
        picture = np.asarray(Image.open(run / "samples" / f"{name}_{STEPS:07d}.png"))
        assert picture.shape[0] > rows * 8 and picture.std() > 20
    assert {"config.yaml", "environment.json", "log.jsonl", "checkpoints", "tensorboard"} <= {path.name for path in run.iterdir()}


def test_it_computes_what_a_plain_loop_computes(run):
    """The autoencoder of the run, bit by bit, from the objective written out as one process does it with the whole batch at once."""
    config, encoder = load(VAVAEConfig, run / "config.yaml"), SmallEncoder.load(run / "encoder.safetensors")
    a, c, images = config.autoencoder, config.loss, digits()[0]
    images = images[split(len(images), config.data.val_fraction, config.seed)[1]]
    torch.set_num_threads(1)
    torch.manual_seed(seed_for(config.seed, "autoencoder"))
    autoencoder = AutoencoderKL(in_channels=1, out_channels=1, ch=a.ch, ch_mult=a.ch_mult, num_res_blocks=a.num_res_blocks, resolution=8,
                                z_channels=a.z_channels, embed_dim=a.z_channels, attn_resolutions=(), num_groups=a.num_groups)
    autoencoder.to(memory_format=torch.channels_last)
    projection = LatentProjection(a.z_channels, encoder.feature_channels)
    optimizer = torch.optim.Adam([*autoencoder.parameters(), *projection.parameters()], betas=config.optim.betas, fused=True)
    for step in range(STEPS):
        x = to_pixels(images[batch_indices(step, config.batch_size, len(images), config.seed)])
        posterior = autoencoder.encode(x)
        z = posterior.sample(generator_for(config.seed, "posterior", step))
        loss, _ = generator_loss(
            x, autoencoder.decode(z), posterior, projection(z), encoder.features(x), encoder_layer=autoencoder.encoder.conv_out.weight,
            kl_weight=c.kl_weight, vf_weight=c.vf_weight, cos_margin=c.cos_margin, distmat_margin=c.distmat_margin)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, lr=config.optim.lr, steps=STEPS, warmup=config.optim.warmup, schedule=config.optim.schedule)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    trained = Tokenizer.load(run / "tokenizer.safetensors").autoencoder.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in autoencoder.state_dict().items())


@pytest.mark.parametrize(("chosen", "layout"), [(None, torch.channels_last), (True, torch.channels_last), (False, torch.contiguous_format)])
def test_convolutions_are_channels_last_unless_told_otherwise(chosen, layout):
    config = VAVAEConfig(channels_last=chosen)
    config.loss.perceptual_weight = 0.0
    nets = SCRIPT["build_networks"](config, None, torch.device("cpu"))
    assert nets.memory_format == layout
    assert nets.autoencoder.encoder.down[0].block[0].conv1.weight.is_contiguous(memory_format=layout)


def test_same_seed_same_bytes(run, tmp_path):
    train(tmp_path / "again")
    train(tmp_path / "other", "--seed", "1", "--steps", "6")
    for name in ("tokenizer.safetensors", "encoder.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes(), name
    tokenizers = [Tokenizer.load(folder / "tokenizer.safetensors").sha256 for folder in (run, tmp_path / "again", tmp_path / "other")]
    assert tokenizers[0] == tokenizers[1] != tokenizers[2]


def test_without_alignment_there_is_no_encoder(tmp_path):
    lines = train(tmp_path / "run", "--loss.vf-weight", "0", "--steps", "4", "--optim.warmup", "0")
    assert "vf_loss" not in lines[0] and lines[0]["rec_loss"] > 0 and "encoder_accuracy" not in lines[-1]
    assert not (tmp_path / "run" / "encoder.safetensors").exists()
    assert np.asarray(Image.open(tmp_path / "run" / "samples" / "latent_map_0000004.png")).std() > 20


# stages, resumption, processes

# Three stages on the digits, a discriminator of one layer, a running average: 5 + 4 + 3 steps.
STAGED = """
precision: fp32
batch_size: 16
threads: 1
log_every: 4
checkpoint_every: 4
sample_every: 12
data: {image_size: 8, channels: 1}
encoder: {steps: 5, batch_size: 32, width: 8}
autoencoder: {ch: 8, ch_mult: [1, 1], num_res_blocks: 1, z_channels: 4, attn_resolutions: [], num_groups: 8}
loss: {kl_weight: 1.0e-3, perceptual_weight: 0.0, disc_layers: 1, disc_width: 8, disc_weight: 0.5}
optim: {lr: 1.0e-3, ema: 0.9}
stages:
  - {steps: 5, vf_weight: 0.5, cos_margin: 0.0, distmat_margin: 0.0, disc_start: 3}
  - {steps: 4, vf_weight: 0.0, disc_start: 1, lr: 5.0e-4}
  - {steps: 3, vf_weight: 0.1, disc_start: 0}
"""


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged")
    (folder / "staged.yaml").write_text(STAGED)
    train(folder / "run", short=["--config", str(folder / "staged.yaml")])
    return folder


def steps_of(run):
    timing = ("images_per_second", "seconds")
    return [{name: value for name, value in line.items() if name not in timing} for line in read_log(run) if "loss" in line]


def test_stages_switch_at_their_batch(staged):
    """The discriminator counts batches of its stage; what is not on is neither computed nor logged."""
    lines = steps_of(staged / "run")
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines if "g_loss" in line] == [4, 5, 7, 8, 9, 10, 11, 12]
    assert all({"d_weight", "disc_loss"} <= line.keys() for line in lines if "g_loss" in line)
    assert [line["step"] for line in lines if "vf_loss" in line] == [1, 2, 3, 4, 5, 10, 11, 12]
    assert [line["lr"] for line in lines] == [1e-3] * 5 + [5e-4] * 4 + [1e-3] * 3
    # The margins of stage 1 are 0, those of stage 3 the defaults, which forgive more.
    assert min(line["vf_loss"] for line in lines[:5]) > max(line["vf_loss"] for line in lines[9:])


@pytest.mark.parametrize("life", [3, 5, 8])
def test_resumed_is_bitwise_the_same(staged, tmp_path, life):
    """Ends within a stage before its discriminator starts, at the end of a stage, and within the next; then the same command goes on."""
    command = ["--config", str(staged / "staged.yaml")]
    train(tmp_path / "run", "--steps", life, short=command)
    shutil.copytree(tmp_path / "run", tmp_path / "killed")
    (tmp_path / "killed" / "tokenizer.safetensors").unlink()
    train(tmp_path / "killed", short=command)
    assert steps_of(tmp_path / "killed") == steps_of(staged / "run")
    for name in ("generator", "discriminator", "ema", "generator_trainer", "discriminator_trainer"):
        ours, theirs = (load_tensors(run / "checkpoints" / "step_0000012", name) for run in (tmp_path / "killed", staged / "run"))
        assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    ours, theirs = (Tokenizer.load(run / "tokenizer.safetensors").sha256 for run in (tmp_path / "killed", staged / "run"))
    assert ours == theirs


def test_the_tokenizer_is_the_average(staged):
    ema = load_tensors(staged / "run" / "checkpoints" / "step_0000012", "ema")
    trained = load_tensors(staged / "run" / "checkpoints" / "step_0000012", "generator")
    tokenizer = Tokenizer.load(staged / "run" / "tokenizer.safetensors").autoencoder.state_dict()
    assert all(torch.equal(value, tokenizer[name]) for name, value in ema.items())
    assert not torch.equal(ema["encoder.conv_in.weight"], trained["autoencoder.encoder.conv_in.weight"])


def test_micro_batches_and_processes_change_nothing_but_rounding(staged, tmp_path):
    """Two processes (gloo) with two micro-batches each, before the discriminator, whose BatchNorm is that of a micro-batch, begins."""
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0", "--rdzv-backend", "c10d",
               "--rdzv-endpoint", "localhost:0", "--", str(ROOT / "train" / "vavae.py"), "--config", str(staged / "staged.yaml"),
               "--run", str(tmp_path / "run"), "--micro-batch", "4", "--steps", "3"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    got, expected = steps_of(tmp_path / "run"), steps_of(staged / "run")[:3]
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            assert ours[name] == pytest.approx(value, rel=1e-4), name
    assert result.stdout.count("tokenizer   ") == 1 and Tokenizer.load(tmp_path / "run" / "tokenizer.safetensors").latent_channels == 4


def test_another_configuration_in_the_same_run(staged, tmp_path):
    shutil.copytree(staged / "run", tmp_path / "run")
    with pytest.raises(ConfigError, match="(?s)another configuration.*optim.lr: 0.001 -> 0.5"):
        train(tmp_path / "run", "--optim.lr", "0.5", short=["--config", str(staged / "staged.yaml")])


# own images


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for label, name in enumerate(("dark", "light")):
        (folder / name).mkdir()
        for i in range(40):
            array = np.clip(rng.normal(60 + 130 * label, 20, (20, 24, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(array).save(folder / name / f"{i}.png")
    return folder


def test_own_images(pictures, tmp_path):
    lines = train(tmp_path / "run", "--data.path", pictures, "--data.image-size", "16", "--data.channels", "3",
                  "--autoencoder.ch-mult", "1", "1", "2", "--steps", "30")
    tokenizer = Tokenizer.load(tmp_path / "run" / "tokenizer.safetensors")
    assert (tokenizer.downsample, tokenizer.image_channels, tokenizer.image_mode) == (4, 3, "RGB")
    assert lines[-1]["encoder_accuracy"] > 0.9 and lines[-1]["psnr_db"] > 10 and "classifier_originals" not in lines[-1]


OWN = ["--data.image-size", "32", "--data.channels", "3", "--data.val-fraction", "0.2", "--autoencoder.ch-mult", "1", "1", "2",
       "--steps", "4", "--batch-size", "8", "--optim.warmup", "0", "--log-every", "2", "--sample-num", "4", "--statistics-images", "16",
       "--optim.schedule", "constant", "--encoder.name", "vit_tiny_patch16_224", "--encoder.weights", "random"]


def test_everything_on(pictures, tmp_path):
    """A foundation model, LPIPS, the discriminator, bf16, flips and random crops from disk; resumed in the middle of an epoch."""
    arguments = ["--data.path", pictures, *OWN, "--loss.perceptual-weight", "1", "--loss.perceptual-net", "squeeze",
                 "--loss.perceptual-random-weights", "--loss.disc-weight", "0.5", "--loss.disc-start", "1", "--loss.disc-layers", "2",
                 "--loss.disc-width", "8", "--data.flip", "--precision", "bf16", "--channels-last", "True", "--optim.ema", "0.9",
                 "--checkpoint-every", "2"]
    train(tmp_path / "whole", *arguments)
    train(tmp_path / "run", *arguments, "--steps", "2")
    train(tmp_path / "run", *arguments)
    assert steps_of(tmp_path / "run") == steps_of(tmp_path / "whole")
    lines = steps_of(tmp_path / "run")
    assert all(np.isfinite(list(line.values())).all() for line in lines)
    assert ["g_loss" in line for line in lines] == [False, True, True, True]
    assert lines[0]["nll_loss"] == pytest.approx(lines[0]["rec_loss"] * 3 * 32 * 32, rel=1e-4)


def test_kept_pixels_and_features_change_nothing(pictures, tmp_path):
    """Two epochs with the features of each image computed anew, and with those of its first time."""
    arguments = ["--data.path", pictures, *OWN, "--data.crop", "center", "--data.in-memory", "--steps", "8", "--batch-size", "16"]
    plain, kept = train(tmp_path / "plain", *arguments), train(tmp_path / "kept", *arguments, "--encoder.cache")
    for ours, theirs in zip(kept[:8], plain[:8], strict=True):
        assert ours["vf_loss"] == pytest.approx(theirs["vf_loss"], rel=1e-4) and ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_batches_of_all_ranks_are_those_of_one(pictures):
    """For images in memory and on disk; and a run that starts later goes on where it would be."""
    on_disk = dict(path=pictures, image_size=8, channels=3, val_fraction=0.1, workers=2)
    for data in (TokenizerImages(), TokenizerImages(**on_disk), TokenizerImages(**on_disk, crop="center", in_memory=True)):
        def take(count, *arguments, data=data):
            batches = data.batches(16, 3, *arguments)
            return [next(batches) for _ in range(count)]

        whole = take(7)
        for got, expected in zip(take(2, 5), whole[5:], strict=True):
            assert all(torch.equal(ours, theirs) for ours, theirs in zip(got, expected, strict=True))
        for parts in zip(whole, take(7, 0, 0, 2), take(7, 0, 1, 2), strict=True):
            for one, even, odd in zip(*parts, strict=True):
                assert torch.equal(one[::2], even) and torch.equal(one[1::2], odd)
        epoch = torch.cat([indices for *_, indices in whole])[: len(data) // 16 * 16]
        assert len(epoch.unique()) == len(epoch)


def test_held_out_images_are_not_trained_on(pictures, tmp_path):
    data = TokenizerImages(pictures, image_size=8, channels=3, val_fraction=0.25)
    images = torch.cat([next(data.batches(60, 0))[0]])
    assert len(data) == 60 and len(data.held_out[1]) == 20 and data.labels.bincount().sum() == 60
    sample = torch.cat(list(data.sample(60, 7, 0)))
    assert len(torch.cat([sample, data.held_out[0]]).flatten(1).unique(dim=0)) == 80 and len(images) == 60
    other = TokenizerImages(pictures, val_path=pictures, image_size=8, channels=3)
    assert len(other) == 80 and len(other.held_out[1]) == 80 and other.same_classes


# what can go wrong


@pytest.mark.parametrize("arguments, message", [
    (["--data.image-size", "16"], "data.path"), (["--data.path", "nowhere", "--data.image-size", "16"], "nowhere"),
    (["--autoencoder.num-groups", "3"], "autoencoder.num_groups"), (["--loss.kl-weight", "-1"], "loss.kl_weight"),
    (["--data.path", "nowhere", "--data.image-size", "9"], "data.image_size: got 9"), (["--micro-batch", "5"], "micro_batch: got 5"),
    (["--loss.perceptual-weight", "1"], "0 with data.image_size = 8: vgg needs 16 pixels"),
    (["--loss.disc-weight", "1"], "loss.disc_layers"),
    (["--data.path", "nowhere", "--encoder.cache"], "encoder.cache: got True, expected data.crop = center"),
    (["--data.path", "nowhere", "--data.in-memory"], "data.in_memory: got True"),
])
def test_impossible_settings_leave_no_run(tmp_path, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path / "run", *arguments)
    assert not (tmp_path / "run").exists()


def test_a_diverging_run_stops(tmp_path):
    with pytest.raises(SystemExit, match="non-finite loss .* at or before step 10: .*There is no checkpoint. A lower optim.lr"):
        train(tmp_path / "run", "--optim.lr", "1e30", "--steps", "20", "--encoder.steps", "2")
    assert not (tmp_path / "run" / "tokenizer.safetensors").exists() and not (tmp_path / "run" / "checkpoints").exists()


# recipes


def test_plan_of_the_official_recipe():
    config = load(VAVAEConfig, CONFIGS / "vavae_f16d32_dinov2.yaml")
    an_epoch = 1_281_167 / 256
    first, second, third = config.plan(1_281_167)
    assert [round((s.end - s.start) / an_epoch, 2) for s in (first, second, third)] == [100, 15, 15]
    assert (first.start, second.start, third.start) == (0, first.end, second.end)
    assert [(s.vf_weight, s.cos_margin, s.distmat_margin, s.lr, s.disc_start - s.start) for s in (first, second, third)] == [
        (0.5, 0.0, 0.0, 1e-4, 2500), (0.1, 0.0, 0.0, 1e-4, 0), (0.1, 0.5, 0.25, 1e-4, 0)]
    c, a = config.loss, config.autoencoder
    assert (c.kl_weight, c.perceptual_weight, c.disc_weight, c.adaptive_vf, c.perceptual_net) == (1e-6, 1, 0.5, True, "vgg")
    assert (a.ch, a.ch_mult, a.num_res_blocks, a.z_channels, a.attn_resolutions) == (128, (1, 1, 2, 2, 4), 2, 32, (16,))
    assert (config.batch_size, config.optim.betas, config.optim.ema) == (256, (0.5, 0.9), 0)
    assert (config.data.crop, config.data.flip) == ("random", False)


@pytest.mark.parametrize("name, encoder", [("f16d32_dinov2_short", "dinov2-l"), ("f16d32_mae", "mae-l")])
def test_plan_of_the_short_recipe(name, encoder):
    config = load(VAVAEConfig, CONFIGS / f"vavae_{name}.yaml")
    (stage,) = config.plan(1_281_167)
    assert round(stage.end / (1_281_167 / 256)) == 50 and config.encoder.name == encoder
    assert (stage.vf_weight, stage.cos_margin, stage.distmat_margin, stage.disc_start) == (0.1, 0.5, 0.25, 2500)


def test_plan_stops_after_steps():
    config = load(VAVAEConfig, CONFIGS / "vavae_tiny_imagenet.yaml")
    full = config.plan(1280)
    assert [(s.start, s.end) for s in full] == [(0, 200), (200, 300)]
    config.steps = 250
    assert [(s.start, s.end) for s in config.plan(1280)] == [(0, 200), (200, 250)]
    config.steps = 150
    assert [(s.start, s.end) for s in config.plan(1280)] == [(0, 150)]


@pytest.mark.parametrize("stages, message", [
    ("[{epochs: 1, steps: 2}]", r"stages\[0\].epochs and stages\[0\].steps: got \(1.0, 2\)"), ("[{lr: 1.0}]", "one of the two, positive"),
    ("[{steps: 2}, {steps: 1, cos_margin: 2.0}]", r"stages\[1\].cos_margin"), ("[{step: 2}]", r"stages\[0\].step: unknown key"),
])
def test_impossible_stages(tmp_path, stages, message):
    (tmp_path / "c.yaml").write_text(STAGED.partition("stages:")[0] + f"stages: {stages}\n")
    with pytest.raises(ConfigError, match=message):
        load(VAVAEConfig, tmp_path / "c.yaml")


def test_dry_run_of_the_official_recipe(tmp_path, capsys):
    assert SCRIPT["main"](["--config", str(CONFIGS / "vavae_f16d32_dinov2.yaml"), "--dry-run", "--run", str(tmp_path / "run")]) == 0
    printed = capsys.readouterr().out
    for text in ("69.84 M    autoencoder", "2.77 M    discriminator", "16 x 16 of 32 channels", "steps 1 to 499955, 100.0 epochs",
                 "discriminator from step 2501", "steps 574949 to 649941, 15.0 epochs: vf_weight 0.1, margins 0.5 / 0.25", "bf16",
                 "activations of 32 images, autoencoder"):
        assert text in printed, printed
    assert not (tmp_path / "run").exists()


# the bundled assets


def test_bundled_assets_are_small():
    assert sum(os.path.getsize(path) for path in (*vavae.BUNDLED.values(), *foundation.BUNDLED.values())) < 2e6


def test_bundled_tokenizer_does_what_its_file_says():
    tokenizer = Tokenizer.load("digits")
    images, labels = digits()
    held_out, kept = split(len(images), 0.1, tokenizer.provenance["seed"])
    latents = tokenizer.normalise(tokenizer.encode(to_pixels(images)).mean)
    reconstructions = tokenizer.decode_uint8(latents)
    psnr_db = psnr(images[held_out], reconstructions[held_out]).mean().item()
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
    held_out, _ = split(len(images), 0.1, Tokenizer.load("digits").provenance["seed"])
    with torch.no_grad():
        predicted = encoder(to_pixels(images[held_out])).argmax(1)
    assert (predicted == labels[held_out]).float().mean() > 0.97
