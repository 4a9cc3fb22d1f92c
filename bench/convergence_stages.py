"""The stages of bench/convergence.py: what trains, draws and measures. The plan and the report are there."""

import json
import shutil
import statistics
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from bench.convergence import ROWS, SIZES, TOKENIZERS, comparisons, dit_settings, nested, rows_of, runs_of, tokenizer_of, vavae_settings
from bench.harness import cpu_name
from bench.study import OutOfTime, Stages, launch
from lightningdit.checkpoint import list_checkpoints, save_weights, sha256, write_text
from lightningdit.cli import load_run
from lightningdit.config import DiTConfig, VAVAEConfig, finish, from_dict, require
from lightningdit.distributed import generator_for, pick_device, seed_for
from lightningdit.evaluation import EvaluationData, collect, evaluate_tokenizer, load_reference
from lightningdit.features import load_extractor
from lightningdit.images import to_pixels
from lightningdit.log import environment, read_log
from lightningdit.metrics import frechet_distance
from lightningdit.model import LightningDiT, forward_flops
from lightningdit.sampler import sample_images
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.data import TokenizerImages
from lightningdit.tokenizer.foundation import SmallEncoder
from lightningdit.tokenizer.training import train_classifier
from lightningdit.tokenizer.vavae import Tokenizer

# What the estimate of the duration assumes: FLOP/s that small networks reach, the least time of a step, of beginning and ending a run, of
# saving and of reading a checkpoint. Nothing else depends on it. cuda: assumed for an H200 in bf16; cpu: two cores in fp32.
ASSUMED = dict(cuda=dict(flop_per_s=1e14, step_s=8e-3, run_s=10, save_s=0.5), cpu=dict(flop_per_s=6e10, step_s=8e-3, run_s=1.5, save_s=0.1))
TARGET_SEED, JUDGE_SEED = 1, 2


class TargetClassifier(nn.Module):
    """A ViT of timm that learns the classes: it sees pixels as tokenizer.foundation's FoundationEncoder will show them to it.

    Positions are kept as timm's model has them and interpolated in each pass, so that what is loaded there is what was trained here.

    Args: name: of a ViT with one patch size for all images. grid: latent positions a side, one token each.
    """

    def __init__(self, name, num_classes, grid):
        super().__init__()
        self.model = timm.create_model(name, num_classes=num_classes, dynamic_img_size=True)
        self.side = grid * self.model.patch_embed.patch_size[0]
        for key in ("mean", "std"):
            self.register_buffer(key, torch.tensor(self.model.pretrained_cfg[key]).view(-1, 1, 1), persistent=False)

    def forward(self, pixels):
        """pixels (B, 3 or 1, H, W) in [-1, 1] -> logits (B, num_classes), fp32."""
        x = pixels.expand(-1, 3, -1, -1)
        if tuple(x.shape[2:]) != (self.side, self.side):
            x = F.interpolate(x, size=(self.side, self.side), mode="bilinear", align_corners=False)
        with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
            return self.model(((x + 1) / 2 - self.mean) / self.std).float()


def mirrored(batches, seed, start=0):
    """Each image of each batch (images, labels, ...), of which the first is that of update `start`, as it is or its mirror image."""
    for step, (images, *rest) in enumerate(batches, start):
        flip = torch.rand(len(images), generator=generator_for(seed, "mirror", step)) < 0.5
        yield torch.where(flip.view(-1, 1, 1, 1), images.flip(2), images), *rest


@torch.no_grad()
def accuracy(classifier, images, labels, device):
    found = torch.cat([classifier(to_pixels(batch).to(device)).argmax(1).cpu() for batch in images.split(256)])
    return float((found == labels).double().mean())


class Convergence(Stages):
    """The stages in `out`; see bench/convergence.py.

    Args:
        size: of SIZES. data, val: images to train on and held-out ones; None for the digits. deadline: of time.monotonic(), or None.
        foundation, foundation_weights: a foundation model to align with, as load_encoder takes it, instead of the stand-in.
    """

    def __init__(self, size, data, val, out, device, deadline=None, foundation=None, foundation_weights=None):
        self.size, self.settings, self.data, self.val, self.device = size, SIZES[size], data, val, pick_device(device)
        require((data is None) == (self.settings["channels"] == 1), "data", data, "None for the digits' sizes, else images")
        self.foundation, self.foundation_weights = foundation, foundation_weights
        about = dict(size=size, data=data, val=val, foundation=foundation, **self.settings)
        about |= dict(foundation_sha256=sha256(foundation_weights) if foundation_weights else None)
        super().__init__(out, about, deadline)
        self.grid = self.settings["image_size"] // 2 ** (len(self.settings["ch_mult"]) - 1)
        self.images = None

    def plan(self):
        """[(name, work, arguments, estimated seconds, whether it can be interrupted)] of all stages, in order of worth."""
        cost, plan, known = self.estimate(), [], set()
        if self.foundation is None:
            plan.append(("target", self.train_target, (), cost["target"], True))
        plan.append(("judge", self.train_judge, (), cost["judge"], True))
        for row, seed in runs_of(self.size):
            name = tokenizer_of(row)
            if name not in known:
                known.add(name)
                plan.append((f"tokenizer_{name}", self.train_tokenizer, (name,), cost["tokenizer"], True))
                plan.append((f"reconstruction_{name}", self.measure_tokenizer, (name,), cost["reconstruction"], False))
            plan.append((f"dit_{row}_{seed}", self.train_dit, (row, seed), cost["dit", row], True))
            plan.append((f"score_{row}_{seed}", self.score, (row, seed), cost["score"], True))
        return plan

    def estimate(self):
        """Seconds of each kind of stage, counted from FLOPs and the rates of ASSUMED: no measurement."""
        s, rate = self.settings, ASSUMED[self.device.type]

        def seconds(flops, steps=0, saves=0):
            return rate["run_s"] + max(flops / rate["flop_per_s"], steps * rate["step_s"]) + saves * rate["save_s"]

        with torch.device("meta"):
            pixels = torch.empty(1, s["channels"], s["image_size"], s["image_size"])
            settings = from_dict(VAVAEConfig, nested(vavae_settings(self.size, "plain")))
            autoencoder = AutoencoderKL(**settings.autoencoder_arguments())
            flops = dict(target=count_flops(TargetClassifier(s["target"], 100, self.grid), pixels),
                         judge=count_flops(SmallEncoder(s["channels"], 100, autoencoder.downsample, s["judge_width"]), pixels),
                         autoencoder=count_flops(lambda x: autoencoder.decode(autoencoder.encode(x).mean), pixels))
        steps = dict(target=s["target_steps"], judge=s["judge_steps"])
        found = {name: seconds(3 * flops[name] * n * s["classifier_batch"], n) for name, n in steps.items()}
        # Beside forward and backward: the target's features, and the second backward pass through one layer that weighs the alignment.
        found["tokenizer"] = seconds((3.5 * flops["autoencoder"] + flops["target"]) * s["vae_steps"] * s["vae_batch"], s["vae_steps"])
        found["reconstruction"] = seconds(flops["autoencoder"] * 5_000)
        for row in rows_of(self.size):
            config = self.dit_config(row, 0)
            config.data.num_classes = 100
            with torch.device("meta"):
                dit = forward_flops(LightningDiT(**config.model_arguments()))
            found["dit", row] = seconds(3 * dit * s["images"], config.steps, s["parts"])
        draws = -(-s["samples"] // config.sample.batch_size) * s["sample_steps"] * len(s["points"])
        drawn = s["samples"] * len(s["points"])
        found["score"] = seconds(drawn * (s["sample_steps"] * dit + flops["autoencoder"] / 2), draws, len(s["points"]))
        return found

    def run(self):
        """All stages that are not done yet, then the report."""
        plan = self.plan()
        left = sum(cost for name, _, _, cost, _ in plan if not (self.out / f"{name}.done.json").is_file())
        print(f"{len(plan)} stages in {self.out} on {self.device}: about {left / 60:.0f} minutes to go, the longest stage "
              f"{max(cost for *_, cost, _ in plan) / 60:.1f} (estimated from FLOPs)", flush=True)
        for number, (name, work, arguments, cost, interruptible) in enumerate(plan, 1):
            if self.stage(name, work, *arguments, needs_s=0 if interruptible else cost,
                          note=f" ({number} of {len(plan)}, about {left / 60:.1f} minutes to go by the estimate)"):
                left -= cost
        return self.report()

    # Stages

    def training_images(self):
        s = self.settings
        if self.images is None:
            try:
                self.images = TokenizerImages(self.data, val_path=self.val, image_size=s["image_size"], channels=s["channels"],
                                              crop="center", in_memory=True, progress=True)
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{error}; --data and --val name the images, by default Tiny-ImageNet's") from error
        return self.images

    def train_on_classes(self, name, classifier, seed, steps, lr):
        """Trains it, and returns what there is to say about it. At the deadline it is kept in NAME_state.pt, which goes when it is done."""
        s, data = self.settings, self.training_images()

        def batches(start):
            found = data.batches(s["classifier_batch"], seed_for(seed, "classifier"), start)
            return mirrored(found, seed, start) if s["flip"] else found

        try:
            train_classifier(classifier, batches, steps=steps, lr=lr, translate=s["shift"], seed=seed, state=self.state(name),
                             deadline=self.deadline)
        except TimeoutError:
            raise OutOfTime(name) from None
        classifier.eval()
        return dict(held_out_accuracy=accuracy(classifier, *data.held_out, self.device), held_out_images=len(data.held_out[1]), seed=seed,
                    images=len(data), classes=len(data.classes))

    def state(self, name):
        return self.out / f"{name}_state.pt"

    def train_target(self):
        torch.manual_seed(seed_for(TARGET_SEED, "target"))
        classifier = TargetClassifier(self.settings["target"], len(self.training_images().classes), self.grid).to(self.device)
        about = self.train_on_classes("target", classifier, TARGET_SEED, self.settings["target_steps"], self.settings["target_lr"])
        save_weights(self.out / "target.safetensors", classifier.model.state_dict())
        write(self.out / "target.json", dict(name=self.settings["target"], stand_in=True, **about))
        self.state("target").unlink(missing_ok=True)

    def train_judge(self):
        s, data = self.settings, self.training_images()
        torch.manual_seed(seed_for(JUDGE_SEED, "judge"))
        judge = SmallEncoder(s["channels"], len(data.classes), 2 ** (len(s["ch_mult"]) - 1), s["judge_width"]).to(self.device)
        about = self.train_on_classes("judge", judge, JUDGE_SEED, s["judge_steps"], 1e-3)
        judge.save(self.out / "judge.safetensors", dict(data=self.data or "scikit-learn digits"))
        write(self.out / "judge.json", dict(name="SmallEncoder", features=judge.feature_channels, **about))
        self.state("judge").unlink(missing_ok=True)

    def train_tokenizer(self, name):
        plan = TOKENIZERS[name]
        settings = vavae_settings(self.size, name) | {"data.path": self.data, "data.val_path": self.val}
        if plan.vf_weight:
            weights = self.foundation_weights if self.foundation else str(self.out / "target.safetensors")
            settings |= {"encoder.name": self.foundation or self.settings["target"], "encoder.weights": weights}
        settings |= {"run": str(self.out / f"tokenizer_{name}"), "device": self.device.type, "threads": torch.get_num_threads()}
        self.train("vavae.py", settings, f"tokenizer_{name}")

    def tokenizer(self, name):
        return self.out / f"tokenizer_{name}" / "tokenizer.safetensors"

    def measure_tokenizer(self, name):
        evaluate_tokenizer(str(self.tokenizer(name)), EvaluationData(self.val, self.settings["image_size"]),
                           extractors=str(self.out / "judge.safetensors"), uniformity_points=self.settings["uniformity"],
                           device=self.device.type, out=str(self.out / f"reconstruction_{name}"))

    def dit_paths(self, row, seed):
        """{dotted name of DiTConfig: value}: where a run reads and writes. Runs on one tokenizer share their latents."""
        return {"run": str(self.out / f"dit_{row}_{seed}"), "data.path": self.data, "data.cache": str(self.out / "latents"),
                "tokenizer.path": str(self.tokenizer(tokenizer_of(row))), "device": self.device.type}

    def dit_config(self, row, seed):
        return finish(from_dict(DiTConfig, nested(dit_settings(self.size, row, seed) | self.dit_paths(row, seed))))

    def train_dit(self, row, seed):
        self.train("dit.py", dit_settings(self.size, row, seed) | self.dit_paths(row, seed), f"dit_{row}_{seed}")

    def train(self, script, settings, name):
        """Runs a script of train/ on these settings, kept as a YAML file."""
        path = self.out / "configs" / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(nested(settings), sort_keys=False))
        launch(script, ["--config", path], self.deadline)

    def score(self, row, seed):
        """scores/ROW_SEED.json: the distance at each of the points; checkpoints before the last are then removed."""
        s, run, path = self.settings, self.out / f"dit_{row}_{seed}", self.out / "scores" / f"{row}_{seed}.json"
        path.parent.mkdir(exist_ok=True)
        scores = json.loads(path.read_text()) if path.is_file() else {}
        config, checkpoints = self.dit_config(row, seed), dict(list_checkpoints(run))
        extractor = load_extractor(str(self.out / "judge.safetensors"), device=self.device)
        reference = load_reference(self.data or "digits", extractor, image_size=s["image_size"], cache=str(self.out))
        for point in s["points"]:
            step = point * config.checkpoint_every
            if str(step) in scores:
                continue
            self.check_time(f"score_{row}_{seed}")
            scores[str(step)] = self.distance(checkpoints[step], extractor, reference)
            print(f"   {ROWS[row].title}, seed {seed}: {step * config.batch_size:,} images, distance {scores[str(step)]:.4g}", flush=True)
            write(path, scores)
        for checkpoint in [checkpoints[step] for step in sorted(checkpoints)][:-1]:
            shutil.rmtree(checkpoint)

    def distance(self, checkpoint, extractor, reference):
        """Frechet distance of samples from a checkpoint's average weights, as many of each class, the same seeds for all."""
        s, (config, model, tokenizer, _) = self.settings, load_run(checkpoint, device=self.device)
        n = s["samples"]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=config.use_bf16(self.device)):
            images = sample_images(model, tokenizer, labels=torch.arange(n) % config.data.num_classes, seeds=range(n), device=self.device,
                                   **config.sampling_arguments())
        batches = zip(images.split(250), torch.arange(len(images)).split(250), strict=True)
        found = collect(batches, extractor, keep=0).statistics["pool"]
        return frechet_distance(found.mean.cpu(), found.covariance.cpu(), *reference.moments["pool"])

    # The report

    def curve(self, row, seed):
        """One run of the report: images seen, seconds of training at the run's median rate, and distance at each point."""
        run, config = self.out / f"dit_{row}_{seed}", self.dit_config(row, seed)
        steps = [point * config.checkpoint_every for point in self.settings["points"]]
        scores = json.loads((self.out / "scores" / f"{row}_{seed}.json").read_text())
        # The median rate: compiling in the first steps, saving and other programs on the machine are no part of a recipe.
        rate = statistics.median(line["images_per_second"] for line in read_log(run) if "images_per_second" in line)
        images = [step * config.batch_size for step in steps]
        return dict(row=row, seed=seed, tokenizer=tokenizer_of(row), images=images, seconds=[round(n / rate, 3) for n in images],
                    distances=[scores[str(step)] for step in steps], steps=config.steps, batch_size=config.batch_size,
                    images_per_second=rate)

    def report(self):
        """Writes report.json and returns it."""
        runs = [self.curve(row, seed) for row, seed in runs_of(self.size)]
        tokenizers = {}
        for name in (name for name in TOKENIZERS if name in {run["tokenizer"] for run in runs}):
            metrics = json.loads((self.out / f"reconstruction_{name}" / "evaluation.json").read_text())["metrics"]
            file = Tokenizer.load(self.tokenizer(name))
            tokenizers[name] = dict(channels=file.latent_channels, sha256=file.sha256,
                                    metrics={one["metric"]: one["value"] for one in metrics if one["value"] is not None})
        target = (dict(name=self.foundation, stand_in=False, sha256=self.about["foundation_sha256"]) if self.foundation
                  else json.loads((self.out / "target.json").read_text()))
        judge, env = json.loads((self.out / "judge.json").read_text()), environment(self.device) | dict(timm=timm.__version__)
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            env["hardware"] = f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"
        data = "the digits that scikit-learn ships"
        if self.data is not None:
            data = f"{judge['images']:,} images of {judge['classes']} classes of {Path(self.data).parent.name}"
        found = dict(what="convergence study", size=self.size, data=data, settings=self.settings, target=target,
                     judge=judge, tokenizers=tokenizers, runs=runs, speedups=comparisons(runs), stage_seconds=self.seconds, environment=env)
        write(self.out / "report.json", found)
        return json.loads((self.out / "report.json").read_text())


def write(path, content):
    """JSON, whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def count_flops(forward, pixels):
    """Floating-point operations of one forward pass, 2 a multiply-add."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        forward(pixels)
    return counter.get_total_flops()
