"""What a run leaves behind while it trains: log.jsonl, TensorBoard files, loss.png, a progress bar and environment.json."""
import datetime
import functools
import importlib.metadata
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from .checkpoint import Saver, write_text
from .guard import LEFT_OUT
from .optional import optional, progress_bar, pyplot


def environment(device):
    """Versions, device, commit and date, for whoever asks later what made these numbers: JSON values."""
    versions = {name: _version(name) for name in ("lightningdit", "triton", "numpy", "safetensors")} | dict(torch=torch.__version__)
    on_cpu = f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"
    hardware = torch.cuda.get_device_name(device) if device.type == "cuda" else on_cpu
    try:
        describe = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        commit = subprocess.run(describe, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return dict(date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"), commit=commit or None,
                python=platform.python_version(), platform=platform.platform(), device=str(device), hardware=hardware, **versions)


def write_environment(run, device):
    """run/environment.json: the `environment`, and the command line."""
    write_text(Path(run) / "environment.json", json.dumps(environment(device) | dict(command=sys.argv), indent=1))


def _version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


class LogError(OSError):
    """A run cannot write its log any more: says which, why, and what is safe."""


def _naming(method):
    """The method of a RunLog, whose OSErrors, which say no more than "no space left", become LogErrors."""
    @functools.wraps(method)
    def write(log, *arguments, **options):
        try:
            return method(log, *arguments, **options)
        except LogError:
            raise
        except OSError as error:
            raise LogError(f"could not write the log of {log.path.parent}: {error}; {log.whole()}") from None

    return write


PLOT_EVERY_S = 120.0  # a plot of a short log takes half a second, the first one more, for importing matplotlib
PLOT_SHARE = 0.005  # of the time of a long run, at most, goes into plots: their time grows with the log


class RunLog:
    """One JSON line a step in run/log.jsonl, fetched from the device every `every` steps so that no step waits for the device.

    Args:
        run: run directory. start: updates done before; the lines of later ones, which will be repeated, are removed.
        steps: total steps. images_per_step, flops_per_image: for throughput, in images/s and model TFLOP/s (backward included).
        rank: of this process; only rank 0 writes. keep: checkpoints that stay.
    Attributes: saved, the step of the newest whole checkpoint, 0 without one; bad, [(step, verdict)] of the updates that the guard left
        out, for the caller to take; seconds, the time that the steps in the log took, without what came between them (validation, pictures,
        scores) and without steps that were lost and repeated.
    """

    def __init__(self, run, start, steps, every, images_per_step, flops_per_image, rank=0, keep=2):
        self.path, self.writes = Path(run) / "log.jsonl", rank == 0
        self.saver, self.saved, self.bad, self.seconds = Saver(run, keep), start, [], 0.0
        if self.writes:
            kept = [line for line in read_log(run) if line["step"] <= start]
            self.seconds = max((line.get("seconds", 0.0) for line in kept), default=0.0)
            write_text(self.path, "".join(json.dumps(line) + "\n" for line in kept))
        self.file = self.path.open("a") if self.writes else _Silent()
        self.tensorboard = _tensorboard(Path(run) / "tensorboard", start) if self.writes else _Silent()
        interval = 0.5 if sys.stderr.isatty() else 10  # seconds; a log file gets few lines
        self.bar = progress_bar(total=steps, initial=start, unit="step", dynamic_ncols=True, smoothing=0.1, mininterval=interval,
                        disable=not self.writes)
        self.every, self.images_per_step, self.flops_per_image = every, images_per_step, flops_per_image
        self.pending, self.not_finite = [], None
        self.since = self.plotted = time.perf_counter()
        self.plot_wait_s = PLOT_EVERY_S

    def step(self, step, lr, values):
        """Records update number `step` (the first is 1); the scalar tensors `values` are read from the device every `every` steps only."""
        if self.pending and self.pending[-1][2] != list(values):  # a term has come or gone
            self.flush()
        self.pending.append((step, lr, list(values), torch.stack([value.detach().float() for value in values.values()])))
        if len(self.pending) >= self.every:
            self.flush()
        self.bar.update()

    @_naming
    def flush(self):
        """Writes the pending steps. Returns the means of their values, for the caller to judge."""
        if not self.pending:
            return {}
        rows = torch.stack([values for *_, values in self.pending]).tolist()  # the one wait for the device
        elapsed = time.perf_counter() - self.since
        rate = len(rows) * self.images_per_step / elapsed
        good = []
        for (step, lr, names, _), row in zip(self.pending, rows, strict=True):
            self.seconds += elapsed / len(rows)
            row = dict(zip(names, row, strict=True))
            if verdict := row.pop("verdict", 0):
                row["left_out"] = True
                if verdict != LEFT_OUT:
                    self.bad.append((step, verdict))
            else:
                good.append(row)
            self._write(dict(step=step, **row, lr=lr, images_per_second=round(rate, 1), seconds=round(self.seconds, 3)))
        step, means = self.pending[-1][0], {name: sum(row[name] for row in good) / len(good) for name in good[0]} if good else {}
        if self.not_finite is None and not all(map(math.isfinite, means.values())):
            self.not_finite = means
        tflops = 3 * rate * self.flops_per_image / 1e12
        scalars = means | dict(lr=self.pending[-1][1], images_per_second=rate, model_tflops_per_second=tflops)
        for name, value in scalars.items():
            self.tensorboard.add_scalar(f"train/{name}", value, step)
        self.file.flush()
        self.bar.set_postfix_str(f"loss {means.get('loss', math.nan):.4f}, {rate:.0f} images/s", refresh=False)
        self.pending, self.since = [], time.perf_counter()
        return means

    @_naming
    def event(self, step, **values):
        """A line of its own, for what does not happen every step: validation, a checkpoint, a picture, a failed save."""
        self.flush()
        self._write(dict(step=step, **values))
        self.file.flush()
        for name, value in values.items():
            if isinstance(value, float):
                self.tensorboard.add_scalar(name, value, step)
        self.since = time.perf_counter()

    @_naming
    def score(self, step, values):
        """An event with what scoring.Scorer measured, next to the images seen and the seconds of training so far."""
        self.flush()
        self.event(step, images=step * self.images_per_step, seconds=round(self.seconds, 3), **values)
        self.since = time.perf_counter()

    def plot(self, last=False):
        """Draws run/loss.png, and run/score.png where there are scores: every PLOT_EVERY_S at most, and the `last` time in any case.

        A plot that cannot be written is logged, and training continues.
        """
        begin = time.perf_counter()
        if not self.writes or not last and begin - self.plotted < self.plot_wait_s:
            return
        try:
            plot_losses(self.path.parent)
            plot_scores(self.path.parent)
        except OSError as error:
            self.say(f"warning: could not draw the curves of {self.path.parent}: {error}; training continues")
        self.since = self.plotted = time.perf_counter()
        self.plot_wait_s = max(PLOT_EVERY_S, (self.plotted - begin) / PLOT_SHARE)

    @_naming
    def image(self, step, name, picture):
        """Puts an (H, W, 3) uint8 array into TensorBoard."""
        self.tensorboard.add_image(name, picture, step, dataformats="HWC")
        self.since = time.perf_counter()

    def take_bad(self):
        """The updates that were left out since it was last asked, [(step, verdict)]."""
        bad, self.bad = self.bad, []
        return bad

    def say(self, text):
        """Prints a line without tearing the progress bar."""
        if self.writes:
            self.bar.write(text, file=sys.stdout)

    def stop_if_not_finite(self, step, hint):
        """Flushes; ends the program if any value so far was not finite, naming the newest checkpoint."""
        self.flush()
        if self.not_finite is not None:
            raise SystemExit(f"error: non-finite loss or gradient at or before step {step}: {self.not_finite}. "
                             f"{f'The last checkpoint is of step {self.saved}' if self.saved else 'There is no checkpoint'}. {hint}")

    def checkpoint(self, step, tensors, state, last=False):
        """Saves in the background, see checkpoint.Saver. A failed save is told and survived, unless it is the `last`, which is waited for.

        Every process calls it.
        """
        self.settle()
        self.saver.start(step, tensors, state)
        if last:
            self.settle(last=True)

    def settle(self, last=False):
        """Waits for the save in the background, so that `saved` is what a resumption would find."""
        try:
            self.saved = self.saver.wait() or self.saved
        except OSError as error:
            text = f"could not save step {self.saver.saving}: {error}; {self.whole()}"
            if last:
                raise SystemExit(f"error: {text}") from None
            self._write(dict(step=self.saver.saving, error=text))
            self.say(f"warning: {text}; training goes on")

    def whole(self):
        """In words, the newest whole checkpoint."""
        return f"the checkpoint of step {self.saved} is whole" if self.saved else "there is no earlier checkpoint"

    @_naming
    def close(self):
        self.flush()
        self.settle()
        self.bar.close()
        self.file.close()
        self.tensorboard.close()

    def _write(self, record):
        self.file.write(json.dumps(record) + "\n")


def _tensorboard(folder, start):
    with optional("the log of a run"):
        from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=start)


class _Silent:
    """A file or TensorBoard writer that writes nothing, for the processes that leave that to rank 0."""

    def __getattr__(self, name):
        return lambda *arguments, **options: None


def read_log(run):
    """The records of run/log.jsonl as dictionaries; a last line that a killed run left unfinished is dropped."""
    path, records = Path(run) / "log.jsonl", []
    for line in path.read_text().splitlines() if path.is_file() else ():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return records


def plot_losses(run):
    """Draws run/loss.png from log.jsonl: both loss terms, thin as logged and thick as a moving mean, and the validation loss."""
    plt = pyplot()

    records = read_log(run)
    train = [record for record in records if "loss" in record and not record.get("left_out")]  # those are NaN, or off the scale
    validation = [record for record in records if "val_mse" in record]
    names = [name for name in ("mse", "cos") if train and name in train[0]]
    figure, axes = plt.subplots(1, max(1, len(names)), figsize=(5.5 * max(1, len(names)), 3.6), squeeze=False)
    for axis, name, color in zip(axes[0], names, ("tab:blue", "tab:orange"), strict=False):
        steps, values = [record["step"] for record in train], [record[name] for record in train]
        half = len(values) // 60  # a centered mean does not lag behind the curve as a running one does
        sums = np.cumsum([0.0, *values])
        left, right = np.maximum(np.arange(len(values)) - half, 0), np.minimum(np.arange(len(values)) + half + 1, len(values))
        smooth = (sums[right] - sums[left]) / (right - left)
        axis.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axis.plot(steps, smooth, color=color, label="training")
        points = [(record["step"], record[f"val_{name}"]) for record in validation if f"val_{name}" in record]
        if points:
            axis.plot(*zip(*points, strict=True), "k.-", markersize=5, linewidth=0.8, label="validation (EMA, uniform t)")
        low, high = min(values), sorted(values)[int(0.99 * (len(values) - 1))]  # the first steps would flatten the rest
        axis.set_ylim(low - 0.1 * (high - low + 1e-9), high + 0.1 * (high - low + 1e-9))
        axis.set(xlabel="step", ylabel={"mse": "velocity, mean squared error", "cos": "1 - cosine"}[name])
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(run) / "loss.png", dpi=110)
    plt.close(figure)
    return Path(run) / "loss.png"


def plot_scores(run):
    """Draws run/score.png from log.jsonl, if it has scores: the distance against images seen, and against the time of training."""
    scores = {}
    for record in read_log(run):
        if "score" in record:
            scores.setdefault((record["score"], record["samples"]), []).append(record)
    if not scores:
        return
    plt = pyplot()
    from matplotlib.ticker import EngFormatter, LogLocator, NullFormatter

    unit, name = max(((s, name) for s, name in ((1, "seconds"), (60, "minutes"), (3600, "hours"))
                      if s == 1 or 2 * s < max(record["seconds"] for records in scores.values() for record in records)))
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
    for (metric, samples), records in scores.items():
        values = [record[metric] for record in records]
        for axis, key, scale in zip(axes, ("images", "seconds"), (1, unit), strict=True):
            axis.plot([record[key] / scale for record in records], values, ".-", label=f"{metric}, {samples:,} samples")
    axes[0].set(xlabel="images seen", ylabel="Frechet distance, EMA weights")
    axes[0].xaxis.set_major_formatter(EngFormatter())
    axes[1].set(xlabel=f"time of training, {name}")
    for axis in axes:
        axis.set(yscale="log", xlim=(0, None))
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}"), axis.yaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
        axis.legend()
    figure.tight_layout()
    figure.savefig(Path(run) / "score.png", dpi=110)
    plt.close(figure)


def image_grid(images, columns=None, min_tile=48, gap=2):
    """(n, H, W, C) uint8 images -> one picture (H', W', 3) uint8, row by row; small images are enlarged without smoothing."""
    images = np.asarray(images)
    n, height, width, channels = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows, zoom = -(-n // columns), max(1, -(-min_tile // max(height, width)))
    images = images.repeat(zoom, axis=1).repeat(zoom, axis=2)
    if channels == 1:
        images = images.repeat(3, axis=3)
    tile_height, tile_width = height * zoom + gap, width * zoom + gap
    picture = np.full((rows * tile_height - gap, columns * tile_width - gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        y, x = i // columns * tile_height, i % columns * tile_width
        picture[y : y + height * zoom, x : x + width * zoom] = image
    return picture


def principal_colours(x):
    """The first three principal components of all positions as red, green and blue, each from its 2nd to its 98th percentile.

    Args:
        x: (n, F, h, w), features or latents. Fewer than three channels leave the other colours black.
    Returns: uint8 (n, h, w, 3).
    """
    tokens = x.permute(0, 2, 3, 1).flatten(0, 2)
    tokens = tokens - tokens.mean(0)
    colours = F.pad(tokens, (0, 3)) @ F.pad(torch.linalg.svd(tokens, full_matrices=False).Vh, (0, 3, 0, 3))[:3].T
    low, high = colours.quantile(0.02, dim=0), colours.quantile(0.98, dim=0)
    return (255 * ((colours - low) / (high - low).clamp(min=1e-9)).clamp(0, 1)).to(torch.uint8).unflatten(0, (x.shape[0], *x.shape[2:]))


def save_png(picture, path):
    """Writes an (H, W, 3) uint8 array as a PNG file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with optional("a PNG file"):
        from PIL import Image

    Image.fromarray(picture).save(path)
