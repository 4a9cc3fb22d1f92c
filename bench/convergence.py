"""Does the paper's story hold at a small size? Distance against images seen and time, from DiT to LightningDiT on aligned latents.

    python bench/convergence.py --size smoke                     # the digits, a CPU: make convergence-smoke
    python bench/convergence.py --size full --budget-s 540       # Tiny-ImageNet, a GPU; exit status 3: the same command again goes on
    python bench/convergence.py --size full --foundation dinov2-s --foundation-weights FILE     # a real foundation model as the target

Stages, each done once and remembered in OUT (bench/convergence_stages.py): target, a ViT trained on the data's classes that stands in for
a foundation model; judge, a convnet of another seed whose features every distance is taken in, which no tokenizer ever sees; tokenizers
without and with alignment and its parts; a DiT-S a row and seed of ROWS, on the same images in the same order; scores, of checkpoints at
growing numbers of images. Here are the plan, the arithmetic and the report; the two need no torch.
OUT gets report.json and plots; --publish copies the report to bench/results, where `make report` finds it.
"""

import argparse
import itertools
import math
import re
import shutil
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.study import INTERRUPTED, UNFINISHED, OutOfTime  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "tiny-imagenet"

# The plan

# shift: pixels that the classifiers' images are moved by. latents: channels, narrow and wide. images: that each DiT sees. batch, lr: of the
# first rows; later ones have 4 times the batch and twice the rate, and so a quarter of the steps. parts: checkpoints of a run; points:
# those of them that are scored. rows: None for all.
SIZES = dict(
    tiny=dict(
        image_size=8, channels=1, flip=False, shift=1, classifier_batch=64, target="test_vit", target_steps=3, target_lr=1e-3,
        judge_width=8, judge_steps=3, ch=8, ch_mult=(1, 1), groups=8, attention=(), latents=(2, 4), vae_steps=3, vae_batch=16, vae_lr=1e-3,
        kl_weight=1e-3, depth=1, hidden_size=16, heads=2, images=128, batch=8, lr=1e-3, ema=0.9, parts=2, points=(1, 2), seeds=1,
        samples=16, sample_steps=2, uniformity=0, rows=("rope", "aligned")),
    smoke=dict(
        image_size=8, channels=1, flip=False, shift=0, classifier_batch=128, target="test_vit", target_steps=200, target_lr=2e-3,
        judge_width=16, judge_steps=300, ch=16, ch_mult=(1, 1), groups=8, attention=(), latents=(4, 8), vae_steps=150, vae_batch=64,
        vae_lr=3e-3, kl_weight=3e-3, depth=2, hidden_size=64, heads=4, images=8_192, batch=16, lr=1e-3, ema=0.99, parts=8,
        points=(1, 2, 4, 8), seeds=3, samples=500, sample_steps=15, uniformity=0, rows=None),
    full=dict(
        image_size=64, channels=3, flip=True, shift=4, classifier_batch=256, target="vit_small_patch8_224", target_steps=4_000,
        target_lr=5e-4, judge_width=32, judge_steps=4_000, ch=64, ch_mult=(1, 2, 2, 4), groups=32, attention=(8,), latents=(16, 32),
        vae_steps=2_500, vae_batch=128, vae_lr=2e-4, kl_weight=1e-6, depth=12, hidden_size=384, heads=6, images=819_200, batch=64, lr=2e-4,
        ema=0.999, parts=16, points=(1, 2, 3, 4, 6, 8, 12, 16), seeds=3, samples=2_000, sample_steps=40, uniformity=2_000, rows=None),
)
VF_WEIGHT, COSINE_MARGIN, DISTANCE_MARGIN = 0.5, 0.5, 0.25  # the weight is of the paper's first stage: these tokenizers train for short
KEEP = 1_000  # checkpoints: all of them, and each interruption makes one more
OFF = 1.999  # as a margin: cosines differ by 2 at most, so that the term is 0


@dataclass(frozen=True)
class TokenizerPlan:
    latents: int  # index of SIZES' latents
    vf_weight: float = 0.0
    cos_margin: float = COSINE_MARGIN
    distmat_margin: float = DISTANCE_MARGIN


TOKENIZERS = dict(
    plain=TokenizerPlan(1), aligned=TokenizerPlan(1, VF_WEIGHT), no_mcos=TokenizerPlan(1, VF_WEIGHT, cos_margin=OFF),
    no_mdms=TokenizerPlan(1, VF_WEIGHT, distmat_margin=OFF), no_margin=TokenizerPlan(1, VF_WEIGHT, 0.0, 0.0),
    plain_narrow=TokenizerPlan(0), aligned_narrow=TokenizerPlan(0, VF_WEIGHT),
)


@dataclass(frozen=True)
class Row:
    """One recipe: that of the row `before`, and what `changes`: dotted names of DiTConfig, "tokenizer", or a factor on "batch" and "lr"."""

    title: str
    before: str | None
    changes: dict = field(default_factory=dict)
    paper_fid: float | None = None  # FID-50k of XL on ImageNet 256 after 80 epochs without guidance: LightningDiT, Table 2


ROWS = dict(
    dit=Row("DiT: VP path, noise prediction", None, {}, 19.50),
    flow=Row("rectified flow", "dit", {"flow.path": "linear", "flow.prediction": "velocity"}, 17.20),
    batch=Row("batch x 4, learning rate x 2", "flow", {"batch": 4, "lr": 2}, 16.59),
    beta2=Row("AdamW beta2 0.95", "batch", {"optim.betas": [0.9, 0.95]}, 16.61),
    logit_normal=Row("logit-normal times", "beta2", {"flow.time": "logit_normal"}, 13.99),
    cosine=Row("cosine velocity loss", "logit_normal", {"flow.cosine_loss": True}, 12.52),
    swiglu=Row("SwiGLU", "cosine", {"model.use_swiglu": True}, 10.10),
    rmsnorm=Row("RMSNorm", "swiglu", {"model.use_rmsnorm": True}, 9.25),
    rope=Row("RoPE: LightningDiT on plain latents", "rmsnorm", {"model.use_rope": True}, 7.13),
    aligned=Row("aligned latents", "rope", {"tokenizer": "aligned"}, 4.29),
    no_mcos=Row("aligned without the marginal cosine loss", "rope", {"tokenizer": "no_mcos"}),
    no_mdms=Row("aligned without the marginal distance matrix loss", "rope", {"tokenizer": "no_mdms"}),
    no_margin=Row("aligned without margins", "rope", {"tokenizer": "no_margin"}),
    plain_narrow=Row("LightningDiT on plain latents of fewer channels", "rope", {"tokenizer": "plain_narrow"}),
    aligned_narrow=Row("aligned latents of fewer channels", "plain_narrow", {"tokenizer": "aligned_narrow"}),
)
LADDER = tuple(name for name, row in ROWS.items() if row.paper_fid is not None)
ABLATIONS = dict(rope=22.62, no_mcos=21.87, no_mdms=17.74, no_margin=17.77, aligned=15.82)  # the paper: FID-10k of B, f16d32
HEADLINE = ("aligned", "rope", "dit")  # of several seeds
COMPARISONS = (  # name, title, baseline, row, the paper's speed-up
    ("alignment", "alignment", "rope", "aligned", "2.54 (32 channels), 2.76 (64)"),
    ("alignment_narrow", "alignment, fewer channels", "plain_narrow", "aligned_narrow", "2.54 (32 channels), 2.76 (64)"),
    ("recipe", "recipe: LightningDiT against DiT, both on plain latents", "dit", "rope", ""),
    ("all", "all: LightningDiT on aligned latents against DiT on plain ones", "dit", "aligned", "21.8"),
)


def rows_of(size):
    """Names of the rows of a size, those of the headline first, should time run out."""
    wanted = SIZES[size]["rows"] or tuple(ROWS)
    return [name for name in (*HEADLINE, *(name for name in ROWS if name not in HEADLINE)) if name in wanted]


def runs_of(size):
    """[(row, seed)] of all trainings: the headline's rows with all seeds, the others with the first."""
    return [(name, seed) for name in rows_of(size) for seed in range(SIZES[size]["seeds"] if name in HEADLINE else 1)]


def tokenizer_of(name):
    """The name of a row's tokenizer: its own, or that of the nearest row before which names one."""
    row = ROWS[name]
    return row.changes.get("tokenizer") or ("plain" if row.before is None else tokenizer_of(row.before))


def dit_settings(size, name, seed):
    """{dotted name of DiTConfig: value} of a row, all but its paths and its device."""
    s, row = SIZES[size], ROWS[name]
    if row.before is None:
        settings = {
            "seed": seed, "batch_size": s["batch"], "optim.lr": s["lr"], "keep_checkpoints": KEEP, "log_every": 25, "sample_num": 40,
            "data.image_size": s["image_size"], "data.flip": s["flip"], "tokenizer.downsample": 2 ** (len(s["ch_mult"]) - 1),
            "model.size": None, "model.depth": s["depth"], "model.hidden_size": s["hidden_size"], "model.num_heads": s["heads"],
            "model.patch_size": 1, "model.use_swiglu": False, "model.use_rmsnorm": False, "model.use_rope": False, "flow.path": "vp",
            "flow.prediction": "noise", "flow.time": "uniform", "flow.cosine_loss": False, "optim.betas": [0.9, 0.999],
            "optim.ema": s["ema"], "optim.ema_warmup": True, "guard.threshold": None,  # recipes as they are: no update is left out
            "sample.method": "dpmpp_2m", "sample.num_steps": s["sample_steps"], "sample.shift": 1.0, "sample.batch_size": 250}
    else:
        settings = dit_settings(size, row.before, seed)
    for key, value in row.changes.items():
        if key == "batch":
            settings["batch_size"] *= value
        elif key == "lr":
            settings["optim.lr"] *= value
        elif key != "tokenizer":
            settings[key] = value
    steps = s["images"] // settings["batch_size"]
    channels = s["latents"][TOKENIZERS[tokenizer_of(name)].latents]
    settings |= {"steps": steps, "checkpoint_every": steps // s["parts"], "sample_every": steps}
    return settings | {"tokenizer.latent_channels": channels}


def vavae_settings(size, name):
    """{dotted name of VAVAEConfig: value} of a tokenizer, all but paths, target and device."""
    s, plan = SIZES[size], TOKENIZERS[name]
    return {
        "seed": 0, "steps": s["vae_steps"], "batch_size": s["vae_batch"], "log_every": 50, "checkpoint_every": max(1, s["vae_steps"] // 3),
        "sample_every": s["vae_steps"], "data.image_size": s["image_size"], "data.channels": s["channels"], "data.crop": "center",
        "data.in_memory": True, "encoder.cache": True, "autoencoder.ch": s["ch"], "autoencoder.ch_mult": list(s["ch_mult"]),
        "autoencoder.z_channels": s["latents"][plan.latents], "autoencoder.attn_resolutions": list(s["attention"]),
        "autoencoder.num_groups": s["groups"], "loss.kl_weight": s["kl_weight"], "loss.perceptual_weight": 0.0, "loss.disc_weight": 0.0,
        "loss.vf_weight": plan.vf_weight, "loss.cos_margin": plan.cos_margin, "loss.distmat_margin": plan.distmat_margin,
        "optim.lr": s["vae_lr"], "optim.betas": [0.9, 0.95], "optim.warmup": min(50, s["vae_steps"] // 2), "optim.schedule": "cosine"}


def nested(settings):
    """{"a.b": 1} -> {"a": {"b": 1}}, as the YAML files have it."""
    tree = {}
    for key, value in settings.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


# The arithmetic


def reach(xs, distances, target):
    """(x, at_once) where a curve first falls to `target`: log x is interpolated linearly between neighbours; None if it never does.

    Args: xs: increasing and positive. at_once: the first point is there already, so that the true x may be smaller.
    """
    if distances[0] <= target:
        return xs[0], True
    for (x0, f0), (x1, f1) in itertools.pairwise(zip(xs, distances, strict=True)):
        if f1 <= target:
            return x0 * (x1 / x0) ** ((f0 - target) / (f0 - f1)), False
    return None


def speedup(baseline, run, axis):
    """{"value", "at_least"}: how many times less of `axis` ("images" or "seconds") `run` needs for the baseline's final distance.

    value is None where it never gets there.
    """
    target = baseline["distances"][-1]
    own, found = (reach(one[axis], one["distances"], target) for one in (baseline, run))
    return dict(value=None, at_least=False) if found is None else dict(value=own[0] / found[0], at_least=found[1])


T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, 97.5 %, 1 to 9 degrees of freedom


def interval(values):
    """(geometric mean, low, high): the 95 % t-interval of the mean logarithm; low and high are None for one value.

    Args: values: 1 to 10 positive numbers.
    """
    logs = [math.log(value) for value in values]
    mean = statistics.fmean(logs)
    if len(logs) == 1:
        return math.exp(mean), None, None
    half = T975[len(logs) - 2] * statistics.stdev(logs) / math.sqrt(len(logs))
    return math.exp(mean), math.exp(mean - half), math.exp(mean + half)


def compare(runs, baseline, row, axis):
    """The speed-up of a row over a baseline, paired by seed: per_seed, and the `interval`, all None if some seed never gets there.

    Returns: None where no seed has both.
    """
    pairs = {run["seed"]: [None, run] for run in runs if run["row"] == row}
    for run in runs:
        if run["row"] == baseline and run["seed"] in pairs:
            pairs[run["seed"]][0] = run
    found = [dict(seed=seed, **speedup(*pair, axis)) for seed, pair in sorted(pairs.items()) if pair[0] is not None]
    if not found:
        return None
    values = [one["value"] for one in found]
    mean, low, high = (None, None, None) if None in values else interval(values)
    return dict(mean=mean, low=low, high=high, at_least=any(one["at_least"] for one in found), per_seed=found)


def comparisons(runs):
    """{name: {"images": ..., "seconds": ...}} of COMPARISONS, as far as there are runs of them."""
    found = {}
    for name, _, baseline, row, _ in COMPARISONS:
        axes = {axis: compare(runs, baseline, row, axis) for axis in ("images", "seconds")}
        if axes["images"] is not None:
            found[name] = axes
    return found


# The report, from its JSON alone


def finals(study):
    """{row: {seed: final distance}}."""
    found = {}
    for run in study["runs"]:
        found.setdefault(run["row"], {})[run["seed"]] = run["distances"][-1]
    return found


def paired(final, a, b):
    """Mean final distances (of a, of b) over the seeds that both have."""
    seeds = final[a].keys() & final[b].keys()
    return tuple(statistics.fmean(final[row][seed] for seed in seeds) for row in (a, b))


def cell(by_seed):
    """Mean of {seed: value}, and with several seeds their standard deviation."""
    values = by_seed.values()
    spread = f" ± {statistics.stdev(values):.2g} ({len(values)} seeds)" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4g}{spread}"


def speedup_cell(found):
    values = [one["value"] for one in found["per_seed"]]
    if found["mean"] is None:
        missed = values.count(None)
        return f"not reached in {missed} of {len(values)} seeds" if len(values) > 1 else "not reached"
    least = "at least " if found["at_least"] else ""
    return f"{least}{found['mean']:.2f}" + (f" ({found['low']:.2f} to {found['high']:.2f})" if found["low"] is not None else " (one seed)")


def table(header, rows):
    return ["| " + " | ".join(row) + " |" for row in (header, ["---"] * len(header), *rows)] + [""]


def ladder_sentence(final):
    """Which steps of the ladder go the other way than the paper's; steps that the paper found to change less than 1 % are left out."""
    steps = [(a, b) for a, b in itertools.pairwise(LADDER)
             if a in final and b in final and abs(ROWS[b].paper_fid / ROWS[a].paper_fid - 1) >= 0.01]
    if not steps:
        return "This study has no step of the paper's ladder."
    wrong = [(b, *means) for a, b in steps for means in [paired(final, a, b)] if means[1] >= means[0]]  # the paper's all go down
    spreads = [statistics.stdev(values.values()) for values in final.values() if len(values) > 1]
    noise = f" Seeds of one row differ by a standard deviation of up to {max(spreads):.2g}." if spreads else ""
    if not wrong:
        return f"All {len(steps)} steps go the paper's way.{noise}"
    names = ", ".join(f"{ROWS[name].title} ({before:.4g} to {after:.4g})" for name, before, after in wrong)
    return f"{len(steps) - len(wrong)} of {len(steps)} steps go the paper's way; not reproduced here: {names}.{noise}"


def ablation_sentence(final):
    """Pairs of the ablation's rows that are ordered otherwise than the paper's; pairs that differ there by less than 1 % are left out."""
    pairs = [(a, b) for a, b in itertools.combinations(sorted(ABLATIONS, key=ABLATIONS.get), 2)
             if a in final and b in final and ABLATIONS[b] / ABLATIONS[a] - 1 >= 0.01]
    if not pairs:
        return "This study has no ablation of the alignment."
    wrong = [(a, b, *means) for a, b in pairs for means in [paired(final, a, b)] if means[0] >= means[1]]
    if not wrong:
        return f"All {len(pairs)} pairs are ordered as in the paper."
    names = "; ".join(f"{ROWS[a].title} ({ours:.4g}) and {ROWS[b].title} ({other:.4g})" for a, b, ours, other in wrong)
    return (f"{len(pairs) - len(wrong)} of {len(pairs)} pairs are ordered as in the paper; not these, of which the first is its better: "
            f"{names}.")


def alignment_sentence(found):
    """What the headline's interval says."""
    name = "At this size alignment"
    if found["mean"] is None:
        return f"{name} does not reproduce: not every seed on aligned latents reaches what plain ones end with."
    if found["low"] is None:
        return f"{name} gives a speed-up of {found['mean']:.2f}, from one seed."
    if found["low"] > 1:
        return f"{name} speeds convergence up: the whole interval is above 1."
    return f"{name} does not reproduce with certainty: the interval is not above 1."


def report(study):
    """Markdown lines of one results file: what was done, speed-ups, ladder, ablation, tokenizers; nothing but the file is read."""
    s, env, target, final = study["settings"], study["environment"], study["target"], finals(study)
    aligned_with = f"the foundation model {target['name']}"
    if target["stand_in"]:
        aligned_with = (f"{target['name']}, which stands in for a foundation model: it learned the classes of the training images and "
                        f"knows {target['held_out_accuracy']:.1%} of held-out ones")
    lines = [
        f"{study['data']}, {s['image_size']} pixels; latents of {s['latents'][1]} channels (few: {s['latents'][0]}), "
        f"{2 ** (len(s['ch_mult']) - 1)} pixels a position; a DiT of depth {s['depth']} and width {s['hidden_size']}; {s['images']:,} "
        f"images a run; {env['hardware']} ({env['date'][:10]}, commit {env['commit']}, torch {env['torch']}).", "",
        f"Aligned with {aligned_with}. Distances are squared Frechet "
        f"distances of {s['samples']:,} samples in the features of a small classifier of another architecture and seed, which knows "
        f"{study['judge']['held_out_accuracy']:.1%} of held-out images: they are no FID. Samples are drawn without guidance from the "
        "weights' average. Tokenizers train without LPIPS and without a discriminator.", ""]
    if study["size"] != "full":
        lines += ["This size is there to run every stage and row on any machine, not to settle anything: the images are few and small.", ""]
    found = study["speedups"]
    if found:
        rows = [[title, speedup_cell(found[name]["images"]), speedup_cell(found[name]["seconds"]),
                 ", ".join("not reached" if one["value"] is None else f"{one['value']:.2f}" for one in found[name]["images"]["per_seed"]),
                 paper] for name, title, _, _, paper in COMPARISONS if name in found]
        lines += table(["speed-up to the baseline's final distance", "in images seen (95 % interval)", "in time (95 % interval)",
                        "each seed, in images", "the paper, at its own scale"], rows)
        lines += ["A speed-up is the ratio of the images, or seconds of training at a run's median rate, after which baseline and row "
                  "first reach the baseline's final distance, interpolated in their logarithm; an interval is the t-interval of its "
                  "logarithm over seeds, paired by seed.", ""]
        if "alignment" in found:
            lines += [alignment_sentence(found["alignment"]["images"]), ""]
    runs = {}
    for run in study["runs"]:
        runs.setdefault(run["row"], run)
    ladder, before = [], None
    for name in (name for name in LADDER if name in final):
        changes = [""] * 2
        if before is not None:
            pairs = paired(final, before, name), (ROWS[before].paper_fid, ROWS[name].paper_fid)
            ratios = [after / first for first, after in pairs]
            changes = [f"{100 * (ratio - 1):+.1f} %" for ratio in ratios]
        ladder.append([("+ " if before else "") + ROWS[name].title, cell(final[name]), changes[0],
                       f"{runs[name]['seconds'][-1]:.4g}", f"{ROWS[name].paper_fid:.2f}", changes[1]])
        before = name
    lines += table(["ladder, one step at a time", "final distance", "change, same seeds", "training, s",
                    "the paper: FID-50k of XL on ImageNet 256", "its change"], ladder)
    lines += [ladder_sentence(final), ""]
    ablation = [[ROWS[name].title, cell(final[name]), f"{paper:.2f}"] for name, paper in ABLATIONS.items() if name in final]
    lines += table(["ablation of the alignment", "final distance", "the paper: FID-10k of B on ImageNet 256"], ablation)
    lines += [ablation_sentence(final), ""]
    metrics = dict(psnr="PSNR, dB", rfd_judge="reconstructions, Frechet distance", density_cv="density CV", gini="Gini")
    metrics = {key: name for key, name in metrics.items() if all(key in one["metrics"] for one in study["tokenizers"].values())}
    rows = [[name, str(one["channels"]), *(f"{one['metrics'][key]:.4g}" for key in metrics)] for name, one in study["tokenizers"].items()]
    lines += table(["tokenizer", "channels", *metrics.values()], rows)
    return lines[:-1]


def figures(study):
    """{"ladder", "alignment"}: matplotlib figures from one results file; distance against images seen and against seconds of training."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter

    by_row = {}
    for run in study["runs"]:
        by_row.setdefault(run["row"], []).append(run)
    ladder = [name for name in LADDER if name in by_row]
    styles = {name: dict(color=colormaps["viridis"](0.9 * i / len(LADDER))) for i, name in enumerate(ladder)}
    if "aligned" in styles:
        styles["aligned"] = dict(color="tab:red")
    other = dict(rope="tab:blue", aligned="tab:red", no_mcos="tab:orange", no_mdms="tab:green", no_margin="tab:purple",
                 plain_narrow="tab:blue", aligned_narrow="tab:red")
    other = {name: dict(color=color, linestyle="--" if "narrow" in name else "-") for name, color in other.items() if name in by_row}
    plain = FuncFormatter(lambda value, _: f"{value:,.10g}" if f"{value:e}"[0] in "12357" else "")
    found = {}
    for name, chosen in dict(ladder=styles, alignment=other).items():
        figure = Figure(figsize=(12, 5.5), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        for axes, axis, label in zip(panels, ("images", "seconds"), ("images seen", "seconds of training at the median rate"), strict=True):
            for row, style in chosen.items():
                runs = by_row[row]
                mean = [statistics.fmean(values) for values in zip(*(run["distances"] for run in runs), strict=True)]
                xs = [statistics.fmean(values) for values in zip(*(run[axis] for run in runs), strict=True)]
                title = ROWS[row].title + (f", {len(runs)} seeds" if len(runs) > 1 else "")
                axes.plot(xs, mean, marker="o", markersize=4, label=title, **style)
                if len(runs) > 1:
                    for run in runs:
                        axes.plot(run[axis], run["distances"], linewidth=0.7, alpha=0.5, **style)
            if name == "alignment" and "rope" in by_row:
                axes.axhline(statistics.fmean(run["distances"][-1] for run in by_row["rope"]), color="0.6", linewidth=0.8, linestyle=":")
            axes.set(xscale="log", yscale="log", xlabel=label)
            axes.grid(alpha=0.3, which="both")
            for ticks in (axes.xaxis, axes.yaxis):
                ticks.set_major_formatter(plain)
                ticks.set_minor_formatter(plain)
        panels[0].set_ylabel("Frechet distance, judge's features (no FID)")
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
        figure.suptitle(f"{study['data']}, {study['environment']['hardware']}", fontsize=10)
        found[name] = figure
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="smoke", help="tiny: for tests; smoke: digits, a CPU; full: a GPU, an hour")
    parser.add_argument("--data", default=str(DATA / "train-{00..04}.tar"), help="full: training images, as images.open_images takes them")
    parser.add_argument("--val", default=str(DATA / "val.tar"), help="full: held-out images of the same classes")
    parser.add_argument("--foundation", help="model to align with, such as dinov2-s; default: a ViT trained on the data stands in for one")
    parser.add_argument("--foundation-weights", help="its weights, a file; default: the hub's, or its cache")
    parser.add_argument("--out", help="working folder; default: runs/convergence_SIZE")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget-s", type=float, help=f"stop after so many seconds with exit status {UNFINISHED}; run again to go on")
    parser.add_argument("--publish", action="store_true", help="copy the report to bench/results")
    args = parser.parse_args(argv)
    if args.foundation_weights and not args.foundation:
        parser.error("--foundation-weights: got a file without --foundation, expected the name of the model whose weights they are")
    from bench.convergence_stages import Convergence  # torch and all the rest

    deadline = None if args.budget_s is None else time.monotonic() + args.budget_s
    digits = SIZES[args.size]["channels"] == 1
    study = Convergence(args.size, None if digits else args.data, None if digits else args.val,
                        args.out or f"runs/convergence_{args.size}", args.device, deadline, args.foundation, args.foundation_weights)
    try:
        found = study.run()
    except OutOfTime as where:
        print(f"out of time at {where}; the same command again goes on from there")
        return UNFINISHED
    print("\n".join(report(found)))
    print(f"report   {study.out / 'report.json'}")
    for name, figure in figures(found).items():
        figure.savefig(study.out / f"{name}.png", dpi=110)
        print(f"plot     {study.out / f'{name}.png'}")
    if args.publish:
        device = re.sub(r"[^a-z0-9]+", "_", found["environment"]["hardware"].lower()).strip("_") if study.device.type == "cuda" else "cpu"
        name = f"convergence_{device}" if args.size == "full" else f"convergence_{args.size}_{device}"
        shutil.copy(study.out / "report.json", ROOT / "bench" / "results" / f"{name}.json")
        print(f"results  bench/results/{name}.json")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from there", file=sys.stderr)
        sys.exit(INTERRUPTED)
