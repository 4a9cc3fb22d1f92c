"""How time and memory of a training step grow with batch, tokens, width and depth: a fixed cost, an exponent, and their plot.

    pytest bench/bench_growth.py --benchmark-only --results bench/results/growth_cpu.json
    python bench/bench_growth.py bench/results/growth_cpu.json --docs docs                   # the plot, from the file alone

One axis varies, the others stay; heads are 64 channels wide. The step is that of train/dit.py (bench/step.py), in eager mode, so that no
point has to be compiled: fp32 on a CPU, bf16 autocast on a GPU. What is fitted is offset + factor x^exponent, by least squares of relative
errors: a power law alone takes what a step costs at any size (calls, optimizer, average) for slow growth. The exponent's 95 % interval
leaves offset and factor free; where the points do not bound it, it is open. "last" is the slope between the logarithms of the two largest
points. Memory is what a step allocates at most on top of weights, optimizer and average.
"""

import argparse
import gc
import json
import math
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

import pytest  # noqa: E402

from bench import step  # noqa: E402
from bench.harness import Timer, gpu_state, interleave, quantile, reason_of, rounds_for, short, synchronize  # noqa: E402
from lightningdit.memory import is_out_of_memory, largest_by_trial  # noqa: E402

HEAD_DIM = 64
AXES = ("batch", "tokens", "width", "depth")
BASE = {
    "cpu": dict(batch=4, tokens=64, width=192, depth=2),
    "cuda": dict(batch=32, tokens=256, width=1152, depth=12),
}
VALUES = {
    "cpu": dict(batch=(1, 2, 4, 8, 16), tokens=(16, 64, 144, 256, 576, 1024), width=(64, 128, 256, 512, 768), depth=(1, 2, 4, 8, 16)),
    "cuda": dict(batch=(8, 16, 32, 64, 128), tokens=(64, 256, 576, 1024, 2304, 4096), width=(384, 768, 1152, 1536, 2304),
                 depth=(3, 6, 12, 24, 48)),
}
CONTESTANTS = (step.Contestant("reference eager", step.ALL), step.Contestant("ours eager"))


def measure(point: dict[str, int], settings) -> list[dict]:
    """A row a contestant at one point; {"name", "status", "reason"} for one that is "too large" for the GPU, or "failed"."""
    device = settings.device
    config = step.configure("tiny" if settings.shapes == ("tiny",) else "s", device, heads=point["width"] // HEAD_DIM, **point)
    try:
        trainer = step.Trainer(config, device)
        batch = trainer.batch()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return [dict(name=one.name, status="too large", reason="out of memory") for one in CONTESTANTS]
    timers, rows, lost, failed = {}, [], {}, {}
    for one in CONTESTANTS:
        row = dict(name=one.name)
        rows.append(row)

        def attempt(_, one=one, row=row):
            model = trainer.build(one)

            def run(i):
                trainer.step(model, batch)
                synchronize(device)

            timer = Timer(run, 1, "cpu", settings.sample_ms)
            row["peak_mib"] = short(trainer.peak_mib(model, batch))
            timers[one.name] = timer

        try:
            if not largest_by_trial([config.batch_size], attempt, device):
                lost[one.name] = "out of memory"
        except RuntimeError as error:  # the other points and the other contestant are worth having without it
            failed[one.name] = reason_of(error)
    samples = interleave(timers, rounds_for(timers, settings, lost), warmup_s=min(1.0, settings.warmup_s), lost=lost)
    for row in rows:
        if times := samples.get(row["name"]):
            row |= {key: short(quantile(times, share)) for key, share in (("median_ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8))}
    unmeasured = {"too large": lost, "failed": failed}
    replaced = {name: dict(name=name, status=status, reason=reasons[name]) for status, reasons in unmeasured.items() for name in reasons}
    return [replaced.get(row["name"], row) for row in rows]


EXPONENTS = (0.05, 4.0)  # that a fit chooses from, and that an interval may reach before it counts as open


def fit(xs: list[float], ys: list[float]) -> dict[str, float | None]:
    """Exponent p of y = offset + factor x^p with offset, factor >= 0, its 95 % interval, and the exponent between the last two points.

    "low" and "high" are the p whose best fit is as bad as Student's t at n - 3 degrees of freedom allows; None where that is no p of
    EXPONENTS, and for three points, which leave no degree of freedom. "error" is the root mean square of the relative residuals.

    Raises: ValueError for fewer than three points, or values that are not positive.
    """
    if len(xs) < 3 or len(xs) != len(ys) or min(*xs, *ys) <= 0:
        raise ValueError(f"xs, ys: got {xs} and {ys}, expected at least three pairs of positive numbers")
    import numpy as np
    from scipy import optimize, stats

    x, y = np.array(xs, float) / max(xs), np.array(ys, float)

    def best(p):
        """(offset, factor of x / max(xs)) and the sum of squares."""
        coefficients, residual = optimize.nnls(np.stack([np.ones_like(x), x**p], axis=1) / y[:, None], np.ones_like(y))
        return coefficients, residual**2

    grid = np.linspace(*EXPONENTS, 80)
    start = int(np.argmin([best(p)[1] for p in grid]))
    ends = grid[max(0, start - 1)], grid[min(len(grid) - 1, start + 1)]
    p = float(optimize.minimize_scalar(lambda p: best(p)[1], bounds=ends, method="bounded", options=dict(xatol=1e-6)).x)
    (offset, factor), least = best(p)
    low = high = None
    if len(xs) > 3:
        most = max(least, 1e-12) * (1 + stats.t.ppf(0.975, len(xs) - 3) ** 2 / (len(xs) - 3))  # 1e-12: exact values have rounding, too
        low, high = (float(optimize.brentq(lambda p: best(p)[1] - most, p, end, xtol=1e-6)) if best(end)[1] > most else None
                     for end in EXPONENTS)
    last = math.log(ys[-1] / ys[-2]) / math.log(xs[-1] / xs[-2])
    found = dict(exponent=p, low=low, high=high, offset=offset, factor=factor / max(xs) ** p, error=math.sqrt(least / len(xs)), last=last)
    return {key: value if value is None else short(float(value)) for key, value in found.items()}


def interval(found: dict[str, float | None]) -> str:
    """Of an exponent, in words."""
    low, high = found["low"], found["high"]
    if low is None or high is None:
        return "too few points" if low is high else f"at least {low:.2f}" if high is None else f"at most {high:.2f}"
    return f"{low:.2f} to {high:.2f}"


def fits(points: list[dict]) -> dict[str, dict]:
    """{contestant: {"median_ms": fit, "peak_mib": fit}} of points {"value", "rows"}; without those that were measured at too few."""
    found = {}
    for name in dict.fromkeys(row["name"] for point in points for row in point["rows"]):
        pairs = [(point["value"], row) for point in points for row in point["rows"] if row["name"] == name and "median_ms" in row]
        if len(pairs) >= 3:
            found[name] = {key: fit([value for value, _ in pairs], [row[key] for _, row in pairs]) for key in ("median_ms", "peak_mib")}
    return found


@pytest.mark.parametrize("axis", AXES)
def bench_growth(benchmark, settings, axis):
    device, tiny = settings.device, settings.shapes == ("tiny",)
    base = dict(batch=1, tokens=16, width=64, depth=1) if tiny else BASE[device]
    values, points = [base[axis] * factor for factor in (1, 4, 16)] if tiny else VALUES[device][axis], []

    def run():
        for value in values:
            points.append(dict(value=value, rows=measure(base | {axis: value}, settings)))
            gc.collect()

    benchmark.pedantic(run, rounds=1, iterations=1)
    record = dict(kind="growth", axis=axis, device=device, base=base, points=points, load=os.getloadavg()[0])
    if device == "cuda":
        record |= dict(after=gpu_state())
    benchmark.extra_info.update(record)
    settings.record(record)
    failed = [f"{axis} {point['value']}: {row['reason']}" for point in points for row in point["rows"] if row.get("status") == "failed"]
    assert not failed, failed
    assert all("median_ms" in row for row in points[0]["rows"]), f"{axis} {values[0]} is not measured: {points[0]['rows']}"


def figure(run: dict):
    """Matplotlib figure of the growth records of a results file: time above, memory below, a column an axis."""
    from matplotlib.figure import Figure

    records = sorted((one for one in run["results"] if one["kind"] == "growth"), key=lambda one: AXES.index(one["axis"]))
    plot = Figure(figsize=(3.4 * len(records), 6), layout="constrained")
    grid = plot.subplots(2, len(records), squeeze=False)
    for column, record in enumerate(records):
        others = ", ".join(f"{name} {value}" for name, value in record["base"].items() if name != record["axis"])
        for axes, key, label in zip(grid[:, column], ("median_ms", "peak_mib"), ("ms a step", "MiB a step"), strict=True):
            for color, (name, fitted) in enumerate(fits(record["points"]).items()):
                pairs = [(p["value"], r) for p in record["points"] for r in p["rows"] if r["name"] == name and key in r]
                xs, ys, line = [value for value, _ in pairs], [row[key] for _, row in pairs], fitted[key]
                text = f"{name}: {line['exponent']:.2f} ({interval(line)}) above {line['offset']:.3g}"
                between = [xs[0] * (xs[-1] / xs[0]) ** (i / 50) for i in range(51)]
                fitted_line = [line["offset"] + line["factor"] * x ** line["exponent"] for x in between]
                axes.plot(between, fitted_line, color=f"C{color}", linewidth=1)
                axes.plot(xs, ys, "os"[color], color=f"C{color}", markersize=4, label=text)
                if key == "median_ms":
                    axes.vlines(xs, [row["p20_ms"] for _, row in pairs], [row["p80_ms"] for _, row in pairs], color=f"C{color}")
            axes.set(xscale="log", yscale="log", xlabel=record["axis"], ylabel=label if column == 0 else "")
            values = [point["value"] for point in record["points"]]
            axes.set_xticks(values, list(map(str, values)), fontsize=7)
            axes.set_xticks([], minor=True)
            axes.tick_params(axis="y", which="both", labelsize=7)
            axes.legend(fontsize=6, loc="upper left")
        grid[0, column].set_title(f"at {others}", fontsize=7)
    where = f"{run.get('gpu') or run['cpu']}, {run['date'][:10]}"
    plot.suptitle(f"Training step, exponents of growth above a fixed cost with 95 % interval: {where}", fontsize=9)
    return plot


def main() -> None:
    parser = argparse.ArgumentParser(description="the plot of a results file with growth records")
    parser.add_argument("results", type=Path)
    parser.add_argument("--docs", type=Path, default=ROOT / "docs")
    options = parser.parse_args()
    run = json.loads(options.results.read_text(encoding="utf-8"))
    if not any(one["kind"] == "growth" for one in run["results"]):
        parser.error(f"results: {options.results} has no growth records")
    path = options.docs / f"{options.results.stem}.png"
    figure(run).savefig(path, dpi=110, metadata={"Software": None})
    print(path)


if __name__ == "__main__":
    main()
