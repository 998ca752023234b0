"""Distances between two sets of features, all in float64.

What grows with the square of the number of images is computed in blocks: of 50,000 images that
would be 20 GB a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..progress import follow

BLOCK = 2048  # images: 32 MB of products
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
INCEPTION_SCORE_SPLIT = 5000


class Gaussian(NamedTuple):
    """A Gaussian has a mean (D,) and a covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """Return mean and covariance, divided by n - 1, of features (n, D), n > 1.

    One pass over blocks, whose means and scatter matrices are merged (Chan, Golub and LeVeque
    1983); nothing but a block of them is converted to float64.
    """
    dim = features.shape[1]
    mean, scatter = (
        torch.zeros(shape, dtype=torch.float64, device=features.device)
        for shape in ((dim,), (dim, dim))
    )
    count = 0
    for block in features.split(BLOCK):
        block = block.double()
        centre = block.mean(0)
        centred, shift = block - centre, centre - mean
        total = count + len(block)
        scatter += centred.T @ centred
        scatter += torch.outer(shift, shift) * (count * len(block) / total)
        mean += shift * (len(block) / total)
        count = total
    return Gaussian(mean, scatter / (count - 1))


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a
    S_b)^1/2).

    The root's trace is the sum of the roots of the eigenvalues of S_a^1/2 S_b S_a^1/2, which is
    symmetric.
    """
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # Rounding leaves eigenvalues of about -1e-16 where a set has fewer than D + 1 images.
    cross = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    mean = (a.mean - b.mean).square().sum()
    # Rounding leaves about -1e-6 of equal sets.
    return max(0.0, float(mean + a.covariance.trace() + b.covariance.trace() - 2 * cross))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Return the Frechet distance of the Gaussians fitted to a (n, D) and b (m, D) (Heusel et al.
    2017).

    It is biased upwards by O(1/n + 1/m): compare only distances between sets of the same sizes.
    """
    _check("frechet_distance", a, b, minimum=2)
    return gaussian_distance(fit_gaussian(a), fit_gaussian(b))


def kid(a: Tensor, b: Tensor, *, progress: bool = False) -> float:
    """Return the kernel distance of a (n, D) and b (m, D): unbiased squared MMD (Binkowski et al.
    2018).

    The kernel is (x.y / D + 1)^3. The distance's expectation is 0 for independent samples of one
    distribution, so that single values may be negative, and slightly below 0 where both have the
    same label counts.
    """
    _check("kid", a, b, minimum=2)
    a, b = a.double(), b.double()
    within = sum(_kernel_sum(x, None, progress) / (len(x) * (len(x) - 1)) for x in (a, b))
    return within - 2 * _kernel_sum(a, b, progress) / (len(a) * len(b))


def kid_of_subsets(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Return the mean and the standard deviation of KID over 100 pairs of subsets of a (n, D) and b
    (m, D), 1,000 of either, or all of the smaller set.

    The field reports it so. Subsets are those that torch-fidelity draws, without replacement.
    """
    _check("kid_of_subsets", a, b, minimum=2)
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    random = np.random.RandomState(KID_SEED)
    values = []
    for _ in range(KID_SUBSETS):
        subsets = [torch.from_numpy(random.choice(len(x), size, replace=False)) for x in (a, b)]
        values.append(kid(a[subsets[0].to(a.device)], b[subsets[1].to(b.device)]))
    return float(np.mean(values)), float(np.std(values))


def inception_score(features: Tensor, weight: Tensor) -> float:
    """Return the Inception Score (Salimans et al. 2016) of features (n, D): exp(E KL(p(y|x) ||
    p(y))), the mean over consecutive splits of 5,000 as ADM takes them.

    p(y|x) is the softmax of features times weight (K, D); ADM leaves out the bias, as the authors'
    code did. Images sorted by class have few classes a split, which lowers the score.
    """
    scores = []
    for split in features.split(INCEPTION_SCORE_SPLIT):
        log_p = (split.double() @ weight.double().T).log_softmax(1)
        log_marginal = log_p.logsumexp(0) - math.log(len(split))
        divergence = (log_p.exp() * (log_p - log_marginal)).sum(1)
        scores.append(divergence.mean().exp())
    return float(torch.stack(scores).mean())


def in_manifold(points: Tensor, queries: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """Return which queries (m, D) lie in the manifold of points (n, D), as (m,) bool.

    The manifold is the union of the balls around every point that reach to its k-th nearest
    neighbour among the others (Kynkaanniemi et al. 2019).
    """
    _check("in_manifold", points, queries, minimum=k + 1)
    points, queries = points.double(), queries.double()
    radii = _squared_radii(points, k)
    inside = torch.zeros(len(queries), dtype=torch.bool, device=queries.device)
    for rows, columns, squared in _squared_distances(queries, points):
        inside[rows] |= (squared <= radii[columns]).any(1)
    return inside


def precision(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> float:
    """Return the improved precision (Kynkaanniemi et al. 2019): the share of generated (m, D) in
    the manifold of real (n, D). With the two exchanged it is recall."""
    return float(in_manifold(real, generated, k).double().mean())


def precision_and_recall(
    real: Tensor, generated: Tensor, k: int = NEIGHBOURS, *, progress: bool = False
) -> tuple[float, float]:
    """Return ``precision`` of real (n, D) and generated (m, D) and recall, for which all distances
    between the two are computed once."""
    _check("precision_and_recall", real, generated, minimum=k + 1)
    real, generated = real.double(), generated.double()
    real_radii, radii = (_squared_radii(x, k, progress) for x in (real, generated))
    real_inside, inside = (torch.zeros_like(x, dtype=torch.bool) for x in (real_radii, radii))
    for rows, columns, squared in _squared_distances(generated, real, "manifolds", progress):
        inside[rows] |= (squared <= real_radii[columns]).any(1)
        real_inside[columns] |= (squared <= radii[rows, None]).any(0)
    return float(inside.double().mean()), float(real_inside.double().mean())


def _kernel_sum(a: Tensor, b: Tensor | None, progress: bool) -> float:
    """Return the sum of the kernel over all pairs of a (n, D) and b (m, D), or over all of
    different images of a where b is None."""
    total = 0.0
    for rows, columns, products in _products(a, b, "KID", progress):
        kernel = products.div_(a.shape[1]).add_(1).pow_(3)
        if b is not None:
            total += float(kernel.sum())
        elif rows == columns:
            total += float(kernel.sum() - kernel.trace())
        else:
            total += 2 * float(kernel.sum())
    return total


def _squared_radii(points: Tensor, k: int, progress: bool = False) -> Tensor:
    """Return the squared distances (n,) of points (n, D) from their k-th nearest others."""
    nearest = points.new_full((len(points), k), math.inf)
    for rows, columns, squared in _squared_distances(points, None, "neighbours", progress):
        if rows == columns:
            squared.fill_diagonal_(math.inf)
        else:
            nearest[columns] = _smallest(nearest[columns], squared.T)
        nearest[rows] = _smallest(nearest[rows], squared)
    return nearest.amax(1)


def _smallest(nearest: Tensor, squared: Tensor) -> Tensor:
    """Return the k smallest of each row of nearest (n, k) and squared (n, m)."""
    k = nearest.shape[1]
    found = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
    return torch.cat([nearest, found], dim=1).topk(k, dim=1, largest=False).values


def _squared_distances(
    a: Tensor, b: Tensor | None, name: str = "", progress: bool = False
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield what ``_products`` does, with squared distances in place of products."""
    lengths_a, lengths_b = (x.square().sum(1) for x in (a, a if b is None else b))
    for rows, columns, products in _products(a, b, name, progress):
        squared = products.mul_(-2).add_(lengths_a[rows, None]).add_(lengths_b[columns])
        yield rows, columns, squared.clamp_(min=0)


def _products(
    a: Tensor, b: Tensor | None, name: str, progress: bool
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield (rows, columns, a[rows] @ b[columns].T) for all blocks of a (n, D) and b (m, D). Where
    b is None they are those of a with itself, on the diagonal and above it."""
    other = a if b is None else b
    blocks_a, blocks_b = (
        [slice(i, min(i + BLOCK, len(x))) for i in range(0, len(x), BLOCK)] for x in (a, other)
    )
    pairs = [
        (rows, columns)
        for rows in blocks_a
        for columns in blocks_b
        if b is not None or rows.start <= columns.start
    ]
    for rows, columns in follow(pairs, name, len(pairs), "blocks", shown=progress):
        yield rows, columns, a[rows] @ other[columns].T


def _check(name: str, a: Tensor, b: Tensor, minimum: int) -> None:
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
