"""group_norm_silu against eager PyTorch and torch.compile: pytest bench --benchmark-only.

Every contestant must first be as close to fp64 as eager PyTorch is in the same dtype; then forward, and forward with backward, are
timed. gb_per_s counts the bytes that one perfect pass moves: forward 2 elements (reads x, writes the result), backward 3 more (reads
x and the incoming gradient, writes the gradient). On CUDA the timed function ends with a synchronisation, some 10 us on top of each figure.
"""

import functools

import pytest
import torch
import torch.nn.functional as nnf

from lightningdit_kernels import backends, group_norm_silu, native
from lightningdit_kernels.groupnorm import group_norm_silu_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

GROUPS = 32  # of every GroupNorm in the VA-VAE
# (B, C, H, W): a middle level of the VA-VAE on CPU; its widest and its deepest level at a training batch on CUDA.
CASES = [("cpu", (4, 256, 64, 64), dtype) for dtype in (torch.float32, torch.bfloat16)]
if torch.cuda.is_available():
    CASES += [("cuda", shape, dtype) for shape in ((8, 128, 256, 256), (8, 512, 16, 16)) for dtype in (torch.bfloat16, torch.float32)]


def eager(x, weight, bias):
    return nnf.silu(nnf.group_norm(x, GROUPS, weight, bias, 1e-6))


def reference(x, weight, bias):
    return group_norm_silu_ref(x, weight, bias, GROUPS)


def ours(x, weight, bias):
    return group_norm_silu(x, weight, bias, GROUPS)


def inputs(shape, dtype, device, layout):
    weight, bias = (random_tensor(shape[1], dtype=dtype, seed=seed, device=device) for seed in (1, 2))
    return dict(x=random_tensor(*shape, dtype=dtype, device=device).to(memory_format=layout), weight=weight, bias=bias)


@functools.cache
def contestant(name, device, dtype, layout):
    """The function of this name, once it has shown that it is correct."""
    if name == "ours" and device == "cpu" and not native.serves(dtype):
        pytest.skip(f"{device}: {backends()['group_norm_silu']['why']}")
    function = {"eager": eager, "compiled_eager": eager, "compiled_reference": reference, "ours": ours}[name]
    function = torch.compile(function, fullgraph=True, dynamic=False) if name.startswith("compiled") else function
    assert_matches_truth(function, eager, inputs((2, 64, 16, 16), dtype, device, layout))
    return function


@pytest.mark.parametrize("name", ["eager", "compiled_eager", "compiled_reference", "ours"])
@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("device, shape, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def bench_group_norm_silu(benchmark, device, shape, dtype, layout, step, name):
    function = contestant(name, device, dtype, layout)
    leaves = [tensor.requires_grad_() for tensor in inputs(shape, dtype, device, layout).values()]
    grad = random_tensor(*shape, dtype=dtype, seed=3, device=device).to(memory_format=layout)

    def forward():
        with torch.no_grad():
            function(*leaves)

    def forward_backward():
        torch.autograd.grad(function(*leaves), leaves, grad)

    def timed():
        forward() if step == "forward" else forward_backward()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()  # compiles for this shape, outside the measurement
    benchmark.group = f"group_norm_silu {step} {device} {dtype} {shape} {layout}"
    benchmark(timed)
    moved = (2 if step == "forward" else 5) * grad.numel() * grad.element_size()
    environment = dict(torch=torch.__version__, threads=torch.get_num_threads(), backend=backends()["group_norm_silu"])
    benchmark.extra_info.update(gb_per_s=moved / benchmark.stats["median"] / 1e9, bytes=moved, **environment)
    if device == "cuda":
        benchmark.extra_info["device"] = torch.cuda.get_device_name()
