"""The writing of results: never over what is there unless asked to, and never half-written."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ..files import atomic_write, remove, temporary_folder
from . import signals
from .errors import Failure


def add_overwrite_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def check_file(path: Path, overwrite: bool) -> None:
    """Raise a ValueError when ``path`` exists and may not be overwritten, or cannot be made."""
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; --out must name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another --out or add --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise ValueError(f"{folder}: is a file; --out must name a file in a folder")
    if not os.access(folder, os.W_OK):
        raise ValueError(f"{folder}: may not be written to; choose another --out")


def check_folder(path: Path, overwrite: bool) -> None:
    """Raise a ValueError when ``path`` holds anything but images that may be overwritten."""
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path}: is a file; --out must name a folder here")
    content = sorted(path.iterdir()) if path.exists() else []
    if content and not overwrite:
        raise ValueError(f"{path}: holds files already; choose another --out or add --overwrite")
    others = [file.name for file in content if file.suffix != ".png" or file.is_dir()]
    if others:
        raise ValueError(f"{path}: holds more than images ({others[0]}); choose another --out")


def to_json(document: dict[str, Any]) -> str:
    """Return the document as JSON; reports and configurations in it stand for their ``to_dict``."""
    return json.dumps(document, indent=2, default=lambda part: part.to_dict())


def write_json(path: Path, document: dict[str, Any]) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(to_json(document) + "\n")


@contextmanager
def atomic_folder(path: Path, *, keeps: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it becomes ``path``, else it goes.

    With ``keeps``, what its files are, it is kept on Ctrl-C too, if it has some, and a Failure says
    where and how many: at ``path``, or beside it where it would replace others before it is whole.
    """
    path = path.resolve()
    with temporary_folder(path) as temporary:
        try:
            yield temporary
        except KeyboardInterrupt:
            if not keeps:
                raise
            raise _kept(temporary, path, keeps) from None
        _put(temporary, path)


def _put(temporary: Path, path: Path) -> None:
    """Move a folder to where another may be, which goes."""
    if path.exists():
        shutil.rmtree(path)
    os.replace(temporary, path)


def _unused(path: Path) -> Path:
    """Return ``path`` if it holds nothing, else the first name beside it that nothing has."""
    if not path.exists() or not any(path.iterdir()):
        return path
    beside = (path.with_name(f"{path.name}-interrupted-{i}") for i in itertools.count(1))
    return next(place for place in beside if not place.exists())


def _kept(temporary: Path, path: Path, kind: str) -> BaseException:
    """Move what is done to ``path`` or beside it, however often Ctrl-C is pressed, and return what
    to raise."""
    previous = signals.ignore()
    try:
        for cut in temporary.glob(".*"):
            remove(cut)
        count = sum(1 for _ in temporary.iterdir())
        if not count:
            return KeyboardInterrupt()
        place = _unused(path)
        _put(temporary, place)
        return Failure(f"interrupted; kept the {count:,} {kind} that are done in {place}", 130)
    finally:
        signals.restore(previous)
