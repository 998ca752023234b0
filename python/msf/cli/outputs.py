"""The writing of results: never over what is there unless asked to, and never half-written."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .. import files


def add_overwrite_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--overwrite", action="store_true", help="replace what --out holds")


def place(text: str) -> Path:
    """Return what --out names, which an unset variable of a shell does not: Path("") is the folder
    that the command runs in."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder, got an empty string")
    return Path(text)


def check_file(path: Path, overwrite: bool) -> None:
    """Raise a ValueError when ``path`` exists and may not be overwritten, or cannot be made."""
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "no file"
        raise ValueError(f"{path}: is {what}; --out must name a file")
    if path.exists() and not overwrite:
        raise ValueError(f"{path}: exists already; choose another --out or add --overwrite")
    files.check_folder(files.behind_links(path).parent, "--out must be in a folder")


def check_folder(path: Path, overwrite: bool, names: str) -> None:
    """Raise a ValueError when ``path`` holds anything but files that the command has made, whose
    names match the pattern ``names``, and that may be overwritten."""
    files.check_folder(path, "--out must name a folder here")
    content = sorted(path.iterdir()) if path.exists() else []
    if content and not overwrite:
        raise ValueError(f"{path}: holds files already; choose another --out or add --overwrite")
    others = [file.name for file in content if not re.fullmatch(names, file.name) or file.is_dir()]
    if others:
        raise ValueError(f"{path}: holds other files too ({others[0]}); choose another --out")


def check_not_read(path: Path, *read: Path) -> None:
    """Raise a ValueError when writing ``path`` would replace a file that belongs to what the
    command reads."""
    for file in read:
        if files.behind_links(file).is_relative_to(files.behind_links(path)):
            raise ValueError(
                f"{path}: would replace {file}, which belongs to what is read here; choose another "
                "--out"
            )


def check_new_folder(path: Path) -> None:
    """Raise a ValueError when ``path`` is there and no empty folder, or cannot be made."""
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise ValueError(f"{path}: is there already; choose another --out")
    files.check_folder(path)


def to_json(document: dict[str, Any]) -> str:
    """Return the document as JSON; reports and configurations in it stand for their ``to_dict``."""
    return json.dumps(document, indent=2, default=lambda part: part.to_dict())


def write_json(path: Path, document: dict[str, Any]) -> None:
    with files.atomic_write(files.behind_links(path)) as temporary:
        temporary.write_text(to_json(document) + "\n")


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside ``path``; on success it becomes ``path``, else it goes."""
    path = files.behind_links(path)
    with files.temporary_folder(path) as temporary:
        yield temporary
        if path.exists():
            shutil.rmtree(path)
        os.replace(temporary, path)
