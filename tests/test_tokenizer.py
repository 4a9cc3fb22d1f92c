"""The tokenizer against numbers of the official implementation, its three spaces, its file, and the losses that train it."""

import itertools
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightningdit.checkpoint import CheckpointError
from lightningdit.tokenizer import training
from lightningdit.tokenizer.autoencoder import AutoencoderKL, Posterior
from lightningdit.tokenizer.foundation import SmallEncoder
from lightningdit.tokenizer.vavae import Tokenizer, latent_statistics


def relative_error(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def small_autoencoder(seed=0, **arguments):
    torch.manual_seed(seed)
    return AutoencoderKL(**dict(dict(in_channels=3, out_channels=3, ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, embed_dim=4,
                                     attn_resolutions=(4,), resolution=16, num_groups=4), **arguments))


@pytest.fixture
def tokenizer():
    return Tokenizer(small_autoencoder(), [0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.0])


# autoencoder


@pytest.mark.parametrize("name", ["vavae", "marvae"])
def test_autoencoder_reproduces_the_official_one(golden, name):
    tensors, metadata = golden(name)
    config = metadata["config"]
    model = AutoencoderKL(decoder_attention=config.pop("variant") == "vavae", **{k: v for k, v in config.items() if k != "image_size"})
    model.load_state_dict({k.removeprefix("param."): v.float() for k, v in tensors.items() if k.startswith("param.")})
    with torch.no_grad():
        posterior = model.encode(tensors["x"])
        decoded = model.decode(tensors["mean"])
    nll = posterior.nll(posterior.mean + 0.1)
    for key, got in dict(mean=posterior.mean, logvar=posterior.logvar, kl=posterior.kl(), nll=nll, decoded=decoded).items():
        assert relative_error(got, tensors[key]) < 1e-5, key


def test_posterior():
    moments = torch.cat([torch.full((2, 3, 4, 4), 0.7), torch.full((2, 3, 4, 4), -1.2)], dim=1)
    posterior = Posterior.from_moments(moments)
    normal = torch.distributions.Normal(posterior.mean, posterior.std)
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(posterior.nll(x), -normal.log_prob(x).sum((1, 2, 3)))
    torch.testing.assert_close(posterior.kl(), torch.distributions.kl_divergence(normal, torch.distributions.Normal(0, 1)).sum((1, 2, 3)))
    assert torch.equal(posterior.mode(), posterior.mean)
    many = Posterior(torch.full((200, 3, 8, 8), 0.7), torch.full((200, 3, 8, 8), -1.2)).sample(torch.Generator().manual_seed(0))
    assert abs(many.mean() - 0.7) < 0.01 and abs(many.std() - 2.718281828**-0.6) < 0.01
    draws = [posterior.sample(torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_posterior_clamps_logvar():
    posterior = Posterior(torch.zeros(1, 1, 1, 2), torch.tensor([-1e3, 1e3]).view(1, 1, 1, 2))
    assert posterior.logvar.flatten().tolist() == [-30.0, 20.0] and posterior.sample().isfinite().all()


def test_attention_levels_follow_resolution():
    def levels(module):
        return [len(level.attn) for level in module]

    model = small_autoencoder(attn_resolutions=(16, 4), num_res_blocks=2)
    assert levels(model.encoder.down) == [2, 0, 2] and levels(model.decoder.up) == [3, 0, 3]
    mar = small_autoencoder(attn_resolutions=(16, 4), num_res_blocks=2, decoder_attention=False)
    assert levels(mar.encoder.down) == [2, 0, 2] and levels(mar.decoder.up) == [0, 0, 0] and hasattr(mar.decoder.mid, "attn_1")


def test_other_image_sizes_and_embed_dim():
    model = small_autoencoder(embed_dim=6)
    posterior = model.encode(torch.rand(2, 3, 24, 32))
    assert posterior.mean.shape == (2, 6, 6, 8) and model.decode(posterior.mean).shape == (2, 3, 24, 32)


@pytest.mark.parametrize("arguments, message", [
    (dict(ch=0), "ch: got 0"), (dict(ch_mult=()), "ch_mult"), (dict(ch_mult=(1, 0)), "ch_mult"), (dict(num_groups=3), "ch \\* 1 is 8"),
    (dict(resolution=18), "resolution: got 18"), (dict(z_channels=2.5), "z_channels: got 2.5"),
])
def test_impossible_autoencoders(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_autoencoder(**arguments)


@pytest.mark.parametrize("x, message", [
    (torch.zeros(1, 3, 16, 18), "16x18"), (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), "uint8"),
    (torch.zeros(1, 1, 16, 16), "expected \\(B, 3, H, W\\)"), (torch.zeros(3, 16, 16), "expected \\(B, 3, H, W\\)"),
])
def test_impossible_images(x, message):
    with pytest.raises(ValueError, match=message):
        small_autoencoder().encode(x)


def test_impossible_latents():
    with pytest.raises(ValueError, match="z: got .*expected \\(B, 4, H, W\\)"):
        small_autoencoder().decode(torch.zeros(1, 5, 4, 4))


# tokenizer


def test_spaces(tokenizer):
    raw = torch.randn(2, 4, 3, 5)
    normalised = tokenizer.normalise(raw)
    for c, (mean, std) in enumerate(zip([0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.0], strict=True)):
        torch.testing.assert_close(normalised[:, c], (raw[:, c] - mean) / std)
    torch.testing.assert_close(tokenizer.denormalise(normalised), raw)
    torch.testing.assert_close(tokenizer.decode(normalised), tokenizer.autoencoder.decode(raw), rtol=1e-4, atol=1e-5)
    assert tokenizer.normalise(raw.bfloat16()).dtype == tokenizer.denormalise(raw.bfloat16()).dtype == torch.bfloat16


def test_decode_uint8_truncates(tokenizer, monkeypatch):
    values = torch.tensor([-2.0, -1.0, -1.0 + 1 / 255, 0.0, 0.996, 1.0, 2.0])
    monkeypatch.setattr(tokenizer.autoencoder, "decode", lambda z: values.expand(1, 3, 1, 7))
    assert tokenizer.decode_uint8(torch.zeros(1, 4, 1, 1))[0, 0, :, 0].tolist() == [0, 0, 1, 128, 254, 255, 255]
    assert tokenizer.decode_uint8(torch.zeros(1, 4, 1, 1)).shape == (1, 1, 7, 3)


def test_latent_statistics():
    raw = torch.randn(50, 3, 4, 4) * torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1) + 5
    mean, std = latent_statistics(raw)
    torch.testing.assert_close(mean, raw.mean((0, 2, 3)))
    torch.testing.assert_close(std, raw.std((0, 2, 3), unbiased=True))
    assert abs(std - raw.std((0, 2, 3), unbiased=False)).min() > 1e-5
    with pytest.raises(ValueError, match="at least two"):
        latent_statistics(torch.zeros(1, 3, 1, 1))


@pytest.mark.parametrize("mean, std, message", [
    ([0.0] * 3, [1.0] * 4, "latent_mean"), ([0.0] * 4, [1.0] * 3 + [0.0], "latent_std.*positive"),
    ([0.0] * 4, [1.0] * 3 + [float("nan")], "latent_std"),
])
def test_statistics_must_fit(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(small_autoencoder(), mean, std)


def test_save_and_load(tokenizer, tmp_path):
    tokenizer.provenance = dict(data="noise")
    tokenizer.save(tmp_path / "t.safetensors")
    loaded = Tokenizer.load(tmp_path / "t.safetensors")
    x = torch.rand(2, 3, 16, 16)
    assert torch.equal(loaded.encode(x).mean, tokenizer.encode(x).mean) and torch.equal(loaded.latent_std, tokenizer.latent_std)
    assert (loaded.downsample, loaded.latent_channels, loaded.image_channels, loaded.image_mode) == (4, 4, 3, "RGB")
    assert loaded.sha256 == tokenizer.sha256 and loaded.provenance == dict(data="noise")
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert {"encoder.down.0.block.0.norm1.weight", "post_quant_conv.bias"} <= load_file(tmp_path / "t.safetensors").keys()
    tokenizer.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "t.safetensors").read_bytes()


def test_sha256_sees_weights_and_statistics(tokenizer):
    seen = {tokenizer.sha256}
    seen.add(Tokenizer(small_autoencoder(), [0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.0]).sha256)
    assert len(seen) == 1
    seen.add(Tokenizer(small_autoencoder(), [0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.1]).sha256)
    seen.add(Tokenizer(small_autoencoder(seed=1), [0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.0]).sha256)
    assert len(seen) == 3


def rewrite(path, change):
    """Applies change(tensors, about) to a saved tokenizer."""
    with safe_open(path, "pt") as file:
        about = json.loads(file.metadata()["lightningdit"])
    tensors = load_file(path)
    change(tensors, about)
    save_file(tensors, path, {"lightningdit": json.dumps(about)})


@pytest.mark.parametrize("change, message", [
    (lambda tensors, about: about.pop("latent_mean"), "no latent statistics, .*train/vavae.py"),
    (lambda tensors, about: about.update(kind="encoder"), "kind 'encoder', expected a tokenizer"),
    (lambda tensors, about: about["config"].update(depth=3), "describes no autoencoder.*depth"),
    (lambda tensors, about: tensors.pop("encoder.conv_in.bias"), "missing: encoder.conv_in.bias"),
    (lambda tensors, about: tensors.update(extra=torch.zeros(1)), "unexpected: extra"),
    (lambda tensors, about: tensors.update({"quant_conv.bias": torch.zeros(3)}), r"misshaped: quant_conv.bias \(3,\) instead of \(8,\)"),
    (lambda tensors, about: about.update(latent_mean=[0.0]), "latent_mean"),
])
def test_files_that_do_not_fit(tokenizer, tmp_path, change, message):
    tokenizer.save(tmp_path / "t.safetensors")
    rewrite(tmp_path / "t.safetensors", change)
    with pytest.raises(ValueError, match=message):
        Tokenizer.load(tmp_path / "t.safetensors")


def test_damaged_and_missing_files(tokenizer, tmp_path):
    path = tmp_path / "t.safetensors"
    tokenizer.save(path)
    data = path.read_bytes()
    for damaged in (b"", data[: len(data) // 2], b"<html>" + bytes(100)):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match="not a whole .safetensors file"):
            Tokenizer.load(path)
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="no 'lightningdit' metadata"):
        Tokenizer.load(path)
    with pytest.raises(FileNotFoundError, match="bundled: digits"):
        Tokenizer.load("digit")


def test_a_failed_save_leaves_the_old_file(tokenizer, tmp_path, monkeypatch):
    path = tmp_path / "t.safetensors"
    tokenizer.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    tokenizer.latent_mean += 1
    with pytest.raises(OSError, match="No space left"):
        tokenizer.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["t.safetensors"]


# the frozen encoder


def test_encoder_features_lie_on_the_latent_grid(tmp_path):
    torch.manual_seed(0)
    encoder = SmallEncoder(in_channels=3, num_classes=5, downsample=4, width=8)
    x = torch.rand(2, 3, 48, 64)
    features = encoder.features(x)
    assert features.shape == (2, 12 * 16, encoder.feature_channels) and encoder(x).shape == (2, 5)
    changed = x.clone()
    changed[:, :, 44:, :4] += 1.0  # the latent position at the bottom left; GroupNorm spreads a little of it everywhere
    difference = (encoder.features(changed) - features).norm(dim=-1).mean(0).view(12, 16)
    assert difference[-3:, :3].mean() > 10 * difference[:-3, 3:].mean()
    encoder.save(tmp_path / "e.safetensors")
    loaded = SmallEncoder.load(tmp_path / "e.safetensors")
    assert torch.equal(loaded.features(x), features) and not any(p.requires_grad for p in loaded.parameters())
    with pytest.raises(ValueError, match="expected a tokenizer"):
        Tokenizer.load(tmp_path / "e.safetensors")


@pytest.mark.parametrize("arguments, message", [(dict(downsample=3), "downsample: got 3"), (dict(width=12), "width: got 12")])
def test_impossible_encoders(arguments, message):
    with pytest.raises(ValueError, match=message):
        SmallEncoder(**dict(dict(in_channels=1, num_classes=2, downsample=2), **arguments))


def test_a_classifier_goes_on_where_time_ran_out(tmp_path, monkeypatch):
    images = torch.randint(256, (12, 8, 8, 1), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    asked = []

    def train(**options):
        def batches(start):
            asked.append(start)
            return ((images[step % 3 :: 3], torch.arange(4) % 2) for step in itertools.count(start))

        torch.manual_seed(1)
        encoder = SmallEncoder(1, 2, 2, width=8)
        return training.train_classifier(encoder, batches, **dict(steps=5, lr=1e-3, translate=1, seed=0) | options).state_dict()

    truth, state = train(), tmp_path / "state.pt"
    clock = itertools.count()
    monkeypatch.setattr(training.time, "monotonic", lambda: next(clock))  # ticks once at the start and once a step
    with pytest.raises(TimeoutError, match="step 2 of 5"):
        train(state=state, deadline=2.5)
    with pytest.raises(TimeoutError, match="step 2 of 5"):  # no time for a single step: nothing is lost
        train(state=state, deadline=0)
    with pytest.raises(CheckpointError, match="state: .*expected .*'steps': 6.*remove it"):
        train(state=state, steps=6)
    found = train(state=state)
    assert asked == [0, 0, 2, 2] and all(torch.equal(found[name], value) for name, value in truth.items())
    monkeypatch.setattr(training, "SAVE_EVERY_S", 1.5)
    state.unlink()
    train(state=state)  # every other step by that clock, so that a kill costs no more
    assert torch.load(state, weights_only=True)["step"] == 3
    torch.save(dict(torch.load(state, weights_only=True), encoder={}), state)
    with pytest.raises(CheckpointError, match="of another encoder"):
        train(state=state)
