"""The margin losses against the official numbers, and against loops over single tokens in fp64."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lightningdit_kernels import alignment, alignment_losses, marginal_cosine_loss, marginal_distance_matrix_loss, native
from lightningdit_kernels.alignment import alignment_losses_ref, marginal_cosine_loss_ref, marginal_distance_matrix_loss_ref
from lightningdit_kernels.testing import assert_matches_truth, assert_within, random_tensor, truth_and_bounds, values_and_gradients

REFERENCES = {"mcos": marginal_cosine_loss_ref, "mdms": marginal_distance_matrix_loss_ref}
needs_native = pytest.mark.skipif(not native.available, reason=native.about)
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


@pytest.mark.parametrize("case", ["0", "1", "2", "3"])
def test_official_values_and_gradients_in_the_low_rank_form(golden, case):
    """The official z is a product: with its QR factors as latents and weight, both losses and d loss / d latents = (d loss / dz) weight."""
    tensors, metadata = golden("alignment")
    z, f = (tensors[f"{case}.{key}"].flatten(2).mT for key in ("z_projected", "vf_feature"))
    weight, s = torch.linalg.qr(z.flatten(0, 1).mT.double())  # z^T = weight s^T for any z: r = min(C, B N)
    s, weight = s.mT.reshape(*z.shape[:2], -1).float().requires_grad_(), weight.float().requires_grad_()
    margins = [metadata["cases"][case][key] for key in ("cos_margin", "distmat_margin")]
    for value, name in zip(alignment_losses(s, weight, f, *margins), LOSSES, strict=True):
        grad_z = tensors[f"{case}.grad_z.{name}"].flatten(2).mT
        grad_s, grad_weight = torch.autograd.grad(value, (s, weight), retain_graph=True)
        assert value.item() == pytest.approx(tensors[f"{case}.{name}_loss"].item(), rel=2e-5)
        for gradient, expected in ((grad_s, grad_z @ weight), (grad_weight, grad_z.flatten(0, 1).mT @ s.flatten(0, 1))):
            assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max()


def low_rank_inputs(B, N, r, C, dtype=torch.float32, distmat_margin=0.05):
    inputs = dict(s=random_tensor(B, N, r, dtype=dtype, seed=1), weight=random_tensor(C, r, dtype=dtype, seed=2))
    return inputs | dict(f=random_tensor(B, N, C, dtype=dtype, seed=3), cos_margin=0.4, distmat_margin=distmat_margin)


@pytest.mark.parametrize("shape", [(2, 9, 4, 24), (1, 7, 10, 6), (2, 12, 70, 80)], ids=str)  # r below, above C; r above one kernel's
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_low_rank_form_matches_truth(shape, dtype, backend):
    assert_matches_truth(alignment_losses, alignment_losses_ref, low_rank_inputs(*shape, dtype), frozen=("f",))


def test_low_rank_form_of_one_latent_channel(backend):
    """Every cosine of z is 1 or -1: the gradient to s is rounding."""
    inputs = low_rank_inputs(2, 5, 1, 3)
    truth, bounds = truth_and_bounds(alignment_losses_ref, inputs, ("f",))
    ours = values_and_gradients(alignment_losses, inputs, ("f",))
    assert (ours.pop("grad.s") * inputs["s"]).abs().max() <= 4 * torch.finfo(torch.float32).eps
    truth.pop("grad.s")
    assert_within(ours, truth, bounds)


def ill_conditioned(weight):
    """Singular values from 1 to 1e-4, in directions of their own."""
    u, _, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    return (u * torch.logspace(0, -4, u.shape[1], dtype=torch.float64) @ vh).to(weight.dtype)


def with_copies(weight):
    weight[:, -2:] = weight[:, :2]
    return weight


def with_dependent_columns(weight):
    """Rank 3, exactly, where no two columns are parallel."""
    return (64 * weight[:, :3]).round() @ (4 * random_tensor(3, weight.shape[1], seed=4)).round() / 64


def with_zeros(weight):
    weight[:, 0] = weight[:, 3] = 0
    return weight


def with_scales(weight):
    """Each column 100 times shorter than the one before it."""
    return weight * torch.logspace(0, -2 * (weight.shape[1] - 1), weight.shape[1])


def unchanged(weight):
    return weight


WEIGHTS = [unchanged, ill_conditioned, with_copies, with_dependent_columns, with_zeros, with_scales]


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("shape", [(2, 40, 6, 24), (1, 30, 9, 5)], ids=str)
def test_low_rank_form_of_weights_that_are_nearly_or_exactly_singular(change, shape, backend):
    """At a margin that leaves many pairs on either side of it."""
    inputs = low_rank_inputs(*shape, distmat_margin=0.3)
    inputs["weight"] = change(inputs["weight"])
    assert_matches_truth(alignment_losses, alignment_losses_ref, inputs, frozen=("f",))


@pytest.mark.parametrize("directions", [(1, 1, 0, 0, 0, 0), (0, 0, 1, 1, 0, 0), (0, 0, 0, 0, 1, 1)], ids=str)
def test_low_rank_form_of_latents_that_the_weight_nearly_cancels(directions, backend):
    """Of singular values from 1 to 1e-4 the latents meet two."""
    inputs = low_rank_inputs(2, 40, 6, 24, distmat_margin=0.3)
    inputs["weight"] = ill_conditioned(inputs["weight"])
    vh = torch.linalg.svd(inputs["weight"].double(), full_matrices=False).Vh
    inputs["s"] = (inputs["s"] * torch.tensor(directions)) @ vh.float()
    assert_matches_truth(alignment_losses, alignment_losses_ref, inputs, frozen=("f",))


def test_low_rank_form_of_a_weight_that_is_not_a_number(backend):
    for poison in (float("nan"), float("inf")):
        inputs = low_rank_inputs(1, 8, 6, 12)
        inputs["weight"][2, 3] = poison
        assert all(value.isnan() for value in alignment_losses(**inputs))


@pytest.mark.parametrize("change", WEIGHTS)
@pytest.mark.parametrize("function", [alignment._factor, torch.ops.lightningdit.alignment_factor], ids=["definition", "op"])
def test_factor(function, change):
    weight = change(random_tensor(24, 6, seed=2))
    L, q = function(weight)
    assert torch.equal(L, L.tril())
    length = weight.double().norm(dim=0)
    assert ((q @ L.mT - weight).abs() <= 1e-7 * length).all()
    independent = L.diagonal() > 0
    assert independent.sum() == torch.linalg.matrix_rank(weight.double() / length.clamp(min=1e-30), rtol=1e-6)
    assert (q.mT @ q - independent.double().diag()).abs().max() <= 1e-7
    assert not L[:, ~independent].any()


def test_low_rank_form_needs_neither_qr_nor_the_host():
    """No decomposition of PyTorch's, and no value of a tensor: what a CUDA graph of the op would have to wait for."""
    operators = set()

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            operators.add(operator._schema.name.partition("::")[2])
            return operator(*args, **kwargs or {})

    inputs = low_rank_inputs(2, 9, 4, 24)
    s, weight, f, *margins = inputs.values()
    with Noted():
        saved = alignment._losses(s, weight, f, *margins)[2:]
        alignment._losses_backward(torch.ones(()), torch.ones(()), s, f, *saved, *margins)
        alignment._factor(weight)
    assert {"marginal_distance_matrix_loss_backward", "alignment_factor", "rsqrt"} <= operators
    assert not {name for name in operators if "linalg" in name or "triangular" in name or "cholesky" in name} - {"linalg_vector_norm"}
    assert not operators & {"_local_scalar_dense", "item", "nonzero", "is_nonzero", "equal"}


def test_low_rank_form_bad_input():
    s, weight, f = torch.ones(2, 4, 3), torch.ones(5, 3), torch.ones(2, 4, 5)
    with pytest.raises(ValueError, match=r"weight has shape \(5, 2\), expected \(5, 3\)"):
        alignment_losses(s, weight[:, :2], f)
    with pytest.raises(ValueError, match=r"f has shape \(2, 4, 4\), expected \(2, 4, 5\)"):
        alignment_losses(s, weight, f[..., :4])
    with pytest.raises(ValueError, match=r"weight has shape \(5, 3, 1, 1\), expected \(C, r\)"):
        alignment_losses(s, weight[..., None, None], f)


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


# B, N, C: panels and tiles with a rest and without, one token, widths below and above a vector.
NATIVE_SHAPES = [(2, 33, 40), (1, 64, 32), (3, 70, 7), (2, 1, 5), (1, 1, 1), (1, 100, 67)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", NATIVE_SHAPES, ids=str)
@pytest.mark.parametrize("name", LOSSES)
def test_every_backend_matches_truth(name, shape, dtype, backend):
    inputs = dict(z=random_tensor(*shape, dtype=dtype, seed=1), f=random_tensor(*shape, dtype=dtype, seed=2), margin=0.3)
    assert_matches_truth(LOSSES[name][0], REFERENCES[name], inputs, frozen=("f",))


@pytest.mark.parametrize("name", LOSSES)
def test_one_channel_has_no_gradient(name, backend):
    """Every cosine is 1 or -1, whatever the lengths: what comes out as a gradient is rounding."""
    inputs = dict(z=random_tensor(2, 40, 1, seed=1), f=random_tensor(2, 40, 1, seed=2), margin=0.3)
    ours = values_and_gradients(LOSSES[name][0], inputs, frozen=("f",))
    torch.testing.assert_close(ours["out.0"], REFERENCES[name](inputs["z"].double(), inputs["f"].double(), 0.3).float())
    assert (ours["grad.z"] * inputs["z"]).abs().max() <= 2 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("name", LOSSES)
def test_inputs_of_two_dtypes_and_strides(name, backend):
    z, f = random_tensor(2, 24, 37, seed=1).mT, random_tensor(2, 37, 48, dtype=torch.bfloat16, seed=2)[..., ::2]
    for pair in ((z, f), (z.half(), f.float()), (z.half(), f), (z.bfloat16(), f.half())):
        inputs = dict(zip("zf", pair, strict=True), margin=0.2)
        assert_matches_truth(LOSSES[name][0], REFERENCES[name], inputs, frozen=("f",))


@pytest.mark.parametrize("name", LOSSES)
def test_the_operators_own_backward_is_the_gradient(name, backend):
    """What alignment_losses calls, and the reference where the gradient did not come out of the forward."""
    operators, z, f = torch.ops.lightningdit, random_tensor(2, 40, 12, seed=1), random_tensor(2, 40, 12, seed=2)
    grad = torch.tensor(-1.7)
    expected = values_and_gradients(lambda z: LOSSES[name][0](z, f, 0.2), dict(z=z), cotangents=(grad,))["grad.z"]
    if name == "mcos":
        gradient = operators.marginal_cosine_loss_backward(grad, z, f, 0.2)
    else:
        norms = operators.marginal_distance_matrix_loss(z, f, 0.2)[1:]
        gradient = operators.marginal_distance_matrix_loss_backward(grad, z, f, *norms, 0.2)
        assert torch.allclose(norms[0], 1 / z.norm(dim=-1)) and torch.allclose(norms[1], 1 / f.norm(dim=-1))
    assert torch.allclose(gradient, expected, rtol=1e-6, atol=1e-9)


@needs_native
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("name", LOSSES)
def test_nothing_depends_on_the_number_of_threads(name, batch):
    inputs = dict(z=random_tensor(batch, 150, 300, seed=1), f=random_tensor(batch, 150, 300, seed=2), margin=0.05)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(values_and_gradients(LOSSES[name][0], inputs, frozen=("f",)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(other[key], value) for key, value in results[0].items())


def largest_allocation(function):
    """Bytes of the largest single allocation on the CPU while function runs."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()

    def sizes(events):
        for event in events:
            if event.tag.name == "Allocation":
                yield event.extra_fields.alloc_size
            yield from sizes(event.children)

    return max(sizes(profiler.profiler.kineto_results.experimental_event_tree()))


@needs_native
@pytest.mark.parametrize("form", ["plain", "low rank"])
def test_no_allocation_is_as_large_as_a_matrix_of_similarities(form):
    count, channels = 1024, 16
    z, f = random_tensor(1, count, channels, seed=1).requires_grad_(), random_tensor(1, count, channels, seed=2)
    weight = random_tensor(channels, channels, seed=3)
    matrix = 4 * count * count

    def plain(loss):
        return lambda: torch.autograd.grad(loss(z, f, 0.1), z)

    ours = plain(marginal_distance_matrix_loss) if form == "plain" else lambda: torch.autograd.grad(sum(alignment_losses(z, weight, f)), z)
    ours()
    # Channels and features, the gradient, and a row of tiles: 32 tokens' signs against all, twice.
    assert largest_allocation(ours) <= 4 * count * (3 * channels + 2 * 32 + 1) < matrix / 8
    assert largest_allocation(plain(marginal_distance_matrix_loss_ref)) >= matrix, "what the test looks for is seen"


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_a_number_does_not_pass_unnoticed(name, backend):
    for poison in ("z", "f"):
        inputs = dict(z=random_tensor(2, 40, 12, seed=1), f=random_tensor(2, 40, 12, seed=2), margin=0.2)
        inputs[poison][1, 7, 3] = float("nan")
        assert values_and_gradients(LOSSES[name][0], inputs, frozen=("f",))["out.0"].isnan()
        assert LOSSES[name][0](**inputs).isnan(), "without a gradient too"


@pytest.mark.parametrize("name", LOSSES)
def test_zero_tokens_follow_the_clamps_of_torch(name, backend):
    z, f = random_tensor(1, 40, 12, seed=1), random_tensor(1, 40, 12, seed=2)
    z[0, 3], f[0, 5], z[0, 36], f[0, 36] = 0, 0, 0, 0
    truth, ours = (values_and_gradients(loss, dict(z=z.double() if loss is REFERENCES[name] else z, f=f.to(kind), margin=0.1), ("f",))
                   for loss, kind in ((REFERENCES[name], torch.float64), (LOSSES[name][0], torch.float32)))  # fmt: skip
    for key, true in truth.items():
        torch.testing.assert_close(ours[key].double(), true, rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("tokens", [2, 40])
def test_a_pair_exactly_at_the_margin_is_free(tokens, backend):
    """cos z = 1 and cos f = 1 * 1 / (2 * 1) = 0.5 are exact: at margin 0.5 neither cost nor gradient, just below both."""
    z = torch.zeros(1, tokens, 4)
    z[..., 0] = 1
    z[:, 1, 1] = 2**-13  # z_0 . z_1 / (|z_0| |z_1|) is still 1 in fp32, and the gradient of a pair that pays is not 0
    f = torch.zeros(1, tokens, 4)
    f[:, :, 0] = 1
    f[:, 1] = 1
    inputs = dict(z=z, f=f)
    at, below = (values_and_gradients(marginal_distance_matrix_loss, inputs | dict(margin=margin), ("f",)) for margin in (0.5, 0.4999))
    assert at["out.0"] == 0 and not at["grad.z"].any()
    assert below["out.0"] > 0 and below["grad.z"].any()
    # Cosine: 1 - 0.5 - 0.5 is exactly 0.
    at, below = (values_and_gradients(marginal_cosine_loss, inputs | dict(margin=m, z=z[:, 1:2] * 0 + z[:, :1], f=f[:, 1:2]), ("f",))
                 for m in (0.5, 0.4999))  # fmt: skip
    assert at["out.0"] == 0 and not at["grad.z"].any()
    assert below["out.0"] > 0 and below["grad.z"].any()


@pytest.mark.parametrize("margin", [0.0, 0.25])
def test_identical_tokens_cost_nothing(margin, backend):
    z = random_tensor(2, 45, 20, seed=1)
    got = values_and_gradients(marginal_distance_matrix_loss, dict(z=z, f=z.clone(), margin=margin), ("f",))
    assert got["out.0"] == 0 and not got["grad.z"].any()


def test_empty_batches_are_refused():
    for loss, _ in LOSSES.values():
        with pytest.raises(ValueError, match=r"z has shape \(0, 4, 3\), .* none of them zero"):
            loss(torch.ones(0, 4, 3), torch.ones(0, 4, 3))
