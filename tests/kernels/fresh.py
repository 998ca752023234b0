"""A call compared with one of which nothing is known, for tests of what is kept of earlier ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class Watching(TorchDispatchMode):
    """While somebody looks on, operators run without plans."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return func(*args, **(kwargs or {}))


def tensors(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else outputs


def assert_right(call: Callable[..., Any], *args: Any, **options: Any) -> None:
    """That a call gives what it gives without a plan, or raises that."""
    with Watching():
        try:
            expected: Any = tensors(call(*args, **options))
        except Exception as error:
            expected = error
    if isinstance(expected, Exception):
        with pytest.raises(type(expected)) as raised:
            call(*args, **options)
        assert str(raised.value) == str(expected)
    else:
        got = tensors(call(*args, **options))
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other) and one.stride() == other.stride()
