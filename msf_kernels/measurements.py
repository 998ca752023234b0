"""Automatic choice follows measurement: which backend came first, by GPU, operator and sizes.

The tables in `measured/<gpu>.json` are made by `python -m benchmarks.choose` from results of that
GPU. They have an order of backends for each operator, {"pyramid_merge": ["triton", "cuda"]}, or
where it depends on sizes one for all that were measured, {"attention": [{"sizes": [256, 72, 1],
"order": ["triton", "cudnn"]}, ...]}.

A GPU without a table takes that of the nearest compute capability, of two as near the higher one's.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).parent / "measured"

Sizes = tuple[int, ...]
Capability = tuple[int, int]


@dataclass(frozen=True)
class Table:
    """A table holds what was measured on one GPU.

    Args:
        gpu: its name as that of a file, such as "h200".
        capability: its compute capability, (9, 0) for sm_90.
        orders: {operator: order of backends}, as above.
        best: {operator: its fastest backend in the first result}, in words for people.
    """

    gpu: str
    capability: Capability
    orders: dict[str, Any]
    best: dict[str, str]


def slug(device: torch.device) -> str:
    """Return the device as the name of a file: "NVIDIA H200" is h200."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


@functools.lru_cache(maxsize=1024)
def fastest(op: str, device: torch.device, sizes: Sizes = ()) -> Sequence[str]:
    """Return the backends of an operator that were measured at the nearest sizes, fastest first.

    A backward that nobody measured goes by its forward.
    """
    table = table_for(device)
    orders = table.orders if table else {}
    found = orders.get(op) or orders.get(op.removesuffix("_backward"), ())
    if not found or isinstance(found[0], str):
        return found
    return min(found, key=lambda entry: _distance(entry["sizes"], sizes))["order"]


@functools.lru_cache
def table_for(device: torch.device) -> Table | None:
    """Return the table that decides on this GPU, its own or the nearest's, None without any."""
    own, capability = slug(device), torch.cuda.get_device_capability(device)
    return min(
        map(_read, sorted(FOLDER.glob("*.json"))),
        key=lambda table: (table.gpu != own, _rank(table.capability, capability)),
        default=None,
    )


def _rank(measured: Capability, capability: Capability) -> tuple[int, int]:
    """Rank a table by the distance of its compute capability from ours, as 10 * major + minor; of
    two as near the higher comes first."""
    number, wanted = (10 * major + minor for major, minor in (measured, capability))
    return abs(number - wanted), -number


def _distance(measured: Sequence[int], sizes: Sizes) -> float:
    """Return the sum of logarithms of the sizes' ratios, with 1 added because a size may be 0."""
    return sum(abs(math.log((1 + x) / (1 + y))) for x, y in zip(measured, sizes))


def _read(file: Path) -> Table:
    document = json.loads(file.read_text())
    major, minor = map(int, document["capability"].split("."))
    return Table(file.stem, (major, minor), document["orders"], document["best"])
