"""How an op is held to the truth, and on which shapes. Used by tests/ and by the gates of bench/; nothing else imports it."""

import contextlib

import torch
from torch import Tensor

import lightningdit_kernels as kernels
from lightningdit_kernels.alignment import alignment_losses_ref, marginal_cosine_loss_ref, marginal_distance_matrix_loss_ref
from lightningdit_kernels.attention import rope_attention_ref
from lightningdit_kernels.groupnorm import group_norm_silu_ref
from lightningdit_kernels.library import result_dtype
from lightningdit_kernels.norm import gated_residual_rms_norm_modulate_ref, rms_norm_modulate_ref
from lightningdit_kernels.swiglu import swiglu_ref

OPS = {name: getattr(kernels, name) for name in kernels.__all__ if name != "backends"}

# Every op's definition, with the signature of the op. It is also eager PyTorch for the acceptance rule below.
DEFINITIONS = {
    "alignment_losses": alignment_losses_ref,
    "gated_residual_rms_norm_modulate": gated_residual_rms_norm_modulate_ref,
    "group_norm_silu": group_norm_silu_ref,
    "marginal_cosine_loss": marginal_cosine_loss_ref,
    "marginal_distance_matrix_loss": marginal_distance_matrix_loss_ref,
    "rms_norm_modulate": rms_norm_modulate_ref,
    "rope_attention": rope_attention_ref,
    "swiglu": lambda packed, bias=None: swiglu_ref(packed, bias, result_dtype(packed)),
}

FROZEN = ("positions", "freqs", "f")  # arguments of ops that get no gradient

# (B, N, D) to test at: a small model, odd everywhere, a width over one block, one of each, nothing.
TOKEN_SHAPES = [(2, 16, 192), (3, 63, 97), (1, 5, 1152), (1, 1, 1), (0, 4, 8), (2, 0, 8)]


def token_grid(rows: int, columns: int, device: str = "cpu") -> Tensor:
    """Row and column of every token in reading order, (rows * columns, 2)."""
    return torch.cartesian_prod(torch.arange(rows, device=device), torch.arange(columns, device=device))


def rope_frequencies(head_dim: int, device: str = "cpu") -> Tensor:
    """The Dh/4 frequencies of 2-D RoPE with base 10,000."""
    return 10_000.0 ** -(torch.arange(head_dim // 4, device=device) / (head_dim // 4))


def example_inputs(
    op: str,
    batch: int,
    rows: int,
    columns: int,
    width: int,
    heads: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    *,
    parameters: torch.dtype | None = None,
    residual: torch.dtype | None = None,
    features: torch.dtype | None = None,
    qk_norm: bool = True,
) -> dict:
    """Keyword arguments of an op for `batch` images of rows x columns tokens: every optional tensor is given, RoPE is on.

    Args: parameters, residual, features: dtypes of weights and biases, of the residual stream x, of the frozen f; None: dtype.
    """

    def tensor(*shape, seed, dtype=dtype):
        return random_tensor(*shape, dtype=dtype, seed=seed, device=device)

    def parameter(*shape, seed):
        return tensor(*shape, seed=seed, dtype=parameters or dtype)

    def feature(*shape, seed):
        return tensor(*shape, seed=seed, dtype=features or dtype)

    tokens, head_dim = rows * columns, width // heads
    match op:
        case "rms_norm_modulate" | "gated_residual_rms_norm_modulate":
            inputs = dict(x=tensor(batch, tokens, width, seed=1, dtype=residual or dtype))
            if op.startswith("gated"):
                inputs |= dict(y=tensor(batch, tokens, width, seed=2), gate=tensor(batch, width, seed=6), bias=parameter(width, seed=7))
            weight = 1 + parameter(width, seed=5) / 4
            return inputs | dict(scale=tensor(batch, width, seed=3), shift=tensor(batch, width, seed=4), weight=weight)
        case "rope_attention":
            rope = dict(positions=token_grid(rows, columns, device).float(), freqs=rope_frequencies(head_dim, device))
            norm = {f"{name}_weight": 1 + parameter(head_dim, seed=seed) / 4 for seed, name in enumerate("qk", 2)} if qk_norm else {}
            inputs = dict(qkv=tensor(batch, tokens, 3, heads, head_dim, seed=1), bias=parameter(3, heads, head_dim, seed=4))
            return inputs | rope | norm
        case "swiglu":
            return dict(packed=tensor(batch, tokens, 2 * width, seed=1), bias=parameter(2 * width, seed=2))
        case "alignment_losses":
            r = min(32, width // 2)
            inputs = dict(s=tensor(batch, tokens, r, seed=1), weight=parameter(width, r, seed=3), f=feature(batch, tokens, width, seed=2))
            return inputs | dict(cos_margin=0.5, distmat_margin=0.05)
        case "marginal_cosine_loss" | "marginal_distance_matrix_loss":
            return dict(z=tensor(batch, tokens, width, seed=1), f=feature(batch, tokens, width, seed=2), margin=0.05)
        case "group_norm_silu":
            affine = dict(weight=1 + parameter(width, seed=2) / 4, bias=parameter(width, seed=3))
            return dict(x=tensor(batch, width, rows, columns, seed=1), num_groups=heads) | affine
    raise ValueError(f"op is {op!r}, expected one of {', '.join(OPS)}")


@contextlib.contextmanager
def poisoned_memory():
    """Inside, torch.empty and its like return NaN (integers: their maximum), so that an element that nobody wrote shows in the result."""
    before, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    # warn_only: cuBLAS would refuse to run without CUBLAS_WORKSPACE_CONFIG; it is not what is tested.
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warn_only)


def values_and_gradients(op, inputs: dict, frozen: tuple[str, ...] = (), cotangents: tuple[Tensor, ...] = ()) -> dict[str, Tensor]:
    """Outputs of op(**inputs) as `out.i`, and the gradients of <outputs, cotangents> as `grad.name`.

    Floating-point tensors that are not named in frozen are differentiated. Without cotangents they are random, but depend on the
    outputs' shapes only.
    """
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and name not in frozen) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    generator = torch.Generator().manual_seed(0)
    cotangents = cotangents or [
        random_tensor(*out.shape, dtype=out.dtype, seed=1000 + i, device=out.device) if out.is_cuda
        else torch.randn(out.shape, generator=generator, dtype=torch.float64) for i, out in enumerate(outputs)
    ]
    cotangents = [cotangent.to(out.device, out.dtype) for cotangent, out in zip(cotangents, outputs, strict=True)]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    result = {f"out.{i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"grad.{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def truth_and_bounds(
    eager, inputs: dict, frozen: tuple[str, ...] = (), cotangents: tuple[Tensor, ...] = ()
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What eager gives in fp64 on the same (already rounded) inputs, and how far from it an op may be, by output and gradient.

    The bound is 2 * err(eager in the inputs' dtype) + tiny; err is the largest absolute difference; tiny is four units in the last
    place of the largest true value. Where there are margins, the gradient jumps as a pair crosses one, and a cosine in fp32 may lie on
    either side: what margins 8 units of fp32 lower and higher change is added.
    """
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    truth = values_and_gradients(eager, doubled, frozen, cotangents)
    plain = values_and_gradients(eager, inputs, frozen, cotangents)
    bounds = {}
    for name, true in truth.items():
        if true.numel():
            tiny = 4 * torch.finfo(plain[name].dtype).eps * true.abs().max().item()
            bounds[name] = 2 * (plain[name].double() - true).abs().max().item() + tiny
    if margins := [name for name in inputs if name.endswith("margin")]:
        shift = 8 * torch.finfo(torch.float32).eps
        sides = [values_and_gradients(eager, doubled | {name: inputs[name] + side for name in margins}, frozen, cotangents)
                 for side in (-shift, shift)]
        bounds = {name: bound + (sides[0][name] - sides[1][name]).abs().max().item() for name, bound in bounds.items()}
    return truth, bounds


def assert_within(ours: dict[str, Tensor], truth: dict[str, Tensor], bounds: dict[str, float]) -> None:
    """AssertionError, naming the output or gradient, the error and the bound, unless ours is as close to the truth as bounds ask."""
    assert ours.keys() == truth.keys(), f"got {sorted(ours)}, expected {sorted(truth)}"
    for name, true in truth.items():
        assert ours[name].shape == true.shape, f"{name}: got shape {tuple(ours[name].shape)}, expected {tuple(true.shape)}"
        if true.numel():
            error = (ours[name].double() - true).abs().max().item()
            allowed = f"allowed {bounds[name]:.3e} (2 x eager + 4 ulp)"
            assert error <= bounds[name], f"{name} in {ours[name].dtype}: error {error:.3e}, {allowed}"


def assert_matches_truth(op, eager, inputs: dict, frozen: tuple[str, ...] = ()) -> None:
    """op is as close to the truth as PyTorch is (truth_and_bounds), for every output and gradient.

    Also: a second run is bitwise equal to the first, on CUDA a third, too, which may be played back (plans_triton.py), and no result
    depends on uninitialised memory.

    Args:
        op: the function under test, called with inputs as keywords.
        eager: an independent formulation of the same in plain PyTorch that runs in every dtype.
        inputs: keyword arguments, tensors in the dtype to test.
        frozen: names of tensors that get no gradient.
    Raises: AssertionError naming the output or gradient, the error and the bound.
    """
    truth, bounds = truth_and_bounds(eager, inputs, frozen)
    with poisoned_memory():
        ours = values_and_gradients(op, inputs, frozen)
    assert_within(ours, truth, bounds)
    for memory in (contextlib.nullcontext, poisoned_memory)[: 2 if any(value.is_cuda for value in ours.values()) else 1]:
        with memory():
            again = values_and_gradients(op, inputs, frozen)
        for name, value in again.items():
            assert torch.equal(ours[name], value), f"{name}: another run differs from the first"


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Standard normal numbers that do not depend on dtype. They are drawn on the device: one thread of a host draws 4e7 a second, and the
    inputs of one benchmark would take longer than measuring it."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64, device=device).to(dtype)
