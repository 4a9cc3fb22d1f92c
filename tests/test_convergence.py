"""bench/convergence.py: the plan, the arithmetic, the report, and every stage at its smallest size."""
import copy
import json
import math
import shutil
import subprocess
import sys
import time

import pytest
import torch
import yaml

from bench import convergence, convergence_stages, study
from bench.convergence import LADDER, ROWS, SIZES, TOKENIZERS, dit_settings, interval, nested, reach, runs_of, speedup, vavae_settings
from bench.convergence_stages import Convergence, TargetClassifier
from bench.study import OutOfTime
from lightningdit.checkpoint import save_weights
from lightningdit.config import DiTConfig, VAVAEConfig, differences, finish, from_dict
from lightningdit.tokenizer.foundation import load_encoder


def parsed(cls, settings):
    """As the scripts read it: through YAML, checked, resolved."""
    if settings["data.image_size"] > 8:
        settings = settings | {"data.path": "train.tar"}
    return finish(from_dict(cls, yaml.safe_load(yaml.safe_dump(nested(settings)))))


@pytest.mark.parametrize("size", SIZES)
def test_every_row_is_a_valid_configuration(size):
    for name in ROWS:
        config = parsed(DiTConfig, dit_settings(size, name, 0))
        assert config.steps * config.batch_size == SIZES[size]["images"]  # every row sees as many images
        assert config.steps == config.checkpoint_every * SIZES[size]["parts"] and config.keep_checkpoints > SIZES[size]["parts"]
    for name, plan in TOKENIZERS.items():
        config = parsed(VAVAEConfig, vavae_settings(size, name))
        assert config.aligned == bool(plan.vf_weight) and config.autoencoder.z_channels == SIZES[size]["latents"][plan.latents]
    assert max(SIZES[size]["points"]) == SIZES[size]["parts"]


def test_a_row_changes_what_it_says_and_nothing_else():
    def changed(name):
        before, after = (parsed(DiTConfig, dit_settings("full", row, 0)) for row in (ROWS[name].before, name))
        return {line.partition(":")[0] for line in differences(before, after)}

    expected = dict(flow={"flow.path", "flow.prediction"}, beta2={"optim.betas"}, logit_normal={"flow.time"}, cosine={"flow.cosine_loss"},
                    batch={"batch_size", "steps", "checkpoint_every", "sample_every", "optim.lr"}, swiglu={"model.use_swiglu"},
                    rmsnorm={"model.use_rmsnorm"}, rope={"model.use_rope"}, aligned=set(), no_mcos=set(), no_mdms=set(), no_margin=set(),
                    plain_narrow={"tokenizer.latent_channels"}, aligned_narrow=set())
    assert {name: changed(name) for name in ROWS if name != "dit"} == expected
    assert [ROWS[name].before for name in LADDER] == [None, *LADDER[:-1]]
    first, last = (parsed(DiTConfig, dit_settings("full", name, 3)) for name in ("dit", "rope"))
    assert (first.batch_size, first.optim.lr, last.batch_size, last.optim.lr) == (64, 2e-4, 256, 4e-4) and first.seed == 3
    official = DiTConfig()
    assert last.flow == official.flow and last.optim.betas == official.optim.betas
    assert all(getattr(last.model, flag) for flag in ("use_swiglu", "use_rmsnorm", "use_rope"))
    tokenizers = {name: convergence.tokenizer_of(name) for name in ROWS}
    assert set(tokenizers.values()) == set(TOKENIZERS) and {tokenizers[name] for name in LADDER[:-1]} == {"plain"}


def test_tokenizers_differ_in_alignment_only():
    plain = parsed(VAVAEConfig, vavae_settings("full", "plain"))
    for name in ("aligned", "no_mcos", "no_mdms", "no_margin"):
        lines = differences(plain, parsed(VAVAEConfig, vavae_settings("full", name)))
        assert {line.partition(":")[0] for line in lines} <= {"loss.vf_weight", "loss.cos_margin", "loss.distmat_margin"}, name
    z, f = torch.randn(2, 16, 8, 8), torch.randn(2, 64, 8)
    from lightningdit_kernels import marginal_cosine_loss, marginal_distance_matrix_loss
    projected = z.flatten(2).mT[..., :8]
    assert marginal_cosine_loss(projected, f, convergence.OFF) == 0 and marginal_distance_matrix_loss(projected, f, convergence.OFF) == 0


def test_the_full_study_fits_an_hour_by_its_estimate(tmp_path, monkeypatch):
    monkeypatch.setattr(convergence_stages, "ASSUMED", dict(cpu=convergence_stages.ASSUMED["cuda"]))
    plan = Convergence("full", "train.tar", "val.tar", tmp_path, "cpu").plan()
    costs = {name: cost for name, _, _, cost, _ in plan}
    assert len(costs) == len(plan) == 2 + 2 * len(TOKENIZERS) + 2 * len(runs_of("full"))
    assert [len([1 for row, _ in runs_of("full") if row == name]) for name in ("aligned", "rope", "dit", "cosine")] == [3, 3, 3, 1]
    assert max(costs.values()) < 9 * 60 / 2 and 30 * 60 < sum(costs.values()) < 75 * 60


def test_reach_by_hand():
    assert reach([100, 200, 400], [10.0, 8.0, 4.0], 8.0) == (200, False)
    x, at_once = reach([100, 400], [10.0, 6.0], 8.0)  # half way down, and half way in log images
    assert x == pytest.approx(200) and not at_once
    assert reach([100, 200], [5.0, 4.0], 6.0) == (100, True)
    assert reach([100, 200], [5.0, 4.0], 3.0) is None
    x, _ = reach([1, 10, 100, 1000], [9.0, 4.0, 6.0, 2.0], 5.0)  # the first time counts
    assert x == pytest.approx(10 ** 0.8)


def curve(distances, row="rope", seed=0, pace=1.0):
    images = [100, 200, 400, 800]
    return dict(row=row, seed=seed, images=images, seconds=[pace * n for n in images], distances=distances)


def test_speedup_by_hand():
    baseline = curve([16.0, 12.0, 10.0, 8.0])
    assert speedup(baseline, baseline, "images") == dict(value=1, at_least=False)
    assert speedup(baseline, curve([12.0, 8.0, 6.0, 5.0]), "images") == dict(value=4, at_least=False)
    assert speedup(baseline, curve([12.0, 8.0, 6.0, 5.0], pace=2.0), "seconds") == dict(value=2, at_least=False)
    assert speedup(baseline, curve([7.0, 6.0, 5.0, 4.0]), "images") == dict(value=8, at_least=True)
    assert speedup(baseline, curve([20.0, 18.0, 16.0, 14.0]), "images") == dict(value=None, at_least=False)
    rising = curve([16.0, 8.0, 6.0, 8.0])  # its own final distance was reached at 200 already: no advantage from that
    assert speedup(rising, curve([16.0, 8.0, 8.0, 8.0]), "images") == dict(value=1, at_least=False)


def test_interval_by_hand():
    mean, low, high = interval([1.0, 2.0, 4.0])
    half = 4.303 * math.log(2) / math.sqrt(3)  # logs 0, ln 2, 2 ln 2: their deviation is ln 2
    assert mean == pytest.approx(2) and low == pytest.approx(2 / math.exp(half)) and high == pytest.approx(2 * math.exp(half))
    assert interval([3.0]) == (pytest.approx(3), None, None)
    from scipy.stats import t
    assert convergence.T975 == pytest.approx([t.ppf(0.975, n) for n in range(1, 10)], abs=6e-4)


def hand_made():
    """Some rows: the ladder falls by 1 a step except at SwiGLU, alignment is 4 times faster in one seed and 2 in the other."""
    runs = []
    for i, name in enumerate(LADDER[:-1]):
        shift = 20.0 - i + (2.5 if name == "swiglu" else 0)
        runs.append(curve([shift + 8, shift + 4, shift + 2, shift], name))
    runs.append(curve([20.0, 16.0, 14.0, 12.0], "rope", 1))
    runs += [curve([16.0, 12.0, 11.0, 10.0], "aligned"), curve([16.0, 14.0, 12.0, 11.0], "aligned", 1)]
    runs += [curve([20.0, 16.0, 14.0, final], name) for name, final in dict(no_mcos=11.5, no_mdms=10.6, no_margin=9.0).items()]
    settings = SIZES["smoke"]
    tokenizers = {name: dict(channels=8, metrics=dict(psnr=20.0, rfd_judge=1.5)) for name in ("plain", "aligned")}
    env = dict(hardware="a machine", date="2026-01-02T03:04:05", commit="abc", torch="2.11")
    return json.loads(json.dumps(dict(
        data="Digits", size="full", settings=settings, environment=env, target=dict(name="test_vit", stand_in=True, held_out_accuracy=0.9),
        judge=dict(held_out_accuracy=0.95), tokenizers=tokenizers, runs=runs, speedups=convergence.comparisons(runs))))


def test_report_of_a_hand_made_study():
    made = hand_made()
    lines = convergence.report(made)
    assert all(isinstance(line, str) and "\n" not in line for line in lines)
    assert convergence.cell(convergence.finals(made)["aligned"]) == "10.5 ± 0.71 (2 seeds)"
    text = "\n".join(lines)
    mean, low, high = interval([4.0, 2.0])
    assert f"| alignment | {mean:.2f} ({low:.2f} to {high:.2f}) |" in text and "| 4.00, 2.00 | 2.54 (32 channels), 2.76 (64) |" in text
    assert "all: LightningDiT on aligned latents against DiT on plain ones | at least 8.00 (one seed) |" in text and "| 21.8 |" in text
    assert "does not reproduce with certainty: the interval is not above 1" in text
    assert "| + rectified flow | 19 | -5.0 % | 800 | 17.20 | -11.8 % |" in text
    assert "| + RoPE: LightningDiT on plain latents | 12 ± 0 (2 seeds) |" in text
    assert "7 of 8 steps go the paper's way; not reproduced here: SwiGLU (15 to 16.5)" in text  # beta2 is left out: +0.1 % in the paper
    assert "| aligned without the marginal cosine loss | 11.5 | 21.87 |" in text
    assert "8 of 9 pairs" in text and "its better: aligned latents (10) and aligned without margins (9)." in text
    assert "stands in for a foundation model" in text and "90.0% of held-out" in text and "no FID" in text
    assert "| plain | 8 | 20 | 1.5 |" in text

    assert "not to settle anything" not in text and "not to settle anything" in "\n".join(convergence.report(made | dict(size="smoke")))

    better = copy.deepcopy(made)
    for run in better["runs"]:
        if run["row"] == "swiglu":
            run["distances"] = [d - 2.5 for d in run["distances"]]
        if run["row"] == "no_margin":
            run["distances"] = [d + 2 for d in run["distances"]]
    text = "\n".join(convergence.report(better))
    assert "All 8 steps go the paper's way" in text and "ordered as in the paper" in text

    missed = copy.deepcopy(made)
    missed["runs"] = [run | dict(distances=[30.0] * 4) if (run["row"], run["seed"]) == ("aligned", 1) else run for run in made["runs"]]
    missed["speedups"] = convergence.comparisons(missed["runs"])
    text = "\n".join(convergence.report(missed))
    assert "| alignment | not reached in 1 of 2 seeds |" in text and "| 4.00, not reached |" in text and "does not reproduce" in text
    real = copy.deepcopy(made) | dict(target=dict(name="dinov2-s", stand_in=False))
    assert "Aligned with the foundation model dinov2-s." in "\n".join(convergence.report(real))


def test_figures_draw_every_row(tmp_path):
    made = hand_made()
    figures = convergence.figures(made)
    assert set(figures) == {"ladder", "alignment"}
    labels = {name: {line.get_label() for line in figure.axes[0].get_lines()} for name, figure in figures.items()}
    titles = {name: ROWS[name].title for name in ROWS}
    assert {titles["dit"], titles["swiglu"], f"{titles['aligned']}, 2 seeds"} <= labels["ladder"]
    assert {titles["no_mcos"], titles["no_margin"], f"{titles['rope']}, 2 seeds"} <= labels["alignment"]
    swiglu = next(line for line in figures["ladder"].axes[1].get_lines() if line.get_label() == titles["swiglu"])
    assert list(swiglu.get_ydata()) == [24.5, 20.5, 18.5, 16.5] and list(swiglu.get_xdata()) == [100, 200, 400, 800]


def test_plan_and_report_need_no_torch():
    code = ("import sys; sys.path[:0] = ['.', 'kernels']; from bench import convergence; convergence.runs_of('full'); "
            "assert not {'torch', 'timm', 'matplotlib', 'numpy'} & set(sys.modules), 'heavy'")
    subprocess.run([sys.executable, "-c", code], cwd=convergence.ROOT, check=True)


def test_the_target_is_loaded_as_it_was_trained(tmp_path):
    torch.manual_seed(0)
    target = TargetClassifier("test_vit", 10, 4).eval()
    with torch.no_grad():
        target.model.pos_embed.normal_()
    save_weights(tmp_path / "target.safetensors", target.model.state_dict())
    encoder = load_encoder("test_vit", weights=str(tmp_path / "target.safetensors"), image_size=8, grid=4)
    pixels = torch.rand(3, 1, 8, 8) * 2 - 1
    seen = []
    handle = target.model.norm.register_forward_hook(lambda module, inputs, output: seen.append(output[:, 1:]))
    with torch.no_grad():
        target(pixels)
    handle.remove()
    torch.testing.assert_close(encoder.features(pixels), seen[0], rtol=1e-4, atol=1e-5)


def test_every_stage_and_a_restart(tmp_path, monkeypatch, capsys):
    ran, interrupt = [], []

    def launch(script, arguments, deadline):
        ran.append((script, arguments[1].stem))
        if arguments[1].stem in interrupt:
            study.launch(script, [*arguments, "--steps", 3], deadline)
            raise OutOfTime(interrupt.pop())
        study.launch(script, arguments, deadline)

    def begin(deadline=None, size="tiny"):
        return Convergence(size, None, None, tmp_path, "cpu", deadline)

    monkeypatch.setattr(convergence_stages, "launch", launch)
    with pytest.raises(OutOfTime, match="target"):
        begin(time.monotonic() - 1).run()
    late = begin()
    late.stage = lambda name, work, *arguments, **options: setattr(late, "deadline", time.monotonic()) or work(*arguments)
    with pytest.raises(OutOfTime, match="target"):  # time runs out within the stage: what was learned is kept, and gone on from
        late.run()
    assert (tmp_path / "target_state.pt").is_file() and not (tmp_path / "target.safetensors").exists()
    found = begin().run()
    assert ran == [("vavae.py", "tokenizer_aligned"), ("dit.py", "dit_aligned_0"),
                   ("vavae.py", "tokenizer_plain"), ("dit.py", "dit_rope_0")]
    for run in found["runs"]:
        assert run["images"] == [64, 128] and all(d > 0 for d in run["distances"]) and 0 < run["seconds"][0] < run["seconds"][1]
    assert found["runs"][0]["distances"] != found["runs"][1]["distances"]
    assert found["tokenizers"]["plain"]["sha256"] != found["tokenizers"]["aligned"]["sha256"] and len(found["runs"]) == 2
    assert found["environment"]["torch"] == torch.__version__ and found["environment"]["date"] and "commit" in found["environment"]
    assert [path.name for path in (tmp_path / "dit_rope_0" / "checkpoints").iterdir()] == ["step_0000004"]  # the one before is scored
    assert f"10 stages in {tmp_path} on cpu: about " in capsys.readouterr().out
    report = convergence.report(found)
    assert any(line.startswith("| alignment |") for line in report) and set(convergence.figures(found)) == {"ladder", "alignment"}

    assert not list(tmp_path.glob("*_state.pt"))
    again = begin().run()  # nothing is done twice
    assert again["runs"] == found["runs"] and len(ran) == 4
    scores = tmp_path / "scores" / "rope_0.json"
    (tmp_path / "score_rope_0.done.json").unlink()  # killed between the scores and the marker: what is scored stays
    again = begin().run()
    assert again["runs"] == found["runs"] and len(ran) == 4
    kept = json.loads(scores.read_text())
    scores.write_text(json.dumps({step: value for step, value in kept.items() if step != "4"}))
    (tmp_path / "score_rope_0.done.json").unlink()  # killed between two scores: the missing one comes out the same
    assert begin().run()["runs"] == found["runs"]
    for path in (tmp_path / "dit_rope_0", scores, *(tmp_path / f"{stage}_rope_0.done.json" for stage in ("dit", "score"))):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    interrupt.append("dit_rope_0")
    with pytest.raises(OutOfTime, match="dit_rope_0"):
        begin().run()
    again = begin().run()["runs"]  # resumed after three steps of four: the same distances, all of them
    assert [run["distances"] for run in again] == [run["distances"] for run in found["runs"]] and len(ran) == 6
    with pytest.raises(ValueError, match="holds a study of other settings"):
        begin(size="smoke").run()


def test_data_that_does_not_fit_the_size(tmp_path):
    with pytest.raises(ValueError, match="data: got 'x.tar', expected None"):
        Convergence("smoke", "x.tar", None, tmp_path, "cpu")


def test_images_that_are_absent_are_named_with_their_options(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent.*--data and --val name the images"):
        Convergence("full", str(tmp_path / "absent"), None, tmp_path, "cpu").training_images()
