"""The training step of LightningDiT: the official graph, ours, and ours with each kernel switched off.

    pytest bench/bench_step.py --benchmark-only --results bench/results/step_cpu.json
    pytest bench/bench_step.py --benchmark-only --shapes xl --tokens 256,1024 --official CHECKOUT    # on a GPU; also --shapes l, b

--official names a checkout of github.com/hustvl/LightningDiT, whose model needs `pip install einops fairscale`; it compiles itself.

A step is that of train/dit.py (bench/step.py). Before it is timed a contestant must agree with the reference in fp32: the loss and every
gradient, in fp32 to LOSS_TOLERANCE and GRADIENT_TOLERANCE, in bf16 to twice the error of the eager reference in bf16; and a profile must
show the kernels that are switched on and no others. The agreement is of at most GATE_IMAGES different images, which fill the batch.

A batch that does not fit a contestant, with what all of them share and 3 GiB to spare, is halved for it; speed-ups are per image.
FLOPs are the model's, three times the forward's. Matrix products take turns with the steps: "of product" is of their rate in this run.
Peak memory is what a step allocates on top of weights, optimizer and average, which all share (state_mib). The first step is timed in a
fresh process with empty compiler caches; the first call, which finds them as that process left them, is the model's and step's in this one.
"""

import functools
import os
import re
import time

import pytest
import torch

from bench import step
from bench.harness import OURS, Monitor, Timer, gpu_state, interleave, make_timers, ran, reason_of, rounds_for, short, summary, synchronize
from bench.providers import serving
from bench.scaling import PEAK_TFLOPS
from lightningdit.images import digits, to_pixels
from lightningdit.memory import largest_by_trial
from lightningdit.model import forward_flops
from lightningdit.tokenizer.vavae import load_tokenizer
from lightningdit_kernels.testing import random_tensor

REFERENCE = "reference eager"
GEMM = dict(cuda=8192, cpu=1024)
STEPS_A_SAMPLE, PRODUCTS = dict(cuda=5, cpu=1), dict(cuda=20, cpu=1)
GATE_IMAGES = 32  # whose truth is computed, and for which the eager reference must fit the GPU, however small the batch that is timed
COLD = ("reference compiled", "ours compiled")  # whose first step is timed in a fresh process
OVERLAY_STEPS, OVERLAY_BATCH = dict(cuda=300, cpu=60), dict(cuda=128, cpu=8)
# Of the mean difference of the two loss curves to the mean loss: rounding grows from step to step, and more in bf16.
OVERLAY_TOLERANCE = 0.01


class Gate:
    """The fp32 truth, and what the eager reference is off, for different images.

    A larger batch repeats them: its mean loss and gradients are those of the images, and the graph that is compared is the one that is
    timed. A contestant needs no more memory for it than for a step.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.of = functools.cache(self._of)

    def _of(self, images):
        batch = self.trainer.batch(count=images)
        truth = self.trainer.truth(batch)
        reference = self.trainer.build(step.Contestant("gate", step.ALL))
        return batch, truth, step.bounds(step.errors(self.trainer.gradients(reference, batch), truth))

    @staticmethod
    def images(count):
        """How many different images a batch of `count` is made of: its largest divisor up to GATE_IMAGES."""
        return next(images for images in range(min(count, GATE_IMAGES), 0, -1) if count % images == 0)

    def __call__(self, name, model, count):
        images = self.images(count)
        batch, truth, bounds = self.of(images)
        batch = {name: value.repeat(count // images, *[1] * (value.dim() - 1)) for name, value in batch.items()}
        errors = step.errors(self.trainer.gradients(model, batch), truth)
        wrong = [f"{key} is off by {errors[key]:.2g} > {bounds[key]:.2g}" for key in bounds if not errors[key] <= bounds[key]]
        if wrong:
            raise AssertionError(f"{name}: {', '.join(wrong)}")
        return {key: short(value) for key, value in errors.items()}


def prepare(trainer, gate, contestant, device, official=None, most=None):
    """(model, its batch, row) of a contestant that may be timed, or (None, None, row with the reason). Changes no weights.

    Args: official: makes the model in place of the contestant. most: images of a batch, instead of the configuration's.
    """
    row = dict(name=contestant.name, status="ok")
    try:
        begin = time.perf_counter()
        model = trainer.share(official()) if official else trainer.build(contestant)
        build_s = time.perf_counter() - begin

        def attempt(count):  # all that comes before the rounds: whatever does not fit, a smaller batch may
            begin = time.perf_counter()
            batch = trainer.batch(count=count)
            trainer.step(model, batch, skip=True)
            synchronize(device)
            row.update(batch=count, first_call_s=round(build_s + time.perf_counter() - begin, 2))
            row.update(errors=gate(contestant.name, model, count), gate_images=gate.images(count))
            seen = ran(lambda: trainer.step(model, batch, skip=True), device)
            if not official:
                contestant.prove(seen, device)
            row.update(peak_mib=round(trainer.peak_mib(model, batch), 1), ran=[one for one in seen if re.search(OURS, one)])

        most = most or trainer.config.batch_size
        count = largest_by_trial([most >> halving for halving in range(most.bit_length())], attempt, device)
        if not count:
            return None, None, dict(name=contestant.name, status="failed", reason="out of memory: not even one image fits")
        return model, trainer.batch(count=count), row
    except AssertionError as error:
        return None, None, row | dict(status="incorrect", reason=str(error))
    except Exception as error:
        if contestant.name == REFERENCE:  # nothing is timed without it; without ours the others are
            raise
        return None, None, row | dict(status="failed", reason=reason_of(error))


def measure(runs, timed, product, settings, benchmark, monitor):
    """(samples, rounds, states of the monitor, {name: reason} of who ran out of memory, for what all of them hold at once)."""
    lost, states = {}, []
    timers = make_timers(runs, timed, lost) | make_timers(["product"], lambda name: Timer(product, 1, "cpu", settings.sample_ms), lost)
    rounds = rounds_for(timers, settings, lost)
    observe = monitor and (lambda: states.append(monitor.sample()))
    samples = interleave(timers, rounds, benchmark, settings.warmup_s, observe, lost)
    assert "product" in samples, lost.get("product")
    return samples, rounds, states, lost


def products(device, dtype, size):
    """So many products that waiting for them costs nothing, and their FLOPs."""
    (a, b), count = (random_tensor(size, size, dtype=dtype, seed=seed, device=device) for seed in (1, 2)), PRODUCTS[device]

    def run(i):
        for _ in range(count):
            a @ b
        synchronize(device)

    return run, 2 * count * size**3


@pytest.fixture(autouse=True)
def compiler(tmp_path, monkeypatch):
    """Caches that only the first steps in fresh processes filled, and shapes that are fixed, as in training, where a batch has one size."""
    for name in step.CACHES:
        monkeypatch.setenv(name, str(tmp_path / name))
    torch.compiler.reset()
    with torch._dynamo.config.patch(automatic_dynamic_shapes=False):
        yield


@pytest.mark.parametrize("part", ["ladder", "kernels"])
def bench_step(benchmark, settings, shapes, part, request):
    device, tiny = settings.device, shapes.startswith("tiny")
    if serving("swiglu", device) == "reference":
        pytest.skip("no kernels of ours here: ours is the reference")
    official = request.config.getoption("--official") if part == "ladder" else None
    chosen = [one for one in step.contestants(device)[part] if not settings.only or one.name in settings.only]
    limit_s = request.config.getoption("--first-step-s") or step.FIRST_STEP_S
    cold = {one.name: step.first_step(one.name, shapes, device, limit_s) for one in chosen if part == "ladder" and one.name in COLD}
    trainer = step.Trainer(step.configure(shapes, device), device)
    config, gate, runs, rows = trainer.config, Gate(trainer), {}, []
    size, dtype = 64 if tiny else GEMM[device], torch.bfloat16 if trainer.bf16 else torch.float32
    multiply, product_flops = products(device, dtype, size)  # there before memory is tried
    for one in [*chosen, *[step.Contestant("official", compiled=True)] * (official is not None)]:
        ours = next((row for row in rows if row["name"] == "ours compiled" and row["status"] == "ok"), None)
        if device == "cuda" and one.off == ("attention",) and ours and not any("rope_attention" in name for name in ours["ran"]):
            rows.append(dict(name=one.name, status="unavailable", reason="the attention of ours is PyTorch's here already"))
            continue
        build = functools.partial(step.official_model, official, config) if one.name == "official" else None
        model, batch, row = prepare(trainer, gate, one, device, build)
        rows.append(row | cold.get(one.name, {}))
        if model is not None:
            runs[one.name] = model, batch
    if official is None and part == "ladder":
        rows.append(dict(name="official", status="unavailable", reason="needs --official PATH, a checkout of the official code"))

    def timed(name):
        def run(i):
            for _ in range(1 if tiny else STEPS_A_SAMPLE[device]):
                trainer.step(*runs[name])
            synchronize(device)

        return Timer(run, 1, "cpu", settings.sample_ms)  # by the wall clock on GPUs too

    assert REFERENCE in runs, f"{REFERENCE} is not timed, and nothing without it: {rows[:1]}"
    flops, per_sample = 3 * forward_flops(trainer.model), 1 if tiny else STEPS_A_SAMPLE[device]
    monitor = Monitor() if device == "cuda" else None
    samples, rounds, states, lost = measure(runs, timed, multiply, settings, benchmark, monitor)
    while REFERENCE in lost:  # nothing is worth a time without it
        (reference,), half = [one for one in chosen if one.name == REFERENCE], len(runs.pop(REFERENCE)[1]["t"]) // 2
        assert half, f"{REFERENCE}: {lost[REFERENCE]}"
        model, batch, rows[0] = prepare(trainer, gate, reference, device, most=half)
        assert model is not None, f"{REFERENCE}: {rows[0]['reason']}"
        runs = {REFERENCE: (model, batch)} | runs
        samples, rounds, states, lost = measure(runs, timed, multiply, settings, None, monitor)
    for row in rows:
        if row["name"] in lost:
            row |= dict(status="failed", reason=lost[row["name"]])
    gemm = summary(samples["product"], dict(bytes=0, flops=product_flops), samples["product"])
    samples = {name: [ms / per_sample for ms in times] for name, times in samples.items() if name != "product"}
    reference_batch = next(row["batch"] for row in rows if row["name"] == REFERENCE)
    for row in rows:
        if row["name"] not in samples:
            continue
        per_image = row["batch"] / reference_batch
        one = summary(samples[row["name"]], dict(bytes=0, flops=flops * row["batch"]), [ms * per_image for ms in samples[REFERENCE]])
        del one["gb_per_s"]
        row |= one | dict(images_per_s=short(1e3 * row["batch"] / one["median_ms"]))
        row |= dict(of_product=short(one["tflop_per_s"] / gemm["tflop_per_s"]))
        if device == "cuda":
            row |= dict(mfu=short(one["tflop_per_s"] / PEAK_TFLOPS))
    model = dict(depth=config.model.depth, width=config.model.hidden_size, heads=config.model.num_heads, tokens=config.latent_size**2)
    model |= dict(parameters=sum(p.numel() for p in trainer.model.parameters()), flops_per_image=flops)
    model |= dict(state_mib=round(trainer.state_mib(), 1))
    record = dict(kind="training_step", case=shapes, part=part, device=device, dtype=str(dtype).removeprefix("torch."),
                  batch=config.batch_size, model=model, product=dict(size=size, tflop_per_s=gemm["tflop_per_s"]), load=os.getloadavg()[0],
                  rows=[row for row in rows if row["status"] == "ok"], left_out=[row for row in rows if row["status"] != "ok"],
                  samples_ms={name: list(map(short, times)) for name, times in samples.items()})
    if device == "cuda":
        record |= dict(after=gpu_state(), monitor=monitor.source, peak_tflops=PEAK_TFLOPS)
        record |= dict(rounds={key: [one.get(key) for one in states[-rounds:]] for key in states[-1]})
    benchmark.extra_info.update(record)
    settings.record(record)
    wrong = {row["name"]: row["reason"] for row in record["left_out"] if row["status"] != "unavailable" and row["name"] != "official"}
    assert not wrong, wrong


def digit_latents(side, device):
    """(latents of the digits enlarged to `side` positions (n, 4, side, side), labels): real data that every machine has."""
    images, labels = digits()
    pixels = to_pixels(images).to(device)
    tokenizer = load_tokenizer("digits", device=device)
    if side > 4:
        pixels = torch.nn.functional.interpolate(pixels, 2 * side, mode="bicubic").clamp(-1, 1)
    with torch.no_grad():
        return torch.cat([tokenizer.normalise(tokenizer.encode(part).mean) for part in pixels.split(64)]), labels.to(device)


def bench_overlay(benchmark, settings, shapes):
    """The losses of training with the reference and with ours from the same weights on the same batches; both compiled on CUDA."""
    device, tiny = settings.device, shapes.startswith("tiny")
    steps, side = (4 if tiny else OVERLAY_STEPS[device]), 16 if device == "cuda" else 4
    config = step.configure(shapes, device, tokens=side * side, batch=2 if tiny else OVERLAY_BATCH[device])
    config.tokenizer.latent_channels, config.data.num_classes = 4, 10
    latents, labels = digit_latents(side, device)
    names = [f"{who} {'compiled' if device == 'cuda' else 'eager'}" for who in ("reference", "ours")]
    curves, found = {}, {one.name: one for one in step.contestants(device)["ladder"]}

    def run():
        for name in names:
            trainer, losses = step.Trainer(config, device), []
            model = trainer.build(found[name])
            for done in range(steps):
                batch = trainer.batch(seed=done)
                rows = torch.randint(len(latents), (config.batch_size,), generator=torch.Generator().manual_seed(done)).to(device)
                losses.append(trainer.step(model, batch | dict(x1=latents[rows], y=labels[rows])))
            curves[name] = torch.stack(losses).tolist()

    benchmark.pedantic(run, rounds=1, iterations=1)
    reference, ours = (torch.tensor(curves[name], dtype=torch.float64) for name in names)
    difference = (reference - ours).abs()
    record = dict(kind="loss_overlay", case=shapes, device=device, dtype="bfloat16" if device == "cuda" else "float32", steps=steps,
                  batch=config.batch_size, lr=config.optim.lr, data=f"latents of digits, {side} x {side}",
                  curves={name: [float(f"{value:.7g}") for value in curve] for name, curve in curves.items()},
                  largest_difference=short(difference.max().item()), at_step=int(difference.argmax()) + 1,
                  mean_difference=short(difference.mean().item()), mean_loss=short(reference.mean().item()))
    benchmark.extra_info.update(record)
    settings.record(record)
    assert difference.mean() <= OVERLAY_TOLERANCE * reference.mean(), {key: record[key] for key in ("mean_difference", "mean_loss")}
