"""bench/solvers.py: errors are what it says, and a solver of higher order with more evaluations comes closer to the reference."""

import json

import pytest
import torch

from bench import solvers
from lightningdit import config as configuration
from lightningdit.config import DiTConfig
from lightningdit.model import LightningDiT


def test_relative_errors():
    reference = torch.tensor([3.0, -4.0, 1.0, 2.0]).view(2, 1, 1, 2)
    assert solvers.relative_errors(reference * torch.tensor([1.1, 1.0]).view(2, 1, 1, 1), reference) == pytest.approx([0.1, 0], abs=1e-6)


def test_table_marks_the_best():
    rows = [dict(solver=s, evaluations=8, guidance_scale=1.0, median=m) for s, m in (("euler", 0.2), ("ab2", 0.05), ("unipc", 0.1))]
    assert solvers.table(rows, 1.0)[2] == "| 8 | 20 % |  | **5 %** |  | 10 % |"


def test_measured_on_a_small_model(monkeypatch, tmp_path):
    settings = configuration.load(DiTConfig, solvers.ROOT / "train" / "configs" / "digits.yaml")
    settings.data.num_classes, settings.model.depth, settings.model.hidden_size, settings.model.num_heads = 10, 1, 32, 4
    torch.manual_seed(0)
    model = LightningDiT(**settings.model_arguments()).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    monkeypatch.setattr(solvers, "load_run", lambda *a, **k: (settings, model, None, None))
    arguments = ["--run", "run", "--images", "4", "--evaluations", "8", "32", "--reference-steps", "200"]
    solvers.main([*arguments, "--out", str(tmp_path / "a.json")])
    record = json.loads((tmp_path / "a.json").read_text())
    error = {(row["solver"], row["evaluations"]): row["median"] for row in record["rows"] if row["guidance_scale"] == 1.5}
    assert len(record["rows"]) == 2 * 2 * 5
    solvers.figure(record["rows"]).savefig(tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
    for solver in solvers.SOLVERS:
        assert error[solver, 32] < 0.5 * error[solver, 8], solver
    assert error["ab2", 32] < 0.5 * error["euler", 32]
