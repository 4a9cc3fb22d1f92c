"""The training step of LightningDiT: the official graph, ours, and ours with each kernel switched off.

    pytest bench/bench_step.py --benchmark-only --results bench/results/step_cpu.json
    pytest bench/bench_step.py --benchmark-only --shapes xl --tokens 256,1024 --official CHECKOUT    # on a GPU; also --shapes l, b

--official names a checkout of github.com/hustvl/LightningDiT, whose model needs `pip install einops fairscale`; it compiles itself.

A step is that of train/dit.py (bench/step.py). Before it is timed a contestant must agree with the reference in fp32: the loss and every
gradient, in fp32 to LOSS_TOLERANCE and GRADIENT_TOLERANCE, in bf16 to twice the error of the eager reference in bf16; and a profile must
show the kernels that are switched on and no others. A batch that does not fit a contestant is halved for it; speed-ups are per image.
FLOPs are the model's, three times the forward's. Matrix products take turns with the steps: "of product" is of their rate in this run.
Peak memory is what a step allocates on top of weights, optimizer and average, which all share (state_mib). The first step is timed in a
fresh process with empty compiler caches; the first call, which finds them as that process left them, is the model's and step's in this one.
"""

import functools
import gc
import os
import time

import pytest
import torch

from bench import step
from bench.harness import Monitor, Timer, gpu_state, interleave, ran, reason_of, rounds_for, short, summary, synchronize
from bench.providers import serving
from bench.scaling import PEAK_TFLOPS
from lightningdit.images import digits, to_pixels
from lightningdit.model import forward_flops
from lightningdit.plan import largest_by_trial
from lightningdit.tokenizer.vavae import load_tokenizer
from lightningdit_kernels.testing import random_tensor

REFERENCE = "reference eager"
GEMM = dict(cuda=8192, cpu=1024)
STEPS_A_SAMPLE, PRODUCTS = dict(cuda=5, cpu=1), dict(cuda=20, cpu=1)
COLD = ("reference compiled", "ours compiled")  # whose first step is timed in a fresh process
OVERLAY_STEPS, OVERLAY_BATCH = dict(cuda=300, cpu=60), dict(cuda=128, cpu=8)
# Of the mean difference of the two loss curves to the mean loss: rounding grows from step to step, and more in bf16.
OVERLAY_TOLERANCE = 0.01


class Gate:
    """The fp32 truth, and what the eager reference is off, for batches of several sizes."""

    def __init__(self, trainer):
        self.trainer = trainer
        self.of = functools.cache(self._of)

    def _of(self, count):
        batch = self.trainer.batch(count=count)
        truth = self.trainer.truth(batch)
        reference = self.trainer.build(step.Contestant("gate", step.ALL))
        return batch, truth, step.bounds(step.errors(self.trainer.gradients(reference, batch), truth))

    def __call__(self, name, model, count):
        batch, truth, bounds = self.of(count)
        errors = step.errors(self.trainer.gradients(model, batch), truth)
        wrong = [f"{key} is off by {errors[key]:.2g} > {bounds[key]:.2g}" for key in bounds if not errors[key] <= bounds[key]]
        if wrong:
            raise AssertionError(f"{name}: {', '.join(wrong)}")
        return {key: short(value) for key, value in errors.items()}


def prepare(trainer, gate, contestant, device, official):
    """(model, its batch, row) of a contestant that may be timed, or (None, None, row with the reason). Changes no weights."""
    row = dict(name=contestant.name, status="ok")
    try:
        begin = time.perf_counter()
        model = trainer.share(official()) if official else trainer.build(contestant)
        sizes = [trainer.config.batch_size >> halving for halving in range(trainer.config.batch_size.bit_length())]
        count = largest_by_trial(sizes, lambda count: trainer.step(model, trainer.batch(count=count), skip=True))
        assert count, "not even one image fits"
        synchronize(device)
        row |= dict(batch=count, first_call_s=round(time.perf_counter() - begin, 2), errors=gate(contestant.name, model, count))
        batch = trainer.batch(count=count)
        seen = ran(lambda: trainer.step(model, batch, skip=True), device)
        if not official:
            contestant.prove(seen, device)
        row |= dict(peak_mib=round(trainer.peak_mib(model, batch), 1), ran=[one for one in seen if one.startswith("lightningdit::")])
        return model, batch, row
    except AssertionError as error:
        return None, None, row | dict(status="incorrect", reason=str(error))
    except Exception as error:
        if contestant.name == REFERENCE:  # nothing is timed without it; without ours the others are
            raise
        return None, None, row | dict(status="failed", reason=reason_of(error))


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
    cold = {one.name: step.first_step(one.name, shapes, device) for one in chosen if part == "ladder" and one.name in COLD}
    trainer = step.Trainer(step.configure(shapes, device), device)
    config, gate, runs, rows = trainer.config, Gate(trainer), {}, []
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
    gate.of.cache_clear()
    gc.collect()

    def timed(name):
        def run(i):
            for _ in range(1 if tiny else STEPS_A_SAMPLE[device]):
                trainer.step(*runs[name])
            synchronize(device)

        return Timer(run, 1, "cpu", settings.sample_ms)  # by the wall clock on GPUs too

    assert REFERENCE in runs, f"{REFERENCE} is not timed, and nothing without it: {rows[:1]}"
    flops, per_sample = 3 * forward_flops(trainer.model), 1 if tiny else STEPS_A_SAMPLE[device]
    size, dtype = 64 if tiny else GEMM[device], torch.bfloat16 if trainer.bf16 else torch.float32
    multiply, product_flops = products(device, dtype, size)
    timers = {name: timed(name) for name in runs} | {"product": Timer(multiply, 1, "cpu", settings.sample_ms)}
    monitor, states = Monitor() if device == "cuda" else None, []
    rounds = rounds_for(timers, settings)
    samples = interleave(timers, rounds, benchmark, settings.warmup_s, observe=monitor and (lambda: states.append(monitor.sample())))
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
    wrong = [row for row in record["left_out"] if row["status"] != "unavailable" and row["name"] != "official"]
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
