"""Learning-rate schedules, parameter groups and the weight average."""
import copy
import math

import pytest
import torch

from lightningdit import checkpoint
from lightningdit.guard import Guard
from lightningdit.optim import EMA, AdamW, OffloadedAdamW, build_optimizer, lr_at


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
    assert groups[0]["params"][0] is model["linear"].weight


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


def trained(state, steps, bad=(), model=None, optimizer=None):
    """A small network after some updates; those of the steps in `bad` have NaN gradients, and found_inf says so."""
    if model is None:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
        optimizer = build_optimizer(model, 1e-2, weight_decay=0.1, state=state)
    for step in steps:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.roll(1, 1)).square().mean() * (math.nan if step in bad else 1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.found_inf = torch.tensor(float(step in bad))
        optimizer.step()
    return model, optimizer, loss.item()


def everything(model, optimizer):
    return [tensor.clone() for p in model.parameters() for tensor in (p.detach(), *optimizer.state[p].values())]


def test_adamw_is_pytorchs_bit_for_bit():
    """Weights and state, with updates that are left out in between and a parameter that gets no gradient."""
    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))]
    models[0].register_parameter("unused", torch.nn.Parameter(torch.ones(3)))
    models.append(copy.deepcopy(models[0]))
    settings = dict(lr=1e-2, betas=(0.8, 0.99), eps=1e-6)
    groups = [[dict(params=list(model.parameters())[:2], weight_decay=0.1), dict(params=list(model.parameters())[2:], weight_decay=0.0)]
              for model in models]
    optimizers = [AdamW(groups[0], **settings), torch.optim.AdamW(groups[1], fused=True, **settings)]
    for model, optimizer in zip(models, optimizers, strict=True):
        trained(None, range(6), bad=(0, 3), model=model, optimizer=optimizer)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)
        ours, theirs = optimizers[0].state.get(p, {}), optimizers[1].state.get(q, {})
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert torch.equal(ours[name], theirs[name]), name
            assert ours[name].dtype == theirs[name].dtype, name


def test_eight_bit_moments_train_as_well_as_fp32_in_a_quarter_of_the_memory():
    losses = {state: trained(state, range(150))[2] for state in ("fp32", "8bit")}
    assert losses["fp32"] < 0.5 and losses["8bit"] == pytest.approx(losses["fp32"], rel=0.1)
    size = {}
    for state in losses:
        _, optimizer, _ = trained(state, [0])
        size[state] = sum(value.nbytes for values in optimizer.state.values() for value in values.values())
    assert size["8bit"] < 0.28 * size["fp32"]


def test_eight_bit_leaves_bad_updates_out():
    model, optimizer, _ = trained("8bit", [0, 1, 2])
    before = everything(model, optimizer)
    trained("8bit", [3], bad=[3], model=model, optimizer=optimizer)
    after = everything(model, optimizer)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained("8bit", [4], model=model, optimizer=optimizer)
    assert not torch.equal(before[0], model[0].weight) and Guard(optimizer)


def test_eight_bit_state_survives_a_checkpoint_bitwise(tmp_path):
    model, optimizer, _ = trained("8bit", range(5))
    path = checkpoint.save_checkpoint(tmp_path, 5, dict(trainer=checkpoint.trainer_tensors(model, optimizer)), {})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    trained("8bit", range(5, 8), model=model, optimizer=optimizer)
    other, fresh, _ = trained("8bit", [9])
    other.load_state_dict(weights)
    checkpoint.load_trainer(path, other, fresh)
    trained("8bit", range(5, 8), model=other, optimizer=fresh)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_the_update_on_the_host_is_adamw_bitwise_and_leaves_bad_updates_out():
    models = {state: trained(state, range(20), bad=(0, 7)) for state in ("fp32", "cpu")}
    model, optimizer, _ = models["cpu"]
    assert type(optimizer) is OffloadedAdamW and optimizer.state[model[0].weight]["step"] == 18
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), everything(*models["fp32"][:2]), strict=True))
    before = everything(model, optimizer)
    trained("cpu", [20], bad=[20], model=model, optimizer=optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, everything(model, optimizer), strict=True))
    assert Guard(optimizer)


@pytest.mark.parametrize("saved, loaded", [("cpu", "cpu"), ("fp32", "cpu"), ("cpu", "fp32")])
def test_a_checkpoint_goes_on_bitwise_on_either_side(tmp_path, saved, loaded):
    """The loaded weights, too, are those that the next update on the host begins with: not those of its own earlier updates."""
    model, optimizer, _ = trained(saved, range(5))
    path = checkpoint.save_checkpoint(tmp_path, 5, dict(model=model.state_dict(), trainer=checkpoint.trainer_tensors(model, optimizer)), {})
    trained(saved, range(5, 8), model=model, optimizer=optimizer)
    other, fresh, _ = trained(loaded, [9, 11])
    checkpoint.load_into(path, "model", other.state_dict())
    checkpoint.load_trainer(path, other, fresh)
    trained(loaded, range(5, 8), model=other, optimizer=fresh)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), everything(other, fresh), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
def test_the_update_on_the_host_of_a_gpu(tmp_path):
    """Beside AdamW on the device: the same weights to rounding, 8 bytes a parameter less, and a checkpoint that goes on bitwise."""
    def train(state, steps, model=None, optimizer=None):
        if model is None:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(512, 2048), torch.nn.Tanh(), torch.nn.Linear(2048, 512)).cuda()
            optimizer = build_optimizer(model, 1e-3, weight_decay=0.1, state=state)
        for step in steps:
            x = torch.randn(64, 512, generator=torch.Generator().manual_seed(step)).cuda()
            bad = step == 3
            ((model(x) - x.roll(1, 1)).square().mean() * (math.nan if bad else 1)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.found_inf = torch.tensor(float(bad), device="cuda")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return model, optimizer

    held, results, (initial, _) = {}, {}, train("fp32", [])
    train("fp32", [0])  # allocates workspaces
    for state in ("fp32", "cpu"):
        begin = torch.cuda.memory_allocated()
        results[state] = train(state, range(20))
        held[state] = torch.cuda.memory_allocated() - begin
    model, optimizer = results["cpu"]
    parameters = sum(p.numel() for p in model.parameters())
    assert held["fp32"] - held["cpu"] == pytest.approx(8 * parameters, rel=0.02)
    assert all(tensor.device.type == "cpu" for values in optimizer.state.values() for tensor in values.values())
    for ours, theirs, begin in zip(model.parameters(), results["fp32"][0].parameters(), initial.parameters(), strict=True):
        assert (ours - theirs).norm() < 1e-2 * (theirs - begin).norm()  # where a gradient is near 0, Adam amplifies its rounding

    tensors = dict(model=model.state_dict(), trainer=checkpoint.trainer_tensors(model, optimizer))
    path = checkpoint.save_checkpoint(tmp_path, 20, tensors, {})
    train("cpu", range(20, 25), model, optimizer)
    other, fresh = train("cpu", [40])
    checkpoint.load_into(path, "model", other.state_dict())
    checkpoint.load_trainer(path, other, fresh)
    assert all(tensor.device.type == "cpu" for values in fresh.state.values() for tensor in values.values())
    train("cpu", range(20, 25), other, fresh)
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), everything(other, fresh), strict=True))
