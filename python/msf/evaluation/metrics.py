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

from ..checks import check_real
from ..progress import follow

BLOCK = 1024  # images: 8 MB of products; of more the memory is mapped anew for each block
NEIGHBOURS = 3
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020
INCEPTION_SCORE_SPLIT = 5000


class Gaussian(NamedTuple):
    """A Gaussian has a mean (D,) and a covariance (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """Return mean and covariance, divided by n - 1, of features (n, D), n > 1. Raise ValueError
    where they are not finite, as all metrics here do.

    One pass over blocks, whose means and scatter matrices are merged (Chan, Golub and LeVeque
    1983); nothing but a block of them is converted to float64.
    """
    if len(features) < 2:
        raise ValueError(f"fit_gaussian: needs 2 images, got {len(features)}")
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
    _check_finite("fit_gaussian", "features must be finite", mean)
    return Gaussian(mean, scatter / (count - 1))


def gaussian_distance(a: Gaussian, b: Gaussian) -> float:
    """Return the Frechet distance of two Gaussians, |mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a
    S_b)^1/2).

    The root's trace is the sum of the roots of the eigenvalues of S_a^1/2 S_b S_a^1/2, which is
    symmetric.
    """
    _check_finite("gaussian_distance", "means and covariances must be finite", *a, *b)
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


def kid(a: Tensor, b: Tensor) -> float:
    """Return the kernel distance of a (n, D) and b (m, D): unbiased squared MMD (Binkowski et al.
    2018).

    The kernel is (x.y / D + 1)^3. The distance's expectation is 0 for independent samples of one
    distribution, so that single values may be negative, and slightly below 0 where both have the
    same label counts.
    """
    _check("kid", a, b, minimum=2)
    a, b = a.double(), b.double()
    within = [_mean_kernel(sum(map(_kernel_sum, _blocks(x))), x) for x in (a, b)]
    return sum(within) - 2 * sum(map(_kernel_sum, _blocks(a, b))) / (len(a) * len(b))


def kid_of_subsets(a: Tensor, b: Tensor, *, progress: bool = False) -> tuple[float, float]:
    """Return the mean and the standard deviation of KID over 100 pairs of subsets of a (n, D) and b
    (m, D), 1,000 of either, or all of the smaller set.

    The field reports it so. Subsets are those that torch-fidelity draws, without replacement.
    """
    _check("kid_of_subsets", a, b, minimum=2)
    size = min(KID_SUBSET_SIZE, len(a), len(b))
    random = np.random.RandomState(KID_SEED)
    values = []
    for _ in follow(range(KID_SUBSETS), "KID", KID_SUBSETS, "subsets", shown=progress):
        subsets = [torch.from_numpy(random.choice(len(x), size, replace=False)) for x in (a, b)]
        values.append(kid(a[subsets[0].to(a.device)], b[subsets[1].to(b.device)]))
    return float(np.mean(values)), float(np.std(values))


def inception_score(features: Tensor, weight: Tensor) -> float:
    """Return the Inception Score (Salimans et al. 2016) of features (n, D): exp(E KL(p(y|x) ||
    p(y))), the mean over consecutive splits of 5,000 as ADM takes them.

    p(y|x) is the softmax of features times weight (K, D); ADM leaves out the bias, as the authors'
    code did. Images sorted by class have few classes a split, which lowers the score.
    """
    _check("inception_score", features, weight, minimum=1)
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
    nearest = _no_neighbours(points, k)
    for block in _blocks(points):
        _keep_nearest(nearest, block)
    radii, inside = nearest.amax(1), _nowhere(queries)
    for block in _blocks(queries, points):
        inside[block.rows] |= (_squared_distances(block) <= radii[block.columns]).any(1)
    return inside


def precision(real: Tensor, generated: Tensor, k: int = NEIGHBOURS) -> float:
    """Return the improved precision (Kynkaanniemi et al. 2019): the share of generated (m, D) in
    the manifold of real (n, D). With the two exchanged it is recall."""
    return float(in_manifold(real, generated, k).double().mean())


class Pairwise(NamedTuple):
    """Pairwise figures are those that compare every image with every other."""

    kid: float
    precision: float
    recall: float


def pairwise(
    real: Tensor, generated: Tensor, k: int = NEIGHBOURS, *, progress: bool = False
) -> Pairwise:
    """Return ``kid``, ``precision`` and recall of real (n, D) and generated (m, D), for which the
    products of all features are computed once."""
    _check("pairwise", real, generated, minimum=k + 1)
    real, generated = real.double(), generated.double()
    value, radii = 0.0, []
    for x, name in ((real, "reference"), (generated, "images")):
        total, nearest = 0.0, _no_neighbours(x, k)
        for block in _blocks(x, None, f"pairs within the {name}", progress):
            total += _kernel_sum(block)
            _keep_nearest(nearest, block)
        value += _mean_kernel(total, x)
        radii.append(nearest.amax(1))
    total, covered, inside = 0.0, _nowhere(real), _nowhere(generated)
    for block in _blocks(generated, real, "pairs between the two", progress):
        total += _kernel_sum(block)
        squared = _squared_distances(block)
        inside[block.rows] |= (squared <= radii[0][block.columns]).any(1)
        covered[block.columns] |= (squared <= radii[1][block.rows, None]).any(0)
    value -= 2 * total / (len(real) * len(generated))
    return Pairwise(value, float(inside.double().mean()), float(covered.double().mean()))


class _Block(NamedTuple):
    """A _Block has the products a[rows] @ b[columns].T of features a and b, float64, and their
    squared lengths; ``within``, where b is a."""

    rows: slice
    columns: slice
    products: Tensor
    lengths: tuple[Tensor, Tensor]
    dim: int
    within: bool

    @property
    def is_on_diagonal(self) -> bool:
        return self.within and self.rows == self.columns


def _blocks(
    a: Tensor, b: Tensor | None = None, name: str = "", progress: bool = False
) -> Iterator[_Block]:
    """Yield all blocks of a (n, D) and b (m, D). Where b is None they are those within a, on the
    diagonal and above it."""
    other = a if b is None else b
    lengths_a, lengths_b = (x.square().sum(1) for x in (a, other))
    parts_a, parts_b = (
        [slice(i, min(i + BLOCK, len(x))) for i in range(0, len(x), BLOCK)] for x in (a, other)
    )
    pairs = [(r, c) for r in parts_a for c in parts_b if b is not None or r.start <= c.start]
    for r, c in follow(pairs, name, len(pairs), "blocks", shown=progress):
        lengths = (lengths_a[r], lengths_b[c])
        yield _Block(r, c, a[r] @ other[c].T, lengths, a.shape[1], b is None)


def _kernel_sum(block: _Block) -> float:
    """Return the sum of KID's kernel over the pairs of a block, within a set also over those below
    the diagonal and not over those on it."""
    kernel = (block.products / block.dim).add_(1).pow_(3)
    if block.is_on_diagonal:
        return float(kernel.sum() - kernel.trace())
    return float(kernel.sum()) * (2 if block.within else 1)


def _mean_kernel(total: float, x: Tensor) -> float:
    return total / (len(x) * (len(x) - 1))


def _squared_distances(block: _Block) -> Tensor:
    rows, columns = block.lengths
    return (block.products * -2).add_(rows[:, None]).add_(columns).clamp_(min=0)


def _no_neighbours(points: Tensor, k: int) -> Tensor:
    return points.new_full((len(points), k), math.inf)


def _nowhere(points: Tensor) -> Tensor:
    return torch.zeros(len(points), dtype=torch.bool, device=points.device)


def _keep_nearest(nearest: Tensor, block: _Block) -> None:
    """Replace the squared distances (n, k) of points from their nearest others by smaller ones of a
    block within their set."""
    squared = _squared_distances(block)
    if block.is_on_diagonal:
        squared.fill_diagonal_(math.inf)
    else:
        nearest[block.columns] = _smallest(nearest[block.columns], squared.T)
    nearest[block.rows] = _smallest(nearest[block.rows], squared)


def _smallest(nearest: Tensor, squared: Tensor) -> Tensor:
    """Return the k smallest of each row of nearest (n, k) and squared (n, m)."""
    k = nearest.shape[1]
    found = squared.topk(min(k, squared.shape[1]), dim=1, largest=False).values
    return torch.cat([nearest, found], dim=1).topk(k, dim=1, largest=False).values


def _check(name: str, a: Tensor, b: Tensor, minimum: int) -> None:
    for features in (a, b):
        check_real(features, f"{name}: features must be tensors (n, D)")
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(
            f"{name}: features must be (n, D) and (m, D), got {tuple(a.shape)} and {tuple(b.shape)}"
        )
    if min(len(a), len(b)) < minimum:
        raise ValueError(f"{name}: needs {minimum} images in each set, got {len(a)} and {len(b)}")
    # In float64, what no float32 holds overflows too when it is multiplied as in KID.
    _check_finite(name, "features must be finite in float32", a.float(), b.float())


def _check_finite(name: str, right: str, *tensors: Tensor) -> None:
    if not all(x.isfinite().all() for x in tensors):
        raise ValueError(f"{name}: {right}, but hold NaN or infinity")
