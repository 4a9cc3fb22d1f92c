"""The options beyond bf16 and AdamW: each against the plain path, off by default, and refused where it cannot work."""
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lightningdit import checkpoint
from lightningdit import config as configuration
from lightningdit.config import ConfigError, DiTConfig
from lightningdit.guard import NON_FINITE, Guard
from lightningdit.model import LightningDiT
from lightningdit.optim import MuonAdamW, build_optimizer, orthogonalise

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(input_size=4, in_channels=4, hidden_size=32, depth=4, num_heads=2, num_classes=5, use_swiglu=True, use_rope=True,
            use_rmsnorm=True)


def randomised(**changes):
    torch.manual_seed(0)
    model = LightningDiT(**(TINY | changes)).train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def outcome(model, bf16=False):
    """The output and every gradient of one pass, by name."""
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(8, 4, 4, 4, generator=generator), torch.rand(8, generator=generator), torch.arange(8) % 5
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = model(x, t, y, y == 3)
    (out.float() * torch.randn(out.shape, generator=generator)).sum().backward()
    return {"out": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def error(got, truth):
    return {name: ((got[name].double() - true.double()).norm() / true.double().norm()).item() for name, true in truth.items()}


def compiled(model):
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    return model


def parse(*argv):
    return configuration.parse(DiTConfig, argv)


def test_everything_is_off_by_default():
    config = parse()
    assert not config.model.bf16_residual and config.optim.name == "adamw"


@pytest.mark.parametrize("argv, message", [
    ("--model.bf16-residual --precision fp32", "model.bf16_residual: got True, expected false with precision = fp32"),
    ("--optim.name muon --optim.state 8bit", "optim.state: got '8bit', expected fp32 with optim.name = muon"),
    ("--optim.name muon --parallel fsdp", "optim.name: got 'muon', expected adamw with parallel = fsdp"),
    ("--optim.muon-momentum 1", "optim.muon_momentum: got 1.0, expected a number in [0, 1)"),
])
def test_impossible_combinations(argv, message):
    with pytest.raises(ConfigError) as problem:
        parse(*argv.split())
    assert message in str(problem.value)


@pytest.mark.parametrize("arguments, message", [
    ("--model.bf16-residual", "model.bf16_residual: got True, expected false, or precision = bf16: precision = auto is fp32 on cpu"),
])
def test_what_the_device_cannot_do_is_said_before_any_work(tmp_path, arguments, message):
    command = [sys.executable, str(ROOT / "train/dit.py"), "--run", str(tmp_path / "run"), "--device", "cpu", *arguments.split()]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 1 and message in result.stderr and not (tmp_path / "run").exists(), result.stderr


def test_bf16_residual_stream():
    """bf16 from the first block to the final layer, under autocast only; the error to fp32 is that of bf16, a few times over."""
    truth, plain = outcome(randomised()), outcome(randomised(), bf16=True)
    model, dtypes = randomised(bf16_residual=True), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: dtypes.append((inputs[0].dtype, outputs[0].dtype)))
    ours = outcome(model, bf16=True)
    assert dtypes == 4 * [(torch.bfloat16, torch.bfloat16)]
    errors, usual = error(ours, truth), error(plain, truth)
    assert all(errors[name] <= 4 * usual[name] for name in truth), {n: (errors[n], usual[n]) for n in truth}
    assert errors["out"] > usual["out"]
    assert all(torch.equal(value, truth[name]) for name, value in outcome(randomised(bf16_residual=True)).items())
    again = outcome(compiled(randomised(bf16_residual=True)), bf16=True)
    assert max(error(again, truth)[name] / errors[name] for name in truth) < 2


def test_orthogonalised_matrices_keep_their_singular_vectors():
    """Singular values from 0.05 to 1 of wide, tall and square matrices come out within 0.6 and 1.3; bf16 does the same."""
    for rows, columns in ((24, 40), (40, 24), (32, 32)):
        u, _, vh = torch.linalg.svd(torch.randn(3, rows, columns, dtype=torch.float64), full_matrices=False)
        matrices = u * torch.linspace(0.05, 1, min(rows, columns), dtype=torch.float64) @ vh
        out = u.mT @ orthogonalise(matrices) @ vh.mT
        values = out.diagonal(dim1=1, dim2=2)
        torch.testing.assert_close(out, torch.diag_embed(values), rtol=0, atol=1e-9)
        assert 0.6 < values.min() and values.max() < 1.3
        alone = torch.stack([orthogonalise(one[None])[0] for one in matrices])
        torch.testing.assert_close(orthogonalise(matrices), alone)
        rough = orthogonalise(matrices.bfloat16())
        assert rough.dtype == torch.bfloat16 and (rough.double() - orthogonalise(matrices)).abs().max() < 0.05


def with_gradients(model, seed=0):
    for i, p in enumerate(p for p in model.parameters() if p.requires_grad):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(1000 * seed + i))
    return model


def muon_of(model, **options):
    return build_optimizer(model, 1e-2, name="muon", **options)


def test_muon_steps_are_those_of_torch_and_of_adamw():
    """torch.optim.Muon, in bf16, on the separate matrices; fused AdamW on all else."""
    model, twin = randomised(), randomised()
    optimizer = muon_of(model, weight_decay=0.1)
    rest = [p for name, p in twin.named_parameters() if p.requires_grad and (p.ndim < 2 or "blocks" not in name or "adaLN" in name)]
    packed = {name: optimizer.parts[p] for name, p in model.named_parameters() if p in optimizer.parts}
    assert packed == {f"blocks.{i}.{name}.weight": count for i in range(4)
                      for name, count in {"attn.qkv": 3, "attn.proj": 1, "mlp.w12": 2, "mlp.w3": 1}.items()}
    apart = {f"{name}.{i}": part.clone() for name, count in packed.items()
             for i, part in enumerate(twin.get_parameter(name).detach().chunk(count))}
    theirs = torch.optim.Muon(list(apart.values()), lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(twin, 1e-2, weight_decay=0.1)
    assert len(optimizer.param_groups[0]["params"]) == 16 and sum(len(g["params"]) for g in optimizer.param_groups[1:]) == len(rest)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for seed in range(3):
        with_gradients(model, seed), with_gradients(twin, seed)
        for name, part in apart.items():
            weight, _, i = name.rpartition(".")
            p = twin.get_parameter(weight)
            part.grad = p.grad.chunk(p.numel() // part.numel())[int(i)]
        optimizer.step(), theirs.step(), adamw.step()
    for name, p in model.named_parameters():
        if f"{name}.0" not in apart:
            assert torch.equal(p, twin.get_parameter(name)), name
            continue
        expected = torch.cat([part for key, part in apart.items() if key.rpartition(".")[0] == name])
        moved = expected - before[name]
        assert ((p - expected).norm() / moved.norm()) < 0.02, name  # bf16 against fp32


def test_packed_matrices_are_orthogonalised_apart():
    """Gradients of q a thousand times those of k and v: each part still moves by the same amount, 0.2 times the learning rate."""
    model = randomised()
    optimizer, weight = muon_of(model), model.blocks[0].attn.qkv.weight
    before = weight.detach().clone()
    with_gradients(model)
    weight.grad[:32] *= 1000
    optimizer.step()
    assert [part.square().mean().sqrt().item() for part in (weight.detach() - before).chunk(3)] == pytest.approx(3 * [2e-3], rel=0.2)


def trained(model, optimizer, guard, steps, bad=()):
    for step in steps:
        with_gradients(model, step)
        loss = torch.tensor(math.nan if step in bad else 1.0)
        if step in bad:
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.fill_(math.nan)
        verdict = guard.judge(loss, torch.tensor(1.0))
        optimizer.step()
        assert verdict == (NON_FINITE if step in bad else 0)


def everything(model, optimizer):
    return [t.clone() for p in model.parameters() for t in (p.detach(), *dict(sorted(optimizer.state[p].items())).values())]


def test_muon_leaves_bad_updates_out():
    model = randomised()
    optimizer = muon_of(model, weight_decay=0.1)
    guard = Guard(optimizer)
    trained(model, optimizer, guard, [0, 1])
    before = everything(model, optimizer)
    trained(model, optimizer, guard, [2], bad=[2])
    after = everything(model, optimizer)
    assert len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trained(model, optimizer, guard, [3])
    clean = randomised()
    other = muon_of(clean, weight_decay=0.1)
    trained(clean, other, Guard(other), [0, 1, 3])
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), everything(clean, other), strict=True))


def test_muon_state_survives_a_checkpoint_bitwise(tmp_path):
    model = randomised()
    optimizer = muon_of(model)
    trained(model, optimizer, Guard(optimizer), range(3))
    path = checkpoint.save_checkpoint(tmp_path, 3, dict(trainer=checkpoint.trainer_tensors(model, optimizer)), {})
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    trained(model, optimizer, Guard(optimizer), range(3, 5))
    other = randomised()
    fresh = muon_of(other)
    other.load_state_dict(weights)
    checkpoint.load_trainer(path, other, fresh)
    trained(other, fresh, Guard(fresh), range(3, 5))
    assert all(torch.equal(a, b) for a, b in zip(everything(model, optimizer), everything(other, fresh), strict=True))


def test_muon_needs_blocks():
    with pytest.raises(ValueError, match="optim.name: got 'muon' for a model without blocks"):
        muon_of(torch.nn.Linear(2, 2))
    assert isinstance(muon_of(randomised()), MuonAdamW)
