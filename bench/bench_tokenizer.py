"""The VA-VAE: images a second of a training step, of encoding and of decoding.

    pytest bench/bench_tokenizer.py --benchmark-only --results bench/results/tokenizer_cpu.json

Everybody has the same weights. "fp32 eager" is the official way: fp32, contiguous, every op as its definition in plain PyTorch. "ours" is
as train/vavae.py trains and as tokenizers are used: on CUDA bf16 autocast, channels_last and compiled level by level, on a CPU fp32 and
channels_last.
"diffusers" is AutoencoderKL of that package, made from the same weights; its strongest form on CUDA has bf16, channels_last and
torch.compile. Before it is timed a contestant must agree with fp32 eager to TOLERANCES, on at most GATE_IMAGES images; ours must show its
kernels in a profile. Who runs out of memory gets half the batch.

On CUDA f16d32 at 256 pixels, aligned with DINOv2-L, whose weights, as LPIPS's, are random here: speed does not depend on them. On a CPU a
small tokenizer of 8 pixels a latent position, with random numbers for features and without LPIPS.
"""

import functools
import importlib.util
import os
import tempfile

import pytest
import torch

import lightningdit.tokenizer.autoencoder
import lightningdit.tokenizer.losses
from bench.harness import Timer, gpu_state, identify, interleave, make_timers, ran, reason_of, rounds_for, short, summary, synchronize
from bench.providers import EAGER, serving
from bench.step import allocate_state, copy_of
from lightningdit.memory import SPARE, largest_by_trial
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.foundation import load_encoder
from lightningdit.tokenizer.losses import PatchDiscriminator, perceptual_loss
from lightningdit.tokenizer.training import Networks, backward, update
from lightningdit.tokenizer.vavae import PRESETS, Tokenizer
from lightningdit_kernels.testing import DEFINITIONS

# Preset, pixels a side, images in a training step and in encoding or decoding, channels of the features.
SIZES = dict(cuda=("f16d32", 256, 32, 64, 1024), cpu=("small-f8d16", 64, 4, 8, 384), tiny=("small-f8d16", 16, 2, 2, 256))
BASELINE = "fp32 eager"
GATE_IMAGES = 32
# Relative, in L2 norm: of moments and pixels, of the loss's terms, of all gradients together.
TOLERANCES = dict(fp32=dict(output=1e-4, terms=1e-4, gradient=1e-3), bf16=dict(output=5e-2, terms=5e-2, gradient=1e-1))


@functools.cache
def plain_modules():
    """(autoencoder, losses) of lightningdit.tokenizer with their ops as plain PyTorch."""
    alignment = {name: DEFINITIONS[name] for name in ("alignment_losses", "marginal_cosine_loss", "marginal_distance_matrix_loss")}
    return (copy_of(lightningdit.tokenizer.autoencoder, "plain", group_norm_silu=EAGER["group_norm_silu"]),
            copy_of(lightningdit.tokenizer.losses, "plain", **alignment))


def networks(plain, device, size):
    """Networks of fixed random weights: of ours, or with every op as its definition in fp32."""
    preset, _, _, _, width = size
    full = size == SIZES["cuda"]
    autoencoder, losses = plain_modules() if plain else (lightningdit.tokenizer.autoencoder, lightningdit.tokenizer.losses)
    torch.manual_seed(0)
    parts = (autoencoder.AutoencoderKL(**PRESETS[preset]), losses.LatentProjection(PRESETS[preset]["z_channels"], width),
             PatchDiscriminator(3, *((64, 3) if full else (16, 2))))
    perceptual = perceptual_loss(random_weights=True) if full else None
    fast = device == "cuda" and not plain
    nets = Networks(*parts, perceptual, device=device, bf16=fast, channels_last=not plain)
    if fast:
        nets.compile()
    return nets


def feature_source(plain, device, size):
    """pixels -> features of the frozen encoder, as train/vavae.py has it; at the smaller sizes random numbers."""
    _, side, _, _, width = size
    if size == SIZES["cuda"]:
        options = {} if plain else dict(dtype=torch.bfloat16, compile=True)
        return load_encoder("dinov2-l", weights="random", image_size=side, grid=16, device=device, **options).features
    found = torch.randn(64, (side // 8) ** 2, width, generator=torch.Generator().manual_seed(0)).to(device)
    return lambda pixels: found[: len(pixels)]


def distance(found, truth):
    """Relative, in L2 norm; 0 where both are equal, all zeros too."""
    difference = float((found.float() - truth.float()).norm())
    return difference / float(truth.float().norm()) if difference else 0.0


class StepContestant:
    """One way to make the training step of train/vavae.py, with the discriminator on."""

    def __init__(self, plain, device, size):
        self.nets, self.features = networks(plain, device, size), feature_source(plain, device, size)
        self.optimizers = [torch.optim.Adam(module.parameters(), betas=(0.5, 0.9), fused=True) for _, module in self.nets.trained()]
        for optimizer in self.optimizers:
            allocate_state(optimizer)
        self.lpips = size == SIZES["cuda"]

    def backward(self, pixels, noise, features=None):
        features = self.features(pixels) if features is None else features
        return backward(self.nets, pixels, noise, features, adversarial=True, perceptual_weight=1.0 if self.lpips else 0.0)

    def __call__(self, pixels, noise):
        self.backward(pixels, noise)
        for optimizer in self.optimizers:
            update(optimizer, 1e-4)

    def measures(self, pixels, noise, features):
        """(terms of the loss, gradients of all generator parameters in one vector), gone from the parameters afterwards."""
        values = self.backward(pixels, noise, features)
        gradient = torch.cat([p.grad.flatten() for p in self.nets.generator.parameters() if p.grad is not None])
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        terms = torch.stack([value for name, value in values.items() if name.endswith("loss")])
        return terms, gradient


def halved(batch):
    """Numbers of images to try: the batch, half of it, and so on."""
    return [batch >> halving for halving in range(batch.bit_length())]


def race(benchmark, settings, case, runs, batch, gate, left_out, precision, **more):
    """Times runs[name](count), count images of the batch or as many as fit, in turns. gate(name, count) returns by how much the contestant
    differs, or raises AssertionError."""
    device, rows, timers, lost = settings.device, [], {}, {}

    def timer_of(name, count):
        def timed(i):
            runs[name](count)
            synchronize(device)

        return Timer(timed, 1, "cpu", settings.sample_ms)  # by the wall clock on GPUs too

    for name, run in runs.items():
        row = dict(name=name, status="ok", precision=precision[name])
        rows.append(row)

        def attempt(count, name=name, run=run, row=row):
            if "differences" not in row:  # a run changes the weights, even one that fails half-way
                row["differences"] = gate(name, count)
            run(count)
            if device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            seen = ran(lambda: run(count), device)
            identify(name, "", serving("group_norm_silu", device), seen)
            if device == "cuda":
                row["peak_mib"] = round((torch.cuda.max_memory_allocated() - SPARE) / 2**20, 1)
            timers[name], row["batch"] = timer_of(name, count), count

        try:
            if not largest_by_trial(halved(batch), attempt, device):
                row |= dict(status="failed", reason="out of memory: not even one image fits")
        except AssertionError as error:
            row |= dict(status="incorrect", reason=str(error))
            continue
        except Exception as error:
            if name == BASELINE:  # nothing is timed without it; without the others the rest is
                raise
            row |= dict(status="failed", reason=reason_of(error))
    by_name = {row["name"]: row for row in rows}
    assert by_name[BASELINE]["status"] == "ok", f"{BASELINE} is not timed, and nothing without it: {by_name[BASELINE]['reason']}"
    samples = interleave(timers, rounds_for(timers, settings, lost), benchmark, settings.warmup_s, lost=lost)
    while BASELINE in lost:  # nothing is worth a time without it
        half = by_name[BASELINE]["batch"] // 2
        assert half, f"{BASELINE}: {lost[BASELINE]}"
        by_name[BASELINE]["batch"] = half
        del lost[BASELINE]
        timers = make_timers([BASELINE, *timers], lambda name: timer_of(name, by_name[name]["batch"]), lost)
        samples = interleave(timers, rounds_for(timers, settings, lost), None, settings.warmup_s, lost=lost)
    for name, reason in lost.items():
        by_name[name] |= dict(status="failed", reason=reason)
    for name, times in samples.items():
        row = by_name[name]
        per_image = row["batch"] / by_name[BASELINE]["batch"]
        one = summary(times, dict(bytes=0, flops=0), [ms * per_image for ms in samples[BASELINE]])
        del one["gb_per_s"]
        row |= one | dict(images_per_s=short(1e3 * row["batch"] / one["median_ms"]))
    record = dict(kind="tokenizer", case=case, device=device, batch=batch, load=os.getloadavg()[0],
                  rows=[row for row in rows if row["status"] == "ok"],
                  left_out=[row for row in rows if row["status"] != "ok"] + left_out, **more,
                  samples_ms={name: list(map(short, times)) for name, times in samples.items()})
    if device == "cuda":
        record |= dict(after=gpu_state())
    benchmark.extra_info.update(record)
    settings.record(record)
    wrong = [row for row in record["left_out"] if row["status"] != "unavailable" and not row["name"].startswith("diffusers")]
    wrong += [row for row in record["left_out"] if row["status"] == "incorrect" and row not in wrong]
    assert not wrong, wrong


@pytest.fixture(autouse=True)
def fixed_shapes():
    """A batch that had to be halved is compiled as it is, and not for any size."""
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


def size_of(settings):
    return SIZES["tiny" if settings.shapes == ("tiny",) else settings.device]


def bench_vavae_step(benchmark, settings):
    device, size = settings.device, size_of(settings)
    preset, side, batch, *_ = size
    generator = torch.Generator(device).manual_seed(1)
    pixels = torch.rand(batch, 3, side, side, device=device, generator=generator) * 2 - 1
    shape = PRESETS[preset]["z_channels"], *2 * [side // 2 ** (len(PRESETS[preset]["ch_mult"]) - 1)]
    noise = torch.randn(batch, *shape, device=device, generator=generator)
    precision = {BASELINE: "fp32", "ours": "bf16" if device == "cuda" else "fp32"}
    found = {name: StepContestant(name == BASELINE, device, size) for name in precision}
    truth = {}  # by number of images: all that a contestant may be left with, for a run changes the baseline's weights

    def measure(most):
        truth.clear()
        for count in sorted({min(count, most) for count in halved(batch)}, reverse=True):
            given = pixels[:count], noise[:count], found[BASELINE].features(pixels[:count]).float()
            truth[count] = given, [value.cpu() for value in found[BASELINE].measures(*given)]

    def gate(name, count):
        given, true = truth[min(count, max(truth))]
        found_here = found[name].measures(*given)
        differences = {key: distance(one.cpu(), other) for key, one, other in zip(("terms", "gradient"), found_here, true, strict=True)}
        return check(name, differences, precision[name])

    assert largest_by_trial(halved(min(batch, GATE_IMAGES)), measure, device), f"{BASELINE}: not even one image fits"
    runs = {name: lambda count, one=one: one(pixels[:count], noise[:count]) for name, one in found.items()}
    race(benchmark, settings, "step", runs, batch, gate, [], precision, preset=preset, pixels=side)


def check(name, differences, precision):
    wrong = [f"{key} differs by {value:.2g} > {TOLERANCES[precision][key]}" for key, value in differences.items()
             if not value <= TOLERANCES[precision][key]]
    if wrong:
        raise AssertionError(f"{name}: {', '.join(wrong)}")
    return {key: short(value) for key, value in differences.items()}


def diffusers_autoencoder(weights, preset, device):
    """diffusers' AutoencoderKL of our weights."""
    from diffusers import AutoencoderKL as Peer

    ours = AutoencoderKL(**PRESETS[preset])
    ours.load_state_dict(weights)
    with tempfile.TemporaryDirectory() as folder:
        Tokenizer(ours, 0.0, 1.0).save_diffusers(folder)
        return Peer.from_pretrained(folder).to(device).eval().requires_grad_(False)


def codecs(device, size):
    """({name: (encode to moments, decode)}, {name: precision}, [rows of who cannot take part])."""
    preset, cuda = size[0], device == "cuda"
    nets = {BASELINE: networks(True, device, size), "ours": networks(False, device, size)}
    precision = {BASELINE: "fp32", "ours": "bf16" if cuda else "fp32"}

    def of(net):
        def encode(pixels):
            with net.autocast(pixels):
                posterior = net.autoencoder.encode(pixels.contiguous(memory_format=net.memory_format))
            return torch.cat([posterior.mean, posterior.logvar], dim=1)

        def decode(latents):
            with net.autocast(latents):
                return net.autoencoder.decode(latents.contiguous(memory_format=net.memory_format))

        return encode, decode

    found, left_out = {name: of(net) for name, net in nets.items()}, []
    forms = {"diffusers, fp32": False} | ({"diffusers, bf16, channels_last, compiled": True} if cuda else {})
    if importlib.util.find_spec("diffusers") is None:
        left_out += [dict(name=name, status="unavailable", reason="diffusers is not installed (pip install diffusers)") for name in forms]
        return found, precision, left_out
    for name, fast in forms.items():
        try:
            peer = diffusers_autoencoder(nets[BASELINE].autoencoder.state_dict(), preset, device)
        except Exception as error:  # another version of diffusers than the one known here
            left_out.append(dict(name=name, status="failed", reason=reason_of(error)))
            continue
        precision[name] = "bf16" if fast else "fp32"
        dtype, layout = (torch.bfloat16, torch.channels_last) if fast else (torch.float32, torch.contiguous_format)
        peer.to(dtype, memory_format=layout)
        if fast:
            peer.encoder.compile()
            peer.decoder.compile()

        def encode(pixels, peer=peer, dtype=dtype, layout=layout):
            distribution = peer.encode(pixels.to(dtype).contiguous(memory_format=layout)).latent_dist
            return torch.cat([distribution.mean, distribution.logvar], dim=1)

        def decode(latents, peer=peer, dtype=dtype, layout=layout):
            return peer.decode(latents.to(dtype).contiguous(memory_format=layout)).sample

        found[name] = encode, decode
    return found, precision, left_out


@pytest.mark.parametrize("case", ["encode", "decode"])
def bench_codec(benchmark, settings, case):
    device, size = settings.device, size_of(settings)
    preset, side, _, batch, _ = size
    generator = torch.Generator(device).manual_seed(1)
    found, precision, left_out = codecs(device, size)
    inputs = torch.rand(batch, 3, side, side, device=device, generator=generator) * 2 - 1
    if case == "decode":
        grid = side // 2 ** (len(PRESETS[preset]["ch_mult"]) - 1)
        inputs = torch.randn(batch, PRESETS[preset]["z_channels"], grid, grid, device=device, generator=generator)
    functions = {name: pair[case == "decode"] for name, pair in found.items()}
    with torch.no_grad():
        truth = {}

        def measure(count):
            truth["output"] = functions[BASELINE](inputs[:count])

        assert largest_by_trial(halved(min(batch, GATE_IMAGES)), measure, device), f"{BASELINE}: not even one image fits"

        def gate(name, count):  # the batch that is timed: another one would be compiled once more
            true = truth["output"][:count]
            return check(name, dict(output=distance(functions[name](inputs[:count])[: len(true)], true)), precision[name])

        runs = {name: lambda count, f=f: f(inputs[:count]) for name, f in functions.items()}
        race(benchmark, settings, case, runs, batch, gate, left_out, precision, preset=preset, pixels=side)
