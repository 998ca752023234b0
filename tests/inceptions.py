"""Inception of FID with random weights, and npz files of random images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from msf.evaluation.inception import Inception


def save_inception(path: Path) -> Path:
    """Weights under which activations neither vanish nor explode, without the counters that not
    every file has."""
    with torch.device("meta"):
        shapes = {name: x.shape for name, x in Inception().state_dict().items()}
    state = {}
    for name, shape in shapes.items():
        kind = name.rpartition(".")[2]
        if kind == "num_batches_tracked":
            continue
        if len(shape) > 1:
            state[name] = torch.randn(shape) * (2 / shape[1:].numel()) ** 0.5
        else:
            middle = 1.0 if kind == "running_var" or name.endswith("bn.weight") else 0.0
            state[name] = middle + 0.2 * torch.rand(shape)
    torch.save(state, path)
    return path


def pixels(count: int, seed: int, size: tuple[int, int] = (8, 12)) -> np.ndarray:
    """Smooth random images (count, H, W, 3) uint8."""
    random = np.random.default_rng(seed)
    steps = random.normal(0, 20, (count, *size, 3)).cumsum(1).cumsum(2)
    return (128 + steps).clip(0, 255).astype(np.uint8)
