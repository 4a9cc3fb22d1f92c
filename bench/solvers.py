"""Error of each solver against the number of model evaluations, on a trained model.

    python bench/solvers.py                    # trains the digits first; writes bench/results/solvers_cpu.json, which make report draws
    python bench/solvers.py --run runs/digits

The reference is Heun with 1,000 steps. The error of an image is the root mean square of its latent's difference from the reference of the
same seed and label, over that of the reference itself; the median over the images is given, and the worst. It says how well the ODE
is solved, not how good the images are.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

from lightningdit.cli import load_run
from lightningdit.log import environment
from lightningdit.sampler import Prepared, sample

ROOT = Path(__file__).resolve().parent.parent
SOLVERS = {"euler": 1, "heun": 2, "ab2": 1, "dpmpp_2m": 1, "unipc": 1}  # evaluations a step
EVALUATIONS = (4, 6, 8, 10, 16, 20, 32, 50, 100)
REFERENCE_STEPS = 1000


def relative_errors(latents, reference):
    """(n,) root mean square of each image's difference, over that of its reference."""
    difference, size = ((x.double().flatten(1).square().mean(1).sqrt()) for x in (latents - reference, reference))
    return (difference / size).tolist()


def measure(run, images, device, evaluations=EVALUATIONS, reference_steps=REFERENCE_STEPS):
    """Rows {solver, evaluations, guidance_scale, median, worst} for the run's guidance and without."""
    settings, model, _, _ = load_run(run, device=device)
    labels = [i % settings.data.num_classes for i in range(images)]
    arguments = settings.sampling_arguments() | dict(labels=labels, seeds=range(images), batch_size=None, device=device)
    rows, scales = [], sorted({1.0, settings.sample.guidance_scale})
    work = [(solver, evaluation) for solver, each in SOLVERS.items() for evaluation in evaluations if evaluation % each == 0]
    for scale in scales:
        arguments |= dict(guidance_scale=scale)
        ready = dict(batch_size=images, guided=scale != 1, device=device)
        reference = sample(Prepared(model, labels, settings.data.num_classes, num_steps=reference_steps, **ready), progress=True,
                           **arguments | dict(method="heun", num_steps=reference_steps))
        for solver, evaluation in tqdm(work, desc=f"guidance {scale:g}"):
            steps = evaluation // SOLVERS[solver]
            latents = sample(Prepared(model, labels, settings.data.num_classes, num_steps=steps, **ready),
                             **arguments | dict(method=solver, num_steps=steps))
            errors = relative_errors(latents, reference)
            rows.append(dict(solver=solver, evaluations=evaluation, guidance_scale=scale, median=float(f"{statistics.median(errors):.4g}"),
                             worst=float(f"{max(errors):.4g}")))
    return rows, dict(shift=settings.sample.shift, path=settings.flow.path, prediction=settings.flow.prediction)


def table(rows, scale):
    """Markdown: a line an evaluation count, a column a solver, medians in percent, the best one bold."""
    by_count = {}
    for row in rows:
        if row["guidance_scale"] == scale:
            by_count.setdefault(row["evaluations"], {})[row["solver"]] = row["median"]
    lines = ["| evaluations | " + " | ".join(SOLVERS) + " |", "|---|" + "---|" * len(SOLVERS)]
    for count, medians in by_count.items():
        cells = [f"{100 * medians[solver]:.3g} %" if solver in medians else "" for solver in SOLVERS]
        best = list(SOLVERS).index(min(medians, key=medians.get))
        cells[best] = f"**{cells[best]}**"
        lines.append(f"| {count} | " + " | ".join(cells) + " |")
    return lines


def figure(rows):
    """The medians, a panel a guidance scale. A matplotlib figure."""
    from matplotlib.figure import Figure

    scales = sorted({row["guidance_scale"] for row in rows})
    drawn = Figure(figsize=(4.2 * len(scales), 3.4), layout="constrained")
    axes = drawn.subplots(1, len(scales), sharey=True, squeeze=False)[0]
    for axis, scale in zip(axes, scales, strict=True):
        for solver in SOLVERS:
            chosen = [row for row in rows if row["solver"] == solver and row["guidance_scale"] == scale]
            errors = [100 * row["median"] for row in chosen]
            axis.loglog([row["evaluations"] for row in chosen], errors, marker="o", markersize=3, label=solver)
        axis.set(title=f"guidance scale {scale:g}", xlabel="model evaluations")
        axis.grid(alpha=0.3, which="both")
    axes[0].set(ylabel="error of the latent, %")
    axes[0].legend(frameon=False)
    return drawn


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, help="a run directory; default: the digits, trained now")
    parser.add_argument("--images", type=int, default=50)
    parser.add_argument("--evaluations", type=int, nargs="+", default=EVALUATIONS)
    parser.add_argument("--reference-steps", type=int, default=REFERENCE_STEPS)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results" / "solvers_cpu.json")
    options = parser.parse_args(argv)
    device = torch.device(options.device)
    with tempfile.TemporaryDirectory() as folder:
        run = options.run or Path(folder) / "digits"
        if options.run is None:
            paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
            command = [sys.executable, str(ROOT / "train" / "dit.py"), "--run", str(run), "--device", options.device]
            subprocess.run(command, cwd=ROOT, check=True, env=os.environ | dict(PYTHONPATH=paths))
        rows, settings = measure(run, options.images, device, options.evaluations, options.reference_steps)
    about = environment(device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    record = about | dict(what="error of solvers, digits" if options.run is None else "error of solvers", images=options.images,
                          reference=f"heun, {options.reference_steps} steps", settings=settings, rows=rows)
    options.out.write_text(json.dumps(record, indent=1) + "\n")
    for scale in sorted({row["guidance_scale"] for row in rows}):
        print(f"\nguidance scale {scale:g}\n" + "\n".join(table(rows, scale)))
    print(f"\n{options.out}")


if __name__ == "__main__":
    main()
