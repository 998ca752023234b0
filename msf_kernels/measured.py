"""Automatic choice follows measurement: which backend came first, by GPU and operator.

The tables in `measured/<gpu>.json`, such as {"pyramid_merge": ["triton", "cuda", "reference"]}, are
made by `python -m benchmarks.choose` from a result of that GPU.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch

FOLDER = Path(__file__).parent / "measured"


def slug(device: torch.device) -> str:
    """The device as a file name: "NVIDIA H200" is h200."""
    if device.type == "cpu":
        return "cpu"
    words = re.findall(r"[a-z0-9]+", torch.cuda.get_device_name(device).lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce"))


def fastest(op: str, device: torch.device) -> Sequence[str]:
    """The backends of an operator (and of its backward) that were measured, fastest first."""
    return _table(device).get(op.removesuffix("_backward"), ())


@functools.lru_cache
def _table(device: torch.device) -> dict[str, Sequence[str]]:
    file = FOLDER / f"{slug(device)}.json"
    return json.loads(file.read_text()) if file.exists() else {}
