"""The margin losses against the official numbers, and against loops over single tokens in fp64."""

import pytest
import torch

from lightningdit_kernels import marginal_cosine_loss, marginal_distance_matrix_loss
from lightningdit_kernels.testing import assert_matches_truth, random_tensor

LOSSES = {"mcos": (marginal_cosine_loss, "cos_margin"), "mdms": (marginal_distance_matrix_loss, "distmat_margin")}


@pytest.mark.parametrize("case", ["0", "1", "2", "3"])
@pytest.mark.parametrize("name", LOSSES)
def test_official_values_and_gradients(golden, name, case):
    tensors, metadata = golden("alignment")
    loss, margin = LOSSES[name]
    z, f = (tensors[f"{case}.{key}"].flatten(2).mT for key in ("z_projected", "vf_feature"))  # (B, C, H, W) -> (B, N, C)
    z = z.detach().requires_grad_()
    value = loss(z, f, metadata["cases"][case][margin])
    (gradient,) = torch.autograd.grad(value, z)
    expected = tensors[f"{case}.grad_z.{name}"].flatten(2).mT
    assert value.item() == pytest.approx(tensors[f"{case}.{name}_loss"].item(), rel=1e-5)
    assert (gradient - expected).abs().max() <= 1e-5 * expected.abs().max()


def cosine(a, b):
    return torch.dot(a, b) / (torch.dot(a, a) * torch.dot(b, b)).sqrt()


def loop_mcos(z, f, margin):
    terms = [torch.relu(1 - margin - cosine(a, b)) for a, b in zip(z.flatten(0, 1), f.flatten(0, 1), strict=True)]
    return torch.stack(terms).mean()


def loop_mdms(z, f, margin):
    tokens, terms = range(z.shape[1]), []
    for a, b in zip(z, f, strict=True):
        terms += [torch.relu((cosine(a[i], a[j]) - cosine(b[i], b[j])).abs() - margin) for i in tokens for j in tokens]
    return torch.stack(terms).mean()


@pytest.mark.parametrize("shape", [(2, 9, 12), (1, 7, 5), (3, 1, 4), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("name, loop", [("mcos", loop_mcos), ("mdms", loop_mdms)])
@pytest.mark.parametrize("margin", [0.1, 0.5])
def test_matches_truth(name, loop, shape, margin):
    inputs = dict(z=random_tensor(*shape, seed=1), f=random_tensor(*shape, seed=2), margin=margin)
    assert_matches_truth(LOSSES[name][0], loop, inputs, frozen=("f",))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_inputs_are_computed_in_fp32(name, dtype):
    """The only roundings are those of the inputs and, for the gradient, of the result."""
    loss = LOSSES[name][0]
    z, f = random_tensor(2, 16, 24, dtype=dtype, seed=1).requires_grad_(), random_tensor(2, 16, 24, dtype=dtype, seed=2)
    wide = z.detach().float().requires_grad_()
    value, expected = loss(z, f), loss(wide, f.float())
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert torch.equal(torch.autograd.grad(value, z)[0], torch.autograd.grad(expected, wide)[0].to(dtype))


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_changes_nothing(name):
    z, f = random_tensor(2, 8, 16, seed=1), random_tensor(2, 8, 16, seed=2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = LOSSES[name][0](z, f)
    assert torch.equal(inside, LOSSES[name][0](z, f))


@pytest.mark.parametrize("name", LOSSES)
def test_features_are_frozen_and_perfect_alignment_costs_nothing(name):
    z = random_tensor(2, 8, 16).requires_grad_()
    f = (3 * z).detach().requires_grad_()
    value = LOSSES[name][0](z, f)
    assert value.item() == 0
    far = LOSSES[name][0](z, f.flip(1))
    assert far > 0 and torch.autograd.grad(far, (z, f), allow_unused=True)[1] is None


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name):
    z, f = random_tensor(2, 4, 5, dtype=torch.float64, seed=1).requires_grad_(), random_tensor(2, 4, 5, dtype=torch.float64, seed=2)
    assert torch.autograd.gradcheck(lambda z: LOSSES[name][0](z, f, 0.1), z)


def test_feature_width_may_differ_for_the_distance_matrix():
    z, f = random_tensor(2, 6, 4, seed=1), random_tensor(2, 6, 9, seed=2)
    assert_matches_truth(marginal_distance_matrix_loss, loop_mdms, dict(z=z, f=f, margin=0.25), frozen=("f",))
    with pytest.raises(ValueError, match=r"f has shape \(2, 6, 9\), expected \(2, 6, 4\)"):
        marginal_cosine_loss(z, f)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    "z, f, message",
    [
        (torch.ones(2, 4), torch.ones(2, 4), r"z has shape \(2, 4\), expected \(B, N, C\)"),
        (torch.ones(2, 0, 3), torch.ones(2, 0, 3), r"z has shape \(2, 0, 3\), .* none of them zero"),
        (torch.ones(2, 4, 3), torch.ones(2, 5, 3), r"f has shape \(2, 5, 3\), expected \(2, 4, 3\)"),
        (torch.ones(2, 4, 3), torch.ones(2, 4, 3, dtype=torch.uint8), "f has dtype torch.uint8"),
    ],
)
def test_bad_input(name, z, f, message):
    with pytest.raises(ValueError, match=message):
        LOSSES[name][0](z, f)
