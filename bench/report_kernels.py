"""The part of the report about the ops: every row of every file, winning or losing. bench/report.py calls it."""

import re
import statistics

import torch

from bench.harness import STEPS, short, trained_variant
from bench.tables import Row, geometric_mean, markdown, number, origin, percent, times
from lightningdit_kernels.testing import OPS

STEP_NAMES = dict(forward="forward", backward="backward", forward_backward="both")


def samples_of(record: dict, name: str, step: str) -> list[float]:
    """Milliseconds per round of one contestant, those of several processes one after the other."""
    found = record["samples_ms"][f"{name}: {step}"]
    if found and isinstance(found[0], list):
        length = min(map(len, found))  # every process counts the same
        return sum((one[:length] for one in found), [])
    return found


def check(name: str, record: dict) -> None:
    """ValueError unless the medians and speed-ups of a record are those of its samples, to the digits that are kept."""
    for row in record["contestants"]:
        for step in ("forward", "forward_backward"):
            if row["status"] != "ok" or step not in row:
                continue
            mine, base = samples_of(record, row["name"], step), samples_of(record, "eager", step)
            found = dict(median_ms=statistics.median(mine), speedup=statistics.median(b / m for b, m in zip(base, mine, strict=True)))
            for key, value in found.items():
                if abs(row[step][key] - value) > 1e-3 * value:
                    where = f"{record['op']} {record['dtype']} {record['shapes']} {row['name']} {step}"
                    raise ValueError(f"{name}: {key} of {where} is {row[step][key]}, but {short(value)} by its samples")


def ceilings(records: list[dict]) -> dict[str, float]:
    """Measured copy bandwidth in GB/s as "copy", and the square products' TFLOP/s by dtype."""
    found = {}
    for record in records:
        if record["kind"] == "copy":
            found["copy"] = record["rows"][0]["gb_per_s"]
        elif record["kind"] == "gemm":
            found[record["dtype"]] = record["rows"][0]["tflop_per_s"]
    return found


def op_records(records: list[dict]) -> list[dict]:
    order = list(OPS)

    def place(record):
        return order.index(record["op"]), record["shapes"], record["dtype"] != "float32", record.get("variant", "")

    return sorted((record for record in records if record["kind"] == "op"), key=place)


def variant_of(record: dict) -> str:
    """What was measured besides the model's options. Files from before there were variants have QK-norm in attention."""
    return record.get("variant", "QK-norm" if record["op"] == "rope_attention" else "")


def dtype_of(record: dict) -> str:
    """The dtype, with the variant: "bfloat16, fp32 residual"."""
    return ", ".join(filter(None, (record["dtype"], variant_of(record))))


def is_as_trained(record: dict) -> bool:
    return variant_of(record) == trained_variant(record["op"], getattr(torch, record["dtype"]))


def shape_of(record: dict) -> str:
    sizes = record["sizes"]
    if record["op"] == "group_norm_silu":
        return f"({sizes['batch']}, {sizes['width']}, {sizes['rows']}, {sizes['columns']})"
    width = 2 * sizes["width"] if record["op"] == "swiglu" else sizes["width"]
    heads = f", {sizes['heads']} heads" if record["op"] == "rope_attention" else ""
    return f"({sizes['batch']}, {sizes['rows'] * sizes['columns']}, {width}){heads}"


HEADER = ["", "step", "ms: median (p20-p80)", "speed-up over eager (95 %)"]
HEADER += ["GB/s", "of copy", "TFLOP/s", "of product", "peak MiB", "launch us", "first call s"]


def op_rows(record: dict, limits: dict[str, float]) -> list[list[str]]:
    """Rows under HEADER. Who is not installed or not for this device is left to absent()."""
    rows = []
    for row in record["contestants"]:
        name = f"**{row['name']}** ({row['version']})" if row["name"] == "ours" else f"{row['name']} {row['version']}"
        if row["status"] == "unavailable":
            continue
        if row["status"] != "ok":
            rows.append([row["name"], "", f"{row['status']}: {row['reason']}".replace("|", "/"), *[""] * 8])
            continue
        for step in (step for step in STEPS if step in row):
            one = row[step]
            interval = f"{one['speedup']:.2f} ({one['speedup_low']:.2f}-{one['speedup_high']:.2f})"
            spread = f"{number(one['median_ms'])} ({number(one['p20_ms'])}-{number(one['p80_ms'])})"
            if "medians_ms" in one:
                spread += f"; per process {'/'.join(map(number, one['medians_ms']))}"
            rates = [number(one["gb_per_s"]), percent(one["gb_per_s"], limits.get("copy"))]
            flops = one.get("tflop_per_s")
            rates += [number(flops), percent(flops, limits.get(record["dtype"]))]
            once = [number(row.get("peak_mib")), number(row.get("launch_us"))] if step == "forward_backward" else ["", ""]
            rows.append([name, STEP_NAMES[step], spread, interval, *rates, *once, number(row["first_call_s"])])
        if row.get("forward_only"):
            rows.append([name, "backward", "it has none", *[""] * 8])
    return rows


def absent(record: dict) -> list[str]:
    """One line about the contestants that could not take part, by reason; [] if all could."""
    reasons = {}
    for row in record["contestants"]:
        if row["status"] == "unavailable":
            reasons.setdefault(row["reason"], []).append(row["name"])
    return ["Unavailable: " + "; ".join(f"{', '.join(names)} ({reason})" for reason, names in reasons.items()) + ".", ""] if reasons else []


def is_point(record: dict) -> bool:
    """Whether it is one point of a sweep, and not a preset's own shape."""
    return "/" in record["shapes"]


def sweep_tables(records: list[dict]) -> list[str]:
    """Per op, dtype and preset one table: a row for each point, forward + backward of everybody who was timed."""
    groups, lines = {}, []
    for record in filter(is_point, records):
        groups.setdefault((record["op"], dtype_of(record), record["shapes"].partition("/")[0]), []).append(record)
    for (op, dtype, preset), points in groups.items():
        points.sort(key=lambda record: [int(number) for number in re.findall(r"\d+", record["shapes"])])
        names = list(dict.fromkeys(name for record in points for name in timed(record, "forward_backward")))
        rows = []
        for record in points:
            rows_by_name, cells = timed(record), []
            for name in names:
                one, peak = rows_by_name.get(name, {}).get("forward_backward"), number(rows_by_name.get(name, {}).get("peak_mib"))
                cells.append(f"{number(one['median_ms'])} ({one['speedup']:.2f} x{f', {peak} MiB' if peak else ''})" if one else "")
            rows.append([shape_of(record), *cells])
        title = f"### {op}, {dtype}, {preset.upper()}: forward + backward, ms (speed-up over eager, peak memory)"
        lines += [title, "", *markdown(["shape", *names], rows), ""]
    return lines


def timed(record: dict, step: str = "forward") -> dict[str, dict]:
    """The contestants that were timed in this step, by name: some have no backward."""
    return {row["name"]: row for row in record["contestants"] if row["status"] == "ok" and step in row}


def ratio(record: dict, name: str, step: str = "forward_backward") -> float:
    """Median of a contestant over that of ours, from the samples: above 1, ours is faster."""
    return statistics.median(samples_of(record, name, step)) / statistics.median(samples_of(record, "ours", step))


def rows(run: dict) -> list[Row]:
    """For the overview: ceilings, and each op at a preset's shape against the fastest of the others, forward + backward."""
    found = []
    for record in run["results"]:
        if record["kind"] in ("copy", "gemm"):
            row = record["rows"][0]
            key, unit = ("gb_per_s", "GB/s") if record["kind"] == "copy" else ("tflop_per_s", "TFLOP/s")
            amount = row["bytes"] / 1e6 if key == "gb_per_s" else row["flops"] / 1e9
            spread = " to ".join(number(amount / row[edge]) for edge in ("p80_ms", "p20_ms"))
            what, shape = ("copy", "fp32") if record["kind"] == "copy" else ("square matrix product", f"{row['name']} {record['dtype']}")
            found.append(Row(f"ceiling: {what}", shape, f"{number(amount / row['median_ms'])} {unit}", f"{spread} {unit}"))
    for record in (record for record in op_records(run["results"]) if not is_point(record)):
        what, shape = f"{record['op']}, forward + backward", f"{shape_of(record)} {dtype_of(record)}"
        contestants = timed(record, "forward_backward")
        if "ours" not in contestants:
            reason = next((row["reason"] for row in record["contestants"] if row["name"] == "ours"), "not asked for")
            found.append(Row(what, shape, f"not timed: {reason}"))
        elif others := {name: row for name, row in contestants.items() if not name.startswith("ours")}:
            best = min(others, key=lambda name: others[name]["forward_backward"]["median_ms"])
            ours, peer = contestants["ours"]["forward_backward"], others[best]["forward_backward"]
            found.append(Row(what, shape, f"{number(ours['median_ms'])} ms", f"{number(ours['p20_ms'])} to {number(ours['p80_ms'])} ms",
                             f"{best} {others[best]['version']}: {number(peer['median_ms'])} ms", ratio(record, best)))
    return found


def rivalry(records: list[dict], rival: str, dtype: str) -> tuple[float, int, int] | None:
    """(geometric mean of ours over the rival, ops that lose, ops) at the presets' shapes; None if they never met."""
    chosen = [record for record in op_records(records) if record["dtype"] == dtype and not is_point(record)]
    ratios = [ratio(record, rival) for record in chosen if {"ours", rival} <= timed(record).keys()]
    return (geometric_mean(ratios), sum(one < 1 for one in ratios), len(ratios)) if ratios else None


def headline(records: list[dict]) -> list[str]:
    """One sentence per dtype: ours over eager and over torch.compile, forward and backward, geometric mean over the ops."""
    lines = []
    for dtype in ("float32", "bfloat16"):
        met = {rival: found for rival in ("eager", "compiled") if (found := rivalry(records, rival, dtype))}
        if met:
            parts = [f"{times(mean)} as fast as {rival} ({lose} of {count} lose)" for rival, (mean, lose, count) in met.items()]
            lines.append(f"{dtype}, forward + backward, geometric mean of the ratios of medians: ours is {', '.join(parts)}.")
    return lines


def opening(run: dict) -> list[str]:
    """Ceilings and headline of one run, a paragraph each."""
    limits, lines = ceilings(run["results"]), []
    if limits:
        parts = [f"copy {number(limits['copy'])} GB/s"] if "copy" in limits else []
        parts += [f"{dtype} matrix product {number(value)} TFLOP/s" for dtype, value in limits.items() if dtype != "copy"]
        lines += [f"Ceilings measured in this run: {', '.join(parts)}.", ""]
    for line in headline(run["results"]):
        lines += [line, ""]
    return lines


def section(name: str, run: dict) -> list[str]:
    """All tables of one file."""
    records, limits = run["results"], ceilings(run["results"])
    lines = [f"## {run.get('gpu') or 'CPU: ' + run['cpu']}", "", origin(name, run), "", *opening(run)]
    for record in op_records(records):
        if not is_point(record):
            title = f"### {record['op']}, {dtype_of(record)}, {record['shapes'].upper()} {shape_of(record)}"
            lines += [title, "", *markdown(HEADER, op_rows(record, limits)), "", *absent(record)]
    lines += sweep_tables(op_records(records))
    for record in records:
        if record["kind"] == "model_gemms":
            lines += [f"### Matrix products of one block, {record['dtype']}, {record['shapes'].upper()}, {record['tokens']} tokens", ""]
            cells = []
            for row in record["rows"]:
                shape = " x ".join(map(str, record["mnk"][row["name"]]))
                of = percent(row["tflop_per_s"], limits.get(record["dtype"]))
                cells.append([row["name"], shape, number(row["median_ms"]), number(row["tflop_per_s"]), of])
            lines += markdown(["product", "M x N x K", "ms: median", "TFLOP/s", "of square product"], cells) + [""]
    return lines


INTRODUCTION = """# The kernels, row by row

Written by `make report` from the files in bench/results; do not edit. [results.md](results.md) is the overview. bench/harness.py says how
each figure is taken: contestants are gated against fp64, take turns, and work on inputs that rotate through more memory than the last
cache holds. Bytes and FLOPs are those of one perfect pass. "backward" is what both take beyond the forward, left out where noise hides it.
"compiled" is torch.compile of the op's definition; "ours" is the public function, with the backend that serves it here. Speed-ups are over
eager, medians of the ratios per round with a 95 % bootstrap interval; below 1 is a loss, and stays. "peak MiB" is what one forward +
backward allocates at most, "launch us" how long the CPU is busy with enqueueing one on a GPU, "first call s" compilation and everything
else that only the first one does; on a GPU it may find on disk what was compiled ahead."""


def document(runs: dict[str, dict]) -> str:
    """docs/results_kernels.md, of the files that hold ops by name; GPUs first."""
    lines = [INTRODUCTION, ""]
    for name, run in sorted(runs.items(), key=lambda item: item[1]["device"] != "cuda"):
        lines += section(name, run)
    return "\n".join(lines).rstrip() + "\n"


def figures(run: dict) -> dict:
    """The plots of one run by name: speed-up bars of forward + backward, and the roofline. Matplotlib figures."""
    from matplotlib.figure import Figure

    records, limits = [record for record in op_records(run["results"]) if not is_point(record)], ceilings(run["results"])
    groups = [(r, {name: row["forward_backward"] for name, row in timed(r, "forward_backward").items()}) for r in records]
    names = list(dict.fromkeys(name for _, rows in groups for name in rows if name != "eager"))

    bars = Figure(figsize=(9, 1 + 0.22 * sum(len(rows) for _, rows in groups)), layout="constrained")
    axes = bars.subplots()
    at, ticks = 0.0, {}
    for record, rows in groups:
        inside = [name for name in names if name in rows]
        ticks[f"{record['op']}\n{dtype_of(record)} {record['shapes'].upper()}"] = at + (len(inside) - 1) / 2
        for name in inside:
            row, color = rows[name], f"C{names.index(name)}"
            low, high = row["speedup"] - row["speedup_low"], row["speedup_high"] - row["speedup"]
            axes.barh(at, row["speedup"], xerr=[[max(low, 0)], [max(high, 0)]], color=color, ecolor="0.3", height=0.9)
            axes.text(row["speedup_high"] + 0.03, at, f"{row['speedup']:.2f}", va="center", fontsize=7)
            at += 1
        at += 1
    axes.axvline(1, color="0.2", linewidth=1)
    axes.set_yticks(list(ticks.values()), list(ticks), fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("speed-up over eager, forward + backward (the line is eager)")
    handles = [axes.barh([0], [0], color=f"C{index}") for index in range(len(names))]
    axes.legend(handles, names, fontsize=7, loc="lower right")

    roofline = Figure(figsize=(7, 4.5), layout="constrained")
    axes = roofline.subplots()
    kept = [(record, name, rows[name]) for record, rows in groups for name in ("eager", "ours") if name in rows]
    points = [(record, name, row, record["counted"]["forward_backward"]) for record, name, row in kept]
    intensities = [counted["flops"] / counted["bytes"] for *_, counted in points if counted["flops"]]
    if "copy" in limits and intensities:
        ridges = [1e3 * peak / limits["copy"] for dtype, peak in limits.items() if dtype != "copy"]
        low, high = min(intensities + ridges) / 8, 8 * max(intensities + ridges)
        for dtype, peak in limits.items():
            if dtype != "copy":
                xs = [low, 1e3 * peak / limits["copy"], high]
                axes.plot(xs, [min(peak, x * limits["copy"] / 1e3) for x in xs], color="0.4", linestyle="-" if dtype == "float32" else "--")
                axes.text(xs[-1], peak, dtype, ha="right", va="bottom", fontsize=7)
        for record, name, row, counted in points:
            if counted["flops"]:
                marker = dict(eager="o", ours="s")[name]
                axes.plot(counted["flops"] / counted["bytes"], row["tflop_per_s"], marker, color="C0" if name == "eager" else "C1")
                text = f" {record['op']} {dtype_of(record)} {name}"
                axes.text(counted["flops"] / counted["bytes"], row["tflop_per_s"], text, fontsize=6, va="center")
        axes.set_xscale("log")
        axes.set_yscale("log")
    else:
        axes.text(0.5, 0.5, "no ceilings in this run", ha="center")
    axes.set_xlabel("FLOP per byte that one perfect pass moves")
    axes.set_ylabel("TFLOP/s, forward + backward")
    return dict(speedup=bars, roofline=roofline)


def text_table(records: list[dict]) -> list[str]:
    """The same for a terminal: one line per case and contestant."""
    limits, lines = ceilings(records), []
    for record in records:
        for row in record.get("rows", ()):
            rates = dict(images_per_s="images/s", tflop_per_s="TFLOP/s", gb_per_s="GB/s")
            rate = next(f"{row[key]:8.3g} {unit}" for key, unit in rates.items() if key in row)
            lines.append(f"{record['kind']:12} {record.get('dtype', ''):9} {row['name']:14} {row['median_ms']:10.4g} ms  {rate}")
    for record in op_records(records):
        lines.append(f"{record['op']} {dtype_of(record)} {record['shapes']} {shape_of(record)} on {record['device']}")
        for row in record["contestants"]:
            if row["status"] != "ok":
                lines.append(f"  {row['name']:14} {row['status']}: {row['reason']}")
                continue
            parts = [f"{STEP_NAMES[step]} {row[step]['median_ms']:9.4g} ms {row[step]['speedup']:5.2f} x" for step in STEPS if step in row]
            of = percent(row.get("forward_backward", row["forward"])["gb_per_s"], limits.get("copy"))
            parts += ["no backward"] if row.get("forward_only") else []
            lines.append(f"  {row['name']:14} " + "   ".join(parts) + (f"   {of} of copy" if of else ""))
    return lines
