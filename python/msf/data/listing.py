"""The image files of a folder, by name."""

from __future__ import annotations

import os
from collections.abc import Iterator
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
    with os.scandir(root) as entries:
        content = list(entries)
    folders = sorted(entry.name for entry in content if _is_folder(entry))
    beside = sum(map(_is_image, content)) if folders else 0
    files: dict[str, int] = {}
    for folder in folders:
        before = len(files)
        files.update(_walk(root / folder, f"{folder}/"))
        if len(files) == before:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"data: {printable(root / folder)} holds no image ({known})")
    if not folders:
        files.update(_walk(root, ""))
    if not files:
        raise ValueError(
            f"data: {printable(root)} has no subfolders; make one a class, with images inside"
        )
    return folders, files, beside


def _walk(folder: Path, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of the images in ``folder`` and its subfolders, in order of their
    names."""
    with os.scandir(folder) as entries:
        ordered = sorted(entries, key=lambda entry: entry.name)
    for entry in ordered:
        if _is_folder(entry):
            if not _leads_back(entry, folder):
                yield from _walk(Path(entry.path), f"{prefix}{entry.name}/")
        elif _is_image(entry):
            yield prefix + entry.name, entry.stat().st_size


def _is_folder(entry: os.DirEntry[str]) -> bool:
    return entry.is_dir() and not entry.name.startswith(".") and entry.name != NO_CLASS


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in SUFFIXES and not entry.name.startswith(".") and entry.is_file()


def _leads_back(entry: os.DirEntry[str], folder: Path) -> bool:
    """Return whether ``entry`` is a link to ``folder`` or what it lies in: that has no end."""
    return entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve())
