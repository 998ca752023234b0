"""Distances between two sets of features, all in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of the Gaussians fitted to a (n, D) and b (m, D) (Heusel et al.
    2017).

    It is |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^1/2). The root's trace is the sum of the
    roots of the eigenvalues of S_a^1/2 S_b S_a^1/2, which is symmetric. It is biased upwards by
    O(1/n + 1/m): compare only distances between sets of the same sizes.
    """
    a, b = _checked("frechet_distance", a, b, minimum=2)
    # Of one feature cov gives no matrix.
    cov_a, cov_b = (torch.atleast_2d(x.T.cov()) for x in (a, b))
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Rounding leaves eigenvalues of about -1e-16 where a set has fewer than D + 1 images.
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean(0) - b.mean(0)).square().sum()
    # Rounding leaves about -1e-6 of equal sets.
    return max(0.0, float(mean + cov_a.trace() + cov_b.trace() - 2 * cross))


def kid(a: Tensor, b: Tensor) -> float:
    """Return the kernel distance of a (n, D) and b (m, D): unbiased squared MMD (Binkowski et al.
    2018).

    The kernel is (x.y / D + 1)^3. The distance's expectation is 0 for independent samples of one
    distribution, so that single values may be negative, and slightly below 0 where both have the
    same label counts.
    """
    a, b = _checked("kid", a, b, minimum=2)

    def kernel(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / x.shape[1] + 1) ** 3

    def within(x: Tensor) -> Tensor:
        k, n = kernel(x, x), len(x)
        return (k.sum() - k.trace()) / (n * (n - 1))

    return float(within(a) + within(b) - 2 * kernel(a, b).mean())


def in_manifold(points: Tensor, queries: Tensor, k: int = 3) -> Tensor:
    """Return which queries (m, D) lie in the manifold of points (n, D), as (m,) bool.

    The manifold is the union of the balls around every point that reach to its k-th nearest
    neighbour among the others (Kynkaanniemi et al. 2019).
    """
    points, queries = _checked("in_manifold", points, queries, minimum=k + 1)
    # The smallest of the k + 1 is the point's distance to itself, 0.
    radii = torch.cdist(points, points).kthvalue(k + 1, dim=1).values
    return (torch.cdist(queries, points) <= radii).any(1)


def precision(real: Tensor, generated: Tensor, k: int = 3) -> float:
    """Return the improved precision (Kynkaanniemi et al. 2019): the share of generated (m, D) in
    the manifold of real (n, D). With the two exchanged it is recall."""
    return float(in_manifold(real, generated, k).double().mean())


def _checked(name: str, a: Tensor, b: Tensor, minimum: int) -> tuple[Tensor, Tensor]:
    for features in (a, b):
        if not isinstance(features, Tensor):
            kind = type(features).__name__
            raise TypeError(f"{name}: features must be tensors (n, D), got a {kind}")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name}: features must be (n, D) and (m, D), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if min(len(a), len(b)) < minimum:
        raise ValueError(f"{name}: needs {minimum} images in each set, got {len(a)} and {len(b)}")
    for features in (a, b):
        if not features.isfinite().all():
            raise ValueError(f"{name}: features must be finite, but hold NaN or infinity")
    return a.double(), b.double()
