"""Images a second from noise to pixels: ours as `lightningdit sample` runs it, against the official script's way of doing it.

    pytest bench/bench_sampling.py --benchmark-only --results bench/results/sampling_cpu.json

The official way: fp32 (with TF32 on GPUs), the unconditional half at every step, batches of 4, and a list of the states of all steps, as
torchdiffeq keeps them. It runs here on the same model and kernels, so that only the way of sampling differs. Before timing, each
contestant must draw the latents of the official way: in fp32 to 1e-3 of their spread, in TF32 to 5e-3, in bf16 to 5e-2.
"""

import contextlib
import copy
import functools
import os

import torch

from bench.harness import Timer, gpu_state, interleave, make_timers, model_arguments, reason_of, rounds_for, summary, synchronize
from lightningdit.generation import Decoder
from lightningdit.model import SIZES, LightningDiT
from lightningdit.sampler import Prepared, initial_noise, sample, time_grid
from lightningdit.tokenizer.vavae import load_tokenizer

# The paper's 64 epochs: 249 steps, scale 10 on 3 channels from t = 0.10 on, shift 0.3. On CPUs fewer steps, in which the share of guided
# ones is the same, and the digits' tokenizer.
PAPER = dict(guidance_scale=10.0, guidance_interval=(0.10, 1.0), guidance_channels=3, shift=0.3)
STEPS = {"cuda": 249, "cpu": 10}
# Of the large batch; on CUDA the batches of 4 draw fewer, or one pass would take minutes.
IMAGES = {"cuda": 32, "cpu": 32}
FEW = {"cuda": 4, "cpu": 32}
OFFICIAL_BATCH = 4
BASELINE = "official way, fp32, batch 4"
TOLERANCES = dict(fp32=1e-3, tf32=5e-3, bf16=5e-2)  # TF32 rounds what it multiplies to 11 bits, so that another order of sums shows


def official(model, labels, seeds, latent_shape, num_classes, num_steps, shift, guidance_scale, guidance_interval, guidance_channels,
             device):
    """Both halves in every step, the weaker one for nothing below the interval, and all states kept until the batch is done."""
    latents = []
    for start in range(0, len(labels), OFFICIAL_BATCH):
        rows = slice(start, start + OFFICIAL_BATCH)
        x = initial_noise(seeds[rows], latent_shape, device).repeat(2, 1, 1, 1)
        y = torch.tensor(labels[rows], device=device)
        y, trajectory, grid = torch.cat([y, torch.full_like(y, num_classes)]), [x], time_grid(num_steps, shift)
        for t, h in zip(grid[:-1].to(device), grid.diff().to(device), strict=True):
            half = x[: len(x) // 2]
            output = model(torch.cat([half, half]), t.expand(len(x)), y)
            cond, weak = output[:, :guidance_channels].chunk(2)
            mixed = cond if t < guidance_interval[0] else weak + guidance_scale * (cond - weak)  # waits for the device
            x = x + h * torch.cat([torch.cat([mixed, mixed]), output[:, guidance_channels:]], dim=1)
            trajectory.append(x)
        latents.append(torch.stack(trajectory)[-1].chunk(2)[0])
    return latents


def build(shapes, device):
    """(model, labels, latent shape, decode) of a preset: random weights, since speed does not depend on them."""
    torch.manual_seed(0)
    tiny, xl = shapes == "tiny", shapes in ("xl", "b")
    latent_shape = (32, 16, 16) if xl else (4, 4, 4)
    arguments = model_arguments(shapes) | dict(
        depth=1 if tiny else 4 if device == "cpu" else SIZES[shapes.upper()][0],
        input_size=latent_shape[1], in_channels=latent_shape[0], num_classes=1000 if xl else 10)
    model = LightningDiT(**arguments).to(device).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05)
    if xl and device == "cuda":
        from lightningdit.tokenizer.autoencoder import AutoencoderKL
        from lightningdit.tokenizer.vavae import PRESETS as TOKENIZERS
        from lightningdit.tokenizer.vavae import Tokenizer

        tokenizer = Tokenizer(AutoencoderKL(**TOKENIZERS["f16d32"]), torch.zeros(32), torch.ones(32)).to(device).eval()
    else:
        tokenizer = None if xl else load_tokenizer("digits", device=device)
    return model, latent_shape, tokenizer.decode_uint8 if tokenizer else None


def contestants(model, decode, latent_shape, device, few, count, num_steps):
    """By name: (images, a function that draws and decodes so many and returns the latents); `few` of them in batches of 4."""
    labels, seeds, num_classes = [i % model.num_classes for i in range(count)], list(range(count)), model.num_classes
    settings = dict(PAPER, latent_shape=latent_shape, num_classes=num_classes, num_steps=num_steps, device=device)
    decode = decode or (lambda latents: latents.mul(40).add(128).clamp(0, 255).to(torch.uint8))

    def as_official():
        latents = official(model, labels[:few], seeds[:few], **settings)
        for batch in latents:
            decode(batch).cpu()
        return torch.cat(latents)

    def ours(drawn_by, batch_size, bf16=False, count=count):
        decoder, latents = Decoder(decode, torch.device(device)), []
        precision = torch.autocast(device, torch.bfloat16) if bf16 else contextlib.nullcontext()
        with precision:
            for start in range(0, count, batch_size):
                rows = slice(start, min(start + batch_size, count))
                latents.append(sample(drawn_by, labels=labels[rows], seeds=seeds[rows], **settings))
                list(decoder(latents[-1], len(latents[-1])))
            list(decoder.finish())
        return torch.cat(latents)

    @functools.cache  # at its first call, which may run out of memory: that costs the row
    def prepared(bf16=False, compile=False):
        return Prepared(copy.deepcopy(model), labels, num_classes, batch_size=count, num_steps=num_steps, guided=True, device=device,
                        autocast=torch.bfloat16 if bf16 else None, compile=compile)

    found = {BASELINE: (few, as_official)}
    found["ours, fp32, batch 4"] = few, lambda: ours(model, OFFICIAL_BATCH, count=few)
    found[f"ours, fp32, batch {count}"] = count, lambda: ours(model, count)
    found[f"ours, fp32, batch {count}, prepared"] = count, lambda: ours(prepared(), count)
    if device == "cuda":  # a CPU without bf16 units only loses
        found[f"ours, bf16, batch {count}, prepared"] = count, lambda: ours(prepared(True), count, True)
        found[f"ours, bf16, batch {count}, compiled, CUDA graphs"] = count, lambda: ours(prepared(True, True), count, True)
    return found


def bench_sampling(benchmark, settings, shapes):
    device, dry = settings.device, settings.shapes == ("tiny",)
    model, latent_shape, decode = build(shapes.partition("/")[0], device)
    few, count, num_steps = (4, 8, 4) if dry else (FEW[device], IMAGES[device], STEPS[device])
    torch.backends.cuda.matmul.allow_tf32 = True  # as the official script
    with torch.no_grad():
        runs = contestants(model, decode, latent_shape, device, few, count, num_steps)
        truth, rows = runs[BASELINE][1](), []
        for name, (images, run) in runs.items():
            row = dict(name=name, status="ok", count=images)
            rows.append(row)
            try:
                row["max_difference"] = difference = float((run()[:few] - truth).abs().max() / truth.std())
            except Exception as error:  # the others are worth having without it
                row |= dict(status="failed", reason=reason_of(error))
                continue
            tolerance = TOLERANCES["bf16" if "bf16" in name else "tf32" if device == "cuda" else "fp32"]
            if not difference <= tolerance:
                row |= dict(status="incorrect", reason=f"differs by {difference:.2g} > {tolerance} of the spread")

        def timer_of(name):
            def timed(i):
                runs[name][1]()
                synchronize(device)

            return Timer(timed, 1, "cpu", settings.sample_ms)  # by the wall clock on GPUs too

        lost = {}
        timers = make_timers([row["name"] for row in rows if row["status"] == "ok"], timer_of, lost)
        samples = interleave(timers, 1 if dry else rounds_for(timers, settings, lost), benchmark, 0, lost=lost)
    for row in rows:
        if row["name"] in lost:
            row |= dict(status="failed", reason=lost[row["name"]])
    assert BASELINE in samples, f"{BASELINE} is not timed, and nothing without it: {rows[0]['reason']}"
    for row in rows:
        if row["status"] == "ok":
            official_ms = [ms * row["count"] / few for ms in samples[BASELINE]]  # of as many images
            one = summary(samples[row["name"]], dict(bytes=0, flops=0), official_ms)
            del one["gb_per_s"]  # images are what is counted here
            row |= one | dict(images_per_s=round(1e3 * row["count"] / one["median_ms"], 2))
    record = dict(kind="sampling", case=shapes, device=device, count=count, num_steps=num_steps, depth=len(model.blocks),
                  decoded=decode is not None, load=os.getloadavg()[0], rows=[row for row in rows if row["status"] == "ok"],
                  left_out=[row for row in rows if row["status"] != "ok"], **PAPER)
    if device == "cuda":
        record |= dict(after=gpu_state())
    benchmark.extra_info.update(record)
    settings.record(record)
    assert not record["left_out"], record["left_out"]

