"""The image files of a folder, by name."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator, Set
from pathlib import Path

from ..files import printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NO_CLASS = "__MACOSX"  # archives made on a Mac have it; its images are none


def list_images(root: Path) -> tuple[list[str], dict[str, int], int]:
    """Return the class folders of ``root``, the size of every image by its name relative to
    ``root``, class by class, and how many images lie beside the class folders, which are in no
    class; no class folders where all images lie in ``root`` itself.

    What is hidden, AppleDouble's ``._x.png`` too, is left out. Raise ValueError where there are no
    images, or none in a class.
    """
    content, inside = _entries(root), _inside(root)
    folders = [entry.name for entry in content if _is_folder(entry, inside)]
    beside = sum(map(_is_image, content)) if folders else 0
    files: dict[str, int] = {}
    for folder in folders:
        before = len(files)
        files.update(_walk(root / folder, f"{folder}/", inside))
        if len(files) == before:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"data: {printable(root / folder)} holds no image ({known})")
    if not folders:
        files.update(_walk(root, "", inside))
    if not files:
        raise ValueError(
            f"data: {printable(root)} has no subfolders; make one a class, with images inside"
        )
    return folders, files, beside


def _walk(folder: Path, prefix: str, inside: Set[str]) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of the images in ``folder`` and its subfolders, in order of their names;
    ``inside`` is as ``_inside`` returns it for what led here."""
    inside = _inside(folder) | inside
    for entry in _entries(folder):
        if _is_folder(entry, inside):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", inside)
        elif _is_image(entry):
            yield prefix + entry.name, entry.stat().st_size


def _inside(folder: Path) -> Set[str]:
    """Return the real paths of ``folder`` and all that it lies in: links there have no end."""
    real = folder.resolve()
    return {str(path) for path in (real, *real.parents)}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """Return what ``folder`` holds, in order of names, but for links that lead nowhere."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not _leads_nowhere(entry)]
    return sorted(found, key=lambda entry: entry.name)


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_symlink():
            entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return True
        raise
    return False


def _is_folder(entry: os.DirEntry[str], inside: Set[str]) -> bool:
    hidden = entry.name.startswith(".") or entry.name == NO_CLASS
    leads_back = entry.is_symlink() and os.path.realpath(entry.path) in inside
    return entry.is_dir() and not hidden and not leads_back


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in SUFFIXES and not entry.name.startswith(".") and entry.is_file()
