"""The options beyond bf16 and AdamW, each against the same training without it: throughput, memory, loss, and what to make of it.

    python bench/levers.py                                           # a small model on the digits; 6 minutes on two CPU cores
    python bench/levers.py --size b1 --out FOLDER --budget-s 540     # B/1 on a GPU; xl: XL/1. The same command again goes on
    python bench/levers.py --size xl --data STORE --tokenizer FILE   # latents of images, instead of made ones

Each stage writes FOLDER/stages/<name>.json and is then done. A stage "loss" trains one option from one seed: same initial weights, same
batches, noise and times as without it. A stage "speed" alternates blocks of steps with and without the option, on one batch. On CUDA
everything is bf16 autocast with an fp32 residual; on a CPU the rows say in which precision they are, and float8 is emulated: its loss
means something there, its time does not. In the end come bench/results/levers_<device>.json and docs/levers_<device>.png.
"""

import argparse
import functools
import json
import os
import re
import statistics
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.harness import cpu_name, quantile, write  # noqa: E402
from bench.step import allocate_state  # noqa: E402
from lightningdit import optim  # noqa: E402
from lightningdit.checkpoint import write_text  # noqa: E402
from lightningdit.config import DiTConfig, finish, from_dict, read_yaml  # noqa: E402
from lightningdit.distributed import generator_for, pick_device  # noqa: E402
from lightningdit.guard import Guard  # noqa: E402
from lightningdit.log import environment  # noqa: E402
from lightningdit.memory import largest_by_trial  # noqa: E402
from lightningdit.model import LightningDiT, to_float8  # noqa: E402
from lightningdit.optional import progress_bar  # noqa: E402
from lightningdit.training import losses, micro_batches, open_latents, open_tokenizer, redraw_batch, set_lr, validate  # noqa: E402

RESULTS, DOCS = ROOT / "bench" / "results", ROOT / "docs"
UNMEASURED = "not yet measured on a GPU"
UNFINISHED = 3

# What changes in the configuration, and the precision of the comparison on a CPU, whose bf16 products may be far slower than its fp32 ones.
LEVERS = {
    "bf16 residual": (dict(model=dict(bf16_residual=True)), "bf16"),
    "Muon": (dict(optim=dict(name="muon")), "fp32"),
    "batched adaLN": (dict(model=dict(batch_adaln=True)), "fp32"),
    "split-K": (dict(model=dict(split_k=4)), "fp32"),
    "fp8": (dict(precision="fp8"), "bf16"),
}
BASELINE = "AdamW"
BASELINE_SEEDS, LEVER_SEEDS = (0, 1, 2), (0, 1)

LATENTS = dict(data=dict(image_size=256, num_classes=100), tokenizer=dict(path=None, downsample=16, latent_channels=32))
SMALL = dict(depth=2, hidden_size=64, num_heads=4, mlp_ratio=3.0)
CONSTANT = dict(warmup=20, schedule="constant", lr=2e-4, clip_grad_norm=1.0, ema=0.99)
SIZES = {  # configuration on top of digits.yaml; rounds of the speed stages and steps a round, on each side
    "tiny": (dict(batch_size=8, steps=12, model=SMALL | dict(depth=1, hidden_size=32), optim=dict(warmup=2)), 3, 1),
    "digits": (dict(batch_size=32, steps=300, model=SMALL), 12, 8),
    "b1": (dict(batch_size=256, steps=2000, compile=True, model=dict(size="B/1"), optim=CONSTANT, **LATENTS), 12, 10),
    "xl": (dict(batch_size=128, steps=500, compile=True, model=dict(size="XL/1"), optim=CONSTANT, **LATENTS), 12, 5),
}
POINTS = 50  # of a curve

RULE = ("off: the validation loss is higher by more than one standard deviation of AdamW's between seeds, or an update had to be left out, "
        "or, on a GPU, it is neither faster nor better. on: measured on a GPU, the loss no higher than that, and at least 2 % faster "
        "(lower end of the 95 % interval), or a loss lower by more than two standard deviations at 90 % of the speed or more. worth "
        "trying: everything else, so the most that a CPU can say.")


def merged(base, *changes):
    """Nested dictionaries, the later ones on top."""
    result = dict(base)
    for change in changes:
        for key, value in change.items():
            result[key] = merged(result.get(key) or {}, value) if isinstance(value, dict) else value
    return result


def configuration(size, lever, precision, seed=0, **options):
    """DiTConfig of a run; lever: a name of LEVERS or BASELINE."""
    recipe = read_yaml(ROOT / "train" / "configs" / "digits.yaml")
    if "size" in SIZES[size][0]["model"]:
        recipe["model"] = {}
    change = {} if lever == BASELINE else LEVERS[lever][0]
    return finish(from_dict(DiTConfig, merged(recipe, dict(precision=precision, seed=seed), SIZES[size][0], options, change)))


class MadeLatents:
    """Latents of 64 directions around a mean for each class, of unit variance: something to learn where no images are at hand."""

    views, rank = 1, 64

    def __init__(self, count, channels, side, classes):
        generator = generator_for("made latents")
        basis = torch.randn(self.rank, channels * side * side, generator=generator)
        centers = torch.randn(classes, self.rank, generator=generator)
        self.labels = torch.randint(classes, (count,), generator=generator)
        codes = (centers[self.labels] + torch.randn(count, self.rank, generator=generator)) / (2 * self.rank) ** 0.5
        mean = (codes @ basis).view(count, channels, side, side)
        self.moments = torch.cat([mean, torch.full_like(mean, -10.0)], dim=1)

    def __len__(self):
        return len(self.labels)

    def gather(self, indices, views=0):
        return self.moments[indices]

    def split(self, count):
        """(training, validation) of which the second has `count` images."""
        parts = []
        for part in (slice(count, None), slice(count)):
            other = object.__new__(MadeLatents)
            other.moments, other.labels = self.moments[part], self.labels[part]
            parts.append(other)
        return parts


@functools.cache
def data_of(size, data, tokenizer, device):
    """(tokenizer, training set, validation set); the same split for every seed."""
    config = configuration(size, BASELINE, "fp32", **where(data, tokenizer))
    if config.data.path is None and config.tokenizer.path is None:
        made = MadeLatents(8192, config.tokenizer.latent_channels, config.latent_size, config.data.num_classes)
        return SimpleNamespace(normalise=lambda latents: latents), *made.split(512)
    tokenizer = open_tokenizer(config, device)
    return tokenizer, *open_latents(config, tokenizer, device)


def where(data, tokenizer):
    options = dict(run="runs/levers", device="auto")
    if data is not None:
        options |= dict(data=dict(path=data, num_classes=None, val_fraction=0.05), tokenizer=dict(path=tokenizer))
    return options


class Trainer:
    """What train/dit.py does in a step, for one process, without its log and checkpoints."""

    def __init__(self, config, tokenizer, train_set, val_set, device):
        config.data.num_classes = config.data.num_classes or int(train_set.labels.max()) + 1
        torch._dynamo.reset()  # graphs of the stages before count towards its limit, beyond which blocks would run eagerly
        torch.manual_seed(config.seed)
        self.config, self.tokenizer, self.train_set, self.val_set, self.device = config, tokenizer, train_set, val_set, device
        self.model = LightningDiT(**config.model_arguments()).to(device)
        average = optim.frozen_copy(self.model)
        if config.precision == "fp8":
            to_float8(self.model, emulate=device.type != "cuda")
        if config.compile:
            for block in self.model.blocks:
                block.compile()
        settings = config.optim
        self.average = optim.EMA(self.model, settings.ema, settings.ema_warmup, average)
        self.optimizer = optim.build_optimizer(self.model, settings.lr, settings.betas, settings.eps, settings.weight_decay, settings.state,
                                               settings.name, settings.muon_momentum)
        allocate_state(self.optimizer)
        self.guard = Guard(self.optimizer, device=device)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.use_bf16(device))
        self.model.train()

    def batch(self, step):
        batch = redraw_batch(self.config, self.tokenizer, self.train_set, step, self.device)
        return {name: tensor for name, tensor in batch.items() if name != "indices"}

    def step(self, step, batch, skip=False):
        """(loss, verdict) of update `step` (0-based), on the device.

        skip: leave weights, moments and average as they are. OffloadedAdamW then does nothing, the others all their work.
        """
        try:
            return self._step(step, batch, skip)
        finally:  # of a backward that ran out of memory, too
            self.optimizer.zero_grad(set_to_none=True)

    def _step(self, step, batch, skip):
        set_lr(self.optimizer, step, self.config)
        loss, parts = 0, micro_batches(self.config, batch)
        for part in parts:
            share = sum(term.mean() for term in losses(self.config, self.model, self.autocast, **part).values()) / len(parts)
            share.backward()
            loss = loss + share.detach()
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        if self.config.optim.clip_grad_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), self.config.optim.clip_grad_norm, norm)
        verdict = self.guard.judge(loss, norm, skip)
        self.optimizer.step()
        if not skip:
            self.average.update(step)
        return loss, verdict

    def memory_mib(self):
        """Counted after a step: what stays (weights, average, optimizer), and what a forward pass keeps for the backward."""
        stay = [*self.model.parameters(), *self.average.model.parameters()]
        stay += [value for state in self.optimizer.state.values() for value in state.values()]
        kept = {}

        def pack(tensor):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = losses(self.config, self.model, self.autocast, **micro_batches(self.config, self.batch(0))[0])
        for tensor in stay:
            kept.pop(tensor.untyped_storage().data_ptr(), None)
        del loss
        return dict(state_mib=round(sum(t.nbytes for t in stay) / 2**20, 3), kept_mib=round(sum(kept.values()) / 2**20, 3))


def fit(*trainers):
    """Sets the largest micro-batch that divides the batch and with which every trainer makes its step while all of them are there.

    Raises: torch.OutOfMemoryError where one image does not fit.
    """
    whole = trainers[0].config.batch_size

    def attempt(micro):
        torch._dynamo.reset()  # a second size would be compiled for any size
        for trainer in trainers:
            trainer.config.micro_batch = micro
            trainer.step(0, trainer.batch(0), skip=True)

    if not largest_by_trial([size for size in range(whole, 0, -1) if whole % size == 0], attempt, trainers[0].device):
        raise torch.OutOfMemoryError("not even one image fits")


def loss_stage(size, lever, precision, seed, device, data, tokenizer, progress=True):
    """One training: the curve as means over `every` steps, the last validation loss of the average, memory."""
    config = configuration(size, lever, precision, seed, **where(data, tokenizer))
    trainer, curve, verdicts = Trainer(config, *data_of(size, data, tokenizer, device), device), [], []
    fit(trainer)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin, name = time.perf_counter(), f"{lever}, {precision}, seed {seed}"
    for step in progress_bar(range(config.steps), desc=name, disable=not progress, mininterval=1):
        loss, verdict = trainer.step(step, trainer.batch(step))
        curve.append(loss)
        verdicts.append(verdict)
    validation = validate(config, trainer.average.model, trainer.tokenizer, trainer.val_set, trainer.autocast, device)
    row = dict(lever=lever, precision=precision, seed=seed, steps=config.steps, seconds=round(time.perf_counter() - begin, 1))
    every = max(1, config.steps // POINTS)
    means = torch.stack(curve).float().cpu()[: config.steps // every * every].view(-1, every).mean(1)
    row |= dict(every=every, curve=[round(value, 5) for value in means.tolist()], left_out=int((torch.stack(verdicts) != 0).sum()))
    row |= dict(validation=round(sum(validation.values()), 6), micro_batch=config.micro_batch)
    if device.type == "cuda":
        row |= dict(peak_mib=round(torch.cuda.max_memory_allocated() / 2**20, 1))
    return row | trainer.memory_mib()


def speed_stage(size, lever, precision, device, data, tokenizer):
    """Images/s with and without the option: blocks of steps in turn, the ratio of each pair of neighbours."""
    _, rounds, steps = SIZES[size]
    options, sides = where(data, tokenizer), {}
    for name in (BASELINE, lever):
        trainer = Trainer(configuration(size, name, precision, **options), *data_of(size, data, tokenizer, device), device)
        sides[name] = trainer, trainer.batch(0)
    fit(*(trainer for trainer, _ in sides.values()))
    seconds = {name: [] for name in sides}
    for number in range(-1, rounds):  # the first round is to warm up
        for name in sides if number % 2 else reversed(sides):
            trainer, batch = sides[name]
            begin = time.perf_counter()
            for step in range(steps):
                trainer.step(step, batch)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 0:
                seconds[name].append((time.perf_counter() - begin) / steps)
    baseline_s, lever_s = ([float(f"{value:.5g}") for value in seconds[name]] for name in (BASELINE, lever))
    return dict(lever=lever, precision=precision, batch_size=trainer.config.batch_size, micro_batch=trainer.config.micro_batch,
                steps_a_round=steps, baseline_s=baseline_s, lever_s=lever_s, load=round(os.getloadavg()[0], 2))


def stages(device):
    """{name: (function, arguments)} in order of worth, should time run out."""
    table, on_gpu = {}, device.type == "cuda"
    precisions = {lever: "bf16" if on_gpu else precision for lever, (_, precision) in LEVERS.items()}
    for precision in sorted(set(precisions.values())):
        table |= {f"loss_{BASELINE}_{precision}_{seed}": (loss_stage, (BASELINE, precision, seed)) for seed in BASELINE_SEEDS}
    for lever, precision in precisions.items():
        if on_gpu or lever != "fp8":
            table[f"speed_{lever}"] = speed_stage, (lever, precision)
        table |= {f"loss_{lever}_{seed}": (loss_stage, (lever, precision, seed)) for seed in LEVER_SEEDS}
    return {name.replace(" ", "_"): stage for name, stage in table.items()}


def summarise(content):
    """[{lever, precision, difference, differences, spread, speed, low, high, recommendation, ...}] from the raw rows of a file."""
    rows, on_gpu = [], content["device"] == "cuda"
    baselines = {}
    for run in content["runs"]:
        if run["lever"] == BASELINE:
            baselines.setdefault(run["precision"], {})[run["seed"]] = run
    speeds = {row["lever"]: row for row in content["speeds"]}
    for lever in LEVERS:
        runs = [run for run in content["runs"] if run["lever"] == lever]
        if not runs:
            continue
        base = baselines[runs[0]["precision"]]
        values = [run["validation"] for run in base.values()]
        differences = [run["validation"] - base[run["seed"]]["validation"] for run in runs]
        row = dict(lever=lever, precision=runs[0]["precision"], baseline=statistics.fmean(values), spread=statistics.stdev(values),
                   differences=differences, difference=statistics.fmean(differences),
                   left_out=sum(run["left_out"] for run in runs), speed=None, low=None, high=None)
        for key in ("state_mib", "kept_mib", "peak_mib"):
            if key in runs[0]:
                row[key], row[f"baseline_{key}"] = runs[0][key], next(iter(base.values()))[key]
        if lever in speeds:
            pairs = zip(speeds[lever]["baseline_s"], speeds[lever]["lever_s"], strict=True)
            row["speed"], row["low"], row["high"] = median_and_interval([before / after for before, after in pairs])
            row["images_per_s"] = speeds[lever]["batch_size"] / statistics.median(speeds[lever]["lever_s"])
        rows.append({key: float(f"{value:.4g}") if isinstance(value, float) else value for key, value in row.items()}
                    | dict(differences=[float(f"{value:.3g}") for value in differences]))
        rows[-1]["recommendation"] = recommend(rows[-1], on_gpu)
    return rows


def median_and_interval(ratios, draws=2000):
    """(median, low, high): the 95 % bootstrap interval of the median."""
    generator = torch.Generator().manual_seed(0)
    values = torch.tensor(ratios, dtype=torch.float64)
    medians = values[torch.randint(len(ratios), (draws, len(ratios)), generator=generator)].quantile(0.5, dim=1).tolist()
    return statistics.median(ratios), quantile(medians, 0.025), quantile(medians, 0.975)


def recommend(row, on_gpu):
    """RULE."""
    better = row["difference"] < -2 * row["spread"]
    if row["left_out"] or not row["difference"] <= row["spread"]:  # NaN is not lower either
        return "off"
    if not on_gpu or row["speed"] is None:
        return "worth trying"
    if row["low"] >= 1.02 or better and row["speed"] >= 0.9:
        return "on"
    return "worth trying" if better or row["speed"] > 1 else "off"


def report(content):
    """Lines of Markdown from the content of a results file alone."""
    about, on_gpu, settings = content["environment"], content["device"] == "cuda", content["settings"]
    model = settings["model"]
    header = ["option", "compared in", "validation loss - AdamW's, a seed each", "standard deviation of AdamW's", "speed (95 %)",
              "kept for the backward, MiB", "weights, average and optimizer, MiB", "recommendation"]
    header += ["peak MiB"] if on_gpu else []
    busy = not on_gpu and max(row["load"] for row in content["speeds"]) > 1.5 * about["cores"]
    lines = [f"{about['hardware'] if on_gpu else about['cpu']}, torch {about['torch']}, commit {about['commit']}, {about['date']}. "
             f"{content['size']}: depth {model['depth']}, width {model['hidden_size']}, batch {settings['batch_size']}, "
             f"{settings['steps']} steps of {content['latents']}. "
             f"Validation loss of AdamW: {', '.join(f'{v:.4f} in {k}' for k, v in baseline_losses(content).items())}."
             f"{' Other processes shared the cores: the speeds are rough.' if busy else ''}", ""]
    lines += ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header))]
    for row in content["summary"]:
        speed = f"{row['speed']:.3f} ({row['low']:.3f}-{row['high']:.3f})" if row["speed"] else UNMEASURED
        emulated = row["lever"] == "fp8" and not on_gpu
        cells = [row["lever"] + (" (emulated)" if emulated else ""), row["precision"], ", ".join(f"{v:+.4f}" for v in row["differences"]),
                 f"{row['spread']:.4f}", speed if on_gpu or emulated else f"{speed} on this CPU; {UNMEASURED}"]
        cells += [f"{row[f'baseline_{key}']:.3g} -> {row[key]:.3g}" for key in ("kept_mib", "state_mib")] + [f"**{row['recommendation']}**"]
        cells += [f"{row['baseline_peak_mib']:.0f} -> {row['peak_mib']:.0f}"] if on_gpu else []
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", f"Rule: {content['rule']}"]


def baseline_losses(content):
    return {row["precision"]: row["baseline"] for row in content["summary"]}


def figure(content):
    """Training losses over one another, and each option's distance from AdamW with the same seed, from a results file's content alone."""
    from matplotlib.figure import Figure

    runs = {(run["lever"], run["precision"], run["seed"]): run for run in content["runs"]}
    precisions = sorted({run["precision"] for run in content["runs"]})
    drawing = Figure(figsize=(6 * len(precisions), 6.5), layout="constrained")
    axes = drawing.subplots(2, len(precisions), squeeze=False, sharex=True)
    colours = {lever: f"C{i}" for i, lever in enumerate([*LEVERS])} | {BASELINE: "black"}
    for column, precision in enumerate(precisions):
        above, below = axes[:, column]
        labelled = set()
        for (lever, other, seed), run in runs.items():
            if other != precision:
                continue
            xs = [(i + 1) * run["every"] for i in range(len(run["curve"]))]
            label = None if lever in labelled else lever
            labelled.add(lever)
            width = 1.8 if lever == BASELINE else 0.9
            above.plot(xs, run["curve"], color=colours[lever], label=label, linewidth=width, alpha=0.5 if lever == BASELINE else 1)
            if lever != BASELINE:
                theirs = runs[BASELINE, precision, seed]["curve"]
                below.plot(xs, [a - b for a, b in zip(run["curve"], theirs, strict=True)], color=colours[lever], linewidth=0.9)
        seeds = [run["curve"] for (lever, other, _), run in runs.items() if (lever, other) == (BASELINE, precision)]
        spread = [statistics.stdev(values) for values in zip(*seeds, strict=True)]
        below.fill_between(xs, [-s for s in spread], spread, color="0.85", label="standard deviation of AdamW between seeds")
        above.set_title(f"{precision}, {content['size']}: training loss, a line a seed", fontsize=10)
        above.set_yscale("log")
        below.set_title("difference from AdamW with the same seed", fontsize=10)
        below.set_xlabel("step")
        late = slice(len(xs) // 4, None)  # the first steps, on the way down, differ by far the most
        distances = [line.get_ydata()[late] for line in below.lines] + [spread[late]]
        reach = 1.2 * max(abs(value) for values in distances for value in values)
        below.set_ylim(-reach, reach)
        for axis in (above, below):
            axis.legend(fontsize=8, loc="upper right")
            axis.grid(alpha=0.3)
    return drawing


def check_same(before, now, file):
    """ValueError unless a stage that was done before is of the same commit, device and version of torch."""
    differing = [f"{key} {before[key]}, now {now[key]}" for key in ("commit", "hardware", "torch") if before[key] != now[key]]
    if differing:
        raise ValueError(f"--out: {file} is of {'; '.join(differing)}: name another folder")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: digits on a CPU, b1 on a GPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--data", help="store of latents, instead of the digits or of made latents")
    parser.add_argument("--tokenizer", help="of --data")
    parser.add_argument("--out", type=Path, help="folder of the stages; default: runs/levers_SIZE")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--docs", type=Path, default=DOCS, help="folder for the plot")
    parser.add_argument("--budget-s", type=float, default=float("inf"), help="begin no stage, but the first, that might end later; exit 3")
    parser.add_argument("--redraw", action="store_true", help="only draw the plot, and print the table, of the file that is there")
    args = parser.parse_args(argv)
    device = pick_device(args.device)
    size = args.size or ("b1" if device.type == "cuda" else "digits")
    name = "cpu" if device.type == "cpu" else re.sub(r"[^a-z0-9]+", "_", torch.cuda.get_device_name(device).lower()).strip("_")
    path = args.results / f"levers_{name}{'' if size in ('digits', 'b1') else f'_{size}'}.json"
    if not args.redraw:
        folder, begin, longest, failed = (args.out or Path(f"runs/levers_{size}")) / "stages", time.perf_counter(), 0.0, False
        folder.mkdir(parents=True, exist_ok=True)
        # As the program began: its source may change while it runs.
        done, about = {}, environment(device) | dict(cpu=cpu_name(), cores=os.cpu_count())
        work_of = stages(device)
        files = {stage: folder / f"{stage}.json" for stage in work_of}
        for stage, file in files.items():
            if file.is_file():
                done[stage] = json.loads(file.read_text())
                check_same(done[stage]["environment"], about, file)
        for stage, (work, arguments) in work_of.items():
            if stage in done:
                continue
            elapsed = time.perf_counter() - begin
            if longest and elapsed + longest > args.budget_s:
                print(f"stage {stage}: not begun, {elapsed:.0f} s of {args.budget_s:.0f} s are gone; run again to continue", flush=True)
                return UNFINISHED
            try:
                done[stage] = dict(work(size, *arguments, device, args.data, args.tokenizer), environment=about)
            except (ImportError, RuntimeError) as error:  # the other stages are worth having without it
                print(f"stage {stage}: {'left out' if isinstance(error, ImportError) else 'failed'}: {error}", flush=True)
                torch.cuda.empty_cache()  # nothing on a CPU
                failed |= not isinstance(error, ImportError)  # without a package there is no row for its option
                continue
            write_text(files[stage], json.dumps(done[stage]))
            longest = max(longest, time.perf_counter() - begin - elapsed)
        if failed:
            print(f"no results file; what is done stays in {folder}, and the same command tries the rest again", flush=True)
            return 1
        done = {stage: done[stage] for stage in files if stage in done}
        abouts = [row.pop("environment") for row in done.values()]
        config = configuration(size, BASELINE, "bf16", **where(args.data, args.tokenizer))
        content = dict(what="levers", size=size, device=device.type, rule=RULE, environment=abouts[0],
                       latents=args.data or ("the digits" if config.tokenizer.path == "digits" else "made latents"),
                       settings=dict(batch_size=config.batch_size, steps=config.steps, model=vars(config.model), optim=vars(config.optim)),
                       runs=[row for row in done.values() if "curve" in row], speeds=[row for row in done.values() if "lever_s" in row])
        write(path, content | dict(summary=summarise(content)))
    content = json.loads(path.read_text())
    args.docs.mkdir(parents=True, exist_ok=True)
    figure(content).savefig(args.docs / f"{path.stem}.png", dpi=100, metadata={"Software": None})
    print("\n".join(report(content)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
