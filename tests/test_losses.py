"""The VA-VAE's losses: the official numbers, LPIPS, the patch discriminator, and the weights between them."""

import urllib.error
import urllib.request

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightningdit.tokenizer import losses
from lightningdit.tokenizer.autoencoder import Posterior
from lightningdit.tokenizer.losses import (
    LatentProjection,
    PatchDiscriminator,
    adaptive_weights,
    alignment_loss,
    discriminator_loss,
    generator_loss,
    gradient_ratio,
    layer_gradients,
    perceptual_loss,
    reconstruction_loss,
)


def relative_error(got, expected):
    assert got.shape == expected.shape
    return ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-12)).item()


def toy(case, tensors):
    """The toy autoencoder of the golden file: strided convolution, transposed convolution, projection."""
    t = {name.removeprefix(f"{case}."): value for name, value in tensors.items() if name.startswith(f"{case}.")}
    enc, dec = (t[f"{name}.weight"].clone().requires_grad_() for name in ("enc", "dec"))
    projection = LatentProjection(8, 24)
    with torch.no_grad():
        projection.weight.copy_(t["proj.weight"])
    posterior = Posterior.from_moments(F.conv2d(t["x"], enc, t["enc.bias"], stride=8, padding=1))
    z = posterior.mean + posterior.std * t["eps"]
    x_hat = F.conv_transpose2d(z, dec, t["dec.bias"], stride=8)
    torch.testing.assert_close(x_hat, t["reconstruction"])

    def discriminator(x):
        return F.conv2d(x, t["disc.weight"], t["disc.bias"], stride=2, padding=1)

    return t, enc, dec, projection, posterior, z, x_hat, discriminator


@pytest.mark.parametrize("low_rank", [False, True])
@pytest.mark.parametrize("case", ["0", "1", "2", "3"])
def test_official_losses_weights_and_gradients(golden, monkeypatch, case, low_rank):
    """The whole objective by generator_loss; and with the alignment in the rank of the latents, by the pieces that training uses."""
    tensors, metadata = golden("alignment")
    settings = metadata["cases"][case]
    t, enc, dec, projection, posterior, z, x_hat, discriminator = toy(case, tensors)
    disc_factor, features = float(settings["global_step"] >= settings["disc_start"]), t["vf_feature"].flatten(2).mT
    margins = {name: settings[name] for name in ("cos_margin", "distmat_margin")}
    options = dict(perceptual=lambda a, b: (a - b).square().mean((1, 2, 3), keepdim=True), discriminator=discriminator)
    torch.testing.assert_close(projection(z), t["z_projected"].flatten(2).mT)
    if low_rank:
        monkeypatch.setattr(losses, "LOW_RANK_FROM", 1)
        monkeypatch.setattr(projection, "in_channels", 4)  # of the rule "4 times as wide"
        monkeypatch.setattr(projection, "forward", None)
        terms = losses.generator_terms(t["x"], x_hat, posterior, projection.alignment_loss(z, features, **margins), **options)
        gradients = layer_gradients(terms, enc if settings["adaptive_vf"] else None, dec)
        weights = dict(vf_weight=torch.tensor(settings["vf_weight"]))
        weights |= adaptive_weights(gradients, settings["vf_weight"], settings["disc_weight"])
        loss = losses.weighted_sum(terms, weights, settings["kl_weight"], disc_factor)
        log = {name: value.detach() for name, value in dict(terms, **weights, total_loss=loss).items()}
    else:
        names = ("kl_weight", "vf_weight", "adaptive_vf", "disc_weight")
        loss, log = generator_loss(t["x"], x_hat, posterior, projection(z), features, encoder_layer=enc, decoder_layer=dec,
                                   disc_factor=disc_factor, **options, **margins, **{name: settings[name] for name in names})
    loss.backward()
    assert log.keys() == {"rec_loss", "nll_loss", "kl_loss", "vf_loss", "vf_weight", "g_loss", "d_weight", "total_loss"}
    for name, value in log.items():
        assert relative_error(value.view(1), t[f"log.{name}"]) < 1e-5 and not value.requires_grad, name
    assert relative_error(loss.detach().view(1), t["loss_generator"]) < 1e-5
    assert relative_error(log["vf_loss"].view(1), t["mcos_loss"] + t["mdms_loss"]) < 1e-5
    for name, parameter in dict(enc=enc, dec=dec, proj=projection.weight).items():
        assert relative_error(parameter.grad, t[f"grad.{name}.weight"]) < 1e-5, name
    torch.testing.assert_close(discriminator_loss(t["x"], x_hat, discriminator, disc_factor).view(1), t["loss_discriminator"])


def test_wide_features_are_aligned_in_low_rank(monkeypatch):
    torch.manual_seed(0)
    z, features = torch.randn(2, 8, 4, 4, requires_grad=True), torch.randn(2, 16, 256)
    projection = LatentProjection(8, 256)
    expected = alignment_loss(projection(z), features, 0.3, 0.1)
    gradients = torch.autograd.grad(expected, (z, projection.weight))
    monkeypatch.setattr(projection, "forward", lambda z: pytest.fail("projected"))
    got = projection.alignment_loss(z, features, 0.3, 0.1)
    torch.testing.assert_close(got, expected)
    for ours, theirs in zip(torch.autograd.grad(got, (z, projection.weight)), gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-7)


def test_reconstruction_loss_is_summed_over_an_image():
    x, x_hat = torch.zeros(4, 3, 8, 8), torch.full((4, 3, 8, 8), 0.5)
    nll, rec = reconstruction_loss(x, x_hat)
    assert nll.item() == 0.5 * 3 * 64 and rec.item() == 0.5
    nll, rec = reconstruction_loss(x, x_hat, perceptual=lambda a, b: torch.ones(4, 1, 1, 1), perceptual_weight=2.0)
    assert nll.item() == 2.5 * 3 * 64 and rec.item() == 2.5


def test_adaptive_weights_and_their_limits():
    encoder_layer, decoder_layer = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    nll = (6 * encoder_layer + 8 * decoder_layer).sum()
    terms = dict(nll_loss=nll, vf_loss=(2 * encoder_layer).sum(), g_loss=(2 * decoder_layer).sum())
    weights = adaptive_weights(layer_gradients(terms, encoder_layer, decoder_layer), vf_weight=0.1, disc_weight=0.5)
    assert weights["vf_weight"].item() == pytest.approx(0.3, rel=1e-4) and weights["d_weight"].item() == pytest.approx(2.0, rel=1e-4)
    assert layer_gradients(terms) == {} and layer_gradients(terms, encoder_layer).keys() == {"vf_loss"}
    large, zero = torch.full((3,), 1e7), torch.zeros(3)
    assert adaptive_weights(dict(vf_loss=(large, zero), g_loss=(large, zero)), 0.1, 0.5) == {"vf_weight": 0.1 * 1e8, "d_weight": 0.5 * 1e4}
    assert gradient_ratio(torch.tensor([3.0, 4.0]), torch.tensor([0.0, 2.0]), 1e4).item() == pytest.approx(5 / 2.0001)


def test_discriminator_gets_no_gradient_into_the_autoencoder():
    x_hat, weight = torch.rand(2, 3, 8, 8, requires_grad=True), torch.ones(1, requires_grad=True)
    discriminator_loss(torch.rand(2, 3, 8, 8), x_hat, lambda x: x * weight).backward()
    assert x_hat.grad is None and weight.grad.abs() > 0


def test_without_alignment_and_without_discriminator():
    x, posterior = torch.rand(2, 3, 8, 8), Posterior(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    loss, log = generator_loss(x, x + 0.1, posterior, kl_weight=0.5)
    assert log.keys() == {"rec_loss", "nll_loss", "kl_loss", "total_loss"}
    assert loss.item() == pytest.approx(19.2 + 0.5 * 8, rel=1e-5)


@pytest.mark.parametrize("arguments, message", [
    (dict(z=torch.ones(2, 4, 8)), "only z"), (dict(z=torch.ones(2, 4, 8), features=torch.ones(2, 4, 8)), "encoder_layer"),
    (dict(discriminator=lambda x: x), "decoder_layer"),
])
def test_losses_name_what_is_missing(arguments, message):
    posterior = Posterior(torch.ones(2, 4, 2, 2), torch.zeros(2, 4, 2, 2))
    with pytest.raises(ValueError, match=message):
        generator_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 4), posterior, **arguments)
    with pytest.raises(ValueError, match="x_hat: got \\(2, 3, 4, 5\\)"):
        generator_loss(torch.ones(2, 3, 4, 4), torch.zeros(2, 3, 4, 5), posterior)


# the patch discriminator


def test_patch_discriminator_has_the_official_layout():
    """Names, shapes and order of the modules as the published checkpoints have them (`loss.discriminator.` before each)."""
    own = {name: tuple(value.shape) for name, value in PatchDiscriminator().state_dict().items()}
    expected = {"main.0.weight": (64, 3, 4, 4), "main.0.bias": (64,), "main.11.weight": (1, 512, 4, 4), "main.11.bias": (1,)}
    for convolution, before, after in ((2, 64, 128), (5, 128, 256), (8, 256, 512)):
        expected[f"main.{convolution}.weight"] = (after, before, 4, 4)
        expected |= {f"main.{convolution + 1}.{name}": (after,) for name in ("weight", "bias", "running_mean", "running_var")}
        expected[f"main.{convolution + 1}.num_batches_tracked"] = ()
    assert own == expected


def test_patch_discriminator_computes_what_it_should():
    torch.manual_seed(0)
    model = PatchDiscriminator(width=8, num_layers=2)
    assert model.main[2].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.main[3].weight.mean().item() == pytest.approx(1, abs=0.05)
    x, w = torch.randn(3, 3, 16, 12), model.state_dict()
    h = F.leaky_relu(F.conv2d(x, w["main.0.weight"], w["main.0.bias"], 2, 1), 0.2)
    for i, stride in ((2, 2), (5, 1)):
        h = F.conv2d(h, w[f"main.{i}.weight"], None, stride, 1)
        h = F.leaky_relu(F.batch_norm(h, None, None, w[f"main.{i + 1}.weight"], w[f"main.{i + 1}.bias"], training=True), 0.2)
    torch.testing.assert_close(model(x), F.conv2d(h, w["main.8.weight"], w["main.8.bias"], 1, 1))


@pytest.mark.parametrize("layers, size, logits", [(3, (24, 40), (1, 3)), (3, (256, 256), (30, 30)), (1, (8, 8), (2, 2))])
def test_patch_discriminator_takes_any_resolution(layers, size, logits):
    assert PatchDiscriminator(1, width=4, num_layers=layers)(torch.zeros(2, 1, *size)).shape == (2, 1, *logits)


def test_impossible_discriminators():
    with pytest.raises(ValueError, match="num_layers: got 0"):
        PatchDiscriminator(num_layers=0)
    with pytest.raises(ValueError, match="images: got \\(1, 3, 23, 64\\), expected sides of at least 24"):
        PatchDiscriminator()(torch.zeros(1, 3, 23, 64))


# LPIPS


def test_perceptual_loss_is_lpips_with_the_weights_of_the_file(tmp_path):
    """The file has torchvision's names; the truth is the package's own network with the same weights."""
    torch.manual_seed(0)
    random = perceptual_loss(net="squeeze", random_weights=True)
    state = {f"features.{name.partition('.')[2]}": value for name, value in random.lpips.net.state_dict().items()}
    torch.save(state | {"classifier.1.bias": torch.zeros(1000)}, tmp_path / "squeezenet.pth")
    torch.manual_seed(1)
    loaded = perceptual_loss(tmp_path / "squeezenet.pth", net="squeeze")
    x, x_hat = torch.rand(2, 2, 3, 32, 32).mul(2).sub(1)
    expected = random.lpips(x, x_hat)
    assert expected.shape == (2, 1, 1, 1) and (expected > 0).all() and torch.equal(loaded(x, x_hat), expected)
    assert torch.equal(loaded(x, x), torch.zeros(2, 1, 1, 1))
    gray = x.mean(1, keepdim=True)
    torch.testing.assert_close(loaded(gray, gray + 0.1), loaded(gray.expand(-1, 3, -1, -1), gray.expand(-1, 3, -1, -1) + 0.1))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(loaded(x, x_hat), expected)
    with pytest.raises(ValueError, match="got no features.0.weight, expected torchvision's state dict of squeeze"):
        torch.save({"x": torch.zeros(1)}, tmp_path / "other.pth")
        perceptual_loss(tmp_path / "other.pth", net="squeeze")


def test_perceptual_loss_stays_in_eval_mode():
    holder = nn.ModuleDict(dict(perceptual=perceptual_loss(net="squeeze", random_weights=True))).train()
    assert holder.training and not any(module.training for module in holder["perceptual"].modules())
    assert any(isinstance(module, nn.Dropout) for module in holder.modules()) and not any(p.requires_grad for p in holder.parameters())
    x, x_hat = torch.rand(2, 1, 3, 32, 32)
    x_hat.requires_grad_()
    first = holder["perceptual"](x, x_hat)
    assert torch.equal(first, holder["perceptual"](x, x_hat))
    assert torch.autograd.grad(first.sum(), x_hat)[0].abs().sum() > 0


def test_perceptual_loss_offline_names_the_file_and_the_option(monkeypatch, tmp_path):
    def no_network(*arguments, **options):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    with pytest.raises(ValueError, match="vgg16-397923af.pth is neither .*--loss.perceptual-weights FILE"):
        losses._trunk_weights(None, "vgg")


@pytest.mark.parametrize("arguments, message", [
    (dict(net="resnet"), "net: got 'resnet'"), (dict(weights="x.pth", random_weights=True), "weights: got 'x.pth' and random_weights"),
    (dict(weights="nowhere.pth", net="squeeze"), "nowhere.pth"),
])
def test_impossible_perceptual_losses(arguments, message):
    with pytest.raises(ValueError, match=message):
        perceptual_loss(**arguments)
