"""rope_attention against rotation matrices, torch's norms and an explicit softmax in fp64."""

import importlib.util
import operator
import sys
import types

import pytest
import torch
import torch.nn.functional as nnf
from torch._subclasses.fake_tensor import FakeTensorMode

from lightningdit_kernels import attention, native, rope_attention, tuning
from lightningdit_kernels.attention import fused, rope_ref
from lightningdit_kernels.library import triton_available
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


class Clock:
    """A fake one: what runs takes the milliseconds that are planted for it, forward and backward together."""

    def __init__(self):
        self.now, self.planted, self.timed = 0.0, dict(triton=1.0, sdpa=1.0), []

    def slow(self, backend, function):
        def call(*args, **kwargs):
            self.now += self.planted[backend]
            return function(*args, **kwargs)

        return call

    def event_ms(self, run, cycles):
        before = self.now
        results = run()
        self.timed.append(results[0])
        return self.now - before, cycles, False


@pytest.fixture
def clock(monkeypatch, tmp_path):
    """Lets "auto" measure where there is no GPU: on CPU tensors, with the native kernel in the place of the Triton kernels."""
    fake = Clock()
    fake.candidates = ("sdpa", "triton")
    monkeypatch.setattr(attention, "_candidates", lambda index, n, head_dim: (torch.device("cpu"), fake.candidates))
    monkeypatch.setattr(attention, "fused", fake.slow("triton", attention.fused))
    monkeypatch.setattr(attention, "_sdpa", fake.slow("sdpa", attention._sdpa))
    monkeypatch.setattr(attention, "MEASURED_TOKENS", 24)
    monkeypatch.setattr(tuning, "event_ms", fake.event_ms)
    monkeypatch.setattr(tuning, "cycles_to_enqueue", lambda run: 1)
    monkeypatch.setattr(tuning, "device_name", lambda device: "card (sm_90)")
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTNINGDIT_AUTOTUNE", raising=False)
    tuning.warn_once.cache_clear()
    return fake


needs_triton = pytest.mark.skipif(not triton_available, reason="without triton there is nothing to choose")


def chosen(qkv=(2, 6, 3, 2, 8), dtype=torch.bfloat16, norm=None, **options):
    """The backend that "auto" takes for such a qkv on a GPU."""
    with FakeTensorMode():
        qkv = torch.empty(qkv, device="cuda", dtype=dtype)
        weights = dict(q_weight=None, q_bias=None) if norm is None else dict(q_weight=norm, q_bias=None)
        arguments = dict(positions=None, freqs=None, bias=None, center=False) | weights | options
        return attention._auto(qkv, **arguments)


@needs_triton
@pytest.mark.parametrize("slow, fast", [("sdpa", "triton"), ("triton", "sdpa")])
@pytest.mark.parametrize("guess", [("sdpa", "triton"), ("triton", "sdpa")], ids=lambda candidates: f"guess {candidates[0]}")
def test_auto_does_not_choose_a_slow_backend(clock, slow, fast, guess):
    clock.candidates, clock.planted[slow] = guess, 5.0
    assert chosen() == fast
    timed = len(clock.timed)
    assert timed > 0
    assert chosen() == fast
    assert len(clock.timed) == timed
    (entry,) = tuning.choices()
    assert entry["times_ms"] == {slow: 5.0, fast: 1.0}


@needs_triton
def test_what_is_measured_has_the_shape_and_the_options_of_the_call(clock, monkeypatch):
    seen, timed = [], attention.fused
    monkeypatch.setattr(attention, "fused", lambda **inputs: seen.append(inputs) or timed(**inputs))
    weight, bias = torch.ones(8), torch.ones(3, 2, 8)
    constants = dict(positions=torch.ones(6, 2), freqs=torch.ones(2))
    chosen(norm=weight, q_bias=weight, bias=bias, center=True, **constants)
    inputs = seen[-1]
    assert {one["qkv"].shape for one in seen} == {(4, 6, 3, 2, 8)}, "the first call chooses the tiles for all of them"
    assert inputs["qkv"].dtype == torch.bfloat16
    assert inputs.keys() == {"qkv", "center", "positions", "freqs", "q_weight", "k_weight", "q_bias", "k_bias", "bias"}
    assert inputs["center"]
    chosen(norm=weight)
    assert seen[-1].keys() == {"qkv", "center", "q_weight", "k_weight"}
    assert not seen[-1]["center"]
    assert len(tuning.choices()) == 2


@needs_triton
def test_another_shape_is_another_choice(clock):
    clock.planted["sdpa"] = 5.0
    assert chosen() == "triton"
    clock.planted["triton"] = 9.0
    for options in (dict(qkv=(2, 7, 3, 2, 8)), dict(qkv=(2, 6, 3, 1, 8)), dict(qkv=(2, 6, 3, 2, 16)), dict(dtype=torch.float16)):
        assert chosen(**options) == "sdpa", options
    assert chosen(norm=torch.ones(8)) == "sdpa"
    assert chosen(qkv=(5, 6, 3, 2, 8)) == "triton", "the batch is no part of it"


@needs_triton
def test_what_triton_does_not_serve_is_not_measured(clock):
    clock.planted["sdpa"] = 5.0
    assert chosen(dtype=torch.float32) == chosen(dtype=torch.float64) == chosen(qkv=(2, 6, 3, 2, 20)) == "sdpa"
    assert chosen(qkv=(2, 0, 3, 2, 8)) == "sdpa"
    assert chosen(positions=torch.ones(6, 2), freqs=torch.ones(2, requires_grad=True)) == "sdpa"
    assert clock.timed == []


def wrong(*args, **kwargs):
    return fused(*args, **kwargs) * 1.5


def not_finite(*args, **kwargs):
    return fused(*args, **kwargs) + float("nan")


def broken(*args, **kwargs):
    raise ValueError("no such kernel")


@needs_triton
@pytest.mark.parametrize("function", [wrong, not_finite, broken])
def test_a_fast_backend_that_fails_is_not_chosen(clock, monkeypatch, caplog, function):
    monkeypatch.setattr(attention, "fused", function)
    clock.planted["sdpa"] = 5.0
    assert chosen() == "sdpa"
    assert "'triton' is" in caplog.text and "left out" in caplog.text


@needs_triton
def test_too_little_memory_is_no_crash_and_not_kept(clock, monkeypatch, caplog):
    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(attention, "fused", full)
    assert chosen() == "sdpa"
    assert "not enough memory" in caplog.text
    assert tuning.choices() == []


@needs_triton
def test_measuring_leaves_the_caller_alone(clock):
    """No random number is drawn, no hook of the caller sees a tensor, and its modes are in force afterwards."""
    state, packed = torch.get_rng_state(), []
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x)
    with torch.inference_mode(), torch.autocast("cpu", torch.float16), hooks:
        assert chosen() in ("triton", "sdpa")
        assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
    assert clock.timed and {result.dtype for result in clock.timed} == {torch.bfloat16}
    assert packed == []
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def as_on_a_gpu(clock, monkeypatch):
    """rope_attention chooses as it does on a GPU; what it chose, in order."""
    choices = []

    def auto(qkv, positions, freqs, q_weight, q_bias, bias, center):
        _, n, _, heads, head_dim = (operator.index(size) for size in qkv.shape)
        options = positions is not None, "none", bias is not None, torch.compiler.is_compiling()
        return attention._fastest(qkv.device.index, n, heads, head_dim, torch.bfloat16, torch.bfloat16, *options)

    real = attention._fastest

    def noted(*arguments):
        choices.append((arguments[1], arguments[-1], real(*arguments)))
        return choices[-1][-1]

    noted._dynamo_marked_constant = True
    monkeypatch.setattr(attention, "_fastest", noted)
    monkeypatch.setattr(attention, "_auto", auto)
    monkeypatch.setattr(attention, "_triton", fused)
    return choices


@needs_triton
def test_torch_compile_measures_while_it_traces(clock, as_on_a_gpu):
    """On real tensors, in one graph of two shapes, of which each has its choice; again for another shape, and not in a second process."""
    torch.compiler.reset()

    inputs = [random_tensor(2, n, 3, 2, 8, dtype=torch.bfloat16, seed=n).requires_grad_() for n in (6, 10)]
    compiled = torch.compile(lambda *qkv: tuple(map(rope_attention, qkv)), fullgraph=True)
    clock.planted["sdpa"] = 5.0
    results = compiled(*inputs)
    assert as_on_a_gpu == [(6, True, "triton"), (10, True, "triton")]
    assert clock.timed and all(type(result) is torch.Tensor for result in clock.timed)
    for qkv, result in zip(inputs, results, strict=True):
        torch.testing.assert_close(result, rope_attention(qkv, backend="sdpa"), rtol=2e-2, atol=2e-2)
    sum(result.sum() for result in results).backward()
    assert all(qkv.grad.isfinite().all() for qkv in inputs)
    clock.planted["triton"] = 9.0
    compiled(inputs[0], random_tensor(2, 12, 3, 2, 8, dtype=torch.bfloat16))
    assert as_on_a_gpu[-1] == (12, True, "sdpa")
    timed = len(clock.timed)
    torch.compiler.reset()
    tuning._chosen.clear()
    compiled(*inputs)
    assert as_on_a_gpu[-2:] == [(6, True, "triton"), (10, True, "triton")]
    assert len(clock.timed) == timed


@needs_triton
def test_eager_and_compiled_calls_are_different_choices(clock, as_on_a_gpu, monkeypatch):
    """Compiled PyTorch is timed as a copy of qkv and its attention, without the rotation that eager PyTorch pays for."""
    monkeypatch.setattr(attention, "rotate_ref", clock.slow("rotation", attention.rotate_ref))
    clock.planted |= dict(rotation=2.0, triton=3.0, sdpa=1.0)
    inputs = dict(qkv=random_tensor(2, 6, 3, 2, 8, dtype=torch.bfloat16), positions=grid(2, 3).float(), freqs=frequencies(8))
    rope_attention(**inputs)
    torch.compile(rope_attention, fullgraph=True, backend="eager")(**inputs)
    assert as_on_a_gpu == [(6, False, "triton"), (6, True, "sdpa")]


@pytest.mark.parametrize("guess, expected", [({}, "sdpa"), ({((9, 0), 6, 8): "triton"}, "triton")])
def test_the_starting_guess_is_the_table_of_what_won(monkeypatch, guess, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(attention, "MEASURED", guess)
    attention._candidates.cache_clear()
    device, candidates = attention._candidates(0, 6, 8)
    attention._candidates.cache_clear()
    assert device == torch.device("cuda", 0)
    assert candidates[0] == expected
    assert sorted(candidates) == ["sdpa", "triton"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is a GPU")
def test_fake_tensors_without_a_gpu_take_sdpa():
    assert chosen() == "sdpa"


def test_auto_on_a_cpu():
    qkv = torch.zeros(1, 6, 3, 1, 8, dtype=torch.bfloat16)
    expected = "native" if native.serves(torch.bfloat16) else "sdpa"
    assert attention._auto(qkv, None, None, None, None, None, False) == expected


def test_triton_names_what_it_cannot_do():
    with FakeTensorMode():
        for head_dim, dtype, message in [(20, torch.bfloat16, "head dimension 20"), (8, torch.float64, "dtype torch.float64")]:
            with pytest.raises(ValueError, match=f"backend 'triton' got {message}, expected"):
                rope_attention(torch.empty(1, 6, 3, 1, head_dim, device="cuda", dtype=dtype), backend="triton")
        assert rope_attention(torch.empty(2, 6, 3, 1, 72, device="cuda", dtype=torch.bfloat16), backend="triton").shape == (2, 6, 72)
