"""swiglu against eager PyTorch and torch.compile: pytest bench --benchmark-only.

Every contestant must first be as close to fp64 as eager PyTorch is in the same dtype; then forward, and forward with backward, are
timed. gb_per_s counts the bytes that one perfect pass moves: forward 3F elements a row; backward 5F more (reads gate, up and the
incoming gradient, writes two). On CUDA the timed function ends with a synchronisation, some 10 us on top of each figure.
"""

import functools

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import backends, native, swiglu
from lightningdit_kernels.swiglu import swiglu_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

# (B, N, F): LightningDiT-S on CPU, XL at the batch of the training recipe on CUDA.
CASES = [("cpu", (32, 256, 1024), torch.float32), ("cpu", (32, 256, 1024), torch.bfloat16)]
if torch.cuda.is_available():
    CASES += [("cuda", (128, 256, 3072), torch.bfloat16), ("cuda", (128, 256, 3072), torch.float32)]


def eager(packed):
    gate, up = packed.chunk(2, dim=-1)
    return nnf.silu(gate) * up


def reference(packed):
    return swiglu_ref(packed, packed.dtype)


@functools.cache
def contestant(name, device, dtype):
    """The function of this name, once it has shown that it is correct."""
    if name == "native" and not (device == "cpu" and native.serves(dtype)):
        pytest.skip(f"{device}: {backends()['swiglu']['why']}")
    compiled = name.startswith("compiled")
    function = {"eager": eager, "compiled_reference": reference, "compiled_eager": eager, "native": swiglu}[name]
    function = torch.compile(function, fullgraph=True, dynamic=False) if compiled else function
    assert_matches_truth(function, eager, dict(packed=random_tensor(4, 16, 2048, dtype=dtype, device=device)))
    return function


@pytest.mark.parametrize("name", ["eager", "compiled_eager", "compiled_reference", "native"])
@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("device, shape, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def bench_swiglu(benchmark, device, shape, dtype, step, name):
    function = contestant(name, device, dtype)
    packed = random_tensor(*shape[:-1], 2 * shape[-1], dtype=dtype, device=device).requires_grad_()
    grad = random_tensor(*shape, dtype=dtype, seed=1, device=device)

    def forward():
        with torch.no_grad():
            function(packed)

    def forward_backward():
        torch.autograd.grad(function(packed), packed, grad)

    def timed():
        forward() if step == "forward" else forward_backward()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()  # compiles for this shape, outside the measurement
    benchmark.group = f"swiglu {step} {device} {dtype} {shape}"
    benchmark(timed)
    moved = (3 if step == "forward" else 8) * grad.numel() * grad.element_size()
    environment = dict(torch=torch.__version__, threads=torch.get_num_threads(), swiglu=backends()["swiglu"])
    benchmark.extra_info.update(gb_per_s=moved / benchmark.stats["median"] / 1e9, bytes=moved, **environment)
    if device == "cuda":
        benchmark.extra_info["device"] = torch.cuda.get_device_name()
