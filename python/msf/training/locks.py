"""Locks on folders, by which processes that train into one folder keep out of each other's way.

They end with the process that holds them, however it ends.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Wait until no other process has locked ``folder``, and hold it for the body."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


_claims: set[int] = set()


def _drop_claims() -> None:
    while _claims:
        os.close(_claims.pop())


# The workers that decode images outlive a killed parent by seconds; its run may resume at once.
os.register_at_fork(after_in_child=_drop_claims)


@contextmanager
def claim(folder: Path) -> Iterator[bool]:
    """Hold ``folder`` for the body, if nobody else does; yield whether it is held here."""
    descriptor = os.open(folder, os.O_RDONLY)
    _claims.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            free = True
        except BlockingIOError:
            free = False
        yield free
    finally:
        _claims.remove(descriptor)
        os.close(descriptor)
