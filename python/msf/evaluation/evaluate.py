"""The protocol of an evaluation: what is compared with what."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_real
from ..data import HOLDOUT, SPLITS, ImageData, load_data
from ..data.splits import shares
from ..modes import default_device
from ..parsing import parse_whole
from ..progress import follow
from .features import extract, train_feature_network
from .intervals import ANY, DISTANCE, PROPORTION, Figure, figure, subsets
from .metrics import NEIGHBOURS, frechet_distance, kid, precision
from .report import BaseGap, Report

# (labels (B,) int64, B seeds, true images (B, C, H, W) or None) -> images (B, C, H, W) in [-1, 1].
# With true images it samples the residuals on their bases, without them the bases too.
Generate = Callable[[Tensor, list[int], Tensor | None], Tensor]

MAX_MEAN = 10  # of absolute values: far beyond 1, as a model may overshoot
DEFAULT_SAMPLES = 2000  # at most: the intervals of all but the Frechet distance cost n^2
MAX_SAMPLES = 1_000_000  # as many as ``msf sample`` makes; 100 subsets of more fill the memory
MINIMUM = 2 * (NEIGHBOURS + 1)  # both manifolds of an interval's subset have more than neighbours


class Evaluator:
    """An Evaluator judges generators of one data source; what they share is made once.

    The reference is ``num_samples`` images of the test split (default: all, up to 2,000; an odd one
    is left out). The floor is as many images of the train split with the same labels, compared with
    the reference as generated images are, so that both have the same finite-sample bias. Generated
    images get the same labels again. All are compared in the features of a network trained on the
    features split.

    More samples than the test split has are compared with all of it. Their labels are in its
    proportions. There is then no floor, nor what pairs samples with true images: the distances'
    bias depends on the numbers of both, and the intervals are those of other samples against the
    same reference.

    ``seed`` fixes the network, the choice of images, the generator's seeds and the intervals, which
    come from ``replicates`` resamplings. ``num_classes`` and ``holdout`` are as in ``load_data``.
    Images are generated and compared ``batch_size`` at a time; ``progress`` shows on stderr how far
    that is. Raise ValueError where the splits are too small.
    """

    @default_device()
    def __init__(
        self,
        source: str,
        *,
        image_size: tuple[int, int],
        channels: int,
        num_classes: int = 0,
        holdout: float = HOLDOUT,
        num_samples: int | None = None,
        seed: int = 0,
        replicates: int = 100,
        batch_size: int = 256,
        progress: bool = False,
    ) -> None:
        self._batch_size = parse_whole(batch_size, "evaluation: batch_size", 1)
        replicates = parse_whole(replicates, "evaluation: replicates", 2)
        seed = parse_whole(seed, "evaluation: seed", 0)
        self._progress = progress
        self._train, features, self._test = (
            load_data(
                source,
                split=split,
                image_size=image_size,
                channels=channels,
                num_classes=num_classes,
                holdout=holdout,
            )
            for split in SPLITS
        )
        if len(self._test) < MINIMUM:
            raise ValueError(
                f"evaluation: needs at least {MINIMUM} images in the test split, {source!r} has "
                f"{len(self._test)}; the split is {shares(holdout)}, so give about 100 or more"
            )
        n = _even_count(num_samples, len(self._test))
        self.paired = n <= len(self._test)
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self._test), generator=generator)
        # They are sorted by class, so that neighbours are pairs of one class: see ``subsets``.
        self._chosen = self._by_class(order[:n])
        real_labels = self._test.labels[self._chosen]
        self.labels = self._test.labels[self._by_class(order.repeat(-(-n // len(order)))[:n])]
        self.seeds = list(range(seed * n, (seed + 1) * n))
        self._subsets = subsets(n, replicates, seed)
        drawn = draw_like(real_labels, self._train, generator) if self.paired else None

        self.network = train_feature_network(features, seed=seed, progress=progress)
        self._reference, classes = self._extract(
            "reference", lambda at: self._test.images(self._chosen[at]), len(self._chosen)
        )
        if drawn is not None:
            self._real, real_classes = self._extract(
                "real images", lambda at: self._train.images(drawn[at]), n
            )
            self._floor = self._figures(self._real, real_classes)
            self._crossed_floor = self._figure(lambda i: self._crossed(self._real, i), DISTANCE)
        self.settings = {
            "source": source,
            "image_size": list(image_size),
            "channels": channels,
            "num_samples": n,
            "num_reference": len(self._chosen),
            "seed": seed,
            "replicates": replicates,
            "neighbours": NEIGHBOURS,
            "feature_dim": self._reference.shape[1],
            "feature_network_accuracy": (classes == real_labels).double().mean().item(),
        }

    def _by_class(self, chosen: Tensor) -> Tensor:
        return chosen[self._test.labels[chosen].argsort(stable=True)]

    def evaluate(
        self, generate: Generate, *, true_bases: bool = True, conditional: bool = True
    ) -> Report:
        """Generate an image for every label and compare.

        ``generate`` is called without true images and, if ``true_bases`` and if there is a floor,
        again with those of the reference, for what generated bases cost. ``conditional=False``
        leaves out the accuracy, for a generator that ignores labels. Raise ValueError for images of
        a wrong shape or range, or not finite, TypeError for what is no tensor.
        """
        # The caller's default device counts in what is the caller's alone.
        in_its_modes = default_device(torch.empty(0).device)(generate)
        return self._evaluate(in_its_modes, true_bases, conditional)

    @default_device()
    def _evaluate(self, generate: Generate, true_bases: bool, conditional: bool) -> Report:
        def images(at: Tensor, true_images: Tensor | None = None) -> Tensor:
            return generate(self.labels[at], [self.seeds[i] for i in at.tolist()], true_images)

        generated, classes = self._extract("sample", images, len(self.labels))
        figures = self._figures(generated, classes)
        if not conditional:
            figures.pop("accuracy", None)
        if not self.paired:
            return Report(figures, None, None, None, self.settings)
        ratio = self._figure(lambda i: self._ratio(generated, i), DISTANCE)
        bases = None
        if true_bases:
            on_true, _ = self._extract(
                "sample on true bases",
                lambda at: images(at, self._test.images(self._chosen[at])),
                len(self.labels),
            )
            bases = BaseGap(
                true=self._figure(lambda i: self._crossed(on_true, i), DISTANCE),
                generated=self._figure(lambda i: self._crossed(generated, i), DISTANCE),
                real=self._crossed_floor,
                gap=self._figure(lambda i: self._crossed(generated, i) - self._crossed(on_true, i)),
            )
        floor = {key: self._floor[key] for key in figures}
        return Report(figures, floor, ratio, bases, self.settings)

    def _extract(
        self, name: str, images: Callable[[Tensor], Tensor], n: int
    ) -> tuple[Tensor, Tensor]:
        """Return (features (n, D), classes (n,)) of ``images(at)``, for n positions in batches."""
        parts = []
        batches = torch.arange(n).split(self._batch_size)
        for at in follow(batches, name, len(batches), "batches", shown=self._progress):
            batch = images(at)
            _check_images(batch, (len(at), *self._test[0][0].shape))
            parts.append(extract(self.network, batch.cpu().float()))
        features, classes = zip(*parts, strict=True)
        return torch.cat(features), torch.cat(classes)

    def _figures(self, features: Tensor, classes: Tensor) -> dict[str, Figure]:
        correct, reference = (classes == self.labels).double(), self._reference_at
        statistics: dict[str, tuple[Callable[[Tensor], float], tuple[float, float]]] = {
            "fd": (lambda i: self._distance(features, i), DISTANCE),
            "kid": (lambda i: kid(features[i], reference(i)), ANY),
            "precision": (lambda i: precision(reference(i), features[i], NEIGHBOURS), PROPORTION),
            "recall": (lambda i: precision(features[i], reference(i), NEIGHBOURS), PROPORTION),
        }
        if self._test.num_classes > 1:
            statistics["accuracy"] = (lambda i: correct[i].mean().item(), PROPORTION)
        followed = follow(
            statistics.items(), "intervals", len(statistics), "figures", shown=self._progress
        )
        return {name: self._figure(*statistic) for name, statistic in followed}

    def _figure(
        self,
        statistic: Callable[[Tensor], float],
        bounds: tuple[float, float] = ANY,
    ) -> Figure:
        return figure(statistic, len(self.labels), self._subsets, bounds)

    def _distance(self, features: Tensor, i: Tensor) -> float:
        return frechet_distance(features[i], self._reference_at(i))

    def _reference_at(self, i: Tensor) -> Tensor:
        """Return the reference's features for the samples ``i``: of their true images, or all."""
        return self._reference[i] if self.paired else self._reference

    def _ratio(self, features: Tensor, i: Tensor) -> float:
        floor = self._distance(self._real, i)
        if not floor:
            raise ValueError(
                "evaluation: the floor is 0: real images that are all alike, or too few, have no "
                "distance to compare with"
            )
        return self._distance(features, i) / floor

    def _crossed(self, features: Tensor, i: Tensor) -> float:
        """Return the mean distance of each half of the pairs ``i`` from the reference's other
        half."""
        a, b = i[::2], i[1::2]
        return (
            frechet_distance(features[a], self._reference[b])
            + frechet_distance(features[b], self._reference[a])
        ) / 2


def _even_count(asked: int | None, available: int) -> int:
    """Return the number of samples. Raise ValueError where too few or many are ``asked`` for."""
    n = min(available, DEFAULT_SAMPLES)
    if asked is not None:
        n = parse_whole(asked, "evaluation: num_samples (--samples)", MINIMUM)
    if n > MAX_SAMPLES:
        raise ValueError(
            f"evaluation: num_samples (--samples) must be at most {MAX_SAMPLES}, got {n}"
        )
    return n - n % 2


def _check_images(images: Any, shape: tuple[int, ...]) -> None:
    """Raise TypeError or ValueError unless they can be what ``Generate`` returns."""
    check_real(images, f"evaluation: generate must return a tensor {shape}")
    if tuple(images.shape) != shape:
        raise ValueError(f"evaluation: generate must return {shape}, got {tuple(images.shape)}")
    if not images.isfinite().all():
        raise ValueError("evaluation: generated images hold NaN or infinity")
    if (mean := float(images.float().abs().mean())) > MAX_MEAN:
        raise ValueError(
            f"evaluation: generated images must be in [-1, 1], but their mean absolute value is "
            f"{mean:.3g}; of 0..255 take x / 127.5 - 1"
        )


def draw_like(labels: Tensor, data: ImageData, generator: torch.Generator) -> Tensor:
    """Draw indices (n,) of different images of ``data`` that have the given labels (n,)."""
    drawn = torch.empty_like(labels)
    for label in labels.unique().tolist():
        where, pool = labels == label, (data.labels == label).nonzero().flatten()
        wanted = int(where.sum())
        if len(pool) < wanted:
            raise ValueError(
                f"evaluation: class {data.class_names[label]!r} has {wanted} test images but only "
                f"{len(pool)} for training to compare them with; lower num_samples "
                "(--samples)"
            )
        drawn[where] = pool[torch.randperm(len(pool), generator=generator)[:wanted]]
    return drawn
