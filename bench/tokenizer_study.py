"""Does alignment pay? The same small VAE without and with it, and the same small DiT on the latents of each, side by side.

    python bench/tokenizer_study.py --data '../shared/data/tiny-imagenet/train-{00..04}.tar' --val ../shared/data/tiny-imagenet/val.tar
    python bench/tokenizer_study.py --size full --budget-s 540        # on a GPU; the same command again goes on

Stages, each done once and remembered in OUT: data (a subset as tar files), classifier (the independent network whose features judge:
trained on the same images from another seed, and never seen by a tokenizer), then for plain and aligned: tokenizer (train/vavae.py),
reconstruction (lightningdit evaluate tokenizer, held-out images), dit (train/dit.py), samples, generation (lightningdit evaluate samples).
Distances in the classifier's feature space compare within one study only: they are no FID.
OUT gets report.json and study.png; --publish copies them to bench/results and docs.
"""

import argparse
import io
import json
import shutil
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

from bench.study import UNFINISHED, OutOfTime, Stages, launch  # noqa: E402
from lightningdit.cli import load_run  # noqa: E402
from lightningdit.distributed import pick_device  # noqa: E402
from lightningdit.evaluation import EvaluationData, evaluate_samples, evaluate_tokenizer, open_pictures  # noqa: E402
from lightningdit.images import open_images, to_pixels  # noqa: E402
from lightningdit.log import environment, image_grid, read_log  # noqa: E402
from lightningdit.sampler import sample_images  # noqa: E402
from lightningdit.tokenizer.foundation import SmallEncoder  # noqa: E402
from lightningdit.tokenizer.vavae import Tokenizer  # noqa: E402

DATA = ROOT.parent / "shared" / "data" / "tiny-imagenet"
ARMS = ("plain", "aligned")
# classes, per_class and per_class_val images of the data; alignment: (vf_weight, cos_margin, distmat_margin), with margins of 0 the first
# stage of the paper's three, otherwise its short recipe.
SIZES = dict(
    tiny=dict(classes=3, per_class=16, per_class_val=8, image_size=16, ch=8, ch_mult=(1, 2), z_channels=4, vae_steps=6, vae_batch=8,
              alignment=(0.5, 0.0, 0.0), encoder_steps=8, encoder_width=8, depth=1, hidden_size=32, heads=2, dit_steps=6, dit_batch=8,
              samples=12, points=0, vae_lr=1e-3, dit_lr=1e-3),
    smoke=dict(classes=10, per_class=500, per_class_val=50, image_size=32, ch=16, ch_mult=(1, 2, 4), z_channels=16, vae_steps=450,
               vae_batch=32, alignment=(0.5, 0.0, 0.0), encoder_steps=250, encoder_width=16, depth=4, hidden_size=128, heads=4,
               dit_steps=400, dit_batch=64, samples=500, points=500, vae_lr=1e-3, dit_lr=1e-3),
    full=dict(classes=95, per_class=500, per_class_val=50, image_size=64, ch=64, ch_mult=(1, 2, 2, 4), z_channels=32, vae_steps=12_000,
              vae_batch=128, alignment=(0.1, 0.5, 0.25), encoder_steps=4_000, encoder_width=32, depth=12, hidden_size=384, heads=6,
              dit_steps=20_000, dit_batch=256, samples=5_000, points=4_000, vae_lr=2e-4, dit_lr=4e-4),
)
# Rows of the table: name in the report, what it is called, whether more is better.
ROWS = (
    ("reconstruction", "psnr", "PSNR, dB", True), ("reconstruction", "ssim", "SSIM", True),
    ("reconstruction", "rfd_classifier", "reconstructions, Frechet distance", False),
    ("reconstruction", "density_cv", "latents, density CV", False), ("reconstruction", "gini", "latents, Gini", False),
    ("reconstruction", "normalized_entropy", "latents, normalised entropy", True),
    ("generation", "fd_classifier", "samples, Frechet distance", False),
    ("generation", "kid_classifier", "samples, kernel distance", False),
    ("generation", "precision_classifier", "samples, precision", True), ("generation", "recall_classifier", "samples, recall", True),
    ("generation", "recognised", "samples that the classifier takes for their class", True),
)


class Study(Stages):
    """The stages in `out`. Settings are those of SIZES; deadline: of time.monotonic(), or None."""

    def __init__(self, size, data, val, out, device, deadline):
        self.settings, self.data, self.val, self.size, self.device = SIZES[size], data, val, size, pick_device(device)
        super().__init__(out, dict(size=size, data=str(data), **self.settings), deadline)

    def run(self):
        """All stages that are not done yet, then the report."""
        self.stage("data", self.make_data)
        self.stage("classifier", self.train_classifier)
        for arm in ARMS:
            for name in ("tokenizer", "reconstruction", "dit", "samples", "generation"):
                self.stage(f"{arm}_{name}", getattr(self, f"make_{name}"), arm)
        return self.report()

    def make_data(self):
        """train.tar and val.tar: the first images of the first classes, as they are."""
        s = self.settings
        for path, name, count in ((self.data, "train.tar", s["per_class"]), (self.val, "val.tar", s["per_class_val"])):
            source = open_images(path)
            with tarfile.open(self.out / name, "w") as tar:
                for label in range(s["classes"]):
                    members = (source.labels == label).nonzero().flatten().tolist()
                    if len(members) < count:
                        raise ValueError(f"data: {path} has {len(members)} images of class {label}, expected at least {count}")
                    for index in members[:count]:
                        content = source.read(index)
                        member = tarfile.TarInfo(f"{source.classes[label]}/{Path(source.names[index]).name}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))

    def vavae(self, run, seed, steps, *arguments):
        s = self.settings
        launch("vavae.py", [
            "--run", self.out / run, "--seed", seed, "--data.path", self.out / "train.tar", "--data.image-size", s["image_size"],
            "--data.channels", 3, "--autoencoder.ch", s["ch"], "--autoencoder.ch-mult", *s["ch_mult"], "--autoencoder.z-channels",
            s["z_channels"], "--encoder.steps", s["encoder_steps"], "--encoder.width", s["encoder_width"], "--encoder.batch-size",
            min(128, s["classes"] * s["per_class"] // 2), "--encoder.shift", s["image_size"] // 8, "--steps", steps, "--batch-size",
            s["vae_batch"], "--loss.kl-weight", "1e-6", "--optim.lr", s["vae_lr"], "--optim.warmup", min(50, max(0, steps // 2)),
            "--log-every", min(50, steps), "--device", self.device.type, "--threads", torch.get_num_threads(), *arguments], self.deadline)

    def train_classifier(self):
        """The encoder of a run from another seed; its autoencoder of one step is thrown away."""
        self.vavae("classifier", 1, 1, "--loss.vf-weight", "0.1")
        shutil.copy(self.out / "classifier" / "encoder.safetensors", self.out / "classifier.safetensors")

    def make_tokenizer(self, arm):
        weight, cosine, distance = self.settings["alignment"] if arm == "aligned" else (0.0, 0.5, 0.25)
        self.vavae(f"{arm}_tokenizer", 0, self.settings["vae_steps"], "--loss.vf-weight", weight, "--loss.cos-margin", cosine,
                   "--loss.distmat-margin", distance)

    def tokenizer(self, arm):
        return self.out / f"{arm}_tokenizer" / "tokenizer.safetensors"

    def make_reconstruction(self, arm):
        evaluate_tokenizer(str(self.tokenizer(arm)), EvaluationData(str(self.out / "val.tar"), self.settings["image_size"]),
                           extractors=str(self.out / "classifier.safetensors"), uniformity_points=self.settings["points"],
                           device=self.device.type, out=str(self.out / f"{arm}_reconstruction"))

    def make_dit(self, arm):
        s, tokenizer = self.settings, Tokenizer.load(self.tokenizer(arm))
        launch("dit.py", [
            "--run", self.out / f"{arm}_dit", "--data.path", self.out / "train.tar", "--data.image-size", s["image_size"], "--data.flip",
            "--data.val-fraction", 0, "--tokenizer.path", self.tokenizer(arm), "--tokenizer.downsample", tokenizer.downsample,
            "--tokenizer.latent-channels", tokenizer.latent_channels, "--model.depth", s["depth"], "--model.hidden-size", s["hidden_size"],
            "--model.num-heads", s["heads"], "--steps", s["dit_steps"], "--batch-size", s["dit_batch"], "--optim.lr", s["dit_lr"],
            "--optim.warmup", min(50, s["dit_steps"] // 2), "--optim.ema", 0.999, "--log-every", min(50, s["dit_steps"]),
            "--checkpoint-every", max(1, s["dit_steps"] // 4), "--sample-every", s["dit_steps"], "--sample-num", s["classes"],
            "--final-samples", 0, "--sample.guidance-scale", 1, "--device", self.device.type], self.deadline)

    def make_samples(self, arm):
        """samples.npz: as many of each class, the same seeds and labels for both arms, without guidance."""
        settings, model, tokenizer, _ = load_run(self.out / f"{arm}_dit", device=self.device)
        n = self.settings["samples"]
        labels = torch.arange(n) % self.settings["classes"]
        images = sample_images(model, tokenizer, labels=labels, seeds=range(n), device=self.device, progress=True,
                               **settings.sampling_arguments())
        np.savez(self.out / f"{arm}_samples.npz", arr_0=images.numpy(), arr_1=labels.numpy())

    def make_generation(self, arm):
        evaluate_samples(str(self.out / f"{arm}_samples.npz"), str(self.out / "train.tar"), str(self.out / "classifier.safetensors"),
                         image_size=self.settings["image_size"], cache=str(self.out), device=self.device.type,
                         out=str(self.out / f"{arm}_generation"))

    def recognised(self, arm):
        """Fraction of an arm's samples, or of the held-out images (arm None), that the classifier takes for their class."""
        classifier = SmallEncoder.load(self.out / "classifier.safetensors", self.device)
        if arm is None:
            source = open_images(self.out / "val.tar")
            batches = open_pictures(self.out / "val.tar", image_size=self.settings["image_size"]).batches(256)
            images, indices = (torch.cat(parts) for parts in zip(*batches, strict=True))
            labels = source.labels[indices]
        else:
            with np.load(self.out / f"{arm}_samples.npz", allow_pickle=False) as file:
                images, labels = (torch.from_numpy(file[name]) for name in ("arr_0", "arr_1"))
        with torch.no_grad():
            found = torch.cat([classifier(to_pixels(batch).to(self.device)).argmax(1).cpu() for batch in images.split(256)])
        return float((found == labels).double().mean())

    def report(self):
        """Writes report.json and study.png, prints the table; returns the report."""
        arms = {}
        for arm in ARMS:
            arms[arm] = {}
            for part in ("reconstruction", "generation"):
                content = json.loads((self.out / f"{arm}_{part}" / "evaluation.json").read_text())
                arms[arm][part] = {row["metric"]: row["value"] for row in content["metrics"] if row["value"] is not None}
            arms[arm]["generation"]["recognised"] = self.recognised(arm)
            losses = [line for line in read_log(self.out / f"{arm}_dit") if "mse" in line]
            arms[arm]["dit_last_mse"] = float(np.mean([line["mse"] for line in losses[-len(losses) // 10:]]))
            arms[arm]["tokenizer_sha256"] = Tokenizer.load(self.tokenizer(arm)).sha256
        report = dict(what="tokenizer study", size=self.size, settings=self.settings, arms=arms, seconds=self.seconds,
                      judge="features of a small classifier trained on the same images from another seed: distances are no FID",
                      classifier_accuracy_on_held_out_images=self.recognised(None), environment=environment(self.device))
        (self.out / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        self.draw(self.out / "study.png")
        print(table(report))
        return report

    def draw(self, path, columns=12):
        """Originals, both reconstructions and both arms' samples of the same classes, a titled row each."""
        from matplotlib.figure import Figure

        pictures = open_pictures(self.out / "val.tar", image_size=self.settings["image_size"], num_images=columns)
        originals = next(iter(pictures.batches(columns)))[0]
        rows = {"held-out images": originals}
        for arm in ARMS:
            tokenizer = Tokenizer.load(self.tokenizer(arm))
            with torch.no_grad():
                rows[f"{arm}: reconstructed"] = tokenizer.decode_uint8(tokenizer.normalise(tokenizer.encode(to_pixels(originals)).mode()))
        for arm in ARMS:
            with np.load(self.out / f"{arm}_samples.npz", allow_pickle=False) as file:
                rows[f"{arm}: generated"] = torch.from_numpy(file["arr_0"][:columns])
        figure = Figure(figsize=(columns, 1.25 * len(rows)), layout="constrained")
        for axis, (title, images) in zip(figure.subplots(len(rows)), rows.items(), strict=True):
            axis.imshow(image_grid(images, columns=columns))
            axis.set_title(title, loc="left", fontsize=9)
            axis.axis("off")
        figure.savefig(path, dpi=80)


def table(report):
    """The two arms side by side as Markdown, the better number of each row in bold."""
    lines = ["| | plain | aligned |", "| --- | --- | --- |"]
    for part, key, name, more in ROWS:
        plain, aligned = (report["arms"][arm][part].get(key) for arm in ARMS)
        if plain is None or aligned is None:
            continue
        better = (aligned > plain) == more
        cells = [f"{value:.4g}" for value in (plain, aligned)]
        if plain != aligned:
            cells[better] = f"**{cells[better]}**"
        lines.append(f"| {name} ({'more' if more else 'less'} is better) | {cells[0]} | {cells[1]} |")
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), default="smoke", help="tiny: for tests; smoke: a CPU, 15 minutes; full: a GPU")
    parser.add_argument("--data", default=str(DATA / "train-{00..04}.tar"), help="training images, as images.open_images takes them")
    parser.add_argument("--val", default=str(DATA / "val.tar"), help="held-out images of the same classes")
    parser.add_argument("--out", help="working folder; default: runs/tokenizer_study_SIZE")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--budget-s", type=float, help="stop after so many seconds; the same command again goes on")
    parser.add_argument("--publish", action="store_true", help="copy the report to bench/results and the picture to docs")
    args = parser.parse_args(argv)
    deadline = None if args.budget_s is None else time.monotonic() + args.budget_s
    study = Study(args.size, args.data, args.val, args.out or f"runs/tokenizer_study_{args.size}", args.device, deadline)
    try:
        study.run()
    except OutOfTime as where:
        print(f"out of time at {where}; the same command again goes on from there")
        return UNFINISHED
    if args.publish:
        name = f"tokenizer_study_{args.size}_{study.device.type}"
        shutil.copy(study.out / "report.json", ROOT / "bench" / "results" / f"{name}.json")
        shutil.copy(study.out / "study.png", ROOT / "docs" / f"{name}.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError, ImportError) as problem:
        sys.exit(f"error: {problem}")
