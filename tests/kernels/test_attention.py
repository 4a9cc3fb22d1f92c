"""rope_attention against rotation matrices, torch's norms and an explicit softmax in fp64."""

import importlib.util
import sys
import types

import pytest
import torch
import torch.nn.functional as nnf
from torch._subclasses.fake_tensor import FakeTensorMode

from lightningdit_kernels import attention, backends, native, rope_attention
from lightningdit_kernels.attention import fused, rope_ref
from lightningdit_kernels.testing import FROZEN, assert_matches_truth, example_inputs, random_tensor, values_and_gradients
from lightningdit_kernels.testing import rope_frequencies as frequencies
from lightningdit_kernels.testing import token_grid as grid


def eager(qkv, positions=None, freqs=None, q_weight=None, k_weight=None, q_bias=None, k_bias=None, bias=None, eps=1e-6, center=False):
    qkv = qkv if bias is None else qkv + bias
    q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, H, N, Dh) each
    width = q.shape[-1:]
    if q_weight is not None:
        if center:
            q, k = nnf.layer_norm(q, width, q_weight, q_bias, eps), nnf.layer_norm(k, width, k_weight, k_bias, eps)
        else:
            q, k = nnf.rms_norm(q, width, q_weight, eps), nnf.rms_norm(k, width, k_weight, eps)
    if positions is not None:
        # A rotation is the exponential of its generator: one (Dh, Dh) matrix per token, block diagonal in pairs.
        angles = (positions[:, :, None].double() * freqs.double()).flatten(1)
        turn = torch.tensor([[0.0, -1.0], [1.0, 0.0]], dtype=torch.float64)
        rotation = torch.stack([torch.matrix_exp(torch.kron(torch.diag(a), turn)) for a in angles]).to(q.dtype)
        q, k = torch.einsum("nij,bhnj->bhni", rotation, q), torch.einsum("nij,bhnj->bhni", rotation, k)
    weights = torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1)
    return (weights @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(2, 4, 4, 2, 24), (1, 7, 9, 1, 72), (2, 3, 5, 3, 20), (1, 1, 1, 1, 4)], ids=str)
def test_rope_attention_matches_truth(shape, dtype):
    batch, rows, columns, heads, head_dim = shape
    inputs = dict(qkv=random_tensor(batch, rows * columns, 3, heads, head_dim, dtype=dtype), positions=grid(rows, columns))
    assert_matches_truth(rope_attention, eager, inputs | dict(freqs=frequencies(head_dim)), frozen=("freqs",))


@pytest.mark.skipif(not native.available, reason="the definition keeps no table")
def test_kept_angles_are_those_of_the_positions_and_freqs(monkeypatch):
    """The table is computed once for one grid, and again where positions or freqs changed, in place and unseen by version counters too."""
    computed, rope_table = [], attention.rope_table
    monkeypatch.setattr(attention, "rope_table", lambda *arguments: computed.append(1) or rope_table(*arguments))
    qkv, positions, freqs = random_tensor(2, 12, 3, 2, 16), grid(3, 4).float(), frequencies(16)
    attention._tables.clear()
    first = rope_attention(qkv, positions, freqs)
    assert torch.equal(rope_attention(qkv, positions.clone(), freqs), first) and len(computed) == 1
    positions.data += 0.5 * torch.arange(12.0)[:, None]
    second, truth = rope_attention(qkv, positions, freqs), eager(qkv.double(), positions, freqs).float()
    torch.testing.assert_close(second, truth, rtol=1e-4, atol=1e-5)
    freqs.data *= 2
    third, truth = rope_attention(qkv, positions, freqs), eager(qkv.double(), positions, freqs).float()
    torch.testing.assert_close(third, truth, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(first, second, atol=1e-2) and not torch.allclose(second, third, atol=1e-2) and len(computed) == 3
    with torch.inference_mode():  # what sampling kept, training may use
        rope_attention(qkv, positions + 1, freqs)
    values_and_gradients(rope_attention, dict(qkv=qkv, positions=positions + 1, freqs=freqs), frozen=("freqs",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", ["none", "rms", "layer"])
@pytest.mark.parametrize("rope", [False, True])
def test_qk_norm(norm, rope, dtype):
    inputs = dict(qkv=random_tensor(2, 12, 3, 2, 16, dtype=dtype))
    if norm != "none":
        inputs |= {f"{name}_weight": 1 + random_tensor(16, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 1)}
    if norm == "layer":
        inputs |= {f"{name}_bias": random_tensor(16, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 3)} | dict(center=True)
        inputs |= dict(eps=1e-5)
    if rope:
        inputs |= dict(positions=grid(3, 4), freqs=frequencies(16))
    # Without RoPE, softmax is blind to the key's bias: that gradient is zero, and what is computed is rounding noise.
    assert_matches_truth(rope_attention, eager, inputs, frozen=("freqs",) if rope else ("freqs", "k_bias"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_bias_of_the_qkv_layer(norm, dtype):
    inputs = dict(qkv=random_tensor(2, 12, 3, 2, 16, dtype=dtype), bias=random_tensor(3, 2, 16, dtype=dtype, seed=1))
    if norm:
        inputs |= {f"{name}_weight": 1 + random_tensor(16, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 2)}
    assert_matches_truth(rope_attention, eager, inputs | dict(positions=grid(3, 4), freqs=frequencies(16)), frozen=("freqs",))


# Rows, columns, heads, Dh: N below and above one vector and one block of queries, odd; Dh of every remainder to a vector.
CPU_SHAPES = [(2, 2, 2, 8), (3, 5, 3, 20), (9, 9, 2, 72), (4, 5, 1, 136), (5, 7, 1, 4)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CPU_SHAPES, ids=str)
def test_cpu_backends(shape, dtype, backend):
    rows, columns, heads, head_dim = shape
    inputs = dict(qkv=random_tensor(2, rows * columns, 3, heads, head_dim, dtype=dtype))
    inputs |= {f"{name}_weight": 1 + random_tensor(head_dim, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 1)}
    inputs |= {f"{name}_bias": random_tensor(head_dim, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 3)}
    inputs |= dict(bias=random_tensor(3, heads, head_dim, dtype=dtype, seed=5) / 2, eps=1e-5, center=True)
    inputs |= dict(positions=1.7 * grid(rows, columns).double(), freqs=frequencies(head_dim))
    assert_matches_truth(rope_attention, eager, inputs, frozen=("positions", "freqs"))


def test_cpu_backends_do_least(backend):
    """Neither norm nor rotation nor bias, and more queries than a block holds."""
    assert_matches_truth(rope_attention, eager, dict(qkv=random_tensor(1, 150, 3, 1, 12)))


@pytest.mark.skipif(not native.available, reason=native.about)
def test_native_results_do_not_depend_on_threads():
    inputs = example_inputs("rope_attention", 3, 7, 9, 48, 2)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(values_and_gradients(rope_attention, inputs, FROZEN))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(results[0][name], value) for name, value in other.items())


@pytest.mark.skipif(not native.available, reason=native.about)
def test_native_passes_infinity_and_nan_on():
    for poison in (float("nan"), float("inf")):
        qkv = random_tensor(2, 6, 3, 1, 8)
        qkv[0, 2, 0, 0, 3] = poison
        out = rope_attention(qkv)
        assert out[0, 2].isnan().all() and out[0, [0, 1, 3, 4, 5]].isfinite().all() and out[1].isfinite().all()


def test_a_gradient_of_the_angles_is_sdpas():
    freqs = frequencies(8).requires_grad_()
    (gradient,) = torch.autograd.grad(rope_attention(random_tensor(1, 6, 3, 1, 8), grid(2, 3), freqs).square().sum(), freqs)
    assert gradient.abs().min() > 0


def test_non_contiguous_and_empty_batch():
    inputs = dict(positions=grid(2, 3), freqs=frequencies(8))
    strided = random_tensor(3, 6, 2, 2, 16)[..., ::2].permute(2, 1, 0, 3, 4)
    assert strided.shape == (2, 6, 3, 2, 8)
    assert_matches_truth(rope_attention, eager, inputs | dict(qkv=strided), frozen=("freqs",))
    assert rope_attention(torch.zeros(0, 6, 3, 2, 8), **inputs).shape == (0, 6, 16)


@pytest.mark.parametrize("name", ["dit_lightning", "dit_lightning_head72", "dit_qknorm"])
def test_rope_turns_by_the_official_tables(golden, name):
    tensors, metadata = golden(name)
    cos, sin = tensors["param.feat_rope.freqs_cos"], tensors["param.feat_rope.freqs_sin"]  # (N, Dh), each entry twice
    side, head_dim = round(len(cos) ** 0.5), cos.shape[1]
    unit = torch.tensor([1.0, 0.0]).repeat(head_dim // 2).expand(1, len(cos), 1, head_dim)
    turned = rope_ref(unit, grid(side, side), frequencies(head_dim))[0, :, 0]
    assert torch.allclose(turned[:, 0::2], cos[:, 0::2], atol=1e-6) and torch.allclose(turned[:, 1::2], sin[:, 0::2], atol=1e-6)


@pytest.mark.parametrize("name", ["sdpa", "auto"])
def test_autocast_casts_after_the_rotation(name):
    inputs = dict(positions=grid(8, 8), freqs=frequencies(16))
    qkv = 4 * random_tensor(1, 64, 3, 1, 16)
    with torch.autocast("cpu", torch.bfloat16):
        inside = rope_attention(qkv, **inputs, backend=name)
    assert inside.dtype == torch.bfloat16
    q, k, v = qkv.unbind(2)
    q, k = (rope_ref(a, inputs["positions"], inputs["freqs"]) for a in (q, k))
    rotated_then_cast = torch.stack((q, k, v), 2).bfloat16()
    if name == "sdpa":
        assert torch.equal(inside, rope_attention(rotated_then_cast, backend=name))
    else:  # the native products take q' and k' as they are, in fp32
        true = rope_attention(qkv.double(), **inputs)
        assert (inside - true).abs().max() <= (rope_attention(rotated_then_cast).double() - true).abs().max()


def test_gradcheck():
    weights = [1 + random_tensor(8, dtype=torch.float64, seed=seed).requires_grad_() / 4 for seed in (1, 2, 3, 4)]
    qkv = random_tensor(1, 4, 3, 2, 8, dtype=torch.float64).requires_grad_()

    def call(*a):
        return rope_attention(a[0], grid(2, 2), frequencies(8), *a[1:], center=True)

    assert torch.autograd.gradcheck(call, (qkv, *weights))


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(qkv=torch.zeros(2, 6, 2, 1, 8)), r"qkv has shape \(2, 6, 2, 1, 8\), expected \(B, N, 3, H, Dh\)"),
        (dict(qkv=torch.zeros(2, 6, 24)), r"qkv has shape \(2, 6, 24\)"),
        (dict(qkv=torch.zeros(2, 6, 3, 1, 6)), "head dimension 6, expected a multiple of 4"),
        (dict(positions=None), "positions is None, expected both"),
        (dict(freqs=None), "freqs is None, expected both"),
        (dict(positions=grid(2, 2)), r"positions has shape \(4, 2\), expected \(6, 2\)"),
        (dict(positions=grid(2, 3).to("meta")), "positions is on meta, expected cpu"),
        (dict(freqs=torch.ones(4)), r"freqs has shape \(4,\), expected \(2,\)"),
        (dict(bias=torch.ones(24)), r"bias has shape \(24,\), expected \(3, 1, 8\)"),
        (dict(q_weight=torch.ones(8)), "k_weight is None, expected both"),
        (dict(q_weight=torch.ones(8), k_weight=torch.ones(4)), r"k_weight has shape \(4,\), expected \(8,\)"),
        (dict(q_bias=torch.ones(8), k_bias=torch.ones(8)), "q_bias is given without q_weight"),
        (dict(q_weight=torch.ones(8), k_weight=torch.ones(8), k_bias=torch.ones(8)), "q_bias is None, expected both"),
        (dict(backend="triton"), "backend 'triton' got qkv on cpu, expected a CUDA device"),
        (dict(backend="magic"), "backend is 'magic', expected one of auto, triton, sdpa, flash_attn, xformers"),
    ],
)
def test_bad_input(change, message):
    inputs = dict(qkv=torch.zeros(2, 6, 3, 1, 8), positions=grid(2, 3), freqs=frequencies(8))
    with pytest.raises(ValueError, match=message):
        rope_attention(**inputs | change)


def operator_arguments(dtype, norm="layer", rope=True):
    where = (grid(2, 3), frequencies(8)) if rope else (None, None)
    parameters = [1 + random_tensor(8, dtype=dtype, seed=seed) / 4 if norm == "layer" else None for seed in (1, 2, 3, 4)]
    bias = random_tensor(3, 2, 8, dtype=dtype, seed=5) if norm == "layer" else None
    return random_tensor(2, 6, 3, 2, 8, dtype=dtype), *where, *parameters, bias, 1e-5, norm == "layer"


def test_the_operators_backward_is_the_gradient_of_its_forward():
    arguments = operator_arguments(torch.float64)
    leaves = (arguments[0], *arguments[3:8])

    def call(qkv, *parameters):
        return torch.ops.lightningdit.rope_attention(qkv, *arguments[1:3], *parameters, *arguments[8:], torch.float64)[0]

    assert torch.autograd.gradcheck(call, [a.requires_grad_() for a in leaves])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operators_definition_matches_truth(dtype):
    inputs = dict(qkv=random_tensor(2, 12, 3, 2, 16, dtype=dtype), positions=grid(3, 4), freqs=frequencies(16))
    weights = {f"{name}_weight": 1 + random_tensor(16, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 1)}
    weights |= dict(bias=random_tensor(3, 2, 16, dtype=dtype, seed=3))
    assert_matches_truth(fused, eager, inputs | weights, frozen=("freqs",))


def test_the_operator_has_no_gradient_of_freqs_and_says_so():
    with pytest.raises(ValueError, match="freqs requires a gradient"):
        fused(torch.zeros(1, 6, 3, 1, 8), grid(2, 3), frequencies(8).requires_grad_())


@pytest.mark.parametrize("backend, package, pip", [("flash_attn", "flash_attn", "flash-attn"), ("xformers", "xformers", "xformers")])
def test_a_peer_that_is_missing_is_an_error(backend, package, pip):
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(ImportError, match=f"backend '{backend}' needs `pip install {pip}"):
        rope_attention(torch.zeros(1, 6, 3, 1, 8), backend=backend)


def test_a_peer_refuses_what_it_cannot_do(monkeypatch):
    monkeypatch.setattr(attention.importlib, "import_module", lambda name: type("Peer", (), dict(flash_attn_func=lambda *a: 0)))
    with pytest.raises(ValueError, match="backend 'flash_attn' got torch.float32 on cpu, expected bf16 or fp16 on a CUDA device"):
        rope_attention(torch.zeros(1, 6, 3, 1, 8), backend="flash_attn")


@pytest.mark.parametrize("backend", ["flash_attn", "xformers"])
@pytest.mark.parametrize("head_dim", [20, 72])
def test_a_peer_gets_padded_heads_and_the_true_scale(monkeypatch, backend, head_dim):
    """A stub with the peer's signature, in plain PyTorch, that refuses what the peer refuses."""
    calls = []

    def stub(q, k, v, **scale):
        assert q.shape == k.shape == v.shape and q.shape[-1] % 8 == 0 and {q.dtype, k.dtype, v.dtype} == {torch.bfloat16}
        calls.append((q.shape, scale))
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        return nnf.scaled_dot_product_attention(q, k, v, scale=next(iter(scale.values()), None)).transpose(1, 2)

    package, function, keyword, _ = attention.PEERS[backend]
    monkeypatch.setitem(sys.modules, package.partition(".")[0], types.ModuleType(package.partition(".")[0]))
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(**{function: stub}))
    monkeypatch.setattr(attention, "PEER_DEVICE", "cpu")
    inputs = dict(qkv=random_tensor(2, 6, 3, 2, head_dim, dtype=torch.bfloat16), positions=grid(2, 3), freqs=frequencies(head_dim))
    inputs |= dict(bias=random_tensor(3, 2, head_dim, dtype=torch.bfloat16, seed=1))
    assert_matches_truth(lambda **kw: rope_attention(**kw, backend=backend), eager, inputs, frozen=("freqs",))
    expected = ((2, 6, 2, 24), {keyword: 20**-0.5}) if head_dim == 20 else ((2, 6, 2, 72), {})
    assert calls and all(call == expected for call in calls)


@pytest.mark.parametrize("multiple", [8, 80, 96])
def test_padding_changes_nothing(multiple):
    def stub(q, k, v, **scale):
        assert q.shape[-1] == {8: 72, 80: 80, 96: 96}[multiple]
        return nnf.scaled_dot_product_attention(q, k, v, **scale)

    q, k, v = (random_tensor(1, 2, 5, 72, dtype=torch.float64, seed=seed) for seed in (1, 2, 3))
    ours = attention.padded(stub, multiple, "scale")(q, k, v)
    torch.testing.assert_close(ours, nnf.scaled_dot_product_attention(q, k, v))


def test_auto_follows_the_measurements(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention, "MEASURED", {((9, 0), 6, 8): "triton"})
    with FakeTensorMode():
        measured, other = (torch.empty(1, n, 3, 1, 8, device="cuda", dtype=torch.bfloat16) for n in (6, 7))
        assert attention._auto(measured, None, None) == "triton"
        assert attention._auto(other, None, None) == attention._auto(measured.float(), None, None) == "sdpa"
        assert attention._auto(measured.cpu(), None, None) == ("native" if native.serves(torch.bfloat16) else "sdpa")
    assert "sdpa" in backends()["rope_attention"]["cuda"]


def test_triton_names_what_it_cannot_do():
    with FakeTensorMode():
        for head_dim, dtype, message in [(20, torch.bfloat16, "head dimension 20"), (8, torch.float64, "dtype torch.float64")]:
            with pytest.raises(ValueError, match=f"backend 'triton' got {message}, expected"):
                rope_attention(torch.empty(1, 6, 3, 1, head_dim, device="cuda", dtype=dtype), backend="triton")
        assert rope_attention(torch.empty(2, 6, 3, 1, 72, device="cuda", dtype=torch.bfloat16), backend="triton").shape == (2, 6, 72)
