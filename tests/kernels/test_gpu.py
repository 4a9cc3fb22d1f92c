"""Every op on CUDA against its definition: as close to fp64 as the definition is in the same dtype, and bitwise repeatable."""

import functools

import pytest
import torch

from lightningdit import graphs
from lightningdit_kernels import rope_attention, tuning
from lightningdit_kernels.testing import DEFINITIONS, FROZEN, OPS, assert_matches_truth, example_inputs, values_and_gradients

OURS = OPS | dict(rope_attention=functools.partial(rope_attention, backend="triton"))  # "auto" may take PyTorch's, which need not repeat


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(8, 16, 16, 1152, 16), (3, 7, 9, 144, 2)], ids=["xl", "odd"])
@pytest.mark.parametrize("op", OPS)
def test_cuda_matches_truth(op, shape, dtype):
    assert_matches_truth(OURS[op], DEFINITIONS[op], example_inputs(op, *shape, dtype, "cuda"), FROZEN)


def under_autocast(function):
    def called(**inputs):
        with torch.autocast("cuda", torch.bfloat16):
            return function(**inputs)

    return called


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("shape", [(8, 16, 16, 1152, 16), (3, 7, 9, 144, 2)], ids=["xl", "odd"])
@pytest.mark.parametrize("op", ["rms_norm_modulate", "gated_residual_rms_norm_modulate", "rope_attention", "swiglu", "group_norm_silu"])
def test_cuda_matches_truth_in_the_dtypes_of_training(op, shape):
    """bf16 activations, an fp32 residual stream, fp32 parameters."""
    dtypes = dict(parameters=torch.float32, residual=torch.float32, qk_norm=False)
    inputs = example_inputs(op, *shape, torch.bfloat16, "cuda", **dtypes)
    assert_matches_truth(under_autocast(OURS[op]), under_autocast(DEFINITIONS[op]), inputs, FROZEN)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("features", [torch.float32, torch.bfloat16], ids=str)
def test_alignment_losses_do_not_wait_and_are_the_same_in_a_cuda_graph(features):
    """Forward and backward, the factor of the weight included."""
    inputs = example_inputs("alignment_losses", 8, 16, 16, 1024, 16, torch.float32, "cuda", features=features)
    cotangents, results = (torch.full((), 0.7, device="cuda"), torch.full((), 1.3, device="cuda")), {}

    def run():
        results.update(values_and_gradients(OPS["alignment_losses"], inputs, FROZEN, cotangents))

    graphs.warm_up(run)
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    expected = {name: value.clone() for name, value in results.items()}
    graph = graphs.capture(run)
    for value in results.values():
        value.zero_()
    graph.replay()
    for name, value in expected.items():
        assert torch.equal(results[name], value), name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_attention_is_chosen_on_the_gpu_at_hand(compiled, monkeypatch, tmp_path):
    """In the first call outside of a capture, and for the calls after it, of which one is captured."""
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    inputs = example_inputs("rope_attention", 4, 16, 16, 1152, 16, torch.bfloat16, "cuda", parameters=torch.float32)
    attention = torch.compile(rope_attention, fullgraph=True) if compiled else rope_attention
    state = torch.cuda.get_rng_state()
    with torch.no_grad():
        first = attention(**inputs)
        (entry,) = (entry for entry in tuning.choices_here() if entry["op"] == "rope_attention")
        graphs.warm_up(lambda: attention(**inputs))
        captured = []
        graph = graphs.capture(lambda: captured.append(attention(**inputs)))
        graph.replay()
    assert entry["times_ms"].keys() == {"triton", "sdpa"}
    assert entry["shape"].endswith("compiled" if compiled else "eager")
    assert torch.equal(torch.cuda.get_rng_state(), state)
    assert torch.equal(captured[0], first)
    torch.testing.assert_close(first, rope_attention(**inputs, backend=entry["choice"]), rtol=2e-2, atol=2e-2)
