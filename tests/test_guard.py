"""The guard keeps bad updates from the weights on the device, and judges spikes by medians."""
import math

import pytest
import torch

from lightningdit.guard import LEFT_OUT, NON_FINITE, SPIKE, Guard
from lightningdit.optim import build_optimizer


def setup(**options):
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    optimizer = build_optimizer(model, 1e-3)
    return model, optimizer, Guard(optimizer, **options)


def update(model, optimizer, guard, factor=1.0, **options):
    x = torch.linspace(-1, 1, 8).view(2, 4)
    loss = (model(x) - 3).square().mean() * factor
    optimizer.zero_grad()
    loss.backward()
    verdict = guard.judge(loss, torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]), **options)
    optimizer.step()
    return verdict.item()


def snapshot(model, optimizer):
    return [t.clone() for p in model.parameters() for t in (p.detach(), *optimizer.state[p].values())]


@pytest.mark.parametrize("factor", [math.nan, math.inf, -math.inf])
def test_a_non_finite_update_changes_nothing(factor):
    model, optimizer, guard = setup()
    for _ in range(3):
        assert update(model, optimizer, guard) == 0
    before, history = snapshot(model, optimizer), {name: t.clone() for name, t in guard.tensors().items()}
    assert update(model, optimizer, guard, factor) == NON_FINITE
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), before, strict=True))
    assert all(torch.equal(t.nan_to_num(), history[name].nan_to_num()) for name, t in guard.tensors().items())
    assert update(model, optimizer, guard) == 0
    assert not torch.equal(snapshot(model, optimizer)[0], before[0])


def test_a_spike_is_skipped_and_a_slow_rise_is_not():
    model, optimizer, guard = setup(threshold=8.0, window=16)
    for i in range(20):
        assert update(model, optimizer, guard, 1 + 0.2 * math.sin(i)) == 0
    before = snapshot(model, optimizer)
    assert update(model, optimizer, guard, 1e4) == SPIKE
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), before, strict=True))
    for i in range(40):
        assert update(model, optimizer, guard, 1.05**i) == 0


def test_no_spike_is_called_before_half_a_window_or_without_a_threshold():
    model, optimizer, guard = setup(threshold=8.0, window=16)
    assert [update(model, optimizer, guard, factor) for factor in (1.0, 1.1, 1e6)] == [0, 0, 0]
    model, optimizer, guard = setup(threshold=None, window=8)
    assert [update(model, optimizer, guard, factor) for factor in (*[1.0] * 10, 1e6, math.nan)] == [0] * 11 + [NON_FINITE]


def test_a_batch_can_be_left_out():
    model, optimizer, guard = setup()
    update(model, optimizer, guard)
    before = snapshot(model, optimizer)
    assert update(model, optimizer, guard, skip=True) == LEFT_OUT
    assert all(torch.equal(a, b) for a, b in zip(snapshot(model, optimizer), before, strict=True)) and guard.count == 1


def test_bad_input():
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="optimizer: got SGD without fused=True"):
        Guard(torch.optim.SGD(model.parameters(), lr=0.1))
    optimizer = build_optimizer(model, 1e-3)
    with pytest.raises(ValueError, match="threshold: got -1"):
        Guard(optimizer, threshold=-1)
    with pytest.raises(ValueError, match="window: got 3"):
        Guard(optimizer, window=3)
