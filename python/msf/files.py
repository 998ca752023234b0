"""Files appear complete or not at all."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def printable(name: str | os.PathLike[str]) -> str:
    """Return a file's name, or another text, on one line: with marks in place of what is no UTF-8
    or would move a terminal's cursor."""
    return "".join(
        "\ufffd" if _is_control(character) else character for character in os.fspath(name)
    )


def quoted(name: str) -> str:
    """Return ``printable``, in quotes where a list would not show where the name ends: it is empty,
    or has a comma, a space or a quote in it."""
    name = printable(name)
    return json.dumps(name, ensure_ascii=False) if re.search(r'^$|[\s,"]', name) else name


def _is_control(character: str) -> bool:
    return unicodedata.category(character) in ("Cc", "Cs", "Zl", "Zp")


def check_utf8(path: str | os.PathLike[str]) -> None:
    """Raise OSError where ``path`` is no UTF-8: safetensors reads and TensorBoard writes no such
    names."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        why = "its name is no UTF-8, as libraries need it; rename it, or choose another"
        raise OSError(errno.EILSEQ, why, os.fspath(path)) from None


def check_is_file(path: Path) -> None:
    """Raise ValueError where ``path`` is something else than a file, as a pipe, which may have no
    end."""
    if path.exists() and not path.is_file():
        raise ValueError(f"{path}: is no file")


def behind_links(path: Path) -> Path:
    """Return where ``path`` is, which need not be there, behind all links on the way. Raise OSError
    where links lead round."""
    place = Path(os.path.realpath(path))
    if any(part.is_symlink() for part in (place, *place.parents)):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
    return place


def make_folder(path: Path) -> None:
    """Make a folder unless it is there, and those that it is in; of a link what that leads to."""
    behind_links(path).mkdir(parents=True, exist_ok=True)


def existing(path: Path) -> Path:
    """Return what ``path`` leads to, or of the folders that it would be in the nearest there is."""
    path = behind_links(path)
    return next(place for place in (path, *path.parents) if place.exists())


def check_folder(path: Path, wanted: str = "--out must be a folder") -> None:
    """Raise ValueError unless ``path`` is a folder that may be written to, or can become one."""
    place = existing(path)
    if not place.is_dir():
        reason = wanted if path.exists() else "--out must be in a folder"
        raise ValueError(f"{place}: is a file; {reason}")
    if not os.access(place, os.W_OK):
        raise ValueError(f"{place}: may not be written to; choose another --out")


def check_outside(path: Path, source: str | os.PathLike[str]) -> None:
    """Raise ValueError where ``path`` is in the folder ``source``, of which it would become a
    part."""
    folder = behind_links(Path(source))
    if behind_links(path).is_relative_to(folder):
        raise ValueError(
            f"{path}: is in the folder of the data, {folder}; choose another --out, outside it"
        )


def read_file(path: Path) -> bytes:
    check_is_file(path)
    return path.read_bytes()


@contextmanager
def hinted(possible: bool, remedy: str) -> Iterator[None]:
    """Say of a damaged file that a run does without it, where that is ``possible``."""
    try:
        yield
    except ValueError as error:
        if not possible:
            raise
        raise ValueError(f"{error}; remove it, and {remedy}") from None


def checksum(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


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


# What becomes <stem><suffix> is made in a folder of this name, by process <pid> of <machine>. That
# counts because processes of several machines, or containers, may write to one folder.
TEMPORARY = re.compile(
    r"\.(?P<stem>.+)\.(?P<pid>\d+)(-(?P<machine>[0-9a-f]{8}))?\.tmp(?P<suffix>\.[^.]*)?", re.DOTALL
)
MACHINE = f"{zlib.crc32(os.uname().nodename.encode()):08x}"


@contextmanager
def temporary_folder(path: Path) -> Iterator[Path]:
    """Yield a hidden folder of this process beside ``path``, in which to make what gets that name;
    it goes afterwards, with all that a writer left in it. Makes the folder that both are in.

    On success that goes too which processes that have died left of the same ``path``.
    """
    temporary = path.with_name(f".{path.stem}.{os.getpid()}-{MACHINE}.tmp{path.suffix}")
    with reported_as(path, temporary):
        try:
            remove(temporary)  # a process of our number may have died, as one of 1 in a container
            temporary.mkdir(parents=True)
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        # A folder that is itself temporary may hold a million images, and nothing of others.
        if not TEMPORARY.fullmatch(path.parent.name):
            for name, left in abandoned(path.parent):
                if name == path.name:
                    remove(left)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary file of the same name elsewhere; it becomes ``path`` on success and is
    removed on failure. Makes the folder."""
    path = Path(path)
    with temporary_folder(path) as folder:
        temporary = folder / path.name
        with reported_as(path, temporary):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors makes its files unreadable to others, 0600
            os.replace(temporary, path)


def abandoned(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield (the name that it was to get, path) of what processes that have died on this machine
    left in ``folder``, as far as that can be listed. Earlier versions did not name the machine."""
    with suppress(PermissionError):
        for name in os.listdir(folder):
            found = TEMPORARY.fullmatch(name)
            if found and found["machine"] in (None, MACHINE) and not _is_alive(int(found["pid"])):
                yield found["stem"] + (found["suffix"] or ""), folder / name


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):  # another user's, or no process's number at all
        pass
    return True


def remove(path: Path) -> None:
    """Remove a folder, or a file, as earlier versions made, if it is there and we may."""
    shutil.rmtree(path, ignore_errors=True)
    with suppress(OSError):
        path.unlink()
