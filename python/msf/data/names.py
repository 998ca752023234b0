"""Many names in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import overload


class Names(Sequence[str]):
    """Names are those of files, each made when it is asked for.

    They lie in one buffer, in the system's encoding: a worker process would soon have copies of a
    list of a million strings, as Python writes to the page of every one that it touches.
    """

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self._text = b"".join(encoded)
        self._ends = array("Q", accumulate(map(len, encoded)))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...

    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        start = self._ends[index - 1] if index else 0
        return os.fsdecode(self._text[start : self._ends[index]])
