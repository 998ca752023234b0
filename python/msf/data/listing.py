"""The image files of a folder, by name."""

from __future__ import annotations

import errno
import os
from collections import Counter
from collections.abc import Iterator, Sequence, Set
from pathlib import Path

from ..files import printable

SUFFIXES = {".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
NO_CLASS = "__MACOSX"  # archives made on a Mac have it; its images are none


def list_images(root: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Return the class folders of ``root``, the size of every image by its name relative to
    ``root``, class by class, and what is left out: images beside the class folders, which are in no
    class, and other files. No class folders where all images lie in ``root`` itself.

    What is hidden, AppleDouble's ``._x.png`` too, goes without a word. Raise ValueError where there
    are no images, or none in a class.
    """
    content, inside = _entries(root), _inside(root)
    folders = [entry.name for entry in content if _is_folder(entry, inside)]
    left_out = []
    if folders and (beside := sum(map(_is_image, content))):
        left_out.append(f"{beside:,} beside the class folders")
    files: dict[str, int] = {}
    others: Counter[str] = Counter()  # by suffix
    for folder in folders:
        before = len(files)
        files.update(_walk(root / folder, f"{folder}/", inside, others))
        if len(files) == before:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(f"data: {printable(root / folder)} holds no image ({known})")
    if not folders:
        files.update(_walk(root, "", inside, others))
    if not files:
        raise ValueError(
            f"data: {printable(root)} has no subfolders; make one a class, with images inside"
        )
    if others:
        suffixes = ", ".join(printable(suffix or "none") for suffix, _ in others.most_common(3))
        more = ", ..." if len(others) > 3 else ""
        left_out.append(f"{others.total():,} with other suffixes ({suffixes}{more})")
    return folders, files, left_out


def ignored(left_out: Sequence[str]) -> str:
    """Return the end of a line about a folder, which says what of it is ``left_out``, if any is."""
    return f"; {' and '.join(left_out)} are ignored" if left_out else ""


def _walk(
    folder: Path, prefix: str, inside: Set[str], others: Counter[str]
) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of the images in ``folder`` and its subfolders, in order of their names;
    ``inside`` is as ``_inside`` returns it for what led here. Count ``others``."""
    inside = _inside(folder) | inside
    for entry in _entries(folder):
        if _is_folder(entry, inside):
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", inside, others)
        elif _is_image(entry):
            yield prefix + entry.name, entry.stat().st_size
        elif _is_file(entry):
            others[_suffix(entry)] += 1


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
    return _suffix(entry) in SUFFIXES and _is_file(entry)


def _is_file(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_file()


def _suffix(entry: os.DirEntry[str]) -> str:
    return os.path.splitext(entry.name)[1].lower()
