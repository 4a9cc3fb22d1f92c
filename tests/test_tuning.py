"""`lightningdit tune-guidance`: a model with a known optimum, what is measured again, and what the files say."""

import copy
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import cli, features, tuning
from lightningdit import config as configuration
from lightningdit.config import DiTConfig
from lightningdit.model import LightningDiT
from lightningdit.tuning import Setting, frontier, goodness, grid, search

ROOT = Path(__file__).resolve().parent.parent
CLASS_VELOCITY = 0.9  # conditional; the unconditional one is 0, so guidance of scale w from t = a on moves noise by 0.9 (a + (1 - a) w)
BEST = 3.0


def constant_model():
    """A LightningDiT whose velocity depends on nothing but whether there is a class."""
    settings = configuration.load(DiTConfig, ROOT / "train" / "configs" / "digits.yaml")
    settings.data.num_classes, settings.model.depth, settings.model.hidden_size = 10, 1, 48
    settings.sample.shift, settings.sample.num_steps, settings.sample.batch_size = 1.0, 10, 64
    settings.sample.method, settings.precision = "euler", "fp32"  # exact for this model: settings that tie do
    model = LightningDiT(**settings.model_arguments()).eval()
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    with torch.no_grad():
        model.y_embedder.embedding_table.weight[: model.num_classes] = 1.0
        shift = model.final_layer.adaLN_modulation[-1]
        shift.weight[0, 0] = CLASS_VELOCITY / float(torch.nn.functional.silu(torch.ones(())))
        model.final_layer.linear.weight[:, 0] = 1.0
    return settings, model


class Pixels(features.Extractor):
    """Pixels as features."""

    def __init__(self, weights=None, random_weights=False):
        super().__init__("pixels", torch.nn.LayerNorm(1), channels=1)  # only for its parameters, which are the same each time

    def extract(self, images):
        return dict(pool=images.float().flatten(1) / 20)


class Decoder:
    """The mean of a latent's channels, enlarged to 8 x 8 pixels."""

    sha256, image_channels = "0" * 64, 1

    def decode_uint8(self, latents):
        pixels = latents.mean(1).repeat_interleave(2, 1).repeat_interleave(2, 2)
        return (pixels[..., None] * 20 + 100).clamp(0, 255).byte()


@pytest.fixture
def tune(monkeypatch, tmp_path):
    """tune(*options) -> tuning.json of a search with the model above; the reference is what scale 3 over all times would give."""
    settings, model = constant_model()
    monkeypatch.setattr(tuning, "load_run", lambda *a: (settings, copy.deepcopy(model), Decoder(), None))
    monkeypatch.setitem(features.BUILDERS, "pixels", Pixels)
    shape = settings.sampling_arguments()["latent_shape"]
    noise = torch.randn(400, *shape, generator=torch.Generator().manual_seed(9))
    np.savez(tmp_path / "real.npz", arr_0=Decoder().decode_uint8(noise + CLASS_VELOCITY * BEST).numpy())
    common = ["tune-guidance", "--checkpoint", "run", "--reference", str(tmp_path / "real.npz"), "--extractor", "pixels",
              "--scales", "1", "2", "3", "4", "--intervals", "0", "1", "0.5", "1", "--samples", "24", "--max-samples", "100",
              "--factor", "2", "--cache", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]

    def run(*options):
        assert cli.main([*common, *options]) == 0
        return json.loads((tmp_path / "out" / "tuning.json").read_text())

    return run


def test_the_known_optimum(tune, tmp_path, capsys):
    report = tune()
    best = report["best"]
    assert (best["guidance_scale"], best["guidance_interval"], best["samples"]) == (BEST, [0, 1], 96)
    assert [(r["samples"], r["settings"]) for r in report["rounds"]] == [(24, 7), (48, 4), (96, 4)]
    first = {(r["guidance_scale"], *r["guidance_interval"]): r for r in report["results"] if r["samples"] == 24}
    moved = {key: key[0] if key[1] == 0 else 0.5 + 0.5 * key[0] for key in first}  # a scale of 1 has the interval 0-1
    order = sorted(first, key=lambda key: first[key]["metrics"]["fd_pixels"])
    assert order == sorted(first, key=lambda key: abs(moved[key] - BEST)), moved
    for key, result in first.items():  # a shift of all pixels by one number: |difference|^2 times 64, and what the two noises differ by
        expected = 64 * (CLASS_VELOCITY * (moved[key] - BEST)) ** 2
        assert result["metrics"]["fd_pixels"] == pytest.approx(expected, rel=0.25, abs=25), key
        assert result["evaluations"] == {0: 20, 0.5: 15}[key[1]] if key[0] != 1 else 10
    assert {row["evaluations"] for row in report["frontier"]} <= {10, 15, 20} and report["frontier"][-1] == best
    assert report["plan"]["checkpoint"] and report["plan"]["seed"] == 0 and report["environment"]["torch"] == torch.__version__
    printed = capsys.readouterr().out
    assert "best     --guidance-scale 3 --guidance-interval 0 1 --guidance-channels 0 --shift 1 --num-steps 10" in printed
    picture = np.asarray(Image.open(tmp_path / "out" / "tuning.png").convert("RGB")).astype(int)
    assert ((picture - (214, 39, 40)) ** 2).sum(-1).min() == 0 and picture.shape[1] > 1000  # the star is there


def test_nothing_is_measured_twice(tune, monkeypatch, tmp_path):
    measured, real = [], tuning.Trial.measure

    def measure(self, setting, n, update):
        if len(measured) == 5:
            raise KeyboardInterrupt
        measured.append((setting, n))
        return real(self, setting, n, update)

    monkeypatch.setattr(tuning.Trial, "measure", measure)
    with pytest.raises(KeyboardInterrupt):
        tune()
    assert len(json.loads((tmp_path / "out" / "tuning.json").read_text())["results"]) == 5
    monkeypatch.setattr(tuning.Trial, "measure", lambda self, *what: measured.append(what[:2]) or real(self, *what))
    once = tune()
    assert len(measured) == len(set(measured)) == len(once["results"]) == 7 + 4 + 4
    assert tune()["results"] == once["results"] and len(measured) == 15
    tune("--metric", "recall")  # of the same images; other settings may go on
    assert all(n > 24 for _, n in measured[15:])
    before = len(measured)
    tune("--scales", "3", "5", "--max-samples", "24")
    assert [(s.guidance_scale, n) for s, n in measured[before:]] == [(5.0, 24)] * 2
    with pytest.raises(SystemExit, match=r"tuning.json was measured otherwise, expected a new folder:\n  seed: 0 -> 1"):
        tune("--seed", "1")
    (tmp_path / "out" / "tuning.json").write_text("[1]")
    with pytest.raises(SystemExit, match="is no result of this command"):
        tune()


@pytest.mark.parametrize(("options", "message"), [
    (["--samples", "4"], "samples: got 4"), (["--max-samples", "9"], "max_samples: got 9"), (["--factor", "1"], "factor: got 1"),
    (["--intervals", "0.5", "0.1"], "intervals: got"), (["--shifts", "0"], "shifts: got"), (["--channels", "5"], "channels: got"),
    (["--num-steps", "0"], "num_steps: got"), (["--method", "dopri5"], "method: got 'dopri5'"), (["--scales", "nan"], "scales: got"),
    (["--metric", "sfid"], "metric: got 'sfid', which no setting has: it is not among fd_pixels"),
    (["--classes", "12"], "classes: got '12'"), (["--labels", "none"], "labels: got 'none'")])
def test_errors_name_the_argument(tune, options, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        tune(*options)


def test_two_processes_search_as_one(tmp_path, script, digits_model):
    weights = digits_model(tmp_path)
    (tmp_path / "run.py").write_text("from lightningdit.cli import main; raise SystemExit(main())")
    options = ["tune-guidance", *weights, "--scales", "1", "3", "--intervals", "0", "1", "--num-steps", "3", "--samples", "9",
               "--max-samples", "20", "--factor", "2", "--cache", tmp_path / "cache"]
    result = script(tmp_path / "run.py", *options, "--out", tmp_path / "two", processes=2)
    assert result.stdout.count("best ") == 1
    assert cli.main([*map(str, options), "--out", str(tmp_path / "one")]) == 0
    one, two = (json.loads((tmp_path / name / "tuning.json").read_text())["results"] for name in ("one", "two"))
    assert len(one) == 4
    for a, b in zip(one, two, strict=True):
        assert tuning.setting_of(a) == tuning.setting_of(b) and a["metrics"].keys() == b["metrics"].keys()
        for name, value in a["metrics"].items():
            assert b["metrics"][name] == pytest.approx(value, rel=1e-4), name


class Known:
    """A trial whose numbers are known: (value, cost) of each setting, values falling with the images."""

    def __init__(self, numbers):
        self.numbers, self.measured = numbers, []

    def measure(self, setting, n, update):
        self.measured.append((setting.guidance_scale, n))
        value = self.numbers[setting.guidance_scale][0]
        return dict(diverged="too strong") if value is None else dict(fd_x=value + 1000 / n, recall_x=-value)

    def evaluations(self, setting):
        return self.numbers[setting.guidance_scale][1]


def test_halving_keeps_the_best_and_what_diverged_is_last():
    numbers = {float(s): ((s - 5.2) ** 2, 20) for s in range(1, 10)} | {10.0: (None, 20), 0.5: (30.0, 10)}
    settings = grid(numbers, [(0.0, 1.0)], [1.0], [None], [10])
    trial = Known(numbers)
    rounds, results = search(trial, settings, "fid", 10, 100, 3)
    assert [[r["guidance_scale"] for r in found] for found in rounds] == [[5, 6, 4, 7, 3, 8, 2, 9, 1, 0.5, 10], [5, 6, 4, 7], [5, 6, 4, 7]]
    assert trial.measured[11:] == [(s, n) for n in (30, 90) for s in (5.0, 6.0, 4.0, 7.0)] and len(results) == 19
    assert [r["guidance_scale"] for r in frontier(rounds[0], "fid")] == [0.5, 5] and goodness(rounds[0][-1], "fid") == math.inf
    assert [r["guidance_scale"] for r in rounds[0]] == [r["guidance_scale"] for r in sorted(rounds[0], key=lambda r: goodness(r, "recall"))]
    with pytest.raises(ValueError, match="metric: got 'fid', which no setting has: too strong"):
        search(Known({10.0: (None, 1)}), [Setting(10.0, (0.0, 1.0), 1.0, None, 10)], "fid", 10, 10, 3)


def test_grid_has_one_setting_without_guidance():
    settings = grid([1.0, 2.0], [(0.0, 1.0), (0.1, 1.0)], [0.3, 1.0], [None, 3], [10])
    assert len(settings) == 2 * (1 + 4) and len(set(settings)) == len(settings)
