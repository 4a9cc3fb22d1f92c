"""Tokenizers in the files of others: official checkpoints with what training left in them, diffusers folders both ways, damaged and
hostile files."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from bench.fuzz import examples, tally
from lightningdit import cli
from lightningdit.tokenizer import formats
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.vavae import PRESETS, Tokenizer, load_tokenizer

SMALL = dict(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, z_channels=4, embed_dim=4, attn_resolutions=(64,))  # resolution 256, 32 groups
MEAN, STD = [0.5, -1.0, 0.0, 2.0], [0.1, 1.0, 2.0, 3.0]


def autoencoder(**arguments):
    """Random weights, norms and biases included, so that no part of the network can hide."""
    torch.manual_seed(0)
    model = AutoencoderKL(**dict(SMALL, **arguments)).requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    return model.eval()


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def left_by_training():
    """Keys that training leaves in official checkpoints."""
    names = ("foundation_model.model.blocks.0.norm1.weight", "linear_proj.weight", "loss.logvar", "loss.perceptual_loss.lin0.weight",
             "loss.discriminator.main.0.weight", "model_ema.decay", "model_ema.encoderconv_inweight", "discriminator.main.0.weight")
    return {name: torch.zeros(3) for name in names}


@pytest.fixture
def x():
    return torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1


# official checkpoints


@pytest.mark.parametrize("name", ["vavae", "marvae"])
def test_official_checkpoints_reproduce_the_official_numbers(golden, tmp_path, name):
    tensors, metadata = golden(name)
    weights = {key.removeprefix("param."): value.float() for key, value in tensors.items() if key.startswith("param.")}
    path = tmp_path / ("vavae.ckpt" if name == "vavae" else "kl16.ckpt")
    torch.save({"state_dict": weights | left_by_training(), "epoch": 3} if name == "vavae" else {"model": weights}, path)
    tokenizer = load_tokenizer(path, statistics=1.0)
    assert tokenizer.autoencoder.config["decoder_attention"] == (name == "vavae")
    for got, key in ((tokenizer.encode(tensors["x"]).mean, "mean"), (tokenizer.decode(tensors["mean"]), "decoded")):
        assert (got - tensors[key]).abs().max() < 1e-5 * tensors[key].abs().max(), key


@pytest.mark.parametrize("arguments", [{}, dict(decoder_attention=False), dict(attn_resolutions=(), embed_dim=6), dict(quant_conv=False),
                                       dict(middle_attention=False, num_res_blocks=2), dict(in_channels=1, out_channels=1)])
@pytest.mark.parametrize("layout", ["state_dict", "model", "bare", "first_stage_model", "ddp", "safetensors"])
def test_layouts_and_architectures(tmp_path, arguments, layout):
    model = autoencoder(**arguments)
    weights = state(model) | left_by_training()
    stored = {"state_dict": {"state_dict": weights, "global_step": 7, "optimizer_states": [{"state": {0: torch.zeros(2)}}]},
              "model": {"model": weights, "ema": {}}, "bare": weights, "safetensors": weights,
              "first_stage_model": {"state_dict": {f"first_stage_model.{k}": v for k, v in weights.items()} |
                                    {"model.diffusion_model.out.2.bias": torch.zeros(4)}},
              "ddp": {"model": {f"module._orig_mod.{name}": value for name, value in weights.items()}}}[layout]
    path = tmp_path / ("w.safetensors" if layout == "safetensors" else "w.pt")
    save_file(stored, path) if layout == "safetensors" else torch.save(stored, path)
    d = model.config["embed_dim"]
    tokenizer = load_tokenizer(path, statistics=(torch.zeros(d), torch.ones(d)))
    assert tokenizer.autoencoder.config == model.config and tokenizer.provenance == dict(source=path.name)
    assert Tokenizer(model, [0.0] * d, [1.0] * d).sha256 == tokenizer.sha256


def test_every_misfit_is_listed(tmp_path):
    weights = state(autoencoder())
    del weights["encoder.conv_out.bias"], weights["decoder.up.1.block.0.conv1.weight"]
    weights |= {"planted.weight": torch.zeros(2), "encoder.planted": torch.zeros(2), "quant_conv.bias": torch.zeros(5)}
    torch.save({"state_dict": weights | left_by_training()}, tmp_path / "w.ckpt")
    for preset in (None, SMALL):
        with pytest.raises(ValueError) as problem:
            load_tokenizer(tmp_path / "w.ckpt", preset=preset, statistics=1.0)
        assert str(problem.value).endswith(
            "missing: decoder.up.1.block.0.conv1.weight, encoder.conv_out.bias; unexpected: encoder.planted, planted.weight; "
            "misshaped: quant_conv.bias (5,) instead of (8,)")


@pytest.mark.parametrize("change, arguments, message", [
    (lambda w: w.pop("encoder.conv_in.weight"), {}, "for want of encoder.conv_in.weight .*preset="),
    (lambda w: w.clear(), {}, "for want of encoder.conv_in.weight"),
    (lambda w: w.update({"encoder.down.1.block.0.conv1.weight": torch.zeros(48, 32, 3, 3)}), {}, "widths .32, 48, 64."),
    (lambda w: w.update(encoder={}), {}, "expected tensors, got dict in encoder"),
    (lambda w: w.update({3: 4}), {}, "no state dict"),
    (lambda w: None, dict(preset="f16d33"), "preset: got 'f16d33', expected one of f16d16, f16d32"),
    (lambda w: None, dict(preset="f16d32"), "missing: .*decoder.up.4.*misshaped: encoder.conv_in.weight .32, 3, 3, 3. instead of .128"),
    (lambda w: None, dict(preset=dict(SMALL, depth=3)), "preset: .*depth"),
    (lambda w: None, dict(preset=dict(ch=7)), "preset: .*num_groups"),
    (lambda w: None, dict(statistics=None), "no latent statistics.*latents_stats.pt"),
    (lambda w: None, dict(statistics=0.0), "a positive number"),
    (lambda w: None, dict(statistics=([0.0] * 3, [1.0] * 3)), "latent_mean"),
    (lambda w: None, dict(statistics=("a", "b")), "latent_mean: got 'a'"),
    (lambda w: None, dict(statistics=[1, 2, 3]), "got list"),
])
def test_what_cannot_be_loaded(tmp_path, change, arguments, message):
    weights = state(autoencoder())
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path / "w.ckpt", **dict(dict(statistics=1.0), **arguments))


def test_statistics(tmp_path):
    model = autoencoder()
    torch.save({"state_dict": state(model)}, tmp_path / "w.ckpt")
    torch.save({"mean": torch.tensor(MEAN).view(1, 4, 1, 1), "std": torch.tensor(STD).view(1, 4, 1, 1)}, tmp_path / "latents_stats.pt")
    expected = Tokenizer(model, MEAN, STD)
    tokenizer = load_tokenizer(tmp_path / "w.ckpt", statistics=tmp_path / "latents_stats.pt")
    assert tokenizer.sha256 == expected.sha256 == load_tokenizer(tmp_path / "w.ckpt", statistics=(MEAN, STD)).sha256
    raw = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(load_tokenizer(tmp_path / "w.ckpt", statistics=0.18215).normalise(raw), raw * 0.18215)
    assert torch.equal(load_tokenizer(tmp_path / "w.ckpt", statistics=1.0).normalise(raw), raw)
    expected.save(tmp_path / "own.safetensors")  # which has its own statistics
    assert load_tokenizer(tmp_path / "own.safetensors").sha256 == expected.sha256
    assert load_tokenizer(tmp_path / "own.safetensors", statistics=1.0).latent_std.flatten().tolist() == [1.0] * 4
    with pytest.raises(ValueError, match="describes itself"):
        load_tokenizer(tmp_path / "own.safetensors", preset="f16d32")
    torch.save([MEAN, STD], tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="no tensors 'mean' and 'std'"):
        load_tokenizer(tmp_path / "w.ckpt", statistics=tmp_path / "latents_stats.pt")
    with pytest.raises(FileNotFoundError, match="statistics: no file"):
        load_tokenizer(tmp_path / "w.ckpt", statistics=tmp_path / "nowhere.pt")


def test_the_bundled_one():
    assert load_tokenizer("digits").sha256 == Tokenizer.load("digits").sha256
    with pytest.raises(FileNotFoundError, match="bundled: digits"):
        load_tokenizer("digit")


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name):
    """The name says how many pixels a latent position covers and how many channels it has; the weights tell the same architecture."""
    with torch.device("meta"):
        model = AutoencoderKL(**PRESETS[name])
    f, d = name.split("-")[-1][1:].split("d")
    assert model.downsample == int(f) and model.config["embed_dim"] == int(d)
    if not name.startswith("small"):
        assert formats.architecture(model.state_dict(), name) == {k: tuple(v) if isinstance(v, list) else v for k, v in model.config.items()
                                                                  if k != "num_groups"}


def test_published_sizes():
    """Parameters of Stable Diffusion's autoencoder are 83,653,863; between the VA-VAE's and MAR's lies attention in the decoder."""
    def parameters(name):
        with torch.device("meta"):
            return sum(p.numel() for p in AutoencoderKL(**PRESETS[name]).parameters())

    assert parameters("ldm-f8d4") == 83_653_863
    assert parameters("f16d16") - parameters("mar-f16d16") == 3 * (4 * (512 * 512 + 512) + 2 * 512)


# hostile and damaged files


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


def test_a_file_that_would_run_code_is_refused(tmp_path):
    torch.save({"state_dict": state(autoencoder()), "hyper_parameters": Malicious(tmp_path / "touched")}, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"weights_only=True\) refuses it: besides tensors it holds .*If you trust"):
        load_tokenizer(tmp_path / "w.ckpt", statistics=1.0)
    torch.save({"mean": Malicious(tmp_path / "touched")}, tmp_path / "latents_stats.pt")
    with pytest.raises(ValueError, match="refuses it"):
        load_tokenizer(tmp_path / "w.ckpt", statistics=tmp_path / "latents_stats.pt")
    assert not (tmp_path / "touched").exists()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One whole file of each kind."""
    folder = tmp_path_factory.mktemp("files")
    model = AutoencoderKL(ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=1, embed_dim=1, num_groups=2, attn_resolutions=())
    torch.save({"state_dict": model.state_dict()}, folder / "w.ckpt")
    Tokenizer(model, [0.0], [1.0]).save(folder / "own.safetensors")
    return folder


@pytest.mark.fuzz
@examples(60)
@given(name=st.sampled_from(["w.ckpt", "own.safetensors"]), data=st.data())
def test_damaged_bytes_are_refused_in_words_or_make_no_difference_to_shapes(files, tmp_path, name, data):
    whole = bytearray((files / name).read_bytes())
    cut = data.draw(st.just(len(whole)) | st.integers(0, len(whole)))
    for _ in range(data.draw(st.integers(0, 3))):
        whole[data.draw(st.integers(0, min(len(whole), 4000) - 1))] = data.draw(st.integers(0, 255))
    damaged = tmp_path / name
    damaged.write_bytes(bytes(whole[:cut]))
    try:
        tokenizer = load_tokenizer(damaged, statistics=1.0, preset=None if name == "own.safetensors" else dict(
            ch=4, ch_mult=(1, 1), num_res_blocks=1, z_channels=1, embed_dim=1, num_groups=2, attn_resolutions=()))
    except ValueError as error:
        assert name in str(error) or "latent_" in str(error)
        tally("tokenizers", "refused")
    else:
        assert tokenizer.encode(torch.zeros(1, 3, 4, 4)).mean.shape == (1, 1, 2, 2)
        tally("tokenizers", "read, no checksum")


# diffusers


def from_diffusers_package(folder):
    return pytest.importorskip("diffusers").AutoencoderKL.from_pretrained(folder).requires_grad_(False).eval()


ARCHITECTURES = [{}, dict(decoder_attention=False), dict(attn_resolutions=()), dict(quant_conv=False), dict(middle_attention=False),
                 dict(ch_mult=(1, 2, 4, 4), attn_resolutions=(64, 32), num_res_blocks=2, num_groups=8), dict(in_channels=1, out_channels=1)]


@pytest.mark.parametrize("arguments", ARCHITECTURES)
def test_ours_in_diffusers_and_back(tmp_path, x, arguments):
    """In float64 both are the same function of the same weights to rounding; back in this library they are the same bits."""
    tokenizer = Tokenizer(autoencoder(**arguments), MEAN, STD)
    tokenizer.save_diffusers(tmp_path / "folder")
    theirs = from_diffusers_package(tmp_path / "folder").double()
    pixels = x[:, : tokenizer.image_channels].double()
    ours = autoencoder(**arguments).double()
    posterior, expected = ours.encode(pixels), theirs.encode(pixels).latent_dist
    torch.testing.assert_close(posterior.mean, expected.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(posterior.logvar, expected.logvar, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.decode(posterior.mean), theirs.decode(expected.mean).sample, rtol=1e-10, atol=1e-12)
    assert theirs.config.latents_mean == MEAN and theirs.config.scaling_factor == 1.0

    back = load_tokenizer(tmp_path / "folder")
    assert back.sha256 == tokenizer.sha256 and back.autoencoder.config == tokenizer.autoencoder.config
    assert torch.equal(back.encode(pixels.float()).mean, tokenizer.encode(pixels.float()).mean)
    assert torch.equal(back.decode(posterior.mean.float()), tokenizer.decode(posterior.mean.float()))
    back.save_diffusers(tmp_path / "again")
    for name in ("config.json", "diffusion_pytorch_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "folder" / name).read_bytes()


def diffusers_model(folder, **arguments):
    """A model made and saved by diffusers itself, of Stable Diffusion's shape."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    levels = 3
    model = diffusers.AutoencoderKL(**dict(dict(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels, block_out_channels=[32, 64, 64],
        layers_per_block=2, latent_channels=4, sample_size=64), **arguments)).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("arguments, mean, multiplier", [
    ({}, 0.0, 0.18215), (dict(scaling_factor=0.13025), 0.0, 0.13025),
    (dict(scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False), 0.1159, 0.3611),
    (dict(latents_mean=[1.0] * 4, latents_std=[2.0] * 4, scaling_factor=0.5), 1.0, 0.25),
])
def test_theirs_in_ours_and_back(tmp_path, x, arguments, mean, multiplier):
    theirs = diffusers_model(tmp_path / "vae", **arguments)
    tokenizer = load_tokenizer(tmp_path)  # the pipeline's folder; its vae is in vae/
    raw = theirs.encode(x).latent_dist.mean
    torch.testing.assert_close(tokenizer.encode(x).mean, raw, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(tokenizer.normalise(raw), (raw - mean) * multiplier)
    torch.testing.assert_close(tokenizer.decode((raw - mean) * multiplier), theirs.decode(raw).sample, rtol=1e-4, atol=1e-4)
    theirs, ours = theirs.double(), load_tokenizer(tmp_path / "vae").autoencoder.double()
    torch.testing.assert_close(ours.encode(x.double()).mean, theirs.encode(x.double()).latent_dist.mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ours.decode(raw.double()), theirs.decode(raw.double()).sample, rtol=1e-10, atol=1e-12)

    tokenizer.save_diffusers(tmp_path / "back")
    theirs, back = theirs.float(), from_diffusers_package(tmp_path / "back")
    assert mean or arguments.get("latents_mean") or back.config.scaling_factor == multiplier
    assert torch.equal(back.encode(x).latent_dist.mean, raw) and torch.equal(back.decode(raw).sample, theirs.decode(raw).sample)
    assert load_tokenizer(tmp_path / "back").sha256 == tokenizer.sha256


def test_old_names_of_attention_and_pickled_weights(tmp_path):
    """As Stable Diffusion's first autoencoders were published: query, key, value, proj_attn; and no scaling factor in config.json."""
    diffusers_model(tmp_path)
    expected = load_tokenizer(tmp_path)
    weights = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        weights = {name.replace(f".{new}.", f".{old}."): value for name, value in weights.items()}
    torch.save(weights, tmp_path / "diffusion_pytorch_model.bin")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).sha256 == expected.sha256


@pytest.mark.parametrize("change, message", [
    (dict(_class_name="AutoencoderTiny"), "_class_name: got 'AutoencoderTiny', expected 'AutoencoderKL'"),
    (dict(act_fn="relu"), "act_fn: got 'relu'"),
    (dict(block_out_channels=[32, 48, 64]), "block_out_channels: got .32, 48, 64."),
    (dict(block_out_channels=[]), "config.json"), (dict(block_out_channels=None), "config.json"),
    (dict(down_block_types=["DownEncoderBlock2D"]), "expected 3 each"),
    (dict(up_block_types=["UpBlock2D"] * 3), "got 'UpBlock2D'"),
    (dict(up_block_types=["AttnUpDecoderBlock2D"] * 3), "up_block_types: got attention"),
    (dict(use_post_quant_conv=False), "use_post_quant_conv: got False"),
    (dict(latents_mean=[0.0] * 4), "latents_mean and latents_std"),
    (dict(latents_mean=[0.0] * 3, latents_std=[1.0] * 3), "latent_mean"),
    (dict(scaling_factor=0), "scaling_factor: got 0"),
    (dict(norm_num_groups=5), "num_groups: got 5"),
    (dict(layers_per_block=1), "unexpected: "),
])
def test_folders_that_do_not_fit(tmp_path, change, message):
    diffusers_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


def test_damaged_folders(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected config.json"):
        load_tokenizer(tmp_path)
    diffusers_model(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(ValueError, match="config.json: describes no AutoencoderKL"):
        load_tokenizer(tmp_path)
    (tmp_path / "config.json").write_bytes(b"\xff{")
    with pytest.raises(ValueError, match="config.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("arguments", [dict(ch_mult=(2, 2)), dict(embed_dim=6)])
def test_what_diffusers_cannot_build(tmp_path, arguments):
    d = arguments.get("embed_dim", 4)
    with pytest.raises(ValueError, match="diffusers' AutoencoderKL can only"):
        Tokenizer(autoencoder(**arguments), [0.0] * d, [1.0] * d).save_diffusers(tmp_path / "folder")
    assert not (tmp_path / "folder").exists()


# bf16 and channels_last


@pytest.mark.parametrize("last", [False, True])
def test_bf16_and_channels_last(tmp_path, x, last):
    """In bf16 the error against float64 is at most twice that of diffusers' module in bf16; the memory format goes through."""
    form = dict(memory_format=torch.channels_last if last else torch.contiguous_format)
    Tokenizer(autoencoder(), 0.0, 1.0).save_diffusers(tmp_path)
    exact, ours = autoencoder().double(), autoencoder().to(torch.bfloat16, **form)
    theirs = from_diffusers_package(tmp_path).to(torch.bfloat16)
    x = x.to(torch.bfloat16, **form)
    raw = exact.encode(x.double()).mean.to(torch.bfloat16, **form)
    posterior, decoded = ours.encode(x), ours.decode(raw)
    for got, expected, peer in ((posterior.mean, exact.encode(x.double()).mean, theirs.encode(x).latent_dist.mean),
                                (decoded, exact.decode(raw.double()), theirs.decode(raw).sample)):
        assert got.dtype == torch.bfloat16
        assert (got - expected).norm() <= 2 * (peer - expected).norm()
    assert decoded.is_contiguous(**form) and posterior.kl().dtype == torch.float32
    torch.testing.assert_close(autoencoder().to(**form).encode(x.float()).mean, exact.encode(x.double()).mean.float(), rtol=1e-4, atol=1e-4)


def test_a_tokenizer_in_bf16_keeps_its_statistics(x):
    tokenizer, half = (Tokenizer(autoencoder(), [0.123456789] * 4, [1.23456789] * 4) for _ in range(2))
    half.to(torch.bfloat16)
    assert half.latent_mean.dtype == torch.float32 and torch.equal(half.latent_std, tokenizer.latent_std)
    raw = tokenizer.encode(x).mean
    assert torch.equal(half.normalise(raw), tokenizer.normalise(raw))
    plain, last = autoencoder().to(torch.bfloat16), dict(memory_format=torch.channels_last)
    assert torch.equal(half.encode(x).mean, plain.encode(x.bfloat16().contiguous(**last)).mean)
    again = tokenizer.denormalise(tokenizer.normalise(raw)).bfloat16().contiguous(**last)
    assert torch.equal(half.decode(tokenizer.normalise(raw)), plain.decode(again))
    assert half.double().latent_mean.dtype == torch.float32 and half.to("meta").latent_mean.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tokenizer_convolves_channels_last_on_a_cpu(x, dtype):
    """Whatever layout it is given, and gives that one back; nothing but rounding changes, and the state dict not at all."""
    tokenizer, plain, seen = Tokenizer(autoencoder(), 0.0, 1.0).to(dtype), autoencoder().to(dtype), []
    before = {key: (value.stride(), value.clone()) for key, value in tokenizer.state_dict().items()}
    for layer in (tokenizer.autoencoder.encoder.down[0].block[0].conv1, tokenizer.autoencoder.decoder.up[0].block[0].conv1):
        layer.register_forward_hook(lambda layer, inputs, out: seen.append(inputs[0].is_contiguous(memory_format=torch.channels_last)))
    x = x.to(dtype)
    raw, found = plain.encode(x).mean, []
    for layout in (torch.contiguous_format, torch.channels_last):
        posterior = tokenizer.encode(x.contiguous(memory_format=layout))
        found.append((posterior.mean, posterior.logvar, tokenizer.decode(raw.contiguous(memory_format=layout))))
        assert found[-1][2].is_contiguous(memory_format=layout)
    assert all(tensor.is_contiguous() for tensor in found[0])
    assert seen == [dtype == torch.float32 or given for given in (False, False, True, True)]
    truth = plain.double().encode(x.double())
    for tensors in found:
        for got, expected in zip(tensors, (truth.mean, truth.logvar, plain.decode(raw.double())), strict=True):
            torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)
    if dtype == torch.float32:
        assert all(map(torch.equal, *found))
    after = tokenizer.state_dict()
    assert after.keys() == before.keys()
    assert all(after[key].stride() == stride and torch.equal(after[key], value) for key, (stride, value) in before.items())


def test_compiles_in_one_graph(x):
    model = autoencoder()
    encode = torch.compile(lambda pixels: model.encode(pixels).mean, backend="eager", fullgraph=True)
    decode = torch.compile(model.decode, backend="eager", fullgraph=True)
    assert torch.equal(encode(x), model.encode(x).mean) and torch.equal(decode(encode(x)), model.decode(encode(x)))


# the command


def test_export_tokenizer(tmp_path, capsys):
    tokenizer = Tokenizer(autoencoder(), [0.0] * 4, [1 / 0.5] * 4)
    torch.save({"state_dict": state(tokenizer.autoencoder)}, tmp_path / "w.ckpt")
    cli.main(["export-tokenizer", "--tokenizer", str(tmp_path / "w.ckpt"), "--statistics", "0.5", "--out", str(tmp_path / "folder")])
    assert from_diffusers_package(tmp_path / "folder").config.scaling_factor == 0.5
    cli.main(["export-tokenizer", "--tokenizer", str(tmp_path / "folder"), "--out", str(tmp_path / "own.safetensors")])
    assert Tokenizer.load(tmp_path / "own.safetensors").sha256 == tokenizer.sha256 and capsys.readouterr().out.count(tokenizer.sha256) == 2
    with pytest.raises(SystemExit, match="error: .* no latent statistics"):
        cli.main(["export-tokenizer", "--tokenizer", str(tmp_path / "w.ckpt"), "--out", str(tmp_path / "folder")])
