"""What the report knows about each kind of results file: which parts of the pages it fills, and how. bench/report.py puts them together.

A study's table and figure lie beside the study; KINDS and CONTESTS say what is called for which file.
"""

import collections
import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

from bench import bench_growth, convergence, levers, report_kernels, solvers, tokenizer_study
from bench.harness import SCHEMA, short
from bench.tables import Row, about, cell, markdown, number, times

Results = dict[str, dict]  # the content of each file by its name


@dataclasses.dataclass(frozen=True)
class Part:
    """What one file has to say on one topic: lines of Markdown, rows of the overview, and functions that draw its figures, by suffix."""

    topic: str
    lines: list[str]
    rows: list[Row]
    figures: dict[str, Callable] = dataclasses.field(default_factory=dict)


# Records of the harness that are lists of contestants: sampling, loading, decoding


@dataclasses.dataclass(frozen=True)
class Contest:
    """A kind of harness records whose rows are contestants with milliseconds for the same work.

    ours, peers: regular expressions of names. amount: the key, of a row or else of the record, of how many things one time is for.
    shown: ours that the overview has; empty: the fastest one.
    """

    topic: str
    command: str
    what: Callable[[dict], str]
    shape: Callable[[dict], str]
    amount: str
    unit: str
    ours: str
    peers: str
    shown: tuple[str, ...] = ()

    def rate(self, record: dict, row: dict, at: str = "median_ms") -> float:
        return 1e3 * row.get(self.amount, record.get(self.amount)) / row[at]

    def best(self, record: dict, names: str) -> dict | None:
        """The fastest of the rows whose name matches."""
        return max((row for row in record["rows"] if re.match(names, row["name"])), key=lambda row: self.rate(record, row), default=None)

    def rows(self, record: dict) -> Iterator[Row]:
        """Each of ours that is shown against the fastest peer."""
        chosen = [row for row in record["rows"] if row["name"] in self.shown] or [self.best(record, self.ours)]
        peer = self.best(record, self.peers)
        for row in filter(None, chosen):
            rate, low, high = (self.rate(record, row, at) for at in ("median_ms", "p80_ms", "p20_ms"))
            other, ratio = ("", None) if peer is None else (f"{peer['name']}: {number(self.rate(record, peer))} {self.unit}",
                                                            rate / self.rate(record, peer))
            yield Row(f"{self.what(record)}: {row['name']}", self.shape(record), f"{number(rate)} {self.unit}",
                      f"{number(low)} to {number(high)} {self.unit}", other, ratio, short=row is chosen[-1])

    def lines(self, record: dict) -> list[str]:
        """A table of all rows, and who was left out."""
        first = record["rows"][0]
        known = {"name", "status", "median_ms", "p20_ms", "p80_ms", "rounds", "speedup", "speedup_low", "speedup_high"}
        known |= {"images_per_s", "samples_per_second"}  # they follow from the time
        more = list(dict.fromkeys(key for row in record["rows"] for key, value in row.items() if key not in known and is_number(value)))
        header = ["", "ms: median (p20-p80)", self.unit, f"times {first['name']}", *(UNITS.get(key, key.replace("_", " ")) for key in more)]
        rows = []
        for row in record["rows"]:
            spread = f"{number(row['median_ms'])} ({number(row['p20_ms'])}-{number(row['p80_ms'])})"
            rate = self.rate(record, row)
            known_rates = [number(rate), times(rate / self.rate(record, first))]
            rows.append([row["name"], spread, *known_rates, *(number(row.get(key)) for key in more)])
        out = [f"{row['name']} ({cell(row.get('reason', row['status']))})" for row in record.get("left_out", ())]
        title = f"#### {self.what(record)}, {self.shape(record)}"
        return [title, "", *markdown(header, rows), "", *([f"Left out: {'; '.join(out)}.", ""] if out else [])]


UNITS = dict(gb_per_s="GB/s", tflop_per_s="TFLOP/s", peak_mib="peak MiB", mfu="MFU", first_call_s="first call, s",
             first_step_s="first step, s")


def is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


CONTESTS = {
    "training_step": Contest("Training", "pytest bench/bench_step.py --benchmark-only --results bench/results/step_cpu.json",
                             lambda r: f"training step, {r['dtype']}" + (", kernel by kernel" if r.get("part") == "kernels" else ""),
                             lambda r: f"{r['case'].upper()}: depth {r['model']['depth']}, width {r['model']['width']}, "
                                       f"{r['model']['tokens']} tokens, batch {r['batch']}",
                             "batch", "images/s", "ours (eager|compiled)$", "(reference|official)"),
    "tokenizer": Contest("Tokenizers", "pytest bench/bench_tokenizer.py --benchmark-only --results bench/results/tokenizer_cpu.json",
                         lambda r: "VA-VAE " + dict(step="training step", encode="encoding", decode="decoding")[r["case"]],
                         lambda r: f"{r['preset']}, {r['pixels']} pixels, batch {r['batch']}",
                         "batch", "images/s", "ours", "(fp32 eager|diffusers)"),
    "sampling": Contest("Sampling", "pytest bench/bench_sampling.py --benchmark-only --results bench/results/sampling_cpu.json",
                        lambda r: "guided sampling, noise to pixels" if r["decoded"] else "guided sampling, noise to latents",
                        lambda r: f"{r['case'].upper()}, depth {r['depth']}, {r['num_steps']} steps, {r['count']} images",
                        "count", "images/s", "ours", "official"),
    "latents": Contest("Data", "pytest bench/bench_latents.py --benchmark-only --results bench/results/latents_cpu.json",
                       lambda r: f"latent loading, resident {r['resident']}",
                       lambda r: f"batch {r['batch']} of {' x '.join(map(str, r['latent_shape']))}, {r['images']} images",
                       "batch", "samples/s", "(samples|fp32|bf16)", "per sample", ("samples, normalised", "bf16")),
    "images": Contest("Data", "pytest bench/bench_images.py --benchmark-only --results bench/results/images_cpu.json",
                      lambda r: "image decoding", lambda r: f"{r['case']}, {r['count']} images",
                      "count", "images/s", "(pillow|dali)", "(DataLoader|torchvision)"),
}
OPS = ("op", "copy", "gemm", "model_gemms")
COMMANDS = {  # by kind of record: topic, and what measures it
    "op": ("Kernels", "make bench, make bench-gpu"),
    "growth": ("Training", "pytest bench/bench_growth.py --benchmark-only --results bench/results/growth_cpu.json"),
    "check": ("Regressions", "python bench/check.py --update"),
} | {kind: (contest.topic, contest.command) for kind, contest in CONTESTS.items()}


def bars(records: list[dict]):
    """Rates of all contestants, a panel a record; ours in colour. A matplotlib figure."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.6 * len(records) + 0.24 * sum(len(record["rows"]) for record in records)), layout="constrained")
    panels = figure.subplots(len(records), squeeze=False, height_ratios=[1 + len(record["rows"]) for record in records])[:, 0]
    for axes, record in zip(panels, records, strict=True):
        contest = CONTESTS[record["kind"]]
        for row in record["rows"]:
            rate = contest.rate(record, row)
            axes.barh(row["name"], rate, color="C0" if re.match(contest.ours, row["name"]) else "0.7")
            axes.text(rate, row["name"], f" {number(rate)}", va="center", fontsize=7)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.tick_params(labelsize=7)
        axes.set_title(f"{contest.what(record)}, {contest.shape(record)}: {contest.unit}", fontsize=8, loc="left")
    return figure


def check_samples(name: str, record: dict) -> None:
    """ValueError unless medians are those of the samples, where a record has them."""
    for row in record["rows"]:
        if samples := record.get("samples_ms", {}).get(row["name"]):
            if abs(row["median_ms"] - statistics.median(samples)) > 1e-3 * row["median_ms"]:
                right = short(statistics.median(samples))
                raise ValueError(f"{name}: median_ms of {record['kind']} {row['name']} is {row['median_ms']}, but {right} by its samples")


def overlay_part(record: dict) -> Part:
    """Losses of two trainings from the same weights on the same batches."""
    names, curves = list(record["curves"]), list(record["curves"].values())
    differences = [abs(a - b) for a, b in zip(*curves, strict=True)]
    mean, loss = statistics.fmean(differences), statistics.fmean(curves[0])
    shape = f"{record['case'].upper()}, {record['dtype']}, {record['data']}, {record['steps']} steps of {record['batch']} images"
    at = differences.index(max(differences)) + 1
    row = Row("difference of the training losses of ours and of the reference", shape, f"{100 * mean / loss:.2g} % of the loss",
              f"at most {number(max(differences))}, at step {at}")
    line = f"{' and '.join(names)} from the same weights on the same batches: losses {number(mean)} apart in the mean, of {number(loss)}."

    def draw():
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6, 3), layout="constrained")
        axes = figure.subplots()
        for name, curve, style in zip(names, curves, ("-", "--"), strict=True):
            axes.plot(range(1, len(curve) + 1), curve, style, linewidth=1, label=name)
        axes.set(xlabel="step", ylabel="loss", title=shape)
        axes.title.set_fontsize(8)
        axes.legend(frameon=False, fontsize=8)
        return figure

    suffix = "overlay_" + re.sub(r"[^a-z0-9]+", "_", record["case"])
    return Part("Training", [f"#### Losses overlaid, {shape}", "", line, ""], [row], {suffix: draw})


def growth_part(run: dict, records: list[dict]) -> Part:
    """How a step's time and memory grow along each axis: fixed costs and exponents, fitted again to the points."""
    records = sorted(records, key=lambda record: bench_growth.AXES.index(record["axis"]))
    rows, lines = [], []
    for record in records:
        base = ", ".join(f"{name} {value}" for name, value in record["base"].items() if name != record["axis"])
        span = f"{record['axis']} {record['points'][0]['value']} to {record['points'][-1]['value']}, {base}"
        fits = bench_growth.fits(record["points"])
        for key, what, unit in (("median_ms", "time", "ms"), ("peak_mib", "memory", "MiB")):
            words = {name: f"exponent {one[key]['exponent']:.2f} above {one[key]['offset']:.3g} {unit}" for name, one in fits.items()}
            for name, one in ((name, one[key]) for name, one in fits.items()):
                interval = bench_growth.interval(one)
                lines.append([record["axis"], what, name, f"{one['offset']:.3g} {unit}", f"{one['exponent']:.2f} ({interval})",
                              f"{100 * one['error']:.1f} %", f"{one['last']:.2f}", span])
                if name.startswith("ours"):
                    peer = ", ".join(f"{other}: {word}" for other, word in words.items() if other != name)
                    title = f"growth of a training step's {what} with {record['axis']}"
                    rows.append(Row(title, span, words[name], f"{interval} (95 %)" if one["low"] or one["high"] else interval, peer))
    header = ["axis", "of", "", "fixed", "exponent above it (95 %)", "error of the fit", "between the last two points", "span"]
    title = "#### Growth of the training step: fixed + factor x^exponent, fitted to all points"
    return Part("Training", [title, "", *markdown(header, lines), ""], rows, {"": lambda: bench_growth.figure(run)})


def check_part(records: list[dict]) -> Part:
    """The baseline of bench/check.py: times as ratios to a reference that was measured beside them."""
    rows = [[record["name"], number(record["median_ms"]), f"{statistics.median(record['ratios']):.3g}"] for record in records]
    line = "`make bench-check` compares with these ratios, and fails for a loss."
    row = Row("baseline of `make bench-check`: time in units of a reference measured beside it", f"{len(records)} ops and stages, small",
              f"{min(float(one[2]) for one in rows):.3g} to {max(float(one[2]) for one in rows):.3g}")
    return Part("Regressions", [line, "", *markdown(["case", "ms: median", "times the reference"], rows), ""], [row])


def choices(run: dict) -> list[str]:
    """By hand: what was chosen by timing on that machine, of which candidates; and what compiled graphs take for attention there."""
    rows = [[chosen["op"], chosen["shape"], chosen["choice"], "; ".join(f"{name}: {number(1e3 * ms)}" for name, ms in
             sorted(chosen["times_ms"].items(), key=lambda item: item[1]))] for chosen in run.get("choices", [])]
    title = "What was timed there to choose among tiles, and of attention (forward and backward of 16,384 tokens) among backends:"
    lines = [title, "", *markdown(["op", "shape", "choice", "candidates, us"], [list(map(cell, row)) for row in rows]), ""] if rows else []
    if found := run.get("compiled_attention"):
        names = ("triton_ms", "sdpa_compiled_ms", "sdpa_and_two_copies_ms")
        cells = [["{tokens} tokens, {heads} x {head_dim}, QK-norm {qk_norm}".format(**row), *(number(row[name]) for name in names)]
                 for row in found["rows"]]
        title = f"Attention in a compiled graph, ms, from which `auto` has its estimate ({found['note']}):"
        lines += [title, "", *markdown(["shape", "ours", "PyTorch's, compiled", "SDPA and two copies"], cells), ""]
    return lines


def harness_parts(name: str, run: dict) -> list[Part]:
    """Of a file of harness records, by topic. ValueError for another schema, an unknown kind of records, or summaries that lie."""
    if run.get("schema") != SCHEMA:
        raise ValueError(f"{name} has schema {run.get('schema')!r}, expected {SCHEMA!r}")
    known = {*OPS, "loss_overlay", "growth", "check", *CONTESTS}
    if strange := {record["kind"] for record in run["results"]} - known:
        raise ValueError(f"{name} holds records of kind {min(strange)!r}, expected {', '.join(sorted(known))}")
    parts, by_kind = [], collections.defaultdict(list)
    for record in run["results"]:
        by_kind["op" if record["kind"] in OPS else record["kind"]].append(record)
    for kind, records in by_kind.items():
        if kind == "loss_overlay":
            parts += [overlay_part(record) for record in records]
        elif kind == "growth":
            parts.append(growth_part(run, records))
        elif kind == "check":
            parts.append(check_part(records))
        elif kind == "op":
            for record in records:
                if record["kind"] == "op":
                    report_kernels.check(name, record)
            lines = [*report_kernels.opening(run), "Every row: [results_kernels.md](results_kernels.md).", "", *choices(run)]
            drawn = ("speedup", "roofline") if any(record["kind"] == "op" for record in records) else ()
            figures = {plot: lambda plot=plot: report_kernels.figures(run)[plot] for plot in drawn}
            parts.append(Part("Kernels", lines, report_kernels.rows(run), figures))
        else:
            for record in records:
                check_samples(name, record)
            lines = [line for record in records for line in CONTESTS[kind].lines(record)]
            ladder = [record for record in records if record.get("part") != "kernels"]  # those take ours apart: their tables say it all
            rows = [row for record in ladder for row in CONTESTS[kind].rows(record)]
            parts.append(Part(CONTESTS[kind].topic, lines, rows, {kind: lambda records=records: bars(records)}))
    return parts


# Studies


def demo_parts(name: str, content: dict) -> list[Part]:
    """bench/demo.py: the embedded default as users type it."""
    runs, rows, cells = content["runs"], [], []
    for run in runs:
        command = run["command"].strip()
        first = run is not runs[0] and runs[0]
        peer = f"{runs[0]['command'].strip()}: {number(runs[0]['wall_s'])} s" if first else ""
        rows.append(Row(f"the digits, `{command}`: wall clock, everything included", f"{run['steps']} steps", f"{number(run['wall_s'])} s",
                        peer=peer, ratio=first["wall_s"] / run["wall_s"] if first else None, short=True))
        rows.append(Row(f"the digits, `{command}`: generated digits recognised by a classifier", f"{run['steps']} steps",
                        f"{100 * run['recognised']:.1f} %", short=not first))
        cells.append([f"`{command}`", number(run["wall_s"]), number(run["images_per_second_median"]), f"{100 * run['recognised']:.1f} %",
                      number(run["val_mse"]), number(run["val_cos"])])
    header = ["command", "wall clock, s", "images/s, median step", "digits recognised", "validation MSE", "validation cosine loss"]
    return [Part("Training", ["#### The embedded default", "", *markdown(header, cells), ""], rows)]


def spin_parts(name: str, content: dict) -> list[Part]:
    """GOMP_SPINCOUNT, by hand: why the Makefile and train/dit.py set it to 3000."""
    alone, beside = content["images_per_second_alone"], content["images_per_second_beside_other_programs"]
    rows = [Row(f"GOMP_SPINCOUNT=3000, {where}", "the digits' model, batch 128", f"{number(rates['3000'])} images/s", "",
                f"GOMP's default: {number(rates['default'])} images/s", rates["3000"] / rates["default"])
            for where, rates in (("alone on the machine", alone), ("beside other programs", beside))]
    table = markdown(["GOMP_SPINCOUNT", "images/s alone", "images/s beside other programs"],
                     [[count, number(alone[count]), number(beside[count])] for count in alone])
    return [Part("Training", [f"#### {content['what']}", "", *table, "", f"{content['note']}.", ""], rows)]


def solver_parts(name: str, content: dict) -> list[Part]:
    """bench/solvers.py: errors of the ODE solvers."""
    lines, rows, chosen = [], [], content["rows"]
    for scale in sorted({row["guidance_scale"] for row in chosen}):
        lines += [f"#### {content['what']}, guidance scale {scale:g}: median error of the latent", "", *solvers.table(chosen, scale), ""]
        counts = sorted({row["evaluations"] for row in chosen if row["guidance_scale"] == scale and row["solver"] == "euler"})
        count = min(counts, key=lambda count: abs(count - 20))
        at = {row["solver"]: row for row in chosen if row["guidance_scale"] == scale and row["evaluations"] == count}
        best = min(at, key=lambda solver: at[solver]["median"])
        rows.append(Row(f"error of the latent, {best}", f"{count} evaluations, guidance scale {scale:g}, {content['images']} images",
                        f"{100 * at[best]['median']:.3g} %", f"worst image {100 * at[best]['worst']:.3g} %",
                        f"euler: {100 * at['euler']['median']:.3g} %", at["euler"]["median"] / at[best]["median"], short=scale != 1))
    lines += [f"The reference is {content['reference']}; {content['images']} images.", ""]
    return [Part("Sampling", lines, rows, dict(error=lambda: solvers.figure(chosen)))]


def study_parts(name: str, content: dict) -> list[Part]:
    """bench/tokenizer_study.py: does alignment pay?"""
    plain, aligned = (content["arms"][arm] for arm in tokenizer_study.ARMS)
    rows = []
    for part, key, what, more in tokenizer_study.ROWS:
        theirs, ours = plain[part].get(key), aligned[part].get(key)
        if ours and theirs:
            rows.append(Row(f"tokenizer study, aligned: {what}", content["size"], f"{ours:.4g}", "one seed", f"plain: {theirs:.4g}",
                            ours / theirs if more else theirs / ours, short=key == "fd_classifier"))
    lines = [*study_sentence(content), "", "Side by side, with pictures: [evaluation.md](evaluation.md#does-alignment-pay).", ""]
    return [Part("Tokenizers", lines, rows)]


def study_sentence(content: dict) -> list[str]:
    s = content["settings"]
    return [f"Size `{content['size']}`, one seed: {s['classes']} classes, {s['image_size']} pixels, "
            f"{s['vae_steps']:,} VAE steps, {s['dit_steps']:,} DiT steps. The judge: {content['judge']}; it recognises "
            f"{100 * content['classifier_accuracy_on_held_out_images']:.0f} % of held-out images."]


def chaos_parts(name: str, content: dict) -> list[Part]:
    """bench/chaos.py: trainings that are killed, starved and damaged."""
    runs = content["runs"]
    happened = collections.Counter(fault for run in runs for fault in run["faults"])
    survived = collections.Counter(fault for run in runs if run["corruption"] is None for fault in run["faults"])
    corrupted, hung = sum(run["corruption"] is not None for run in runs), sum(run["hung"] for run in runs)
    bitwise, lives, lost = (sum(run[key] for run in runs) for key in ("bitwise", "lives", "lost_steps"))
    row = Row("trainings that were killed, starved and damaged end as if nothing had been", f"{len(runs)} runs, {happened.total()} faults",
              f"{corrupted} corruptions, {hung} hung", f"{bitwise} compared bitwise, {len(runs) - bitwise} to fp32 rounding", short=True)
    table = markdown(["fault", "times", "recovered"], [[name, str(count), str(survived[name])] for name, count in happened.most_common()])
    unclear = sum(run["unclear_ends"] for run in runs)
    closing = (f"{len(runs)} runs of {content['steps']} steps in {lives} lives, seed {content['seed']}: {corrupted} corruptions, {hung} "
               f"lives with a process that hung, {unclear} ends without a clear message, {lost} steps done again (a checkpoint every "
               f"{content['checkpoint_every']}).")
    return [Part("Faults", ["#### Faults in training", "", *table, "", closing, ""], [row])]


def fuzz_parts(name: str, content: dict) -> list[Part]:
    """bench/fuzz.py: damaged checkpoints, archives and images."""
    kinds = content["kinds"]
    outcomes_of_all = collections.Counter()
    for outcomes in kinds.values():
        outcomes_of_all.update(outcomes)
    told = ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes_of_all.most_common())
    value = "FAILED" if content["failed"] else "every input met with an allowed outcome, none crashed"
    row = Row("damaged files read by the library", f"{outcomes_of_all.total():,} inputs of {len(kinds)} kinds", value, told, short=True)
    table = [[kind, f"{sum(outcomes.values()):,}", ", ".join(f"{outcome} {count:,}" for outcome, count in outcomes.items())]
             for kind, outcomes in kinds.items()]
    lines = ["#### Damaged input", "", *markdown(["kind of input", "inputs", "outcomes"], table), "", f"{value}.", ""]
    return [Part("Faults", lines, [row])]


HEADLINES = ("alignment", "all")  # comparisons that the README has


def convergence_parts(name: str, content: dict) -> list[Part]:
    """bench/convergence.py: from DiT to LightningDiT on aligned latents; speed-ups computed again from the curves."""
    content, rows = content | dict(speedups=convergence.comparisons(content["runs"])), []
    shape = f"size {content['size']}: {content['data']}, {content['settings']['images']:,} images"
    for key, title, baseline, _, paper in convergence.COMPARISONS:
        for axis, what in (("images", "images seen"), ("seconds", "seconds of training")) if key in content["speedups"] else ():
            found = content["speedups"][key][axis]
            seeds = f"{len(found['per_seed'])} seeds" if len(found["per_seed"]) > 1 else "one seed"
            spread = seeds if found["low"] is None else f"{found['low']:.2f} to {found['high']:.2f} (95 %, {seeds})"
            peer = f"{convergence.ROWS[baseline].title}: final distance {convergence.cell(convergence.finals(content)[baseline])}"
            peer += f"; the paper: {paper}" if paper else ""
            told, brief = f"speed-up of convergence in {what}: {title}", axis == "images" and key in HEADLINES
            rows.append(Row(told, shape, convergence.speedup_cell(found), spread, peer, found["mean"], brief))
    drawn = {suffix: lambda suffix=suffix: convergence.figures(content)[suffix] for suffix in ("ladder", "alignment")}
    return [Part("Convergence", [*convergence.report(content), ""], rows, drawn)]


def lever_parts(name: str, content: dict) -> list[Part]:
    """bench/levers.py: options beyond bf16 and AdamW; summarised again from the raw rows."""
    content, rows = content | dict(summary=levers.summarise(content)), []
    for one in content["summary"]:
        speed = [f"{number(one['images_per_s'])} images/s"] if one["speed"] else []
        value = "; ".join([*speed, f"validation loss {one['difference']:+.4f}", f"recommendation: {one['recommendation']}"])
        rows.append(Row(f"option: {one['lever']}", f"{content['size']}, {one['precision']}", value,
                        f"{one['low']:.3f} to {one['high']:.3f} x (95 %)" if one["speed"] else "", f"AdamW: loss {one['baseline']:.4f}",
                        one["speed"]))
    return [Part("Training", ["#### Options beyond bf16 and AdamW", "", *levers.report(content), ""], rows,
                 {"": lambda: levers.figure(content)})]


def host_parts(name: str, content: dict) -> list[Part]:
    """CPU time of a training step, by hand, in pairs with a commit before."""
    taken = content["host_ms"]
    table = markdown(["step", "CPU time, ms"], [[cell(who), ", ".join(map(number, ms))] for who, ms in taken.items()])
    rows = []
    for who in ("ours compiled with triton attention", "ours eager"):
        before, now = (next(ms for full, ms in taken.items() if full.startswith(f"{who}, {when}")) for when in ("before", "now"))
        ratio = statistics.median(old / new for old, new in zip(before, now, strict=True))
        rows.append(Row(f"CPU time of a step, {who}", "XL/1, 256 tokens, batch 8", f"{number(statistics.median(now))} ms", "",
                        f"before: {number(statistics.median(before))} ms", ratio))
    first = [[cell(who), ", ".join(map(number, seconds))] for who, seconds in content["first_step_s"].items()]
    table += ["", *markdown(["first step of ours compiled, both CPUs, nothing beside it", "s"], first)]
    return [Part("Training", [content["what"] + ".", "", *table, ""], rows)]


@dataclasses.dataclass(frozen=True)
class Kind:
    """Files PREFIX_*.json: what they say, and the command that makes one. ValueError from `parts` for a file that is not what it seems."""

    parts: Callable[[str, dict], list[Part]]
    command: str
    topic: str = ""  # empty: of its records


HARNESS = Kind(harness_parts, "")
KINDS = dict(
    kernels=HARNESS, step=HARNESS, growth=HARNESS, sampling=HARNESS, tokenizer=HARNESS, latents=HARNESS, images=HARNESS, check=HARNESS,
    demo=Kind(demo_parts, "python bench/demo.py", "Training"),
    spin=Kind(spin_parts, "by hand", "Training"),
    host=Kind(host_parts, "by hand: bench/step.py --steps N under the stand-in, in turns", "Training"),
    levers=Kind(lever_parts, "python bench/levers.py", "Training"),
    solvers=Kind(solver_parts, "python bench/solvers.py", "Sampling"),
    tokenizer_study=Kind(study_parts, "python bench/tokenizer_study.py --publish", "Tokenizers"),
    convergence=Kind(convergence_parts, "make convergence", "Convergence"),
    chaos=Kind(chaos_parts, "make chaos", "Faults"),
    fuzz=Kind(fuzz_parts, "make fuzz", "Faults"),
)  # fmt: skip
# What a GPU is for, by kind of record or prefix of a file: as long as no such file was made on one, the pages say so.
FOR_GPUS = ("convergence", "training_step", "growth", "levers", "op", "sampling", "tokenizer", "tokenizer_study", "images")
TOPICS = ("Convergence", "Training", "Kernels", "Sampling", "Tokenizers", "Data", "Faults", "Regressions")


def kind_of(name: str) -> str:
    """The longest prefix in KINDS of a file's name. ValueError if none fits."""
    fitting = [prefix for prefix in KINDS if re.fullmatch(rf"{prefix}_\w+\.json", name)]
    if not fitting:
        raise ValueError(f"{name} in bench/results is of no known kind, expected {', '.join(f'{prefix}_*.json' for prefix in KINDS)}")
    return max(fitting, key=len)


def load(folder: Path) -> Results:
    """All files of the folder. ValueError for one of an unknown kind, or that does not say where and when it was made."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        kind_of(path.name)
        results[path.name] = json.loads(path.read_text(encoding="utf-8"))
        about(path.name, results[path.name])
    return results


def records_of(content: dict) -> list[dict]:
    """Of a file of the harness; [] of any other."""
    return content["results"] if content.get("schema") == SCHEMA else []


def parts_of(results: Results) -> list[tuple[str, Part]]:
    """Of all files, by their names. ValueError for one that lacks what its kind of files has."""
    found = []
    for name, content in results.items():
        try:
            found += [(name, part) for part in KINDS[kind_of(name)].parts(name, content)]
        except KeyError as error:
            raise ValueError(f"{name} has no {error}, expected what its kind of files holds: measure again") from error
    return found
