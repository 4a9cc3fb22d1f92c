"""metrics.py against the official numbers, textbook definitions written out once more, and other packages."""
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import linalg

from lightningdit import metrics
from lightningdit.metrics import FeatureStatistics, frechet_distance, kernel_distance, precision_recall


def normal(n, dim, seed=0, scale=1.0, shift=0.0):
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale + shift


def distance(x, y):
    a, b = FeatureStatistics.of(x), FeatureStatistics.of(y)
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


# statistics


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 9), min_size=2, max_size=6), st.sampled_from([0.0, 1e6]), st.booleans())
def test_streamed_statistics_are_those_of_the_whole(sizes, shift, merged):
    x = normal(sum(sizes) + 2, 5, seed=sum(sizes), shift=shift)
    parts = x.split([*sizes, 2])
    if merged:
        statistics = FeatureStatistics(5)
        for part in parts:
            statistics.merge(FeatureStatistics(5).update(part))
    else:
        statistics = FeatureStatistics(5)
        for part in parts:
            statistics.update(part)
    exact = (x - shift).numpy()  # numpy's own covariance, of values whose mean is small
    assert statistics.count == len(x)
    assert torch.allclose(statistics.mean - shift, torch.from_numpy(exact.mean(0)), rtol=0, atol=1e-9)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-9)


def test_a_large_mean_does_not_cancel():
    x = normal(4000, 3, shift=1e7)
    naive = (x.T @ x - len(x) * torch.outer(x.mean(0), x.mean(0))) / (len(x) - 1)
    covariance = FeatureStatistics(3).update(x[:1000]).update(x[1000:]).covariance
    exact = torch.cov((x - 1e7).T)
    assert (covariance - exact).abs().max() < 1e-8 < 1e-3 < (naive - exact).abs().max()


@pytest.mark.parametrize("features, message", [
    (torch.zeros(3, 4, dtype=torch.int64), "features: got torch.int64"), (torch.zeros(3), r"of shape \(3,\)"),
    (torch.zeros(3, 5), r"of shape \(3, 5\), expected a tensor \(n, 4\)"), (np.zeros((3, 4)), "ndarray"),
    (torch.tensor([[0, 0, 0, math.nan]]), "NaN or infinity in 1 of 1"), (torch.full((2, 4), math.inf), "in 2 of 2"),
])
def test_features_that_are_none(features, message):
    statistics = FeatureStatistics(4)
    with pytest.raises(ValueError, match=message):
        statistics.update(features)
    assert statistics.count == 0 and not statistics.scatter.any()


def test_a_covariance_needs_two():
    with pytest.raises(ValueError, match="got 1 vectors"):
        _ = FeatureStatistics.of(torch.zeros(1, 3)).covariance
    with pytest.raises(ValueError, match="2 channels, expected 3"):
        FeatureStatistics(3).merge(FeatureStatistics(2))


# Frechet distance


@pytest.mark.parametrize("case", ["small", "wide_rank_deficient"])
def test_frechet_distance_is_the_official_one(golden, case):
    tensors, _ = golden("metrics")
    expected = tensors[f"{case}.frechet_distance"].item()
    assert distance(tensors[f"{case}.samples"], tensors[f"{case}.reference"]) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_full_rank_agrees_with_sqrtm():
    x, y = normal(500, 20) @ normal(20, 20, seed=1), normal(400, 20, seed=2, shift=0.3)
    sx, sy = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(sx + sy - 2 * linalg.sqrtm(sx @ sy).real)
    assert distance(x, y) == pytest.approx(expected, rel=1e-10) == distance(y, x)


def test_frechet_distance_of_singular_covariances_has_a_closed_form():
    # Rank 2 in 300 channels, on planes that share one axis: Tr (S1 S2)^(1/2) = the product of deviations along that axis.
    basis = torch.linalg.qr(normal(300, 3)).Q.T
    s1 = 9 * torch.outer(basis[0], basis[0]) + 4 * torch.outer(basis[1], basis[1])
    s2 = 25 * torch.outer(basis[0], basis[0]) + 1 * torch.outer(basis[2], basis[2])
    d = frechet_distance(basis[2], s1, torch.zeros(300, dtype=torch.float64), s2)
    assert d == pytest.approx(1 + 13 + 26 - 2 * 3 * 5, rel=1e-6)


def test_frechet_distance_from_few_samples():
    """Ten vectors in 64 channels: a general square root of the singular product loses digits, a factor of each set does not."""
    x, y = normal(10, 64), normal(12, 64, seed=1, shift=1.0)
    a, b = ((v - v.mean(0)) / math.sqrt(len(v) - 1) for v in (x, y))
    expected = ((x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
                - 2 * torch.linalg.svdvals(a @ b.T).sum()).item()
    assert distance(x, y) == pytest.approx(expected, rel=1e-7)
    assert distance(x, x) < 1e-6 and distance(x, x + 2) == pytest.approx(64 * 4, rel=1e-7)


@pytest.mark.parametrize("arguments, message", [
    ((np.zeros(2), np.eye(2), np.zeros(3), np.eye(3)), "mean2: got 3 channels"),
    ((np.zeros(2), np.eye(3), np.zeros(2), np.eye(2)), "covar"),
    ((np.zeros(2), -np.eye(2), np.zeros(2), np.eye(2)), "covariance1: got an eigenvalue of -1"),
    ((np.zeros(2), np.eye(2), np.zeros(2), np.array([[1.0, 0.5], [0, 1]])), "covariance2: got a matrix that is not symmetric"),
    ((np.array([0, np.nan]), np.eye(2), np.zeros(2), np.eye(2)), "mean1: got NaN"),
    ((np.zeros(2, int), np.eye(2), np.zeros(2), np.eye(2)), "mean1"),
])
def test_what_is_no_gaussian(arguments, message):
    with pytest.raises(ValueError, match=message):
        frechet_distance(*arguments)


# Inception score, KID, precision and recall


def test_inception_score_is_the_official_one(golden):
    tensors, meta = golden("metrics")
    assert metrics.inception_score(tensors["is.probabilities"], 500) == pytest.approx(tensors["is.split500"].item(), rel=1e-12)


def test_inception_score_of_known_distributions():
    assert metrics.inception_score(torch.eye(10)) == pytest.approx(10)  # certain and balanced: the number of classes
    assert metrics.inception_score(torch.full((7, 10), 0.1)) == pytest.approx(1)
    with pytest.raises(ValueError, match="not distributions"):
        metrics.inception_score(torch.ones(3, 2))


def test_kernel_distance_by_its_definition():
    x, y = normal(30, 6), normal(40, 6, seed=1, shift=0.5)

    def k(a, b):
        return (float(a @ b) / 6 + 1) ** 3

    rng = np.random.RandomState(2020)
    a, b = x[rng.choice(30, 25, replace=False)], y[rng.choice(40, 25, replace=False)]
    same = sum(k(v[i], v[j]) for v in (a, b) for i in range(25) for j in range(25) if i != j) / (25 * 24)
    expected = same - 2 * sum(k(u, v) for u in a for v in b) / 25**2
    assert kernel_distance(x, y, subset_size=25, subsets=1) == (pytest.approx(expected, rel=1e-12), 0)
    with pytest.raises(ValueError, match="subset_size: got 31, expected 2 to 30"):
        kernel_distance(x, y, subset_size=31)


@pytest.mark.parametrize("case", ["small", "wide_rank_deficient"])
@pytest.mark.parametrize("block", [64, 4096])
def test_precision_and_recall_are_the_official_ones(golden, case, block):
    tensors, _ = golden("metrics")
    found = precision_recall(tensors[f"{case}.samples"], tensors[f"{case}.reference"], block=block)
    assert found == tuple(pytest.approx(tensors[f"{case}.{name}"].item(), abs=1e-12) for name in ("precision", "recall"))


@pytest.mark.parametrize("k, block", [(1, 5), (3, 7), (3, 100), (5, 1)])
def test_precision_and_recall_by_brute_force(k, block):
    x, y = normal(40, 3), normal(25, 3, seed=1, shift=0.7)

    def inside(points, others):
        radii = [sorted((a - b).norm().item() for j, b in enumerate(others) if j != i)[k - 1] for i, a in enumerate(others)]
        return np.mean([any((p - o).norm().item() <= r for o, r in zip(others, radii, strict=True)) for p in points])

    assert precision_recall(x, y, k=k, block=block) == (inside(x, y), inside(y, x))


def test_precision_counts_duplicates_and_ties_as_inside():
    y = normal(20, 2048, shift=100.0).repeat(4, 1)  # every radius is 0
    assert precision_recall(y[:30], y) == (1.0, pytest.approx(80 / 80))
    line = torch.arange(10.0, dtype=torch.float64)[:, None] / 3
    assert precision_recall(line + 1 / 3, line, k=1) == (1.0, 1.0)  # neighbours exactly on the sphere
    with pytest.raises(ValueError, match="k: got 3, expected fewer than the vectors"):
        precision_recall(y[:3], y)
    with pytest.raises(ValueError, match="reference: got 2 channels"):
        precision_recall(y, line.repeat(1, 2))


# reconstructions


def photograph(n=2, height=32, width=27, channels=3, seed=0):
    smooth = torch.rand(n, channels, 8, 8, generator=torch.Generator().manual_seed(seed)) * 255
    return torch.nn.functional.interpolate(smooth, (height, width), mode="bicubic").clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous()


def noisy(images, amplitude, seed=1):
    noise = torch.randint(-amplitude, amplitude + 1, images.shape, generator=torch.Generator().manual_seed(seed))
    return (images.int() + noise).clamp(0, 255).byte()


def test_psnr():
    x = photograph()
    y = x.clone()
    y[0] = (x[0].int() + torch.where(x[0] > 127, -10, 10)).byte()
    assert metrics.psnr(x, y).tolist() == [pytest.approx(20 * math.log10(25.5)), pytest.approx(10 * math.log10(255**2 / 1e-10))]


@pytest.mark.parametrize("height, width, channels", [(32, 27, 3), (11, 11, 1), (64, 64, 3)])
def test_ssim_window_by_window(height, width, channels):
    """The definition of the paper of 2004 with a full 11 x 11 window at each position, without separable filters."""
    x = photograph(1, height, width, channels)
    y = noisy(x, 30)
    g = np.exp(-((np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    w = np.outer(g, g) / np.outer(g, g).sum()
    values = []
    for c in range(channels):
        a, b = (v[0, :, :, c].double().numpy() for v in (x, y))
        for i in range(height - 10):
            for j in range(width - 10):
                p, q = a[i : i + 11, j : j + 11], b[i : i + 11, j : j + 11]
                mp, mq = (w * p).sum(), (w * q).sum()
                vp, vq, cov = (w * (p - mp) ** 2).sum(), (w * (q - mq) ** 2).sum(), (w * (p - mp) * (q - mq)).sum()
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * cov + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    assert metrics.ssim(x, y).item() == pytest.approx(np.mean(values), rel=1e-9)


def test_ssim_of_equal_unequal_and_small_images():
    x = photograph(3)
    assert torch.allclose(metrics.ssim(x, x), torch.ones(3, dtype=torch.float64))
    assert (metrics.ssim(x, noisy(x, 10)) > metrics.ssim(x, noisy(x, 60))).all()
    with pytest.raises(ValueError, match="8x8 pixels, expected at least 11x11"):
        metrics.ssim(x[:, :8, :8], x[:, :8, :8])
    with pytest.raises(ValueError, match="reconstructions: got torch.float32"):
        metrics.psnr(x, x.float())
    with pytest.raises(ValueError, match="reconstructions: got shape"):
        metrics.psnr(x, x[:, 1:])


# latents


def test_uniformity():
    rng = np.random.default_rng(0)
    even = np.stack(np.meshgrid(np.arange(20.0), np.arange(20.0)), -1).reshape(-1, 2)
    clumped = np.concatenate([rng.normal(0, 0.01, (200, 2)), rng.uniform(-50, 50, (200, 2))])
    even, clumped = (metrics.uniformity(torch.from_numpy(points)) for points in (even, clumped))
    assert even["density_cv"] < 0.3 < 0.8 < clumped["density_cv"]
    assert even["gini"] < 0.15 < 0.3 < clumped["gini"] and clumped["normalized_entropy"] < even["normalized_entropy"] <= 1


def test_uniformity_by_its_definition():
    points = normal(60, 2)
    n, covariance = 60, np.cov(points.numpy(), rowvar=False) * 60 ** (-2 / 6)  # Scott's factor n^(-1 / (d + 4))
    inverse = np.linalg.inv(covariance)
    density = np.array([np.mean([math.exp(-0.5 * (p - q) @ inverse @ (p - q)) for q in points.numpy()]) for p in points.numpy()])
    found = metrics.uniformity(points)
    assert found["density_cv"] == pytest.approx(density.std() / density.mean(), rel=1e-9)
    assert found["gini"] == pytest.approx(np.abs(density[:, None] - density).mean() / (2 * density.mean()), rel=1e-9)
    p = density / density.sum()
    assert found["normalized_entropy"] == pytest.approx(-(p * np.log2(p)).sum() / math.log2(n), rel=1e-9)
    with pytest.raises(ValueError, match="on one line"):
        metrics.uniformity(torch.stack([torch.arange(9.0), torch.arange(9.0)], 1))


def test_latent_uniformity_is_repeatable_and_sees_neighbourhoods():
    x = normal(100, 4)
    found = metrics.latent_uniformity(x)
    assert found == metrics.latent_uniformity(x)
    x[50:] = x[50:51]  # half of the vectors in one place
    assert metrics.latent_uniformity(x)["density_cv"] > found["density_cv"]
    with pytest.raises(ValueError, match="got 90 rows, expected at least 91"):
        metrics.latent_uniformity(x[:90])
