"""The model against what the official implementation computed, and its weights in and out."""
import pytest
import torch
import torch.nn.functional as F

from lightningdit import checkpoint
from lightningdit.model import PRESETS, LightningDiT, forward_flops

GOLDENS = ["dit_lightning", "dit_lightning_head72", "dit_qknorm", "dit_plain_dit", "dit_no_shift", "dit_learn_sigma_patch2"]
LIGHTNING = dict(use_swiglu=True, use_rope=True, use_rmsnorm=True)
TINY = dict(input_size=4, in_channels=4, hidden_size=32, depth=2, num_heads=2, num_classes=5, **LIGHTNING)


def relative_error(got, expected):
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def official(golden, name):
    tensors, metadata = golden(name)
    model = LightningDiT(**metadata["config"]).eval()
    model.load_weights({key.removeprefix("param."): value for key, value in tensors.items() if key.startswith("param.")})
    return model, tensors


@pytest.mark.parametrize("name", GOLDENS)
def test_output_loss_and_every_gradient_of_the_official_model(golden, name):
    model, g = official(golden, name)
    assert set(model.state_dict()) == {key.removeprefix("param.") for key in g if key.startswith("param.")}
    assert relative_error(model(g["x1"], g["t"], g["y"]), g["out"]) < 1e-5
    if "loss_total" not in g:
        return
    t = g["t"].view(-1, 1, 1, 1)
    velocity = model(t * g["x1"] + (1 - t) * g["x0"], g["t"], g["y"])
    mse = (velocity - (g["x1"] - g["x0"])).square().mean((1, 2, 3))
    cos = 1 - F.cosine_similarity(velocity, g["x1"] - g["x0"], dim=1).mean((1, 2))
    assert relative_error(mse, g["loss_mse"]) < 1e-5 and relative_error(cos, g["loss_cos"]) < 1e-5
    (mse.mean() + cos.mean()).backward()
    stored = {key.removeprefix("grad.") for key in g if key.startswith("grad.")}
    assert stored and stored <= {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for key, parameter in model.named_parameters():
        if key in stored:
            assert relative_error(parameter.grad, g[f"grad.{key}"]) < 1e-5, key


@pytest.mark.parametrize("name", GOLDENS)
def test_fixed_tables_are_the_official_ones(golden, name):
    tensors, metadata = golden(name)
    own = LightningDiT(**metadata["config"]).state_dict()
    for key in ("pos_embed", "feat_rope.freqs_cos", "feat_rope.freqs_sin"):
        if f"param.{key}" in tensors:
            torch.testing.assert_close(own[key], tensors[f"param.{key}"], rtol=1e-6, atol=1e-6)


# SEMANTICS of the official logs. L/2 was counted on the 32 x 32 x 4 latents of SD-VAE, the others on 16 x 16 x 32.
@pytest.mark.parametrize("name, millions, latents", [
    ("B/1", 130.56, {}), ("XL/1", 675.26, {}), ("1p0B/1", 1029.4, {}), ("1p6B/1", 1631.8, {}),
    ("L/2", 458.12, dict(input_size=32, in_channels=4)),
])
def test_parameter_counts(name, millions, latents):
    with torch.device("meta"):
        model = LightningDiT(**PRESETS[name], **(dict(input_size=16, in_channels=32) | latents), **LIGHTNING)
    digits = len(str(millions).partition(".")[2])
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, digits) == millions


def test_every_preset_builds():
    assert set(PRESETS) == {f"{size}/{patch}" for size in ("S", "B", "L", "XL", "1p0B", "1p6B") for patch in (1, 2)}
    for preset in PRESETS.values():
        with torch.device("meta"):
            model = LightningDiT(**preset, **LIGHTNING)
            assert model(torch.empty(2, 32, 16, 16), torch.empty(2), torch.empty(2, dtype=torch.long)).shape == (2, 32, 16, 16)


def test_flops_of_xl():
    with torch.device("meta"):
        model = LightningDiT(**PRESETS["XL/1"], **LIGHTNING)
    assert forward_flops(model) == pytest.approx(237.25e9, rel=1e-4)  # counted by hand, layer by layer


def test_zero_initialised_model_outputs_zero_and_is_the_identity_inside():
    model = LightningDiT(**TINY)
    assert model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 4])).abs().max() == 0
    assert model.blocks[0].attn.qkv.weight.std() > 0


def test_residual_stream_is_fp32_under_bf16_autocast():
    model, dtypes = LightningDiT(**TINY), []
    for block in model.blocks:
        block.register_forward_hook(lambda module, inputs, outputs: dtypes.append([outputs[0].dtype, *(v.dtype for v in outputs[1])]))
    with torch.autocast("cpu", torch.bfloat16):
        out = model(torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([0, 4]))
    expected = [torch.float32, torch.bfloat16, torch.float32, torch.bfloat16]  # the stream; y, bias (a parameter) and gate
    assert dtypes == [expected, expected] and out.dtype == torch.bfloat16


def randomised(**changes):
    torch.manual_seed(0)
    model = LightningDiT(**(TINY | changes))
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_label_dropout():
    model = randomised().train()
    x, t, y = torch.randn(64, 4, 4, 4), torch.rand(64), torch.arange(64) % 5
    drop = torch.rand(64) < 0.5
    dropped = model(x, t, y, drop)
    model.eval()
    torch.testing.assert_close(dropped, model(x, t, torch.where(drop, 5, y)))
    assert torch.equal(model(x, t, y), model(x, t, y, torch.zeros(64, dtype=torch.bool)))
    model.train()
    counts = [(model.y_embedder(y) == model.y_embedder.embedding_table.weight[5]).all(1).float().mean() for _ in range(100)]
    assert torch.stack(counts).mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_checkpointed_activations_give_the_same_gradients(compiled):
    x, t, y, drop = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2]), torch.tensor([False, True])
    gradients = []
    for changes in ({}, dict(use_checkpoint=True), dict(use_checkpoint=True, checkpoint_policy="selective")):
        model = randomised(**changes).train()
        if compiled:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend="aot_eager", fullgraph=True)
        model(x, t, y, drop).square().sum().backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for others in gradients[1:]:
        assert len(gradients[0]) == len(others) and all(torch.equal(a, b) for a, b in zip(gradients[0], others, strict=True))


@pytest.mark.parametrize("use_swiglu", [True, False])
def test_a_replaced_or_hooked_linear_layer_is_called(use_swiglu):
    """The ops take over the bias of plain layers only; the output and every gradient are the same either way."""

    class Replaced(torch.nn.Linear):
        """Stands for LoRA's or torchao's linear layer."""

    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2])
    results, calls = [], []
    for change in ("nothing", "class", "hook"):
        model = randomised(use_swiglu=use_swiglu).eval()
        for block in model.blocks:
            for layer in (block.attn.qkv, block.attn.proj, *(getattr(block.mlp, n) for n in (("w12", "w3") if use_swiglu else ("fc2",)))):
                layer.__class__ = Replaced if change == "class" else torch.nn.Linear
                if change == "hook":
                    layer.register_forward_hook(lambda *_: calls.append(1))
        out = model(x, t, y)
        out.square().sum().backward()
        results.append([out.detach(), *(p.grad for p in model.parameters() if p.requires_grad)])
    assert len(calls) == (8 if use_swiglu else 6)
    for other in results[1:]:
        for have, want in zip(other, results[0], strict=True):
            torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())


def test_compiles_without_graph_breaks():
    model = randomised().eval()
    x, t, y = torch.randn(2, 4, 4, 4), torch.rand(2), torch.tensor([1, 2])
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, t, y), model(x, t, y))


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("entry", ["ema", "model"])
def test_weights_in_and_out(tmp_path, suffix, entry):
    model, ema = randomised(), randomised()
    ema.final_layer.linear.bias.data += 1
    path = tmp_path / f"weights{suffix}"
    checkpoint.save_weights(path, model.state_dict(), ema.state_dict())
    state = checkpoint.load_weights(path, entry)
    expected = model if (entry, suffix) == ("model", ".pt") else ema  # a safetensors file holds one set, the EMA
    other = LightningDiT(**TINY)
    other.load_weights(state)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), expected.state_dict().values(), strict=True))


def test_official_pt_with_ddp_prefix(tmp_path):
    model = randomised()
    weights = {f"module.{key}": value for key, value in model.state_dict().items()}
    torch.save({"ema": weights, "config": {"train": {"max_steps": 1}}}, tmp_path / "official.pt")
    other = LightningDiT(**TINY)
    other.load_weights(checkpoint.load_weights(tmp_path / "official.pt"))
    assert torch.equal(other.blocks[1].mlp.w12.weight, model.blocks[1].mlp.w12.weight)
    with pytest.raises(checkpoint.CheckpointError, match="no entry 'model'"):
        checkpoint.load_weights(tmp_path / "official.pt", "model")


def test_state_dict_of_another_model_lists_every_difference_and_changes_nothing():
    model, state = randomised(), randomised(num_classes=7).state_dict()
    state["stranger"] = state.pop("final_layer.linear.bias")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as error:
        model.load_weights(state)
    for text in ("missing final_layer.linear.bias (4,)", "unexpected stranger (4,)",
                 "misshaped y_embedder.embedding_table.weight: got (8, 32), expected (6, 32)", "3 problems"):
        assert text in str(error.value)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_another_resolution_rebuilds_rope_and_interpolates_pos_embed():
    small, large = randomised(), LightningDiT(**(TINY | dict(input_size=8)))
    tables = large.feat_rope.freqs_cos.clone()
    large.load_weights(small.state_dict())
    assert torch.equal(large.feat_rope.freqs_cos, tables)
    expected = F.interpolate(small.pos_embed.view(1, 4, 4, 32).permute(0, 3, 1, 2), size=(8, 8), mode="bicubic").flatten(2).transpose(1, 2)
    torch.testing.assert_close(large.pos_embed.data, expected)
    assert torch.equal(large.blocks[0].attn.qkv.weight, small.blocks[0].attn.qkv.weight)
    large.eval()(torch.randn(1, 4, 8, 8), torch.rand(1), torch.tensor([0]))


@pytest.mark.parametrize("changes, message", [
    (dict(hidden_size=30), "multiple of num_heads = 2 and of 4"),
    (dict(hidden_size=36, num_heads=6), "got 6, expected a multiple of 4 with use_rope"),
    (dict(checkpoint_policy="some"), "checkpoint_policy: got 'some', expected one of selective, full"),
    (dict(patch_size=3), "input_size: got 4, expected a multiple of patch_size = 3"),
])
def test_impossible_shapes(changes, message):
    with pytest.raises(ValueError, match=message):
        LightningDiT(**(TINY | changes))


def test_wrong_inputs():
    model = LightningDiT(**TINY)
    with pytest.raises(ValueError, match=r"x: got shape \(2, 3, 4, 4\), expected \(B, 4, 4, 4\)"):
        model(torch.randn(2, 3, 4, 4), torch.rand(2), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"t, y: got shapes \(1,\) and \(2,\)"):
        model(torch.randn(2, 4, 4, 4), torch.rand(1), torch.tensor([0, 1]))
