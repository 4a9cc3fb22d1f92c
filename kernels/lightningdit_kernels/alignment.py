"""The two margin losses that align a tokenizer's latents with the features of a vision foundation model.

B images, N tokens, C channels, r latent channels. Both losses are means; the caller adds and weights them.
"""

import torch
import torch.nn.functional as nnf
from torch import Tensor

from lightningdit_kernels import native
from lightningdit_kernels.library import accumulation_dtype, check_floating, check_shape, define, differentiable

COSINE_EPS, NORMALIZE_EPS = 1e-8, 1e-12  # the clamps of torch's cosine_similarity and normalize
PIVOT_EPS = 1e-15  # of weight^T weight: fp64 leaves some 2e-16 of a pivot that should be 0, and what is dropped is 3e-8 of a column


def marginal_cosine_loss_ref(z, f, margin=0.5):
    """The definition of marginal_cosine_loss in plain PyTorch."""
    acc = accumulation_dtype(z)
    cosine = nnf.cosine_similarity(z.to(acc), f.detach().to(acc), dim=-1)  # (B, N)
    return nnf.relu(1 - margin - cosine).mean()


def marginal_distance_matrix_loss_ref(z, f, margin=0.25):
    """The definition of marginal_distance_matrix_loss in plain PyTorch."""
    acc = accumulation_dtype(z)
    # The gradient is a step function of |Gz - Gf| - margin: half-precision products would move tokens across the step.
    with torch.autocast(z.device.type, enabled=False):
        z_hat = nnf.normalize(z.to(acc), dim=-1)
        f_hat = nnf.normalize(f.detach().to(acc), dim=-1)
        distance = (z_hat @ z_hat.mT - f_hat @ f_hat.mT).abs()  # (B, N, N)
        return nnf.relu(distance - margin).mean()


def alignment_losses_ref(s, weight, f, cos_margin=0.5, distmat_margin=0.25):
    """The definition of alignment_losses in plain PyTorch."""
    acc = accumulation_dtype(s)
    with torch.autocast(s.device.type, enabled=False):
        z = s.to(acc) @ weight.to(acc).mT
    return marginal_cosine_loss_ref(z, f, cos_margin), marginal_distance_matrix_loss_ref(z, f, distmat_margin)


# The marginal cosine loss as an operator. Every token is independent: nothing is saved but the inputs.


def _cosines(z, f):
    """cos(z_i, f_i), 1 / |z_i| and 1 / |f_i|, the norms clamped, and where the norm of z is not: each (B, N, 1)."""
    acc = accumulation_dtype(z)
    z, f = z.to(acc), f.to(acc)
    norm = z.norm(dim=-1, keepdim=True)
    z_inverse, f_inverse = 1 / norm.clamp(min=COSINE_EPS), 1 / f.norm(dim=-1, keepdim=True).clamp(min=COSINE_EPS)
    return (z * f).sum(-1, keepdim=True) * z_inverse * f_inverse, z_inverse, f_inverse, norm > COSINE_EPS


def marginal_cosine_loss_backward_ref(grad, z, f, margin):
    """dz_i = -grad / (B N) * (f_hat_i - cos_i z_hat_i) / |z_i| for the tokens that pay, 0 for the others."""
    acc = accumulation_dtype(z)
    cosine, z_inverse, f_inverse, free = _cosines(z, f)
    factor = torch.where(1 - margin - cosine > 0, -grad / (z.shape[0] * z.shape[1]), 0) * z_inverse
    return (factor * (f.to(acc) * f_inverse - free * cosine * z_inverse * z.to(acc))).to(z.dtype)


def _scalar(z, *_):
    return z.new_empty((), dtype=accumulation_dtype(z))


def _like_z(grad, z, *_):
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _native_serves(z, f):
    return native.serves(z.dtype, f.dtype) and {z.dtype, f.dtype} != {torch.bfloat16, torch.float16}


def _cosine_cpu(z, f, margin):
    if not _native_serves(z, f):
        return marginal_cosine_loss_ref(z, f, margin)
    return native.marginal_cosine_loss(z, f, margin, COSINE_EPS)


def _cosine_backward_cpu(grad, z, f, margin):
    if not _native_serves(z, f):
        return marginal_cosine_loss_backward_ref(grad, z, f, margin)
    return native.marginal_cosine_loss_backward(grad, z, f, margin, COSINE_EPS)


def _cosine_cuda(z, f, margin):
    if torch.float64 in (z.dtype, f.dtype):
        return marginal_cosine_loss_ref(z, f, margin)
    from lightningdit_kernels import alignment_triton

    return alignment_triton.marginal_cosine_loss_fwd(z.contiguous(), f.contiguous(), margin)


def _cosine_backward_cuda(grad, z, f, margin):
    if torch.float64 in (z.dtype, f.dtype):
        return marginal_cosine_loss_backward_ref(grad, z, f, margin)
    from lightningdit_kernels import alignment_triton

    return alignment_triton.marginal_cosine_loss_bwd(grad, z.contiguous(), f.contiguous(), margin)


def _cosine_setup_context(ctx, inputs, output):
    z, f, ctx.margin = inputs
    ctx.save_for_backward(z, f)


def _cosine_backward(ctx, grad):
    return torch.ops.lightningdit.marginal_cosine_loss_backward(grad, *ctx.saved_tensors, ctx.margin), None, None


define("marginal_cosine_loss(Tensor z, Tensor f, float margin) -> Tensor", marginal_cosine_loss_ref, _scalar, cpu=_cosine_cpu,
       cuda=_cosine_cuda)
define("marginal_cosine_loss_backward(Tensor grad, Tensor z, Tensor f, float margin) -> Tensor", marginal_cosine_loss_backward_ref, _like_z,
       cpu=_cosine_backward_cpu, cuda=_cosine_backward_cuda)
differentiable("marginal_cosine_loss", _cosine_setup_context, _cosine_backward)


# The marginal distance-matrix loss as an operator. The inverse norms come out for the backward, which recomputes the similarities.


def _inverse_norm(x):
    return 1 / x.to(accumulation_dtype(x)).norm(dim=-1).clamp(min=NORMALIZE_EPS)


def _distance(z, f, margin):
    """The reference of the operator: the loss, and the inverse norms of z and f, (B, N)."""
    return marginal_distance_matrix_loss_ref(z, f, margin), _inverse_norm(z), _inverse_norm(f)


def marginal_distance_matrix_loss_backward_ref(grad, z, f, z_inverse, f_inverse, margin):
    """dz_i = (g_i - z_hat_i (z_hat_i . g_i)) / |z_i|, g_i = 2 grad / (B N^2) sum_j S_ij z_hat_j, S the sign of what exceeds the margin."""
    acc = accumulation_dtype(z)
    with torch.autocast(z.device.type, enabled=False):
        z_inverse, f_inverse = z_inverse.to(acc)[..., None], f_inverse.to(acc)[..., None]
        z_hat, f_hat = z.to(acc) * z_inverse, f.to(acc) * f_inverse
        difference = z_hat @ z_hat.mT - f_hat @ f_hat.mT
        g = torch.where(difference.abs() > margin, difference.sign(), 0) @ z_hat * (2 * grad / difference.numel())
        free = z_inverse * NORMALIZE_EPS < 0.999  # below the clamp the norm is a constant
        return ((g - free * (z_hat * g).sum(-1, keepdim=True) * z_hat) * z_inverse).to(z.dtype)


def _distance_fake(z, f, margin):
    return _scalar(z), z.new_empty(z.shape[:2], dtype=accumulation_dtype(z)), f.new_empty(f.shape[:2], dtype=accumulation_dtype(f))


def _distance_cpu(z, f, margin):
    if not _native_serves(z, f):
        return _distance(z, f, margin)
    return native.marginal_distance_matrix_loss(z, f, margin, NORMALIZE_EPS, gradient=False)[:3]


def _distance_backward_cpu(grad, z, f, z_inverse, f_inverse, margin):
    if not _native_serves(z, f):
        return marginal_distance_matrix_loss_backward_ref(grad, z, f, z_inverse, f_inverse, margin)
    return (grad * native.marginal_distance_matrix_loss(z, f, margin, NORMALIZE_EPS, gradient=True)[3]).to(z.dtype)


def _distance_cuda(z, f, margin):
    if torch.float64 in (z.dtype, f.dtype):
        return _distance(z, f, margin)
    from lightningdit_kernels import alignment_triton

    return alignment_triton.marginal_distance_matrix_loss_fwd(z.contiguous(), f.contiguous(), margin)


def _distance_backward_cuda(grad, z, f, z_inverse, f_inverse, margin):
    if torch.float64 in (z.dtype, f.dtype):
        return marginal_distance_matrix_loss_backward_ref(grad, z, f, z_inverse, f_inverse, margin)
    from lightningdit_kernels import alignment_triton

    return alignment_triton.marginal_distance_matrix_loss_bwd(grad, z.contiguous(), f.contiguous(), z_inverse, f_inverse, margin)


def _distance_setup_context(ctx, inputs, output):
    z, f, ctx.margin = inputs
    ctx.save_for_backward(z, f, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _distance_backward(ctx, grad, *_):
    if grad is None:
        return None, None, None
    return torch.ops.lightningdit.marginal_distance_matrix_loss_backward(grad, *ctx.saved_tensors, ctx.margin), None, None


define("marginal_distance_matrix_loss(Tensor z, Tensor f, float margin) -> (Tensor, Tensor, Tensor)", _distance, _distance_fake,
       cpu=_distance_cpu, cuda=_distance_cuda)
define("marginal_distance_matrix_loss_backward(Tensor grad, Tensor z, Tensor f, Tensor z_inverse, Tensor f_inverse, float margin) "
       "-> Tensor", marginal_distance_matrix_loss_backward_ref, _like_z, cpu=_distance_backward_cpu, cuda=_distance_backward_cuda)
differentiable("marginal_distance_matrix_loss", _distance_setup_context, _distance_backward)


# The same on a CPU when a gradient will be wanted. It comes out of the forward, where the similarities are at hand, for a loss of which
# the derivative is 1: two products of N x N x C in all, three with a backward of its own. It is saved in place of f, and the backward,
# which the adaptive weight of the tokenizer's loss calls twice, is one multiplication.


def _distance_and_gradient(z, f, margin):
    """The reference of the operator: the loss and its gradient to z, (B, N, C), in the dtype of the loss."""
    loss, *inverses = _distance(z, f, margin)
    wide = z.to(loss.dtype)
    return loss, marginal_distance_matrix_loss_backward_ref(torch.ones_like(loss), wide, f, *inverses, margin)


def _distance_and_gradient_fake(z, f, margin):
    return _scalar(z), z.new_empty(z.shape, dtype=accumulation_dtype(z))


def _distance_and_gradient_cpu(z, f, margin):
    if not _native_serves(z, f):
        return _distance_and_gradient(z, f, margin)
    loss, *_, gradient = native.marginal_distance_matrix_loss(z, f, margin, NORMALIZE_EPS, gradient=True)
    return loss, gradient


def _scaled_gradient(grad, gradient, z):
    """z gives the dtype; and, being differentiable, the error of a second derivative."""
    return (grad * gradient).to(z.dtype)


def _distance_and_gradient_setup_context(ctx, inputs, output):
    ctx.save_for_backward(output[1], inputs[0])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _distance_and_gradient_backward(ctx, grad, *_):
    if grad is None:
        return None, None, None
    return torch.ops.lightningdit.marginal_distance_matrix_loss_and_gradient_backward(grad, *ctx.saved_tensors), None, None


define("marginal_distance_matrix_loss_and_gradient(Tensor z, Tensor f, float margin) -> (Tensor, Tensor)", _distance_and_gradient,
       _distance_and_gradient_fake, cpu=_distance_and_gradient_cpu)
define("marginal_distance_matrix_loss_and_gradient_backward(Tensor grad, Tensor gradient, Tensor z) -> Tensor", _scaled_gradient,
       lambda grad, gradient, z: torch.empty_like(gradient, dtype=z.dtype))
differentiable("marginal_distance_matrix_loss_and_gradient", _distance_and_gradient_setup_context, _distance_and_gradient_backward)


# Both losses of z = s weight^T without z. With weight = q L^T (q (C, r) of orthonormal columns) and t = s L, (B, N, r), z_i = q t_i, so
# that z_i . z_j = t_i . t_j, |z_i| = |t_i| and z_i . f_i = t_i . v_i with v = f q: r channels in place of C. q and L need not be
# differentiated: dz/dt = q gives the gradient to t, and through dz the gradients to s and weight. L is the Cholesky factor of
# weight^T weight, in fp64, because that has the square of weight's condition number: less is lost than fp32 loses of weight.


def _factor(weight):
    """The reference of alignment_factor: L (r, r) lower triangular and q (C, r), fp64. weight = q L^T, whatever the rank of weight.

    The pivot of a column of weight that depends on those before it is rounding: its columns of L and q are zero.
    """
    with torch.autocast(weight.device.type, enabled=False):
        wide = weight.double()
        gram = wide.mT @ wide
        r, least = len(gram), PIVOT_EPS * gram.diagonal()
        rest, rows = torch.cat([gram, torch.eye(r, dtype=gram.dtype, device=gram.device)], 1), []
        for j in range(r):  # Gauss makes (gram | 1) into (L^T | L^-1)
            pivot = rest[j, j]
            rows.append(rest[j] * torch.where(pivot <= least[j], 0, pivot.rsqrt()))  # what is not a number stays so
            rest = torch.addr(rest, rows[j][:r], rows[j], alpha=-1)
        rows = torch.stack(rows)
        return rows[:, :r].triu().mT.contiguous(), wide @ rows[:, r:].mT


def _factor_fake(weight):
    C, r = weight.shape
    return weight.new_empty((r, r), dtype=torch.float64), weight.new_empty((C, r), dtype=torch.float64)


def _factor_cpu(weight):
    """LAPACK's, which takes a tenth of the time, where no pivot is rounding."""
    wide = weight.double()
    gram = wide.mT @ wide
    L, failed = torch.linalg.cholesky_ex(gram)
    if failed or not (L.diagonal().square() > PIVOT_EPS * gram.diagonal()).all():
        return _factor(weight)
    return L.contiguous(), torch.linalg.solve_triangular(L.mT, wide, upper=True, left=False).contiguous()


def _factor_cuda(weight):
    from lightningdit_kernels import alignment_triton

    if weight.shape[1] > alignment_triton.LARGEST_FACTOR:
        return _factor(weight)  # three launches a column, none of which waits
    return alignment_triton.factor(weight)


define("alignment_factor(Tensor weight) -> (Tensor, Tensor)", _factor, _factor_fake, cpu=_factor_cpu, cuda=_factor_cuda)


def _project(x, q):
    """The reference of alignment_project: x @ q (B, N, K) and |x_i| (B, N)."""
    acc = accumulation_dtype(x)
    with torch.autocast(x.device.type, enabled=False):
        return x.to(acc) @ q.to(acc), x.to(acc).norm(dim=-1)


def _project_fake(x, q):
    acc = accumulation_dtype(x)
    return x.new_empty((*x.shape[:2], q.shape[1]), dtype=acc), x.new_empty(x.shape[:2], dtype=acc)


def _project_cuda(x, q):
    if torch.float64 in (x.dtype, q.dtype):
        return _project(x, q)
    from lightningdit_kernels import alignment_triton

    return alignment_triton.project(x.contiguous(), q.contiguous())


define("alignment_project(Tensor x, Tensor q) -> (Tensor, Tensor)", _project, _project_fake, cuda=_project_cuda)


def _losses(s, weight, f, cos_margin, distmat_margin):
    """(cosine loss, distance-matrix loss, q (C, r), L (r, r), t (B, N, r), v (B, N, r), |f|, 1/|t|, 1/|f|, each (B, N))."""
    acc = accumulation_dtype(s)
    L, q = torch.ops.lightningdit.alignment_factor(weight)
    with torch.autocast(s.device.type, enabled=False):
        t = (s.double() @ L).to(acc)  # where weight nearly cancels s, the last digits of fp32 are all that is left of t
    L, q = L.to(acc), q.to(acc)
    v, f_norm = torch.ops.lightningdit.alignment_project(f, q)
    distance, t_inverse, f_inverse = torch.ops.lightningdit.marginal_distance_matrix_loss(t, f, distmat_margin)
    cosine = _low_rank_cosines(t, v, f_norm)[0]
    return nnf.relu(1 - cos_margin - cosine).mean(), distance, q, L, t, v, f_norm, t_inverse, f_inverse


def _low_rank_cosines(t, v, f_norm):
    norm = t.norm(dim=-1)
    t_inverse, f_inverse = 1 / norm.clamp(min=COSINE_EPS), 1 / f_norm.clamp(min=COSINE_EPS)
    return (t * v).sum(-1) * t_inverse * f_inverse, t_inverse, f_inverse, norm > COSINE_EPS


def _losses_backward(grad_cosine, grad_distance, s, f, q, L, t, v, f_norm, t_inverse, f_inverse, cos_margin, distmat_margin):
    """The gradients to s and weight. dz_i = q dt_i + a_i (f_i - q v_i): only the cosine term leaves the span of q."""
    with torch.autocast(s.device.type, enabled=False):
        operator = torch.ops.lightningdit.marginal_distance_matrix_loss_backward
        dt = operator(grad_distance, t, f, t_inverse, f_inverse, distmat_margin)
        cosine, norm_inverse, f_scale, free = _low_rank_cosines(t, v, f_norm)
        factor = torch.where(1 - cos_margin - cosine > 0, -grad_cosine / cosine.numel(), 0) * norm_inverse
        a = (factor * f_scale)[..., None]
        dt = dt + a * v - (free * factor * cosine * norm_inverse)[..., None] * t
        acc = dt.dtype
        wide = s.to(acc).flatten(0, 1)
        outside = f.flatten(0, 1).to(acc).mT @ (a.flatten(0, 1) * wide)  # sum_i a_i f_i s_i^T, (C, r)
        grad_weight = outside + q @ ((dt - a * v).flatten(0, 1).mT @ wide)
        return (dt @ L.mT).to(s.dtype), grad_weight


def _losses_fake(s, weight, f, cos_margin, distmat_margin):
    (B, N, r), C, acc = s.shape, weight.shape[0], accumulation_dtype(s)
    shapes = ((), (), (C, r), (r, r), (B, N, r), (B, N, r), (B, N), (B, N), (B, N))
    return tuple(s.new_empty(shape, dtype=acc) for shape in shapes)


def _losses_backward_fake(grad_cosine, grad_distance, s, f, q, *_):
    return _like_z(None, s), torch.empty_like(q)


def _losses_setup_context(ctx, inputs, output):
    s, weight, f, *ctx.margins = inputs
    ctx.weight_dtype = weight.dtype
    ctx.save_for_backward(s, f, *output[2:])
    ctx.mark_non_differentiable(*output[2:])


def _losses_gradient(ctx, grad_cosine, grad_distance, *_):
    grad_s, grad_weight = torch.ops.lightningdit.alignment_losses_backward(grad_cosine, grad_distance, *ctx.saved_tensors, *ctx.margins)
    return grad_s, grad_weight.to(ctx.weight_dtype), None, None, None


define("alignment_losses(Tensor s, Tensor weight, Tensor f, float cos_margin, float distmat_margin) -> (" + ", ".join(["Tensor"] * 9) + ")",
       _losses, _losses_fake)
define("alignment_losses_backward(Tensor grad_cosine, Tensor grad_distance, Tensor s, Tensor f, Tensor q, Tensor L, Tensor t, Tensor v, "
       "Tensor f_norm, Tensor t_inverse, Tensor f_inverse, float cos_margin, float distmat_margin) -> (Tensor, Tensor)",
       _losses_backward, _losses_backward_fake)
differentiable("alignment_losses", _losses_setup_context, _losses_gradient)


def _compiler_is_better(z, f):
    """Without a kernel the compiler fuses the definition, but it cannot look into an operator."""
    return torch.compiler.is_compiling() and not z.is_cuda and not _native_serves(z, f)


def marginal_cosine_loss(z: Tensor, f: Tensor, margin: float = 0.5) -> Tensor:
    """mean over B and N of relu(1 - margin - cos(z_i, f_i)).

    Args:
        z: (B, N, C), projected latents, fp32, bf16, fp16 or fp64.
        f: (B, N, C), features of the frozen foundation model. No gradient flows to them.
        margin: similarity above 1 - margin costs nothing.
    Returns: scalar, fp32 (fp64 for fp64 z).
    Raises: ValueError if the shapes differ, are empty or not of three dimensions, or the dtype is another.
    Source: VA-VAE, arXiv:2501.01423, equation of the marginal cosine similarity loss.
    """
    _check("marginal_cosine_loss", z, f)
    if _compiler_is_better(z, f):
        return marginal_cosine_loss_ref(z, f, margin)
    return torch.ops.lightningdit.marginal_cosine_loss(z, f.detach(), margin)


def marginal_distance_matrix_loss(z: Tensor, f: Tensor, margin: float = 0.25) -> Tensor:
    """mean over B and the N x N token pairs of one image of relu(|cos(z_i, z_j) - cos(f_i, f_j)| - margin).

    No N x N matrix is ever in memory, forward or backward, on CUDA and, with the native library, on a CPU.

    Args:
        z: (B, N, C), projected latents, fp32, bf16, fp16 or fp64.
        f: (B, N, C'), features of the frozen foundation model; C' may differ from C. No gradient flows to them.
        margin: differences of similarity below it cost nothing.
    Returns: scalar, fp32 (fp64 for fp64 z).
    Raises: ValueError if B or N differ, a dimension is empty, or the dtype is another.
    Source: VA-VAE, arXiv:2501.01423, equation of the marginal distance matrix similarity loss.
    """
    _check("marginal_distance_matrix_loss", z, f, same_channels=False)
    if _compiler_is_better(z, f):
        return marginal_distance_matrix_loss_ref(z, f, margin)
    if not z.is_cuda and _native_serves(z, f) and z.requires_grad and torch.is_grad_enabled():
        return torch.ops.lightningdit.marginal_distance_matrix_loss_and_gradient(z, f.detach(), margin)[0]
    return torch.ops.lightningdit.marginal_distance_matrix_loss(z, f.detach(), margin)[0]


def alignment_losses(
    s: Tensor, weight: Tensor, f: Tensor, cos_margin: float = 0.5, distmat_margin: float = 0.25
) -> tuple[Tensor, Tensor]:
    """Both losses of the linear projection z = s weight^T, without z: (marginal_cosine_loss(z, f), marginal_distance_matrix_loss(z, f)).

    For r latent channels and C features the similarities of z cost r / C of the work, and neither z nor its gradient is ever in memory.

    Args:
        s: (B, N, r), latents, fp32, bf16, fp16 or fp64.
        weight: (C, r), that of a linear layer or a 1x1 convolution without bias.
        f: (B, N, C), features of the frozen foundation model. No gradient flows to them.
        cos_margin, distmat_margin: the margins of the two losses.
    Returns: two scalars, fp32 (fp64 for fp64 s). The projection is fp32 under autocast too.
    Raises: ValueError for a shape or dtype other than these.
    Source: VA-VAE, arXiv:2501.01423; the reduction to r channels is ours.
    """
    op = "alignment_losses"
    check_floating(op, s=s, weight=weight, f=f)
    for name, tensor, dims in (("s", s, 3), ("weight", weight, 2), ("f", f, 3)):
        if tensor.dim() != dims or tensor.numel() == 0:
            expected = "(B, N, r)" if name == "s" else "(C, r)" if name == "weight" else "(B, N, C)"
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected {expected}, none of them zero")
    check_shape(op, (weight.shape[0], s.shape[2]), "(C, r) of f and s", weight=weight)
    check_shape(op, (s.shape[0], s.shape[1], weight.shape[0]), "the tokens of s and the rows of weight", f=f)
    return torch.ops.lightningdit.alignment_losses(s, weight, f.detach(), cos_margin, distmat_margin)[:2]


def _check(op, z, f, same_channels=True):
    check_floating(op, z=z, f=f)
    for name, tensor in (("z", z), ("f", f)):
        if tensor.dim() != 3 or tensor.numel() == 0:
            raise ValueError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected (B, N, C), none of them zero")
    channels = z.shape[2] if same_channels else f.shape[2]
    check_shape(op, (z.shape[0], z.shape[1], channels), "the shape of z", f=f)
