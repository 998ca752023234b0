"""The report of an evaluation, as numbers for JSON and as a table for people."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ..files import printable
from .intervals import Figure

TITLES = {
    "fd": "Frechet distance",
    "kid": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "accuracy": "accuracy",
}


# The distances' names are the field's for features of Inception alone.
OWN_FEATURES = "features of a small network trained on these data: not FID, KID or the like"


@dataclass(frozen=True)
class BaseGap:
    """A BaseGap compares the residual stages on true and on generated bases.

    Its Frechet distances compare each half of the images with the other half of the reference: an
    image made on the base of a reference image would be close to it whatever the residual. Half the
    images means a larger distance: compare these with each other only. ``real`` is their floor,
    ``gap`` is generated minus true. True bases come from the test split: where it differs from the
    train split, as in textures, so does the gap from zero.
    """

    true: Figure
    generated: Figure
    real: Figure
    gap: Figure


@dataclass(frozen=True)
class Report:
    """A Report compares generated images, and as many real ones of training, with the test split,
    in the features of a network trained on the same data: nothing published compares with it.

    ``generated`` and ``real`` (the floor) hold "fd", "kid", "precision", "recall" and, with more
    than one class, "accuracy", each with a 95 % interval. ``fd_ratio`` is generated / real.
    ``bases`` is None where sampling on true bases was not asked for, and all three are where there
    are more samples than test images.
    """

    generated: dict[str, Figure]
    real: dict[str, Figure] | None
    fd_ratio: Figure | None
    bases: BaseGap | None
    settings: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """Return nested dictionaries of numbers and strings, for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Return an aligned table: figure, generated, real, each with its 95 % interval."""
        real = self.real or {}
        rows = [("", "generated", "real (floor)" if real else "")]
        for key, figure in self.generated.items():
            rows.append((TITLES[key], str(figure), str(real.get(key, ""))))
        if self.fd_ratio is not None:
            rows.append(("Frechet distance / floor", str(self.fd_ratio), "1"))
        if self.bases is not None:
            rows.append(("FD of halves", str(self.bases.generated), str(self.bases.real)))
            rows.append(("FD of halves, true bases", str(self.bases.true), ""))
            rows.append(("gap of generated bases", str(self.bases.gap), ""))
        widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
        lines.insert(1, "  ".join("-" * width for width in widths if width))
        settings = "  ".join(
            f"{key}={printable(str(value))}" for key, value in self.settings.items()
        )
        return "\n".join([*lines, settings, OWN_FEATURES])
