"""Whether anything has become slower: every op and every stage at small size on a CPU, against the committed baseline. make bench-check.

    python bench/check.py               # compares with bench/results/check_cpu.json, exit status 1 for a loss
    python bench/check.py --update      # writes that file anew

Every case is timed between two runs of a fixed reference, matrix products and copies of plain PyTorch, and counts as its ratio to it; all
cases take turns, round after round, so that clocks and neighbours hit case and reference alike. A loss is a median ratio whose 95 %
bootstrap interval lies above the baseline's by more than 15 %, and that does so again when it is measured once more. A case must also run
the operators that it ran in the baseline. Ratios of another CPU or number of threads differ: they are reported, and fail with --strict.
"""

import argparse
import json
import math
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from tqdm import trange  # noqa: E402

from bench import harness, step  # noqa: E402
from bench.providers import providers, serving  # noqa: E402
from lightningdit.images import ImageBatches, open_images  # noqa: E402
from lightningdit.latents import LatentStore, Loader, Writer, make_plan, spans  # noqa: E402
from lightningdit.sampler import sample  # noqa: E402
from lightningdit.tokenizer.autoencoder import AutoencoderKL  # noqa: E402
from lightningdit.tokenizer.losses import LatentProjection, PatchDiscriminator  # noqa: E402
from lightningdit.tokenizer.training import Networks, backward, update  # noqa: E402
from lightningdit.tokenizer.vavae import PRESETS, Tokenizer  # noqa: E402
from lightningdit_kernels.testing import FROZEN, OPS, example_inputs, random_tensor  # noqa: E402

BASELINE = ROOT / "bench" / "results" / "check_cpu.json"
TOLERANCE = 1.15
ROUNDS = 40
SAMPLE_MS, REFERENCE_MS = 20.0, 8.0  # least lengths of a sample
TOKENIZER, SIDE = "small-f8d16", 32


def reference() -> Callable:
    """The yardstick: two products of matrices that fit the caches, one copy that does not."""
    a, b = random_tensor(256, 256, seed=1), random_tensor(256, 256, seed=2)
    source, target = torch.zeros(2**21), torch.zeros(2**21)

    def run(_):
        torch.mm(torch.mm(a, b), b)
        target.copy_(source)

    return run


# The cases. Each maker returns a function of the number of its run.


def op_case(op: str) -> Callable:
    """Forward and backward of our op at the size of DiT-S; AssertionError if another provider than ours is what runs."""
    inputs = example_inputs(op, batch=4, rows=16, columns=16, width=384, heads=6)
    leaves = [value.requires_grad_() for name, value in inputs.items()
              if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in FROZEN]
    function = next(provider for provider in providers(op) if provider.name == "ours").build()
    out = function(**inputs)
    cotangents = [torch.ones_like(one) for one in (out if isinstance(out, tuple) else (out,))]

    def run(_):
        out = function(**inputs)
        return torch.autograd.grad(out, leaves, cotangents)

    harness.identify("ours", "", serving(op, "cpu"), harness.ran(lambda: run(0), "cpu"))
    return run


def training_step() -> Callable:
    """Of a DiT-S of depth 2 with 64 tokens, as train/dit.py makes it."""
    trainer, ours = step.Trainer(step.configure("s/N64/B4", "cpu"), "cpu"), step.Contestant("ours eager")
    model, batch = trainer.build(ours), trainer.batch()
    return lambda _: trainer.step(model, batch)


def sampling_step() -> Callable:
    """A guided evaluation of the same model for 4 images."""
    trainer = step.Trainer(step.configure("s/N64/B4", "cpu"), "cpu")
    settings = dict(latent_shape=(32, 8, 8), num_classes=1000, num_steps=1, guidance_scale=4.0)

    @torch.no_grad()
    def run(_):
        return sample(trainer.average.model, labels=[0, 1, 2, 3], seeds=[0, 1, 2, 3], **settings)

    return run


def autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(**PRESETS[TOKENIZER])


def vavae_step() -> Callable:
    """One update of tokenizer, projection and discriminator, as train/vavae.py makes it, without LPIPS."""
    nets = Networks(autoencoder(), LatentProjection(16, 384), PatchDiscriminator(3, 16, 2))
    optimizers = [torch.optim.Adam(module.parameters(), betas=(0.5, 0.9), fused=True) for _, module in nets.trained()]
    pixels, noise, features = random_tensor(2, 3, SIDE, SIDE), random_tensor(2, 16, 4, 4), random_tensor(2, 16, 384)

    def run(_):
        backward(nets, pixels, noise, features, adversarial=True, perceptual_weight=0)
        for optimizer in optimizers:
            update(optimizer, 1e-4)

    return run


def tokenizer_cases() -> dict[str, Callable]:
    tokenizer = Tokenizer(autoencoder(), 0.0, 1.0)
    pixels, latents = random_tensor(4, 3, SIDE, SIDE), random_tensor(4, 16, 4, 4)
    return dict(encode=torch.no_grad()(lambda _: tokenizer.encode(pixels)), decode=torch.no_grad()(lambda _: tokenizer.decode(latents)))


def image_decoding(folder: Path) -> Callable:
    """One pass over 8 JPEG files, center crops to 256 pixels by Pillow in two threads."""
    smooth = np.random.default_rng(0).integers(0, 256, (8, 6, 8, 3), dtype=np.uint8)
    (folder / "all").mkdir(parents=True)
    for number, pixels in enumerate(smooth):
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(folder / "all" / f"{number}.jpg", quality=90)
    batches = ImageBatches(open_images(folder), 8, image_size=256, decoder="pillow", workers=2)
    return lambda _: [len(images) for images, *_ in batches.epoch()]


def latent_loading(folder: Path) -> Callable:
    """Batches of 64 from a memory-mapped store of bf16 moments of VA-VAE f16d32's shape."""

    class Source:
        classes, fingerprint = ["all"], "random numbers"

    plan = make_plan(Source, 512, shape=(32, 16, 16), views=2, dtype="bf16", shards=spans(512, 256))
    writer = Writer(folder, plan)
    for number in writer.missing:
        start, stop = plan["shards"][number]
        moments = random_tensor(stop - start, 2, 64, 16, 16, dtype=torch.bfloat16)
        writer.write(number, moments, torch.zeros(stop - start, dtype=torch.int64), torch.arange(start, stop))
    writer.finish(dict(tokenizer=None, mean=None, std=None))
    loader = Loader(LatentStore(folder), 64, seed=0, prefetch=0)
    return lambda _: next(loader)


def makers(folder: Path) -> dict[str, Callable[[], Callable]]:
    """By name: what makes the case, with `folder` for its files."""
    found = {op: lambda op=op: op_case(op) for op in OPS}
    found |= {"training step": training_step, "sampling step": sampling_step, "VA-VAE step": vavae_step}
    found |= {name: lambda name=name: tokenizer_cases()[name] for name in ("encode", "decode")}
    found["image decoding"] = lambda: image_decoding(folder / "images")
    found["latent loading"] = lambda: latent_loading(folder / "latents")
    return found


def operators(run: Callable) -> list[str]:
    """Our operators that one run calls."""
    return [name for name in harness.ran(lambda: run(0), "cpu") if name.startswith("lightningdit::")]


# Measurement and comparison


def measure(runs: dict[str, Callable], rounds: int, progress: bool = True) -> dict[str, dict]:
    """By name: {"median_ms", "ratios": one a round, to the reference just before and after}."""
    yardstick = harness.Timer(reference(), 1, "cpu", REFERENCE_MS)
    timers = {name: harness.Timer(run, 1, "cpu", SAMPLE_MS) for name, run in runs.items()}
    times, ratios = {name: [] for name in runs}, {name: [] for name in runs}
    for _ in trange(rounds, desc="rounds", disable=not progress):
        before = yardstick.sample()
        for name, timer in timers.items():
            times[name].append(timer.sample())
            after = yardstick.sample()
            ratios[name].append(times[name][-1] / math.sqrt(before * after))
            before = after
    return {name: dict(median_ms=harness.short(statistics.median(times[name])), ratios=list(map(harness.short, ratios[name])))
            for name in runs}


def slowdown(now: list[float], before: list[float]) -> tuple[float, float, float]:
    """Median ratio of now over that of before, with its 95 % bootstrap interval over the rounds of both."""
    draw = random.Random(0)

    def median(values):
        return statistics.median(draw.choices(values, k=len(values)))

    drawn = [median(now) / median(before) for _ in range(1000)]
    return statistics.median(now) / statistics.median(before), harness.quantile(drawn, 0.025), harness.quantile(drawn, 0.975)


def compare(measured: dict[str, dict], baseline: dict[str, dict]) -> list[dict]:
    """A row a case: name, slowdown, low, high, verdict; "slower" and "other operators" are the bad ones."""
    rows = []
    for name, one in measured.items():
        row = dict(name=name, median_ms=one["median_ms"], ratio=statistics.median(one["ratios"]), verdict="new")
        rows.append(row)
        if name in baseline:
            change, low, high = slowdown(one["ratios"], baseline[name]["ratios"])
            verdict = "slower" if low > TOLERANCE else "faster: --update" if high < 1 / TOLERANCE else "ok"
            if one["operators"] != baseline[name]["operators"]:
                verdict = "other operators"
            row |= dict(slowdown=change, low=low, high=high, verdict=verdict)
    return rows


def table(rows: list[dict]) -> list[str]:
    lines = [f"{'case':34} {'ms':>9} {'of reference':>13} {'to baseline':>12}  95 % interval"]
    for row in rows:
        change = f"{row['slowdown']:10.2f} x  {row['low']:.2f} to {row['high']:.2f}" if "slowdown" in row else " " * 26
        lines.append(f"{row['name']:34} {row['median_ms']:9.3g} {row['ratio']:13.3g} {change:28} {row['verdict']}")
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--update", action="store_true", help="write the baseline instead of comparing with it")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--strict", action="store_true", help="fail on another CPU or number of threads too")
    parser.add_argument("--only", help="cases, separated by commas; default: all")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make = makers(Path(folder))
        chosen = options.only.split(",") if options.only else list(make)
        if strange := [name for name in chosen if name not in make]:
            parser.error(f"--only names {strange[0]!r}, expected some of {', '.join(make)}")
        if options.rounds < 5:
            parser.error(f"--rounds is {options.rounds}, expected at least 5")
        if not options.update and not options.baseline.is_file():
            parser.error(f"--baseline {options.baseline} is absent; --update writes it")
        return run(options, {name: make[name]() for name in chosen})


def run(options, runs: dict[str, Callable]) -> int:
    """What main does once its cases are made."""
    about, load = harness.environment("cpu"), os.getloadavg()[0]
    proofs = {name: operators(one) for name, one in runs.items()}

    def measured(names):
        found = measure({name: runs[name] for name in names}, options.rounds)
        return {name: one | dict(operators=proofs[name]) for name, one in found.items()}

    found = measured(runs)
    if load > about["cores"]:
        print(f"load average {load:.1f} on {about['cores']} cores: other processes share them, intervals will be wide")
    if options.update:
        about |= dict(load=load, results=[dict(kind="check", name=name, **one) for name, one in found.items()])
        harness.write(options.baseline, about)
        print(*table(compare(found, {})), options.baseline, sep="\n")
        return 0
    content = json.loads(options.baseline.read_text(encoding="utf-8"))
    baseline = {one["name"]: one for one in content["results"]}
    rows = compare(found, baseline)
    if again := [row["name"] for row in rows if row["verdict"] == "slower"]:
        print(f"once more: {', '.join(again)}")
        repeated = {row["name"]: row for row in compare(measured(again), baseline)}
        rows = [repeated.get(row["name"], row) for row in rows]
    print(*table(rows), sep="\n")
    for row in rows:
        if row["verdict"] == "other operators":
            print(f"{row['name']} ran {', '.join(proofs[row['name']]) or 'none of ours'}; "
                  f"in the baseline {', '.join(baseline[row['name']]['operators']) or 'none of ours'}")
    bad = [row["name"] for row in rows if row["verdict"] in ("slower", "other operators")]
    bad += [name for name in baseline if name not in found and not options.only]
    elsewhere = [f"{key} {about[key]}, baseline {content[key]}" for key in ("cpu", "threads") if about[key] != content[key]]
    if elsewhere:
        print(f"the baseline is of another machine ({'; '.join(elsewhere)}): differences say little, and fail with --strict only")
    if bad:
        print(f"slower than the baseline by more than {TOLERANCE - 1:.0%}, changed or gone: {', '.join(bad)}")
    return 1 if bad and (options.strict or not elsewhere) else 0


if __name__ == "__main__":
    sys.exit(main())
