"""The margin losses against eager PyTorch and torch.compile: pytest bench --benchmark-only.

Every contestant must first be as close to fp64 as eager PyTorch is in the same dtype; then forward, and forward with backward, are timed,
and on CUDA the peak of memory above the inputs is taken. "z" computes both losses of a projected z (B, N, C); "projected" starts at the r
latent channels: eager PyTorch projects them first, ours is alignment_losses, which never has z. tflop_per_s counts one pass over half of
both similarity matrices forward, and twice that much more backward, whatever the contestant does.
"""

import functools

import pytest
import torch

from lightningdit_kernels import alignment_losses, backends, marginal_cosine_loss, marginal_distance_matrix_loss
from lightningdit_kernels.alignment import alignment_losses_ref, marginal_cosine_loss_ref, marginal_distance_matrix_loss_ref
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

R = 32  # channels of the VA-VAE's latent
# (B, N, C): the tokens of a 256 x 256 image, and on CUDA of a 512 x 512 one, against DINOv2-L.
CASES = [("cpu", (4, 256, 1024), torch.float32)]
if torch.cuda.is_available():
    CASES += [("cuda", shape, dtype) for shape in ((32, 256, 1024), (8, 1024, 1024)) for dtype in (torch.float32, torch.bfloat16)]


def reference(z, f):
    return marginal_cosine_loss_ref(z, f) + marginal_distance_matrix_loss_ref(z, f)


def ours(z, f):
    return marginal_cosine_loss(z, f) + marginal_distance_matrix_loss(z, f)


def projected_reference(s, weight, f):
    return sum(alignment_losses_ref(s, weight, f))


def projected_ours(s, weight, f):
    return sum(alignment_losses(s, weight, f))


FUNCTIONS = {("z", "eager"): reference, ("z", "compiled"): reference, ("z", "ours"): ours, ("projected", "eager"): projected_reference,
             ("projected", "compiled"): projected_reference, ("projected", "ours"): projected_ours}


def inputs(form, shape, dtype, device):
    f = random_tensor(*shape, dtype=dtype, seed=2, device=device)
    if form == "z":
        return dict(z=random_tensor(*shape, dtype=dtype, seed=1, device=device), f=f)
    s, weight = (random_tensor(*sizes, dtype=dtype, seed=1, device=device) for sizes in ((*shape[:2], R), (shape[2], R)))
    return dict(s=s, weight=weight, f=f)


@functools.cache
def contestant(form, name, device, dtype):
    """The function of this name, once it has shown that it is correct, on tokens few enough that none has a pair at the margin."""
    function = FUNCTIONS[form, name]
    function = torch.compile(function, fullgraph=True, dynamic=False) if name == "compiled" else function
    assert_matches_truth(function, FUNCTIONS[form, "eager"], inputs(form, (2, 24, 96), dtype, device), frozen=("f",))
    return function


@pytest.mark.parametrize("name", ["eager", "compiled", "ours"])
@pytest.mark.parametrize("form", ["z", "projected"])
@pytest.mark.parametrize("step", ["forward", "forward_backward"])
@pytest.mark.parametrize("device, shape, dtype", CASES, ids=lambda value: str(value).removeprefix("torch."))
def bench_alignment(benchmark, device, shape, dtype, step, form, name):
    function = contestant(form, name, device, dtype)
    *leaves, f = inputs(form, shape, dtype, device).values()
    leaves = [leaf.requires_grad_() for leaf in leaves]

    def forward():
        with torch.no_grad():
            function(*leaves, f)

    def forward_backward():
        torch.autograd.grad(function(*leaves, f), leaves)

    def timed():
        forward() if step == "forward" else forward_backward()
        if device == "cuda":
            torch.cuda.synchronize()

    timed()  # compiles for this shape, outside the measurement
    benchmark.group = f"alignment {form} {step} {device} {dtype} {shape}"
    benchmark(timed)
    B, N, C = shape
    flop = 2 * B * N * N * C * (1 if step == "forward" else 3)
    environment = dict(torch=torch.__version__, threads=torch.get_num_threads(), backend=backends()["marginal_distance_matrix_loss"])
    benchmark.extra_info.update(tflop_per_s=flop / benchmark.stats["median"] / 1e12, flop=flop, **environment)
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        timed()
        peak = (torch.cuda.max_memory_allocated() - before) / 2**20
        benchmark.extra_info.update(device=torch.cuda.get_device_name(), peak_mib=peak)
