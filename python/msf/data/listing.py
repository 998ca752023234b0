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

# What an entry of a folder is, if no file of another suffix.
FOLDER, IMAGE, HIDDEN = "folder", "image", "hidden"
# What of a folder is left out and counted beside such files, in words for one and for several.
LEFT_OUT = {
    "beside": ("beside the class folders", "beside the class folders"),
    "nowhere": ("link that leads nowhere", "links that lead nowhere"),
    "back": ("link to a parent folder", "links to parent folders"),
    "special": ("pipe or device", "pipes or devices"),
}


def list_images(root: Path) -> tuple[list[str], dict[str, int], list[str]]:
    """Return the class folders of ``root``, the size of every image by its name relative to
    ``root``, class by class, and what is left out: images beside the class folders, which are in no
    class, links that lead nowhere or back, pipes and devices, and files of other suffixes. No class
    folders where all images lie in ``root`` itself.

    What is hidden, AppleDouble's ``._x.png`` too, goes without a word. Raise ValueError where there
    are no images, or none in a class.
    """
    inside = _inside(root)
    content = [(entry.name, _kind(entry, inside)) for entry in _entries(root)]
    folders = [name for name, kind in content if kind == FOLDER]
    left_out: Counter[str] = Counter()  # by the keys of LEFT_OUT, and by suffixes
    files: dict[str, int] = {}
    if folders:
        kinds = ("beside" if kind == IMAGE else kind for _, kind in content)
        left_out.update(kind for kind in kinds if kind in LEFT_OUT)
    else:
        files.update(_walk(root, "", inside, left_out))
    for folder in folders:
        number, before = len(files), left_out.copy()
        files.update(_walk(root / folder, f"{folder}/", inside, left_out))
        if len(files) == number:
            known = ", ".join(sorted(SUFFIXES))
            raise ValueError(
                f"data: {printable(root / folder)} holds no image ({known})"
                f"{ignored(_words(left_out - before))}"
            )
    words = _words(left_out)
    if not files:
        raise ValueError(
            f"data: {printable(root)} has no subfolders; make one a class, with images inside"
            f"{ignored(words)}"
        )
    return folders, files, words


def ignored(left_out: Sequence[str]) -> str:
    """Return the end of a line about a folder, which says what of it is ``left_out``, if any is."""
    return f"; ignored: {', '.join(left_out)}" if left_out else ""


def _words(left_out: Counter[str]) -> list[str]:
    words = [f"{n:,} {LEFT_OUT[kind][n > 1]}" for kind in LEFT_OUT if (n := left_out[kind])]
    others = Counter({suffix: n for suffix, n in left_out.items() if suffix not in LEFT_OUT})
    if others:
        suffixes = ", ".join(printable(suffix or "none") for suffix, _ in others.most_common(3))
        more = ", ..." if len(others) > 3 else ""
        words.append(f"{others.total():,} with other suffixes ({suffixes}{more})")
    return words


def _walk(
    folder: Path, prefix: str, inside: Set[str], left_out: Counter[str]
) -> Iterator[tuple[str, int]]:
    """Yield (name, size) of the images in ``folder`` and its subfolders, in order of their names;
    ``inside`` is as ``_inside`` returns it for what led here. Count what is ``left_out``."""
    inside = _inside(folder) | inside
    for entry in _entries(folder):
        kind = _kind(entry, inside)
        if kind == FOLDER:
            yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", inside, left_out)
        elif kind == IMAGE:
            yield prefix + entry.name, entry.stat().st_size
        elif kind != HIDDEN:
            left_out[kind] += 1


def _inside(folder: Path) -> Set[str]:
    """Return the real paths of ``folder`` and all that it lies in: links there have no end."""
    real = folder.resolve()
    return {str(path) for path in (real, *real.parents)}


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _kind(entry: os.DirEntry[str], inside: Set[str]) -> str:
    """Return what ``entry`` is: FOLDER, IMAGE, HIDDEN or a key of LEFT_OUT; of other files the
    suffix, which is empty or begins with a dot."""
    if entry.name.startswith("."):
        return HIDDEN
    if _leads_nowhere(entry):
        return "nowhere"
    if entry.is_dir():
        if entry.name == NO_CLASS:
            return HIDDEN
        leads_back = entry.is_symlink() and os.path.realpath(entry.path) in inside
        return "back" if leads_back else FOLDER
    if not entry.is_file():
        return "special"
    suffix = os.path.splitext(entry.name)[1].lower()
    return IMAGE if suffix in SUFFIXES else suffix


def _leads_nowhere(entry: os.DirEntry[str]) -> bool:
    try:
        if entry.is_symlink():
            entry.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
            return True
        raise
    return False
