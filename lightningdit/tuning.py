"""Searching the settings of guidance by successive halving: all of them on few images, the best on more.

    lightningdit tune-guidance --checkpoint runs/digits --scales 1 1.5 2 3 5 --intervals 0 1 0.1 1 --shifts 0.3 1 --out runs/digits/tuning

OUT/tuning.json holds everything that was measured and is written after each setting: the same command goes on where it stopped, and with
more scales, shifts, images, or another metric it measures only what is new. OUT/tuning.png shows it. All settings get the same labels and
seeds, so that they differ by what they do to the same noise. Distances fall with the number of images, so only those of one round compare.
"""
import dataclasses
import hashlib
import json
import math
import time
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from .checkpoint import state_sha256
from .config import require
from .distributed import check_compiler, pick_device, process_group, world
from .evaluation import Collector, compare, load_reference
from .features import load_extractor
from .generation import LABELS, by_the_first, draw_batches, make_labels
from .latents import write_json
from .log import environment
from .optional import progress_bar, pyplot
from .sampler import Diverged, Prepared, sample
from .trained import load_run, parse_classes

SIGNS = {"fid": 1, "sfid": 1, "kid": 1, "is": -1, "precision": -1, "recall": -1}  # 1: less is better
LEAST = 4  # settings that a later round has, where there are as many: a frontier needs more than one


@dataclasses.dataclass(frozen=True)
class Setting:
    """What is searched, under the names of sampler.sample's arguments."""

    guidance_scale: float
    guidance_interval: tuple
    shift: float
    guidance_channels: int | None
    num_steps: int

    def __str__(self):
        low, high = self.guidance_interval
        guided = "" if self.guidance_scale == 1 else f", {low:g}-{high:g}, {self.guidance_channels or 'all'} channels"
        return f"scale {self.guidance_scale:g}{guided}, shift {self.shift:g}, {self.num_steps} steps"

    def options(self):
        """As options of `lightningdit sample`."""
        low, high = self.guidance_interval
        return (f"--guidance-scale {self.guidance_scale:g} --guidance-interval {low:g} {high:g} --guidance-channels "
                f"{self.guidance_channels or 0} --shift {self.shift:g} --num-steps {self.num_steps}")


def tune_guidance(
    checkpoint: str,
    out: str = "runs/tuning",
    metric: Literal["fid", "sfid", "kid", "is", "precision", "recall"] = "fid",
    scales: tuple[float, ...] = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0),
    intervals: tuple[tuple[float, float], ...] = ((0.0, 1.0), (0.125, 1.0)),
    shifts: tuple[float, ...] = (),
    channels: tuple[int, ...] = (),
    num_steps: tuple[int, ...] = (),
    samples: int = 500,
    max_samples: int = 5000,
    factor: int = 3,
    classes: str = "",
    labels: str = "balanced",
    seed: int = 0,
    reference: str = "auto",
    extractor: str = "auto",
    weights: str | None = None,
    cache: str | None = None,
    workers: int = 4,
    method: str | None = None,
    batch_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] | None = None,
    compile: bool = False,
    device: str = "auto",
    config: str | None = None,
    tokenizer: str | None = None,
) -> int:
    """Searches guidance scale x interval x time shift x channels for the best of a metric: all settings on few images, the best on more.

    Prints the last round; writes OUT/tuning.json and OUT/tuning.png. The same command goes on where it stopped. Under torchrun all
    processes share the images of each setting.

    Args:
        checkpoint: a run directory or one of its checkpoints; or official weights (.pt, .safetensors) with --config and --tokenizer.
        out: folder to write.
        metric: what is to be best. Frechet distance, of other features than Inception's too: fid.
        scales: guidance scales; 1 is no guidance.
        intervals: from and to which time guidance acts, pair after pair: 0 1 0.1 1.
        shifts: time shifts; none: the run's.
        channels: numbers of leading latent channels that are guided, 0 meaning all; none: the run's.
        num_steps: intervals of the time grid; none: the run's.
        samples: images a setting in the first round; each further round takes `factor` times as many.
        max_samples: of no round more.
        factor: a round keeps the best of so many, and at least 4 settings.
        classes: class numbers or names, separated by commas; empty: all of them.
        labels: balanced, random, or a file of them.
        seed: of the first image; the next has the next.
        reference: images, ADM's reference file, or "digits", as `lightningdit evaluate samples` takes them. auto: digits for a run of them.
        extractor: inception, dinov2, timm:MODEL, digits, or a file of a small encoder. auto: digits for that reference, else inception.
        weights: file of the extractor's weights, instead of the download.
        cache: folder of reference statistics; none: $XDG_CACHE_HOME/lightningdit or ~/.cache/lightningdit.
        workers: decoding threads for the reference.
        method: a solver with fixed steps; none: the run's.
        batch_size: images at once.
        precision: instead of the configuration's.
        compile: torch.compile; on CUDA with CUDA graphs.
        device: auto, cpu or cuda.
        config: a recipe, where the checkpoint is not a run.
        tokenizer: a tokenizer file, a folder of diffusers, or "digits", where the checkpoint is not a run.
    """
    for name, values in (("scales", scales), ("intervals", intervals)):
        require(values, name, values, "at least one")
    require(all(map(math.isfinite, scales)), "scales", scales, "finite numbers")
    require(all(0 <= low <= high <= 1 for low, high in intervals), "intervals", intervals, "pairs 0 <= low <= high <= 1")
    require(all(0 < shift < math.inf for shift in shifts), "shifts", shifts, "positive numbers; 1 is none")
    require(all(c >= 0 for c in channels), "channels", channels, "numbers of channels, 0 for all")
    require(all(steps > 0 for steps in num_steps), "num_steps", num_steps, "positive numbers")
    require(samples >= 8, "samples", samples, "at least 8")
    require(max_samples >= samples, "max_samples", max_samples, f"at least samples = {samples}")
    require(factor > 1, "factor", factor, "at least 2")
    rank, ranks = world()
    with process_group(pick_device(device)) as device:
        if compile:
            check_compiler(device)
        run, model, decoder, names = load_run(checkpoint, config, tokenizer, device)
        for name, value in dict(method=method, batch_size=batch_size).items():
            if value is not None:
                setattr(run.sample, name, value)
        run.precision = precision or run.precision
        run.sample.validate(), run.validate()
        require(run.sample.method != "dopri5", "method", run.sample.method, "a solver with fixed steps, whose evaluations can be told")
        latent_channels = run.sampling_arguments()["latent_shape"][0]
        require(all(c <= latent_channels for c in channels), "channels", channels, f"at most the latents' {latent_channels}")
        if reference == "auto":
            require(run.data.path is None, "reference", reference, f"images to compare with: the run's are those of {run.data.path}")
            reference = "digits"
        if extractor == "auto":
            extractor = "digits" if reference == "digits" else "inception"
        network = load_extractor(extractor, weights, device)
        real = load_reference(reference, network, image_size=run.data.image_size, cache=cache, workers=workers, rank=rank, world=ranks)
        require(real.features is not None or metric not in ("kid", "precision", "recall"), "metric", metric,
                f"another one: {reference} has statistics only, no images")
        chosen = parse_classes(classes, run.data.num_classes, names)
        drawn = make_labels(labels, max_samples, chosen, seed)
        rule = labels if labels in LABELS else hashlib.sha256(Path(labels).read_bytes()).hexdigest()
        num_steps = num_steps or (run.sample.num_steps,)
        trial = Trial(run, model, decoder, network, real, drawn, seed, device, compile, max(num_steps))
        trial.plan |= dict(labels=rule, classes=chosen)
        settings = grid(scales, intervals, shifts or (run.sample.shift,), [c or None for c in channels] or [run.sample.guidance_channels],
                        num_steps)
        file = Path(out) / "tuning.json"
        kept = by_the_first(lambda: read(file, trial.plan), rank, ranks)
        about = dict(what="guidance", checkpoint=str(checkpoint), plan=trial.plan, environment=environment(device))

        def keep(results, **summary):
            if rank == 0:
                write_json(file, about | dict(metric=metric, **summary, results=results))

        rounds, results = search(trial, settings, metric, samples, max_samples, factor, kept, keep, progress=rank == 0)
        last = rounds[-1]
        sizes = [dict(samples=found[0]["samples"], settings=len(found)) for found in rounds]
        keep(results, best=last[0], frontier=frontier(last, metric), rounds=sizes)
        if rank == 0:
            plot(rounds, metric, file.with_suffix(".png"))
            print(table(last, metric))
            print(f"best     {setting_of(last[0]).options()}\nreport   {file}\nplot     {file.with_suffix('.png')}")
    return 0


def grid(scales, intervals, shifts, channels, num_steps):
    """All combinations [Setting], without those that differ only in how a scale of 1 is applied."""
    found = {}
    for steps in num_steps:
        for shift in shifts:
            for scale in scales:
                for interval in intervals:
                    for c in channels:
                        guidance = ((0.0, 1.0), None) if scale == 1 else (tuple(interval), c)
                        found[Setting(scale, guidance[0], shift, guidance[1], steps)] = None
    return list(found)


class Trial:
    """A model, and what its images are measured against. `measure` gives the numbers of one setting; `plan` says what they depend on."""

    def __init__(self, run, model, decoder, extractor, reference, labels, seed, device, compile, num_steps):
        self.arguments, self.decoder, self.extractor, self.reference = run.sampling_arguments(), decoder, extractor, reference
        self.labels, self.seed, self.device, self.bf16 = labels.tolist(), seed, device, run.use_bf16(device)
        self.batch_size = self.arguments["batch_size"]
        fixed = {name: value for name, value in self.arguments.items() if name not in {f.name for f in dataclasses.fields(Setting)}}
        about = {name: value for name, value in reference.provenance.items() if name not in ("path", "cached")}
        plan = fixed | dict(checkpoint=state_sha256(model.state_dict()), tokenizer=decoder.sha256, extractor=extractor.name,
                            extractor_sha256=extractor.sha256, reference=about, seed=seed, device=device.type,
                            bf16=self.bf16, compile=compile)
        if device.type == "cpu":
            del plan["batch_size"]  # elsewhere batches of other shapes round differently
        self.plan = json.loads(json.dumps(plan))
        self.model = Prepared(model, self.labels, run.data.num_classes, batch_size=self.batch_size, num_steps=num_steps, guided=True,
                              device=device, autocast=torch.bfloat16 if self.bf16 else None, compile=compile)

    def measure(self, setting, n, update):
        """{metric: value} of n images, and {"diverged": why} alone where the setting is too strong; update(k): k more are drawn."""
        rank, ranks = world()
        share, seen, why = list(range(rank, n, ranks)), 0, None
        arguments = self.arguments | dataclasses.asdict(setting) | dict(batch_size=None, device=self.device)
        collector = Collector(self.extractor)
        self.model.table = {}  # of the last setting's times
        try:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                for images in draw_batches(lambda labels, seeds: sample(self.model, labels=labels, seeds=seeds, **arguments),
                                           self.decoder.decode_uint8, self.labels, share, seed=self.seed, batch_size=self.batch_size,
                                           device=self.device):
                    collector.update(torch.from_numpy(images), torch.tensor(share[seen : seen + len(images)]))
                    seen += len(images)
                    update(min(len(images) * ranks, n))
        except Diverged as problem:
            why = str(problem)
        everyone = [why]
        if ranks > 1:
            everyone = [None] * ranks
            dist.all_gather_object(everyone, why)
        if any(everyone):
            return dict(diverged=next(filter(None, everyone)))
        collected = collector.result()
        rows = by_the_first(lambda: compare(collected, self.reference, self.extractor, self.device), rank, ranks)
        return {row["metric"]: row["value"] for row in rows}

    def evaluations(self, setting):
        """Evaluations of the model an image, counted on a model that does nothing: a guided step takes two."""
        rows, few = 0, 8

        def model(x, t, y):
            nonlocal rows
            rows += len(x)
            return torch.zeros_like(x)

        arguments = self.arguments | dataclasses.asdict(setting)
        tiny = dict(latent_shape=(arguments["latent_shape"][0], 1, 1), batch_size=None, device="cpu")
        sample(model, labels=[0] * few, seeds=range(few), **arguments | tiny)
        return rows / few


def read(file, plan):
    """Results of an earlier search. Raises: ValueError if they were measured otherwise."""
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        return []
    try:
        before = json.loads(file.read_text())
        then, results = before["plan"], before["results"]
    except (ValueError, KeyError, TypeError) as problem:
        raise ValueError(f"out: {file} is no result of this command ({problem}), expected a new folder") from None
    if changed := [f"{key}: {then.get(key)!r} -> {plan.get(key)!r}" for key in sorted(then.keys() | plan.keys())
                   if then.get(key) != plan.get(key)]:
        raise ValueError(f"out: {file} was measured otherwise, expected a new folder:\n  " + "\n  ".join(changed))
    return results


def search(trial, settings, metric, samples, max_samples, factor, kept=(), keep=lambda results: None, progress=False):
    """Successive halving.

    Args:
        trial: a Trial. settings: [Setting]. kept: results of an earlier search, which are not measured again.
        keep: called with all results after each new one.
    Returns: (the rounds, each a list of results from best to worst; all results). A result holds the fields of its Setting, samples,
        evaluations an image, seconds, and metrics.
    Raises: ValueError if the metric cannot be had.
    """
    plan, count = [(len(settings), samples)], len(settings)
    while plan[-1][1] * factor <= max_samples and count > 1:
        count = max(math.ceil(count / factor), min(LEAST, count))
        plan.append((count, plan[-1][1] * factor))
    results, known, rounds = list(kept), {(setting_of(r), r["samples"]): r for r in kept}, []
    with progress_bar(total=sum(c * n for c, n in plan), unit="image", disable=not progress, mininterval=1) as bar:
        for count, n in plan:
            found = []
            for setting in settings[:count]:
                bar.set_description(f"{n} images, {setting}")
                if (setting, n) not in known:
                    began, at = time.perf_counter(), bar.n
                    metrics = trial.measure(setting, n, bar.update)
                    result = dataclasses.asdict(setting) | dict(samples=n, evaluations=trial.evaluations(setting),
                                                                seconds=round(time.perf_counter() - began, 2), metrics=metrics)
                    results.append(result)
                    known[setting, n] = result
                    keep(results)
                    bar.update(at + n - bar.n)
                else:
                    bar.update(n)
                found.append(known[setting, n])
            found.sort(key=lambda result: goodness(result, metric))
            if not math.isfinite(goodness(found[0], metric)):
                why = found[0]["metrics"].get("diverged", f"it is not among {', '.join(found[0]['metrics'])}")
                raise ValueError(f"metric: got {metric!r}, which no setting has: {why}")
            rounds.append(found)
            settings = [setting_of(result) for result in found]
    return rounds, results


def setting_of(result):
    return Setting(**{f.name: tuple(v) if isinstance(v := result[f.name], list) else v for f in dataclasses.fields(Setting)})


def column(result, metric):
    """The name under which these metrics hold `metric`, such as fd_digits for fid; None if they do not."""
    for name in result["metrics"]:
        if name.partition("_")[0].replace("fd", "fid") == metric:
            return name
    return None


def value_of(result, metric):
    name = column(result, metric)
    return None if name is None else result["metrics"][name]


def goodness(result, metric):
    """Less is better; infinite for a setting that diverged."""
    value = value_of(result, metric)
    return math.inf if value is None else SIGNS[metric] * value


def frontier(results, metric):
    """Those of which no other is both better and cheaper, from the cheapest to the best."""
    found = []
    for result in sorted(results, key=lambda r: (r["evaluations"], goodness(r, metric))):
        if goodness(result, metric) < min([math.inf, *(goodness(better, metric) for better in found)]):
            found.append(result)
    return found


def table(results, metric):
    """One line a setting, from best to worst; those of the frontier are marked."""
    name, edge = column(results[0], metric), frontier(results, metric)
    lines = [f"{name:>12}  evaluations  setting, {results[0]['samples']:,} images each"]
    for result in results:
        value = value_of(result, metric)
        note = "  diverged" if value is None else "  on the frontier" if result in edge else ""
        lines.append(f"{'' if value is None else f'{value:.5g}':>12}  {result['evaluations']:>11g}  {setting_of(result)}{note}")
    return "\n".join(lines)


def plot(rounds, metric, path):
    """Three panels: the metric against the scale in the first round; against the cost; recall against precision. A star marks the best."""
    plt = pyplot()

    first, last = ([r for r in results if value_of(r, metric) is not None] for results in (rounds[0], rounds[-1]))
    best, name = last[0], column(last[0], metric)
    better = "less" if SIGNS[metric] == 1 else "more"
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4))
    curves = {}
    for result in first:
        setting = setting_of(result)
        others = tuple((f.name, getattr(setting, f.name)) for f in dataclasses.fields(Setting) if f.name != "guidance_scale")
        if setting.guidance_scale != 1:
            curves.setdefault(others, []).append((setting.guidance_scale, value_of(result, metric)))
    plain = {(r["shift"], r["num_steps"]): value_of(r, metric) for r in first if r["guidance_scale"] == 1}
    varied = [key for key in ("guidance_interval", "shift", "guidance_channels", "num_steps") if len({dict(c)[key] for c in curves}) > 1]
    words = dict(guidance_interval=lambda v: "{:g}-{:g}".format(*v), shift=lambda v: f"shift {v:g}",
                 guidance_channels=lambda v: f"{v or 'all'} channels", num_steps=lambda v: f"{v} steps")
    for others, points in curves.items():
        others = dict(others)
        start = [(1.0, plain[key])] if (key := (others["shift"], others["num_steps"])) in plain else []  # without guidance they are one
        axes[0].plot(*zip(*sorted(start + points), strict=True), marker="o", markersize=3.5, linewidth=1.2,
                     label=", ".join(words[key](others[key]) for key in varied))
    if varied and len(curves) <= 12:
        axes[0].legend(frameon=False, fontsize=8)
    axes[0].set(xlabel="guidance scale", ylabel=f"{name} ({better} is better)", title=f"all settings, {first[0]['samples']:,} images each")
    rows = [(first, "lightgrey", 16, f"{len(first)} settings, {first[0]['samples']:,} images")]
    if len(rounds) > 1:
        rows.append((last, "tab:blue", 30, f"{len(last)} settings, {last[0]['samples']:,} images"))
    for results, colour, size, label in rows:
        axes[1].scatter([r["evaluations"] for r in results], [value_of(r, metric) for r in results], c=colour, s=size, label=label)
    edge = frontier(last, metric)
    axes[1].plot([r["evaluations"] for r in edge], [value_of(r, metric) for r in edge], "k--", linewidth=1, label="frontier")
    axes[1].set(xlabel="model evaluations an image", ylabel=f"{name} ({better} is better)", title="quality against cost")
    axes[1].scatter(best["evaluations"], value_of(best, metric), marker="*", c="tab:red", s=190, zorder=3, label="best")
    axes[1].legend(frameon=False, fontsize=8)
    pairs = [(r, value_of(r, "precision"), value_of(r, "recall")) for results, *_ in rows for r in results]
    if any(p is not None for _, p, _ in pairs):
        for results, colour, size, _ in rows:
            axes[2].scatter([value_of(r, "precision") for r in results], [value_of(r, "recall") for r in results], c=colour, s=size)
            for r in results if results is rows[-1][0] else ():
                axes[2].annotate(f"{r['guidance_scale']:g}", (value_of(r, "precision"), value_of(r, "recall")), textcoords="offset points",
                                 xytext=(5, 4), fontsize=8)
        axes[2].scatter(value_of(best, "precision"), value_of(best, "recall"), marker="*", c="tab:red", s=190, zorder=3)
        axes[2].set(xlabel="precision", ylabel="recall", title="precision and recall, with the scale")
    else:
        axes[2].set_axis_off()
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.suptitle(f"best: {setting_of(best)}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)
