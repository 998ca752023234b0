"""Automatic choice follows measurement: which backend came first, by GPU, operator and sizes.

The tables in `measured/<gpu>.json` are made by `python -m benchmarks.choose` from results of that
GPU. They have an order of backends for each operator, {"pyramid_merge": ["triton", "cuda"]}, or
where it depends on sizes one for all that were measured, {"attention": [{"sizes": [256, 72, 1],
"order": ["triton", "cudnn"]}, ...]}.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "measured"

Sizes = tuple[int, ...]


def slug(device: torch.device) -> str:
    """The device as a file name: "NVIDIA H200" is h200."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


@functools.lru_cache(maxsize=1024)
def fastest(op: str, device: torch.device, sizes: Sizes = ()) -> Sequence[str]:
    """The backends of an operator that were measured, fastest first, at the nearest sizes.

    A backward that nobody measured goes by its forward.
    """
    table = _table(device)
    found = table.get(op) or table.get(op.removesuffix("_backward"), ())
    if not found or isinstance(found[0], str):
        return found
    return min(found, key=lambda entry: _distance(entry["sizes"], sizes))["order"]


def _distance(measured: Sequence[int], sizes: Sizes) -> float:
    """By how many times the sizes differ, in logarithms; plus 1, as a size may be 0."""
    return sum(abs(math.log((1 + x) / (1 + y))) for x, y in zip(measured, sizes))


@functools.lru_cache
def _table(device: torch.device) -> dict[str, Any]:
    file = FOLDER / f"{slug(device)}.json"
    return json.loads(file.read_text()) if file.exists() else {}
