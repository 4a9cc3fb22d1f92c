"""bench/levers.py: restartable stages, the rule of its recommendations, and a report and a plot from the file alone."""
import json
import types

import pytest
import torch

from bench import levers

ROW = dict(difference=0.0, spread=0.01, left_out=0, speed=1.1, low=1.05, high=1.2)


@pytest.mark.parametrize("changes, on_gpu, cpu", [
    ({}, "on", "worth trying"),
    (dict(low=1.01), "worth trying", "worth trying"),
    (dict(speed=0.97, low=0.9, high=0.99), "off", "worth trying"),
    (dict(difference=0.011), "off", "off"),
    (dict(difference=float("nan")), "off", "off"),
    (dict(left_out=1), "off", "off"),
    (dict(difference=-0.03, speed=0.95, low=0.93), "on", "worth trying"),
    (dict(difference=-0.03, speed=0.5, low=0.4), "worth trying", "worth trying"),
    (dict(speed=None, low=None), "worth trying", "worth trying"),
])
def test_the_rule(changes, on_gpu, cpu):
    assert [levers.recommend(ROW | changes, where) for where in (True, False)] == [on_gpu, cpu]


@pytest.mark.parametrize("most", [8, 3, 1])
def test_the_micro_batch_that_fits_trains_as_the_whole_batch_does(most, monkeypatch):
    cpu, right, sizes = torch.device("cpu"), levers.losses, []

    def limited(config, model, autocast, x1, *rest, **batch):
        if len(x1) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(x1))
        return right(config, model, autocast, x1, *rest, **batch)

    reference = levers.Trainer(levers.configuration("tiny", "AdamW", "fp32"), *levers.data_of("tiny", None, None, cpu), cpu)
    whole, _ = reference.step(0, reference.batch(0))
    trainer = levers.Trainer(levers.configuration("tiny", "AdamW", "fp32"), *levers.data_of("tiny", None, None, cpu), cpu)
    monkeypatch.setattr(levers, "losses", limited)
    levers.fit(trainer)
    assert trainer.config.micro_batch == {8: 8, 3: 2, 1: 1}[most]
    loss, _ = trainer.step(0, trainer.batch(0))
    assert loss.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, other in zip(trainer.model.parameters(), reference.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    assert sizes[-1] == trainer.config.micro_batch


@pytest.mark.parametrize(("most", "expected"), [(96, 96), (40, 32), (2, 2), (1, 1)])
def test_a_batch_that_is_no_power_of_two_is_divided_down_to_one_image(most, expected):
    class Trainer:
        config, device = types.SimpleNamespace(batch_size=96, micro_batch=None), torch.device("cpu")

        def batch(self, step):
            return {}

        def step(self, step, batch, skip):
            if self.config.micro_batch > most:
                raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = Trainer()
    levers.fit(trainer)
    assert trainer.config.micro_batch == expected


def test_without_memory_for_one_image_a_stage_says_so(monkeypatch):
    def full(*arguments, **batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    cpu = torch.device("cpu")
    trainer = levers.Trainer(levers.configuration("tiny", "AdamW", "fp32"), *levers.data_of("tiny", None, None, cpu), cpu)
    monkeypatch.setattr(levers, "losses", full)
    with pytest.raises(torch.OutOfMemoryError, match="not even one image"):
        levers.fit(trainer)


def test_median_and_its_interval():
    ratios = [1.0 + 0.01 * (i % 5) for i in range(25)]
    median, low, high = levers.median_and_interval(ratios)
    assert low <= median == 1.02 <= high and high - low < 0.04 and (low, high) != (median, median)


def test_made_latents_have_unit_variance_and_classes():
    made = levers.MadeLatents(2000, 4, 8, 10)
    assert made.moments[:, :4].std().item() == pytest.approx(1, abs=0.1) and made.moments.shape == (2000, 8, 8, 8)
    means = torch.stack([made.moments[made.labels == label, :4].mean(0) for label in range(10)])
    assert means.std(0).mean() > 0.5
    train_set, val_set = made.split(100)
    assert len(train_set) == 1900 and torch.equal(val_set.gather(torch.tensor([3])), made.moments[3:4])


def test_stages_go_on_and_the_report_is_made_from_the_file_alone(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(levers, "BASELINE_SEEDS", (0, 1))
    monkeypatch.setattr(levers, "LEVER_SEEDS", (0,))
    monkeypatch.setattr(levers, "LEVERS", {name: levers.LEVERS[name] for name in ("Muon", "split-K")})
    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--results", str(tmp_path), "--docs", str(tmp_path)]
    assert levers.main([*arguments, "--budget-s", "0"]) == levers.UNFINISHED  # the first stage is begun in any case
    assert [path.name for path in (tmp_path / "out" / "stages").iterdir()] == ["loss_AdamW_fp32_0.json"]
    first = (tmp_path / "out" / "stages" / "loss_AdamW_fp32_0.json").read_text()
    assert levers.main(arguments) == 0
    assert (tmp_path / "out" / "stages" / "loss_AdamW_fp32_0.json").read_text() == first
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "levers_cpu_tiny.json").read_text())
    assert content["summary"] == json.loads(json.dumps(levers.summarise(content))) and len(content["runs"]) == 4
    assert "\n".join(levers.report(content)) in printed and "not yet measured on a GPU" in printed
    muon, split = content["summary"]
    assert muon["state_mib"] < muon["baseline_state_mib"] and abs(split["difference"]) < 1e-4 < abs(muon["difference"])
    (tmp_path / "levers_cpu_tiny.png").unlink()
    assert levers.main([*arguments, "--redraw"]) == 0 and (tmp_path / "levers_cpu_tiny.png").stat().st_size > 5000
    other = tmp_path / "out" / "stages" / "speed_Muon.json"
    row = json.loads(other.read_text())
    row["environment"]["torch"] = "0.1"
    other.write_text(json.dumps(row))
    with pytest.raises(ValueError, match="speed_Muon.json is of torch 0.1, now "):
        levers.main(arguments)


def test_a_stage_that_cannot_run_costs_the_others_nothing(tmp_path, monkeypatch, capsys):
    """A missing package leaves its option out; a failure leaves no results file, but every other stage."""
    done = []

    def stage(size, lever, precision, *_):
        if lever == "Muon":
            raise error
        done.append(lever)
        runs = dict(lever=lever, precision=precision, seed=_[0], curve=[1.0], every=1, validation=1.0 + 0.1 * _[0], left_out=0)
        return runs

    monkeypatch.setattr(levers, "loss_stage", stage)
    monkeypatch.setattr(levers, "speed_stage", lambda size, lever, *_: dict(lever=lever, baseline_s=[1.0], lever_s=[1.0], batch_size=2))
    monkeypatch.setattr(levers, "LEVERS", {name: levers.LEVERS[name] for name in ("Muon", "split-K")})
    monkeypatch.setattr(levers, "figure", lambda content: type("Figure", (), {"savefig": lambda *_, **__: None}))
    monkeypatch.setattr(levers, "report", lambda content: [row["lever"] for row in content["summary"]])
    arguments = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path / "out"), "--results", str(tmp_path), "--docs", str(tmp_path)]
    error = RuntimeError("CUDA error: unspecified launch failure")
    assert levers.main(arguments) == 1 and "split-K" in done and not list(tmp_path.glob("*.json"))
    assert "stage loss_Muon_0: failed: CUDA error" in capsys.readouterr().out
    done.clear()
    error = ImportError("needs `pip install torchao`")
    assert levers.main(arguments) == 0 and not done, "what was done is not done again"
    assert "left out: needs" in capsys.readouterr().out
    assert [row["lever"] for row in json.loads((tmp_path / "levers_cpu_tiny.json").read_text())["summary"]] == ["split-K"]


@pytest.mark.parametrize("path", sorted(levers.RESULTS.glob("levers_*.json")), ids=lambda path: path.stem)
def test_recommendations_in_the_results_follow_from_their_rows(path):
    content = json.loads(path.read_text())
    assert content["summary"] == levers.summarise(content) and len(content["summary"]) == len(levers.LEVERS)
    assert content["rule"] == levers.RULE and len(levers.report(content)) > len(levers.LEVERS)
