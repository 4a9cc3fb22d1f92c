"""Linear layers in fp32 on a CPU: both libraries compute the same layer, the faster one is chosen, and a row does not see its company."""

import logging

import pytest
import torch
import torch.nn.functional as F

from lightningdit_kernels import linear as module
from lightningdit_kernels import tuning
from lightningdit_kernels.linear import linear

pytestmark = pytest.mark.skipif(not module.AVAILABLE, reason="PyTorch has MKL and oneDNN only on x86")
ALL_ONEDNN, ALL_MKL = ("oneDNN",) * 3, ("MKL",) * 3


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """No choice of this process or of the disk counts."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    module._of_class.cache_clear()
    yield tmp_path
    module._of_class.cache_clear()


def gradients(function, x, weight, bias):
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias) if tensor is not None]
    out = function(*inputs)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=out.dtype)
    return out.detach(), *torch.autograd.grad(out, inputs, grad)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("shape", [(5,), (7, 5), (1, 36), (2, 63, 96), (3, 0, 8), (4, 2, 16, 768)])
@pytest.mark.parametrize("chosen", [ALL_ONEDNN, ("MKL", "oneDNN", "MKL"), ("oneDNN", "MKL", "oneDNN")])
def test_every_library_computes_the_same_layer(monkeypatch, chosen, shape, biased):
    monkeypatch.setattr(module, "libraries", lambda *_: chosen)
    torch.manual_seed(0)
    x, weight, bias = torch.randn(shape), torch.randn(40, shape[-1]), torch.randn(40) if biased else None
    ours = gradients(linear, x, weight, bias)
    theirs = gradients(F.linear, x, weight, bias)
    truth = gradients(F.linear, *(None if tensor is None else tensor.double() for tensor in (x, weight, bias)))
    for a, b, c in zip(ours, theirs, truth, strict=True):
        assert a.shape == b.shape
        if c.numel():
            assert (a - c).abs().max() <= 2 * (b - c).abs().max() + 1e-6 * c.abs().max()


@pytest.mark.parametrize("chosen", [ALL_ONEDNN, ALL_MKL])
@pytest.mark.parametrize("x, weight, bias", [((4, 5), (6, 8), None), ((4, 8), (6, 8), (5,)), ((), (6, 8), None), ((4, 8), (2, 6, 8), None)])
def test_what_does_not_fit_is_refused_as_pytorch_refuses_it(monkeypatch, chosen, x, weight, bias):
    monkeypatch.setattr(module, "libraries", lambda *_: chosen)
    arguments = [None if shape is None else torch.ones(shape) for shape in (x, weight, bias)]
    with pytest.raises((RuntimeError, IndexError)) as ours:
        linear(*arguments)
    with pytest.raises((RuntimeError, IndexError)) as theirs:
        F.linear(*arguments)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.parametrize("chosen", [ALL_ONEDNN, ALL_MKL])
def test_in_a_compiled_graph(monkeypatch, chosen):
    monkeypatch.setattr(module, "_of_class", lambda *_: chosen)
    torch._dynamo.reset()
    x, weight, bias = torch.randn(8, 16, 96), torch.randn(288, 96), torch.randn(288)
    compiled = torch.compile(linear, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(gradients(compiled, x, weight, bias), gradients(linear, x, weight, bias), strict=True):
        assert torch.equal(ours, theirs)


def test_operator(monkeypatch):
    torch.library.opcheck(torch.ops.lightningdit.onednn_linear.default, (torch.randn(5, 8), torch.randn(6, 8), torch.randn(6)))


def test_all_else_is_pytorchs(monkeypatch):
    """Other dtypes, autocast, weights of other kinds and empty inputs never ask which library is faster."""
    monkeypatch.setattr(module, "libraries", None)
    for dtype in (torch.bfloat16, torch.float64):
        x, weight = torch.randn(4, 8, dtype=dtype), torch.randn(6, 8, dtype=dtype)
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    x, weight = torch.randn(4, 8), torch.randn(6, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear(x, weight), F.linear(x, weight))
    assert linear(x[:0], weight).shape == (0, 6)
    assert linear(x.to("meta"), weight.to("meta")).shape == (4, 6)


@pytest.mark.parametrize("name, mkl_ms, onednn_ms, chosen", [
    ("AMD EPYC", 2.0, 1.0, "oneDNN"), ("AMD EPYC", 1.0, 1.1, "oneDNN"), ("AMD EPYC", 1.0, 1.3, "MKL"),
    ("Intel(R) Xeon(R)", 1.1, 1.0, "MKL"), ("Intel(R) Xeon(R)", 1.3, 1.0, "oneDNN"),
])
def test_the_choice(fresh, monkeypatch, caplog, name, mkl_ms, onednn_ms, chosen):
    """Noise leaves the starting guess of the vendor as it is; what was measured is kept, and the next process measures nothing."""
    monkeypatch.setattr(tuning, "device_name", lambda device: name)
    measured = []
    monkeypatch.setattr(module, "_measure", lambda *what: measured.append(what) or {"MKL": mkl_ms, "oneDNN": onednn_ms})
    with caplog.at_level(logging.INFO, "lightningdit_kernels"):
        assert module.libraries(64, 64) == (chosen,) * 3
    assert [what for what, _ in measured] == list(module.PRODUCTS)
    assert all(record.levelno == logging.INFO for record in caplog.records)  # a moment is not worth a warning
    tuning._chosen.clear()
    module._of_class.cache_clear()
    assert module.libraries(96, 32) == (chosen,) * 3  # of the same class
    assert len(measured) == 3
    module.libraries(1024, 1024)
    assert [size for _, size in measured[3:]] == ["large"] * 3


def test_the_measurement(fresh):
    for product in module.PRODUCTS:
        times_ms = module._measure(product, "small")
        assert set(times_ms) == set(module.LIBRARIES)
        assert all(0 < time_ms < 1000 for time_ms in times_ms.values())


def test_choices_are_shown(fresh, monkeypatch):
    monkeypatch.setattr(module, "_measure", lambda *_: {"MKL": 2.0, "oneDNN": 1.0})
    module.libraries(64, 64)
    shapes = [entry["shape"] for entry in tuning.choices_here() if entry["op"] == "linear"]
    threads = torch.get_num_threads()
    assert shapes == [f"{product.replace(' ', '_')} small {threads}_threads" for product in module.PRODUCTS]


@pytest.mark.parametrize("threads", [1, 2])
def test_a_row_does_not_see_its_company(threads):
    """Of every number of rows from 16 to 4,096, by the library that is chosen here; wider layers at the multiples of 16 that sampling
    fills its batches to.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        torch.manual_seed(0)
        for inputs, outputs, step in ((192, 64, 1), (96, 288, 16), (384, 1024, 256), (768, 256, 256)):
            x, weight = torch.randn(4096, inputs), torch.randn(outputs, inputs)
            whole = linear(x, weight)
            first = 16 if inputs * outputs < 2**17 else 128
            differ = [rows for rows in range(first, 4097, step) if not torch.equal(linear(x[:rows], weight), whole[:rows])]
            assert not differ, (inputs, outputs, differ[:20])
    finally:
        torch.set_num_threads(before)
