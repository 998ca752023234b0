"""Few rows in place of all: every value of a parameter meets every value of each other one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations, product
from typing import Any


def pairwise(*factors: Sequence[Any]) -> list[tuple[Any, ...]]:
    """A row has one value of each factor; any two values of two factors are together in some row.

    A fault that needs three values together is missed: make a factor of such values first.
    """
    pairs = {
        row: set(combinations(enumerate(row), 2)) for row in product(*map(range, map(len, factors)))
    }
    missing, rows = set().union(*pairs.values()), []
    while missing:
        row = max(pairs, key=lambda row: len(pairs[row] & missing))
        missing -= pairs[row]
        rows.append(tuple(factor[index] for factor, index in zip(factors, row, strict=True)))
    return rows
