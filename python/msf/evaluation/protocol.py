"""The protocol of ADM (Dhariwal and Nichol 2021), by which papers compare class-conditional models
of ImageNet: an npz file of images against one of a reference."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files import checksum
from ..modes import default_device
from ..progress import follow
from . import metrics
from .archive import Archive
from .feature_files import features_of
from .inception import PUBLISHED, Features, load_inception

USUAL_IMAGES = 50_000
MINIMUM = metrics.NEIGHBOURS + 1

TITLES = {
    "fid": "FID",
    "sfid": "sFID",
    "inception_score": "Inception Score",
    "precision": "precision",
    "recall": "recall",
    "kid": "KID",
    "kid_of_subsets": "KID, mean of subsets",
    "kid_of_subsets_std": "its standard deviation",
}

# What moves the figures, and is not the same wherever they are published.
CONVENTIONS: dict[str, Any] = {
    "network": "Inception-v3 of TensorFlow, 2015-12-05, float32 without TensorFloat-32",
    "pixels": "8 bits, (x - 128) / 128",
    "resize": "bilinear as of TensorFlow 1 to 299x299: no antialiasing, corners not aligned",
    "fid": "2,048 features of pool_3",
    "sfid": "the first 7 channels of mixed_6/conv, 17x17",
    "covariance": "divided by n - 1, float64",
    "matrix_root": "by eigenvalues of the symmetric product; nothing is added to the diagonal",
    "inception_score": "softmax of pool_3 without bias; mean over consecutive splits",
    "inception_score_split": metrics.INCEPTION_SCORE_SPLIT,
    "precision_recall": "manifolds of pool_3, distances in float64",
    "neighbours": metrics.NEIGHBOURS,
    "kid": "(x.y / 2048 + 1)^3 of pool_3, unbiased, over all images",
    "kid_subsets": metrics.KID_SUBSETS,
    "kid_subset_size": metrics.KID_SUBSET_SIZE,
    "kid_seed": metrics.KID_SEED,
}


@dataclass(frozen=True)
class Comparison:
    """A Comparison has the ``figures`` that could be computed, and ``notes`` on what could not be
    and on what makes them incomparable with published ones."""

    figures: dict[str, float]
    notes: tuple[str, ...]
    images: dict[str, Any]
    reference: dict[str, Any]
    weights: dict[str, str]
    conventions: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of numbers and strings, for JSON."""
        return asdict(self)


@default_device()
@torch.no_grad()
def compare(
    images: Archive,
    reference: Archive,
    weights: Path,
    *,
    batch_size: int = 64,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> Comparison:
    """Compare ``images`` with a ``reference`` in the features of the Inception whose ``weights``
    are in a file.

    FID and sFID take the reference's statistics where it has them, which may be of more images than
    it holds. The network runs on ``device``, ``batch_size`` images at a time. Raise ValueError (one
    line) where there are too few images, or other weights.
    """
    for archive in (images, reference):
        if len(archive) < MINIMUM and (archive is images or archive.shape):
            raise ValueError(
                f"{archive.path}: needs at least {MINIMUM} images, holds {len(archive)}"
            )
    network, digest = load_inception(weights).to(device), checksum(weights)
    features = partial(
        features_of,
        network=network,
        weights_sha256=digest,
        batch_size=batch_size,
        device=device,
        progress=progress,
    )
    generated, real = features(images), features(reference) if reference.shape else None
    figures = {"inception_score": metrics.inception_score(generated.pool, network.fc.weight.cpu())}
    figures |= _distances(generated, real, reference, progress)
    if real is not None:
        figures |= _pairwise(generated.pool.to(device), real.pool.to(device), progress)
    return Comparison(
        {name: figures[name] for name in TITLES if name in figures},
        tuple(_notes(images, reference, digest)),
        _described(images),
        _described(reference),
        {"file": str(weights), "sha256": digest},
        CONVENTIONS,
    )


def _distances(
    generated: Features, real: Features | None, reference: Archive, progress: bool
) -> dict[str, float]:
    """Return FID and sFID, as far as the reference has what they need."""
    if reference.pool is not None:
        others = (reference.pool, reference.spatial)
    else:
        assert real is not None
        others = (metrics.fit_gaussian(real.pool), metrics.fit_gaussian(real.spatial))
    named = list(zip(("fid", "sfid"), generated, others, strict=True))
    return {
        name: metrics.gaussian_distance(metrics.fit_gaussian(features), other)
        for name, features, other in follow(
            named, "Frechet distances", len(named), "figures", shown=progress
        )
        if other is not None
    }


def _pairwise(generated: torch.Tensor, real: torch.Tensor, progress: bool) -> dict[str, float]:
    mean, std = metrics.kid_of_subsets(generated, real, progress=progress)
    figures = metrics.pairwise(real, generated, progress=progress)._asdict()
    return {**figures, "kid_of_subsets": mean, "kid_of_subsets_std": std}


def _notes(images: Archive, reference: Archive, digest: str) -> list[str]:
    notes = []
    if not digest.startswith(PUBLISHED):
        notes.append(
            f"the sha256 of the weights begins with {digest[:8]}, not with the {PUBLISHED} in the "
            "published file's name: FID only if they are the same"
        )
    if reference.shape is None:
        notes.append(f"{reference.path} has no images: no precision, recall and KID")
    if reference.pool is not None and reference.spatial is None:
        notes.append(f"{reference.path} has statistics, but no mu_s and sigma_s: no sFID")
    sizes = [archive.shape[1:3] for archive in (images, reference) if archive.shape is not None]
    if len(set(sizes)) > 1:
        ours, theirs = (f"{height}x{width}" for height, width in sizes)
        notes.append(f"images of {ours} are compared with such of {theirs}, all resized to 299x299")
    if len(images) != USUAL_IMAGES:
        notes.append(
            f"{len(images):,} images are compared, and FID is larger of fewer: published figures "
            f"are mostly of {USUAL_IMAGES:,}"
        )
    return notes


def _described(archive: Archive) -> dict[str, Any]:
    """Return which file it is, how many images it holds, of which size, and its statistics."""
    held = {"mu, sigma": archive.pool, "mu_s, sigma_s": archive.spatial}
    return {
        "file": str(archive.path),
        "sha256": archive.sha256,
        "images": len(archive),
        "size": list(archive.shape[1:3]) if archive.shape else None,
        "statistics": [name for name, value in held.items() if value is not None],
    }
