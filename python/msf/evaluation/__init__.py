"""The distance of generated images from real ones: ``Evaluator`` and the mathematics under it."""

from __future__ import annotations

from .evaluate import Evaluator, Generate
from .intervals import Figure
from .metrics import frechet_distance, in_manifold, kid, precision
from .report import BaseGap, Report

__all__ = [
    "BaseGap",
    "Evaluator",
    "Figure",
    "Generate",
    "Report",
    "frechet_distance",
    "in_manifold",
    "kid",
    "precision",
]
