"""Triton kernels: whether they can run (here), and what they share (the modules beside this one).

Nothing here imports Triton, which takes longer to import than all of this package does. A family's
kernels, and with them Triton, are imported when one of them is first called.
"""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

OLDEST = (3, 3)  # the first in which a kernel takes tuples


@functools.cache
def available() -> str | None:
    """None where Triton kernels can run on this machine, else the reason."""
    try:
        import triton
    except ImportError as error:
        return f"Triton is not installed: {error}"
    if tuple(map(int, triton.__version__.split(".")[:2])) < OLDEST:
        return f"Triton must be {'.'.join(map(str, OLDEST))} or later, got {triton.__version__}"
    if not interpreted() and not torch.cuda.is_available():
        return "no CUDA GPU; set TRITON_INTERPRET=1 to run Triton on the CPU"
    return None


def can_run(*args: Any) -> str | None:
    """None where the kernels can take these tensors, else the reason."""
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    if device.type == "cuda" or interpreted():
        return None
    return f"the tensors are on {device}; set TRITON_INTERPRET=1 to run Triton there"


def interpreted() -> bool:
    """Whether Triton interprets its kernels on the CPU; it reads this when it is imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"
