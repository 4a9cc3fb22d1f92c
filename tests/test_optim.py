"""Learning-rate schedules, parameter groups and the weight average."""
import pytest
import torch

from lightningdit.optim import EMA, build_optimizer, lr_at


def test_schedules():
    linear = [lr_at(step, lr=1.0, steps=10, warmup=4, schedule="linear") for step in range(10)]
    assert linear[:4] == [0.25, 0.5, 0.75, 1.0]
    assert linear[4:] == pytest.approx([1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    cosine = [lr_at(step, lr=2.0, steps=100, schedule="cosine", final_lr_fraction=0.1) for step in range(101)]
    assert cosine[0] == 2.0 and cosine[50] == pytest.approx(1.1) and cosine[100] == pytest.approx(0.2)
    assert {lr_at(step, lr=2e-4, steps=10) for step in range(10)} == {2e-4}


def test_weight_decay_acts_on_matrices_only():
    model = torch.nn.ModuleDict(dict(linear=torch.nn.Linear(3, 2), norm=torch.nn.LayerNorm(2), y_embedder=torch.nn.Embedding(4, 2)))
    groups = build_optimizer(model, 1e-3, weight_decay=0.1).param_groups
    assert [len(group["params"]) for group in groups] == [1, 4] and [group["weight_decay"] for group in groups] == [0.1, 0.0]
    assert groups[0]["params"][0] is model["linear"].weight and groups[0]["fused"]


def test_average_follows_the_official_rule_and_its_warm_up():
    model = torch.nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(0.0)
    plain, warm = EMA(model, 0.9), EMA(model, 0.9, warmup=True)
    expected_plain = expected_warm = 0.0
    for step in range(20):
        model.weight.data.fill_(step + 1.0)
        plain.update(step)
        warm.update(step)
        expected_plain = 0.9 * expected_plain + 0.1 * (step + 1)
        decay = min(0.9, (1 + step) / (10 + step))
        expected_warm = decay * expected_warm + (1 - decay) * (step + 1)
    assert plain.model.weight.item() == pytest.approx(expected_plain, rel=1e-5)
    assert warm.model.weight.item() == pytest.approx(expected_warm, rel=1e-5)
    assert not plain.model.training and not plain.model.weight.requires_grad
