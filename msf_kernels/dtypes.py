"""The dtypes of the operators, and the dtype that their mathematics runs in."""

from __future__ import annotations

import torch
from torch import Tensor

SUPPORTED = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64 for float64, float32 for everything else."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def widen(tensor: Tensor) -> Tensor:
    """Return the tensor in its compute dtype, the tensor itself where it already is."""
    return tensor.to(compute_dtype(tensor))
