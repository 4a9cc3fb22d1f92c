"""The options beyond bf16 and AdamW: each against the plain path, off by default, and refused where it cannot work."""
import math
from pathlib import Path

import pytest
import torch

from lightningdit import checkpoint
from lightningdit import config as configuration
from lightningdit.config import ConfigError, DiTConfig
from lightningdit.guard import NON_FINITE, Guard
from lightningdit.model import LightningDiT, SplitLinear, gradient_parts, sum_of_products, to_float8
from lightningdit.optim import MuonAdamW, build_optimizer, orthogonalise
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

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
    assert not config.model.batch_adaln and config.model.split_k == 1 and config.precision == "auto" and config.parallel == "auto"


@pytest.mark.parametrize("argv, message", [
    ("--model.bf16-residual --precision fp32", "model.bf16_residual: got True, expected false with precision = fp32"),
    ("--optim.name muon --optim.state 8bit", "optim.state: got '8bit', expected fp32 with optim.name = muon"),
    ("--optim.name muon --parallel fsdp", "optim.name: got 'muon', expected adamw with parallel = fsdp"),
    ("--optim.muon-momentum 1", "optim.muon_momentum: got 1.0, expected a number in [0, 1)"),
    ("--model.batch-adaln --parallel hsdp", "model.batch_adaln: got True, expected false with parallel = hsdp: it needs whole weights"),
    ("--model.split-k 0", "model.split_k: got 0, expected a positive number; 1 is none"),
    ("--precision fp8 --parallel fsdp", "precision: got 'fp8', expected bf16 with parallel = fsdp"),
    ("--precision fp8 --model.split-k 2", "model.split_k: got 2, expected 1 with precision = fp8"),
    ("--precision fp8 --model.hidden-size 136 --model.num-heads 2", "model.hidden_size is 136, the MLP's width 362, tokens an image 256"),
])
def test_impossible_combinations(argv, message):
    with pytest.raises(ConfigError) as problem:
        parse(*argv.split())
    assert message in str(problem.value)


def test_what_the_device_cannot_do_is_said_before_any_work(script, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})
    parse("--model.bf16-residual").check_device(torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_f": True})
    message = "model.bf16_residual: got True, expected false, or precision = bf16: on this cpu it is fp32"
    with pytest.raises(ConfigError, match=message):
        parse("--model.bf16-residual").check_device(torch.device("cpu"))
    result = script(ROOT / "train" / "dit.py", "--run", tmp_path / "run", "--device", "cpu", "--precision", "fp8", check=False)
    assert result.returncode == 1 and not (tmp_path / "run").exists()
    assert "precision: got 'fp8', expected bf16 or fp32 on this cpu device" in result.stderr, result.stderr


@pytest.mark.parametrize("argv, expected", [("--optim.name muon", "ddp"), ("--model.batch-adaln", "ddp"), ("--precision fp8", "ddp"),
                                            ("--model.split-k 4 --model.bf16-residual", "auto")])
def test_what_needs_whole_weights_is_never_sharded_by_auto(argv, expected):
    assert parse(*argv.split()).parallel == expected


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


def test_batched_modulations():
    """One product gives what the blocks' own give: values and gradients to rounding, eager in fp32 and compiled in bf16."""
    for bf16 in (False, True):
        truth, plain = outcome(randomised()), outcome(randomised(), bf16)
        model = randomised(batch_adaln=True)
        ours, usual = error(outcome(compiled(model) if bf16 else model, bf16), truth), error(plain, truth)
        assert ours.keys() == usual.keys() and all(ours[name] <= 2 * usual[name] + 1e-6 for name in truth), (ours, usual)
    model, c = randomised(batch_adaln=True), torch.randn(3, 32)
    for block, modulation in zip(model.blocks, model.block_modulations(c), strict=True):
        torch.testing.assert_close(modulation, block.adaLN_modulation(c))
    assert model.state_dict().keys() == randomised().state_dict().keys()


@pytest.mark.parametrize("shape, most, parts", [
    ((1152, 1152), 4, 4), ((3456, 1152), 4, 1), ((6144, 1152), 4, 2), ((1152, 3072), 4, 4), ((96, 96), 8, 8), ((1152, 1152), 1, 1)])
def test_parts_of_a_gradient(shape, most, parts):
    assert gradient_parts(128 * 256, shape, most) == parts
    assert gradient_parts(12, (96, 96), most) == min(most, 4) and gradient_parts(0, shape, most) == gradient_parts(7, shape, most) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("parts", [1, 4])
def test_split_products(dtype, parts):
    inputs = dict(x=random_tensor(4, 24, 20, dtype=dtype, seed=1), weight=random_tensor(36, 20, dtype=dtype, seed=2))
    assert_matches_truth(lambda x, weight: SplitLinear.apply(x, weight, parts), torch.nn.functional.linear, inputs)
    x, grad = random_tensor(96, 20, seed=1), random_tensor(96, 36, seed=2)
    torch.testing.assert_close(sum_of_products(grad.view(parts, -1, 36), x.view(parts, -1, 20)), grad.mT @ x, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("policy", ["none", "selective"])
def test_split_gradients_of_a_model(policy):
    """Eager in fp32, compiled in bf16, with and without recomputation: as far from the truth as the plain gradients are."""
    options = dict(use_checkpoint=policy != "none", checkpoint_policy=policy if policy != "none" else "full")
    for bf16 in (False, True):
        truth, plain = outcome(randomised()), outcome(randomised(), bf16)
        model = randomised(split_k=4, **options)
        ours, usual = error(outcome(compiled(model) if bf16 else model, bf16), truth), error(plain, truth)
        assert ours.keys() == usual.keys() and all(ours[name] <= 2 * usual[name] + 1e-6 for name in truth), (ours, usual)
    assert gradient_parts(8 * 16, model.blocks[0].attn.qkv.weight.shape, model.blocks[0].attn.qkv.split_k) == 4


DIVISIBLE = dict(mlp_ratio=3.0)  # an MLP of 64 for TINY: float8 products need multiples of 16


def test_float8_replaces_the_layers_that_see_tokens_and_keeps_their_parameters():
    model = randomised(**DIVISIBLE)
    before = [(name, id(p)) for name, p in model.named_parameters()]
    to_float8(model, emulate=True)
    assert [(name, id(p)) for name, p in model.named_parameters()] == before
    replaced = {name for name, layer in model.named_modules() if type(layer).__name__ == "Float8Linear"}
    assert replaced == {f"blocks.{i}.{name}" for i in range(4) for name in ("attn.qkv", "attn.proj", "mlp.w12", "mlp.w3")}
    with pytest.raises(ValueError, match=r"blocks.0.attn.qkv: got 40 inputs and 120 outputs, expected multiples of 16"):
        to_float8(randomised(hidden_size=40), emulate=True)


def test_emulated_float8_is_near_and_is_not_bf16():
    """e4m3 keeps 3 bits of a value, bf16 7: errors of a few percent in the layers' gradients, compiled as in eager mode."""
    truth, plain = outcome(randomised(**DIVISIBLE)), outcome(randomised(**DIVISIBLE), bf16=True)
    usual = error(plain, truth)
    for change in (lambda model: model, compiled):
        model = randomised(**DIVISIBLE)
        to_float8(model, emulate=True)
        ours = error(outcome(change(model), bf16=True), truth)
        assert ours.keys() == usual.keys() and max(ours.values()) < 0.2, ours
        for name, layer in model.named_modules():
            if type(layer).__name__ == "Float8Linear":
                assert ours[f"{name}.weight"] > 3 * usual[f"{name}.weight"], name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs float8 products")
def test_float8_on_a_gpu_is_what_is_emulated():
    pytest.importorskip("torchao")
    generator = torch.Generator().manual_seed(1)
    x, t, y = torch.randn(8, 4, 4, 4, generator=generator).cuda(), torch.rand(8, generator=generator).cuda(), torch.arange(8).cuda() % 5
    results = []
    for emulate in (False, True):
        model = randomised(**DIVISIBLE).cuda()
        to_float8(model, emulate)
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x, t, y, y == 3)
        out.float().square().sum().backward()
        results.append({"out": out.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert all(value < 0.05 for value in error(*results).values())
