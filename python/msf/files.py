"""Files appear complete or not at all."""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name, or another text, on one line: with marks in place of what is no UTF-8
    or would move a terminal's cursor."""
    return "".join(
        "\ufffd" if _is_control(character) else character for character in os.fspath(name)
    )


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def check_is_file(path: Path) -> None:
    """Raise ValueError where ``path`` is something else than a file, as a pipe, which may have no
    end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file")


def read_file(path: Path) -> bytes:
    check_is_file(path)
    return path.read_bytes()


@contextmanager
def reported_as(path: Path, temporary: Path) -> Iterator[None]:
    """Let the system's errors name ``path``, which the user knows, where they name
    ``temporary``."""
    try:
        yield
    except OSError as error:
        if error.filename is not None:
            error.filename = str(error.filename).replace(str(temporary), str(path), 1)
        raise


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside ``path``; rename it to ``path`` on success, remove it on
    failure. Makes the folder.

    The suffix is kept, because writers such as Pillow and matplotlib choose the format by it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    with reported_as(path, temporary):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes its files unreadable to others, 0600
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
