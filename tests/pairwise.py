"""Few cases in place of all: every value of a parameter meets every value of each other one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any

import pytest


def pairwise(**parameters: Sequence[Any]) -> pytest.MarkDecorator:
    """Parametrize a test such that any two values of two parameters are together in some case.

    A fault that needs three values together is missed: make one parameter of two such.
    """
    rows = pairwise_rows(*parameters.values())
    return pytest.mark.parametrize(tuple(parameters), rows, ids=_name)


def pairwise_rows(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    pairs = {
        row: set(combinations(enumerate(row), 2)) for row in product(*map(range, map(len, factors)))
    }
    missing, rows = set().union(*pairs.values()), []
    while missing:
        row = max(pairs, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        rows.append(tuple(factor[index] for factor, index in zip(factors, row, strict=True)))
    return rows


def _name(value: Any) -> str:
    return str(value).replace("torch.", "").replace(" ", "")
