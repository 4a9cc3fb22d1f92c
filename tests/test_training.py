"""One update of a VA-VAE: micro-batches and processes change nothing but rounding, and everything can be left out."""

import copy
import functools

import pytest
import torch
import torch.multiprocessing
from torch import nn

from lightningdit.distributed import average_over_ranks, process_group
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.losses import LatentProjection, PatchDiscriminator, generator_loss, perceptual_loss
from lightningdit.tokenizer.training import CachedFeatures, Networks, activation_bytes, backward

BATCH, FEATURES = 8, 12
WEIGHTS = dict(kl_weight=1e-3, vf_weight=0.5, cos_margin=0.1, distmat_margin=0.05, disc_weight=0.5)


def build(*, batch_norm=False, perceptual=True, ch_mult=(1, 2, 2), attn_resolutions=(8,), **options):
    """Tiny networks. The discriminator is one without BatchNorm, whose statistics are those of a micro-batch, unless it is asked for."""
    torch.manual_seed(0)
    autoencoder = AutoencoderKL(3, 3, ch=8, ch_mult=ch_mult, num_res_blocks=1, z_channels=4, embed_dim=4, resolution=32,
                                attn_resolutions=attn_resolutions, num_groups=4)
    discriminator = PatchDiscriminator(3, 8, 2) if batch_norm else nn.Sequential(
        nn.Conv2d(3, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 4, 2, 1))
    lpips = perceptual_loss(net="squeeze", random_weights=True) if perceptual else None
    return Networks(autoencoder, LatentProjection(4, FEATURES), discriminator, lpips, **options)


@functools.cache
def batch():
    generator = torch.Generator().manual_seed(1)
    shapes = ((BATCH, 3, 32, 32), (BATCH, 4, 8, 8), (BATCH, 64, FEATURES))
    return tuple(torch.randn(shape, generator=generator).clamp(-1, 1) for shape in shapes)


def gradients(nets):
    return {f"{part}.{name}": p.grad for part, module in nets.trained() for name, p in module.named_parameters()}


def assert_equal_but_for_rounding(got, expected, tolerance=1e-4):
    """Each tensor within `tolerance` of its own largest value (sums in another order), or of 1e-3 times the largest of all: the keys'
    biases have gradients that are nothing but rounding, for softmax does not see them."""
    assert got.keys() == expected.keys()
    floor = 1e-3 * tolerance * max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        assert (got[name] - value).abs().max() <= tolerance * value.abs().max() + floor, name


def assert_same_values(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=2e-5, atol=1e-6, msg=name)


@functools.cache
def whole_batch():
    nets = build()
    values = backward(nets, *batch(), adversarial=True, **WEIGHTS)
    return values, gradients(nets)


def test_one_micro_batch_is_the_plain_objective():
    """Against generator_loss, which the golden numbers hold, and PyTorch's own backward."""
    values, got = whole_batch()
    nets, (x, noise, features) = build(), batch()
    posterior = nets.autoencoder.encode(x)
    z = posterior.mean + posterior.std * noise
    x_hat = nets.autoencoder.decode(z)
    loss, log = generator_loss(x, x_hat, posterior, nets.projection(z), features, perceptual=nets.perceptual,
                               discriminator=nets.discriminator, encoder_layer=nets.autoencoder.encoder.conv_out.weight,
                               decoder_layer=nets.autoencoder.decoder.conv_out.weight, **WEIGHTS)
    loss.backward()
    generator = {name: grad for name, grad in gradients(nets).items() if name.startswith("generator")}
    assert_equal_but_for_rounding({name: got[name] for name in generator}, generator, 1e-5)
    assert values.keys() == {"loss", "rec_loss", "nll_loss", "kl_loss", "vf_loss", "vf_weight", "g_loss", "d_weight", "disc_loss"}
    for name, value in values.items():
        assert not value.requires_grad and value.isfinite(), name
        if name != "disc_loss":
            torch.testing.assert_close(value, log["total_loss" if name == "loss" else name], msg=name)
    nets.discriminator.zero_grad()
    logits = nets.discriminator(x), nets.discriminator(x_hat.detach())
    (0.5 * (torch.relu(1 - logits[0]).mean() + torch.relu(1 + logits[1]).mean())).backward()
    for name, p in nets.discriminator.named_parameters():
        torch.testing.assert_close(got[f"discriminator.{name}"], p.grad)


@pytest.mark.parametrize("micro_batch", [4, 1])
def test_micro_batches_give_the_gradients_of_the_whole_batch(micro_batch):
    values, expected = whole_batch()
    nets = build()
    assert_same_values(backward(nets, *batch(), adversarial=True, micro_batch=micro_batch, **WEIGHTS), values)
    assert_equal_but_for_rounding(gradients(nets), expected)
    assert all(p.requires_grad for p in nets.discriminator.parameters())


def one_process(rank, folder):
    """Half of the batch, every other image, in two micro-batches."""
    torch.set_num_threads(1)
    import os

    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=(folder / "port").read_text())
    with process_group(torch.device("cpu")):
        tensors = [torch.full((n,), float(rank)) for n in (3, 1, 5)]
        assert all((tensor == 0.5).all() for tensor in average_over_ranks(tensors, bucket=4))
        nets = build(perceptual=False)
        values = backward(nets, *(tensor[rank::2] for tensor in batch()), micro_batch=2, adversarial=True, **WEIGHTS)
        torch.save((values, gradients(nets)), folder / f"{rank}.pt")


def test_two_processes_give_the_gradients_of_one(tmp_path):
    import socket

    with socket.socket() as free:
        free.bind(("localhost", 0))
        (tmp_path / "port").write_text(str(free.getsockname()[1]))
    torch.multiprocessing.start_processes(one_process, (tmp_path,), nprocs=2, start_method="fork")
    nets = build(perceptual=False)
    values = backward(nets, *batch(), adversarial=True, **WEIGHTS)
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    for got_values, got in ranks:
        assert_same_values(got_values, values)
        assert_equal_but_for_rounding(got, gradients(nets))
    assert all(torch.equal(value, ranks[1][1][name]) for name, value in ranks[0][1].items())  # else the processes would drift apart


@pytest.mark.parametrize("left_out, names", [
    (dict(adversarial=False), {"vf_loss", "vf_weight"}), (dict(adversarial=True, vf_weight=0.0), {"g_loss", "d_weight", "disc_loss"}),
    (dict(adversarial=False, vf_weight=0.0), set()),
])
def test_terms_can_be_left_out(left_out, names):
    nets = build(batch_norm=True, perceptual=False)
    values = backward(nets, *batch(), **dict(WEIGHTS, **left_out))
    assert values.keys() == {"loss", "rec_loss", "nll_loss", "kl_loss"} | names
    assert (nets.projection.weight.grad is not None) == ("vf_loss" in names)
    assert all((p.grad is not None) == ("g_loss" in names) for p in nets.discriminator.parameters())
    assert all(p.grad is not None for p in nets.autoencoder.parameters())


def test_a_fixed_weight_is_taken_as_it_is():
    nets = build(perceptual=False)
    assert backward(nets, *batch(), adaptive_vf=False, micro_batch=2, **WEIGHTS)["vf_weight"].item() == 0.5


def test_bf16_keeps_latents_projection_and_losses_in_fp32(monkeypatch):
    """And its gradients point where those of fp32 do; channels-last convolutions included."""
    nets, seen = build(batch_norm=True, perceptual=False, bf16=True, channels_last=True), []
    monkeypatch.setattr(nets.projection, "forward", lambda z, f=nets.projection.forward: seen.append(z.dtype) or f(z))
    nets.autoencoder.decoder.conv_in.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    values = backward(nets, *batch(), adversarial=True, **WEIGHTS)
    assert seen == [torch.float32, torch.bfloat16] and all(value.dtype == torch.float32 for value in values.values())
    reference = build(batch_norm=True, perceptual=False)
    backward(reference, *batch(), adversarial=True, **WEIGHTS)
    ours, theirs = (torch.cat([grad.flatten() for grad in gradients(n).values()]) for n in (nets, reference))
    # How a CPU's bf16 convolutions round between their sums differs from machine to machine: 0.989 on one with AVX2.
    assert torch.cosine_similarity(ours, theirs, dim=0) > 0.98 and ours.dtype == torch.float32


def test_compiled_levels_give_the_same_gradients():
    """Through dynamo and AOTAutograd, whose graphs the adaptive weights go through twice; code generation is left out, for time."""
    one_level = dict(ch_mult=(1,), attn_resolutions=())
    nets, reference = build(perceptual=False, **one_level), build(perceptual=False, **one_level)
    x, noise, features = batch()
    inputs = x[:4, :, :8, :8], noise[:4], features[:4]
    names = list(nets.generator.state_dict())
    nets.compile(backend="aot_eager")
    assert_same_values(backward(nets, *inputs, adversarial=True, **WEIGHTS), backward(reference, *inputs, adversarial=True, **WEIGHTS))
    assert_equal_but_for_rounding(gradients(nets), gradients(reference))
    assert list(nets.generator.state_dict()) == names


def test_cached_features_are_computed_once():
    class Encoder:
        calls = 0

        def features(self, pixels):
            self.calls += len(pixels)
            return pixels.flatten(1)[:, None] * 2

    encoder, pixels = Encoder(), torch.rand(6, 3)
    cached = CachedFeatures(encoder, 6)
    for indices in ([0, 2, 4], [1, 3, 5], [5, 0, 3], [2, 1, 4]):
        indices = torch.tensor(indices)
        assert torch.equal(cached(pixels[indices], indices), pixels[indices][:, None] * 2)
    assert encoder.calls == 6


def test_activation_bytes_are_those_that_autograd_keeps():
    nets, kept = build(batch_norm=True), {}
    x = batch()[0][:1]
    with torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t) if not isinstance(t, nn.Parameter) else t, lambda t: t):
        x_hat = nets.autoencoder.decode(nets.autoencoder.encode(x).mean)
    measured = sum(t.untyped_storage().nbytes() for t in kept.values())
    counted = activation_bytes(copy.deepcopy(nets), 32, 3)
    assert x_hat.shape == x.shape and counted.keys() == {"autoencoder", "LPIPS", "discriminator"}
    assert counted["autoencoder"] == pytest.approx(measured, rel=0.1) and min(counted.values()) > 1000
