"""Arguments of a wrong kind are one clear line: what was wrong, what would be right."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def check_kind(value: Any, kind: type, name: str) -> None:
    """Raise TypeError unless ``value``, the argument ``name``, is of class ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name} must be of class {kind.__name__}, got {type(value).__name__}")


def check_real(x: Any, right: str) -> None:
    """Raise TypeError unless ``x`` is a tensor of real numbers; ``right`` says what it must be. Of
    complex ones PyTorch would drop a part, with a warning."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{right}, got a {type(x).__name__}")
    if x.is_complex():
        raise TypeError(f"{right} of real numbers, got {x.dtype}")
