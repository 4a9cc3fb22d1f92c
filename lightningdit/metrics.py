"""Measures of generated images, reconstructions and latents, in float64: numbers from tensors, without networks and without files.

features.py makes features of images; evaluation.py reads images, keeps references and writes reports.

n, m numbers of images, D feature channels, K classes, z latent channels.
"""
import math

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from .optional import optional

TIE = 1e-12  # of the largest squared norm: squared distances this close count as equal, as rounding of |x|^2 - 2 x y + |y|^2 cannot tell


class FeatureStatistics:
    """Mean and covariance of feature vectors, streamed and mergeable.

    Each batch is centred on its own mean before it is squared, and joined by Chan's formula, so a mean that is large against the spread
    cancels nothing. In float64: of 50,000 Inception features float32 leaves about three digits of a small FID.

    Attributes: count (int); mean (D,); scatter (D, D), the sum of (x - mean) (x - mean)^T; float64, on `device`.
    Source: Chan, Golub, LeVeque, Updating formulae and a pairwise algorithm for computing sample variances, 1979.
    """

    def __init__(self, dim, device="cpu"):
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    @classmethod
    def of(cls, features):
        """Those of features (n, D) at once."""
        return cls(_checked("features", features, minimum=0).shape[1], features.device).update(features)

    def update(self, features):
        """Adds features (n, D), floating point. Returns self. Raises: ValueError for another shape or dtype, NaN or infinity."""
        features = _checked("features", features, dim=len(self.mean), minimum=0).to(self.mean.device)
        if len(features):
            mean = features.mean(0)
            centred = features - mean
            self._join(len(features), mean, centred.T @ centred)
        return self

    def merge(self, other):
        """Adds what another object has seen. Returns self."""
        if other.mean.shape != self.mean.shape:
            raise ValueError(f"other: got statistics of {len(other.mean)} channels, expected {len(self.mean)}")
        if other.count:
            self._join(other.count, other.mean.to(self.mean.device), other.scatter.to(self.mean.device))
        return self

    def all_reduce(self):
        """Merges over all processes of torch.distributed, in place; without a process group nothing. Returns self."""
        if _world() > 1:
            sums = _for_group(torch.cat([self.mean.new_tensor([self.count]), self.count * self.mean]))
            dist.all_reduce(sums)
            sums = sums.to(self.mean.device)
            count, mean = int(sums[0]), sums[1:] / sums[:1].clamp(min=1)
            delta = self.mean - mean
            scatter = _for_group(self.scatter + self.count * torch.outer(delta, delta))
            dist.all_reduce(scatter)
            self.count, self.mean, self.scatter = count, mean, scatter.to(self.mean.device)
        return self

    @property
    def covariance(self):
        """(D, D), unbiased. Raises: ValueError with fewer than two vectors."""
        if self.count < 2:
            raise ValueError(f"features: got {self.count} vectors, expected at least 2 for a covariance")
        return self.scatter / (self.count - 1)

    def _join(self, count, mean, scatter):
        delta, total = mean - self.mean, self.count + count
        self.scatter += scatter + torch.outer(delta, delta) * (self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total


def gather_rows(rows, indices):
    """Rows (n, ...) of all processes in the order of their indices (n,) int64, unequal shares welcome; one process: only ordered."""
    if _world() > 1:
        counts = [None] * _world()
        dist.all_gather_object(counts, len(rows))
        gathered = []
        for values in (rows, indices):
            padded = _for_group(values.new_zeros(max(counts), *values.shape[1:]))
            padded[: len(values)] = values
            parts = [torch.empty_like(padded) for _ in counts]
            dist.all_gather(parts, padded)
            gathered.append(torch.cat([part[:count].to(values.device) for part, count in zip(parts, counts, strict=True)]))
        rows, indices = gathered
    return rows[indices.argsort(stable=True)]


def frechet_distance(mean1, covariance1, mean2, covariance2):
    """|mean1 - mean2|^2 + Tr(S1 + S2 - 2 (S1 S2)^(1/2)), the squared Frechet distance of two Gaussians.

    With S = A A^T from the symmetric eigen-decomposition, Tr (S1 S2)^(1/2) is the sum of the singular values of A1^T A2. Nothing but
    symmetric matrices is decomposed and no root is taken of a product, so singular covariances, such as those of fewer images than
    channels, need no offset on the diagonal; a general matrix square root of S1 S2 is far off there.

    Args:
        mean1, mean2: (D,). covariance1, covariance2: (D, D), symmetric and positive semi-definite. Tensors or arrays; float64 is used.
    Returns: a number >= 0.
    Raises: ValueError for shapes that differ, values that are not finite, or a matrix that is no covariance.
    Source: FID, arXiv:1706.08500.
    """
    mean1, mean2 = (_float64(name, value, (None,)) for name, value in (("mean1", mean1), ("mean2", mean2)))
    dim = len(mean1)
    if len(mean2) != dim:
        raise ValueError(f"mean2: got {len(mean2)} channels, expected {dim} as in mean1")
    device = mean1.device
    roots, traces = [], []
    for name, value in (("covariance1", covariance1), ("covariance2", covariance2)):
        covariance = _float64(name, value, (dim, dim)).to(device)
        if not torch.allclose(covariance, covariance.T, rtol=1e-5, atol=1e-8 * float(covariance.abs().max())):
            raise ValueError(f"{name}: got a matrix that is not symmetric, expected a covariance")
        values, vectors = torch.linalg.eigh(0.5 * (covariance + covariance.T))
        largest = values.abs().max()
        if values.min() < -1e-4 * largest:  # rounding of a covariance stored in float32 leaves -1e-7
            raise ValueError(f"{name}: got an eigenvalue of {float(values.min()):.3g} beside {float(largest):.3g}, expected none below 0")
        real = values > dim * torch.finfo(values.dtype).eps * largest  # the others are rounding errors, and so would their roots be
        roots.append(vectors[:, real] * values[real].sqrt())
        traces.append(values.sum())
    trace_root = torch.linalg.svdvals(roots[0].T @ roots[1]).sum()
    distance = (mean1 - mean2.to(device)).square().sum() + traces[0] + traces[1] - 2 * trace_root
    return max(0.0, float(distance))  # equal Gaussians leave a rounding error of either sign


def inception_score(probabilities, split_size=5000):
    """exp(mean KL(p(y|x) || p(y))), p(y) over a split, averaged over consecutive splits; a shorter last one counts as much as the others.

    Args:
        probabilities: (n, K), rows that sum to 1. split_size: images a split.
    Source: arXiv:1606.03498; splits as the evaluator of ADM, arXiv:2105.05233, makes them.
    """
    p = _checked("probabilities", probabilities)
    _positive("split_size", split_size)
    if p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise ValueError("probabilities: got rows that are not distributions, expected values >= 0 that sum to 1")
    scores = []
    for part in p.split(split_size):
        divergence = (torch.special.xlogy(part, part) - torch.special.xlogy(part, part.mean(0))).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def kernel_distance(features, reference, subset_size=1000, subsets=100, seed=2020):
    """KID: the unbiased squared maximum mean discrepancy with the kernel (x y / D + 1)^3, averaged over random subsets.

    Args:
        features: (n, D). reference: (m, D). subset_size: vectors drawn without replacement from each, at most n and m.
        subsets, seed: as torch-fidelity has them, whose subsets these are.
    Returns: (mean, standard deviation over the subsets). Equal distributions give values about 0, of either sign.
    Source: arXiv:1801.01401.
    """
    x, y = _checked_pair(features, reference)
    _positive("subsets", subsets)
    if not 2 <= subset_size <= min(len(x), len(y)):
        raise ValueError(f"subset_size: got {subset_size}, expected 2 to {min(len(x), len(y))}, the smaller set")
    rng = np.random.RandomState(seed)
    values = []
    for _ in range(subsets):
        a, b = (v[torch.from_numpy(rng.choice(len(v), subset_size, replace=False))] for v in (x, y))
        aa, bb, ab = ((u @ v.T / x.shape[1] + 1) ** 3 for u, v in ((a, a), (b, b), (a, b)))
        within = (aa.sum() - aa.trace() + bb.sum() - bb.trace()) / (subset_size * (subset_size - 1))
        values.append(within - 2 * ab.mean())
    values = torch.stack(values)
    return float(values.mean()), float(values.std(correction=0))


def precision_recall(features, reference, k=3, block=4096):
    """Precision: the fraction of samples inside the reference's manifold. Recall: of reference images inside the samples' manifold.

    The manifold of a set is the union of balls, one at each vector, that reach to its k-th nearest other vector. Equal distances count as
    inside. Distances are taken in float64, block x block at a time: memory does not grow with n m.

    Args:
        features: (n, D) of samples. reference: (m, D). k: neighbours. block: vectors a side of one block of distances.
    Returns: (precision, recall).
    Source: arXiv:1904.06991; k = 3 as in ADM.
    """
    x, y = _checked_pair(features, reference)
    _positive("k", k), _positive("block", block)
    if min(len(x), len(y)) <= k:
        raise ValueError(f"k: got {k}, expected fewer than the vectors of the smaller set, {min(len(x), len(y))}")
    centre = y.mean(0)  # distances do not change, their rounding errors shrink
    x, y = x - centre, y - centre
    tie = TIE * float(torch.cat([x.square().sum(1), y.square().sum(1)]).max())
    return tuple(_inside(a, b, _radii(b, k, block), tie, block) for a, b in ((x, y), (y, x)))


def _squared_distances(x, y):
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp(min=0)


def _radii(x, k, block):
    """(n,) squared distance of each vector to its k-th nearest other one."""
    radii = []
    for i, rows in enumerate(x.split(block)):
        nearest = x.new_empty(len(rows), 0)
        for j, columns in enumerate(x.split(block)):
            distances = _squared_distances(rows, columns)
            if i == j:
                distances.fill_diagonal_(math.inf)
            nearest = torch.cat([nearest, distances], dim=1)
            nearest = nearest.topk(min(k, nearest.shape[1]), largest=False).values
        radii.append(nearest.amax(1))
    return torch.cat(radii)


def _inside(x, y, radii, tie, block):
    """Fraction of x (n, D) inside a ball around any y (m, D) with squared radii (m,)."""
    inside = 0
    for rows in x.split(block):
        hit = torch.zeros(len(rows), dtype=torch.bool, device=x.device)
        for columns, limits in zip(y.split(block), radii.split(block), strict=True):
            hit |= (_squared_distances(rows, columns) <= limits + tie).any(1)
        inside += int(hit.sum())
    return inside / len(x)


def psnr(images, reconstructions):
    """10 log10(255^2 / mean squared error) of each image, in dB: uint8 (n, H, W, C) twice -> (n,) float64. Equal images give 148.1 dB, not
    infinity, so that a mean stays finite (the error is floored at 1e-10)."""
    x, y = _image_pair(images, reconstructions)
    return 10 * torch.log10(255**2 / (x - y).square().mean((1, 2, 3)).clamp(min=1e-10))


def ssim(images, reconstructions):
    """Structural similarity of each image: uint8 (n, H, W, C) twice -> (n,) float64; 1 for equal images.

    Each channel alone; Gaussian window of 11 x 11 with sigma 1.5, weights that sum to 1, variances without Bessel's correction,
    C1 = (0.01 * 255)^2, C2 = (0.03 * 255)^2; averaged over the positions where the window lies inside the image, then over channels.
    The paper's numbers come from this definition, on floating-point reconstructions; here both are uint8, as a user gets them.

    Raises: ValueError for images of fewer than 11 pixels a side.
    Source: Wang, Bovik, Sheikh, Simoncelli, Image quality assessment, 2004.
    """
    x, y = _image_pair(images, reconstructions)
    n, height, width, channels = x.shape
    if min(height, width) < 11:
        raise ValueError(f"images: got {height}x{width} pixels, expected at least 11x11, the window of SSIM")
    window = torch.exp(-0.5 * (torch.arange(-5, 6, dtype=torch.float64, device=x.device) / 1.5) ** 2)
    window = window / window.sum()
    x, y = (v.permute(0, 3, 1, 2).reshape(n * channels, 1, height, width) for v in (x, y))
    means = F.conv2d(torch.cat([x, y, x * x, y * y, x * y]), window.view(1, 1, 11, 1))
    mx, my, xx, yy, xy = F.conv2d(means, window.view(1, 1, 1, 11)).chunk(5)
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    index = (2 * mx * my + c1) * (2 * (xy - mx * my) + c2) / ((mx * mx + my * my + c1) * (xx - mx * mx + yy - my * my + c2))
    return index.view(n, -1).mean(1)


def uniformity(points):
    """How evenly points cover the plane, from a Gaussian kernel density (Scott's bandwidth) at the points themselves.

    Returns: {"density_cv": standard deviation / mean of the densities, "gini": their Gini coefficient, "normalized_entropy": the entropy
        of the densities, scaled to sum to 1, over log n}. Even coverage: 0, 0, 1.
    Args:
        points: (n, 2), n > 2.
    Source: the measures of VA-VAE, arXiv:2501.01423, Sec. 5, which takes them of a t-SNE of latents (see latent_uniformity).
    """
    with optional("uniformity"):
        from scipy.stats import gaussian_kde

    points = _checked("points", points, dim=2, minimum=3).cpu().numpy().T
    if np.linalg.matrix_rank(np.cov(points)) < 2:
        raise ValueError("points: got points on one line, expected points that span the plane")
    density = np.sort(gaussian_kde(points)(points))
    n, p = len(density), density / density.sum()
    gini = float(((2 * np.arange(1, n + 1) - n - 1) * p).sum() / n)
    return dict(density_cv=float(density.std() / density.mean()), gini=gini, normalized_entropy=float(-(p * np.log(p)).sum() / math.log(n)))


def latent_uniformity(vectors):
    """uniformity of a t-SNE (perplexity 30, initialised by PCA, repeatable) of normalised latent vectors (n, z), n > 90.

    The paper takes one vector at a random position of each of 10,000 images, and averages over 10 drawings. The values depend on n, so only
    those of equal n compare; and t-SNE amplifies the last bit of its input: from 100 vectors expect them to move by a tenth.
    """
    with optional("latent_uniformity"):
        from sklearn.manifold import TSNE

    vectors = _checked("vectors", vectors, minimum=91).float().cpu().numpy()
    return uniformity(torch.from_numpy(TSNE(2, perplexity=30, init="pca", random_state=42).fit_transform(vectors)))


def classifier_accuracy(generated, labels, real, real_labels, ridge=1e-2):
    """Fraction of generated images that a classifier trained on real ones takes for the class that was asked for.

    The classifier is kernel ridge regression on pixels, with an RBF kernel as wide as that of scikit-learn's SVC: fit for small images such
    as digits, and at hand at once, where SVC takes seconds to import.

    Args:
        generated: (n, H, W, C) uint8. labels: (n,) the classes asked for. real: (m, H, W, C) uint8. real_labels: (m,) integers.
        ridge: on the kernel's diagonal.
    Returns: a number in [0, 1]. Time grows with m^3, memory with m (m + n).
    Raises: ValueError if the image shapes differ.
    """
    generated, real = (torch.as_tensor(images) for images in (generated, real))
    labels, real_labels = (torch.as_tensor(classes).long() for classes in (labels, real_labels))
    if generated.shape[1:] != real.shape[1:]:
        raise ValueError(f"generated: got images of shape {tuple(generated.shape[1:])}, expected {tuple(real.shape[1:])}, as the real ones")
    x, z = (images.flatten(1).double() / 255 for images in (real, generated))
    gamma = 1 / (x.shape[1] * x.var(correction=0).clamp(min=1e-12))

    def kernel(a, b):
        return torch.exp(-gamma * torch.cdist(a, b).square())

    factor = torch.linalg.cholesky(kernel(x, x) + ridge * torch.eye(len(x), dtype=x.dtype))
    weights = torch.cholesky_solve(torch.nn.functional.one_hot(real_labels).to(x.dtype), factor)
    return float(((kernel(z, x) @ weights).argmax(1) == labels).double().mean())


def _world():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _for_group(tensor):
    """The tensor where the process group can send it from."""
    return tensor.cuda() if dist.get_backend() == "nccl" else tensor


def _positive(name, value):
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: got {value!r}, expected a positive integer")


def _checked(name, rows, dim=None, minimum=1):
    """Rows (n, dim) as finite float64."""
    expected = f"({'n' if dim is None else f'n, {dim}'}{', D' if dim is None else ''}) floating point"
    if not torch.is_tensor(rows) or rows.ndim != 2 or not rows.is_floating_point() or (dim is not None and rows.shape[1] != dim):
        got = f"{rows.dtype} of shape {tuple(rows.shape)}" if torch.is_tensor(rows) else type(rows).__name__
        raise ValueError(f"{name}: got {got}, expected a tensor {expected}")
    if len(rows) < minimum:
        raise ValueError(f"{name}: got {len(rows)} rows, expected at least {minimum}")
    bad = int((~rows.isfinite()).any(1).sum())
    if bad:
        raise ValueError(f"{name}: got NaN or infinity in {bad} of {len(rows)} rows, expected finite values")
    return rows.double()


def _checked_pair(features, reference):
    features, reference = _checked("features", features), _checked("reference", reference)
    if features.shape[1] != reference.shape[1]:
        raise ValueError(f"reference: got {reference.shape[1]} channels, expected {features.shape[1]} as in features")
    return features, reference.to(features.device)


def _float64(name, value, shape):
    value = torch.as_tensor(value).detach()
    fits = value.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, value.shape, strict=True))
    if not fits or not value.is_floating_point() or not value.numel():
        expected = " x ".join("D" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: got {value.dtype} of shape {tuple(value.shape)}, expected {expected} floating point values")
    if not value.isfinite().all():
        raise ValueError(f"{name}: got NaN or infinity, expected finite values")
    return value.double()


def _image_pair(images, reconstructions):
    for name, value in (("images", images), ("reconstructions", reconstructions)):
        if not torch.is_tensor(value) or value.dtype != torch.uint8 or value.ndim != 4 or not value.numel():
            got = f"{value.dtype} of shape {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
            raise ValueError(f"{name}: got {got}, expected uint8 (n, H, W, C)")
    if images.shape != reconstructions.shape:
        raise ValueError(f"reconstructions: got shape {tuple(reconstructions.shape)}, expected {tuple(images.shape)} as in images")
    return images.double(), reconstructions.to(images.device).double()
