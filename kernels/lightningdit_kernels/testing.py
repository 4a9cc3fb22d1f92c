"""How an op is held to the truth. Used by tests/ and by the gates of bench/; nothing else imports it."""

import contextlib

import torch
from torch import Tensor


@contextlib.contextmanager
def poisoned_memory():
    """Inside, torch.empty returns NaN, so that an element which a kernel forgets to write shows up in the result."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # torch.utils.deterministic.fill_uninitialized_memory is on by default
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def values_and_gradients(op, inputs: dict, frozen: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Outputs of op(**inputs) as `out.i`, and the gradients of <outputs, fixed random cotangents> as `grad.name`.

    Floating-point tensors that are not named in frozen are differentiated. The cotangents depend on the outputs' shapes only.
    """
    leaves = {
        name: value.detach().requires_grad_(value.is_floating_point() and name not in frozen) if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
    outputs = op(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    wanted = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor) and leaf.requires_grad}
    generator = torch.Generator().manual_seed(0)
    cotangents = [torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.device, out.dtype) for out in outputs]
    gradients = torch.autograd.grad(outputs, list(wanted.values()), cotangents) if wanted else ()
    result = {f"out.{i}": out.detach() for i, out in enumerate(outputs)}
    return result | {f"grad.{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def assert_matches_truth(op, eager, inputs: dict, frozen: tuple[str, ...] = ()) -> None:
    """op is as close to the truth as PyTorch is: err(op) <= 2 * err(eager) + tiny, for every output and gradient.

    The truth is eager in fp64 on the same (already rounded) inputs; err is the largest absolute difference; tiny is four units in
    the last place of the largest true value. Also: a second run is bitwise equal to the first, no output depends on uninitialised memory.

    Args:
        op: the function under test, called with inputs as keywords.
        eager: an independent formulation of the same in plain PyTorch that runs in every dtype.
        inputs: keyword arguments, tensors in the dtype to test.
        frozen: names of tensors that get no gradient.
    Raises: AssertionError naming the output or gradient, the error and the bound.
    """
    doubled = {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
    truth = values_and_gradients(eager, doubled, frozen)
    plain = values_and_gradients(eager, inputs, frozen)
    with poisoned_memory():
        ours = values_and_gradients(op, inputs, frozen)
    again = values_and_gradients(op, inputs, frozen)
    assert ours.keys() == truth.keys(), f"got {sorted(ours)}, expected {sorted(truth)}"
    for name, true in truth.items():
        assert ours[name].shape == true.shape, f"{name}: got shape {tuple(ours[name].shape)}, expected {tuple(true.shape)}"
        assert torch.equal(ours[name], again[name]), f"{name}: a second run differs from the first"
        if true.numel() == 0:
            continue
        tiny = 4 * torch.finfo(ours[name].dtype).eps * true.abs().max().item()
        bound = 2 * (plain[name].double() - true).abs().max().item() + tiny
        error = (ours[name].double() - true).abs().max().item()
        assert error <= bound, f"{name} in {ours[name].dtype}: error {error:.3e}, allowed {bound:.3e} (2 x eager + 4 ulp)"


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    """Standard normal numbers that do not depend on dtype or device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device, dtype)
