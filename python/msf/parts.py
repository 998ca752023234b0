"""Large outputs are made in parts, so that whatever ends the work, the same command continues it.

The parts of X are files in the folder X.parts beside it. Processes of one job share them by their
numbers and need not talk: each part is there whole or not at all, and knows the settings that it
was made with. They hold a lock on the folder meanwhile, which keeps other jobs out.
"""

from __future__ import annotations

import fcntl
import io
import json
import os
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .files import atomic_write, behind_links, printable, read_file, temporary_folder
from .progress import follow, say

if TYPE_CHECKING:
    from .training.ranks import Ranks

Arrays = dict[str, np.ndarray]
SETTINGS = "settings"


class Damaged(ValueError):
    """A part is not what was written."""


class Parts:
    """A Parts are those of the file or folder ``path``: ``count``, each of named arrays (n, ...).

    ``settings``, which JSON can hold, are all that the parts depend on, by the names that a user
    knows them by.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], count: int) -> None:
        path = behind_links(path)
        self.folder, self.count = path.with_name(f"{path.name}.parts"), count
        self._settings = json.loads(json.dumps(settings))

    @contextmanager
    def claimed(self, ranks: Ranks) -> Iterator[None]:
        """Keep other jobs out until the last of ``ranks``, which call this together, has left the
        body; the folder then goes if there is no part in it. Raise ValueError (one line) where
        another job is at work."""
        self._lock = ranks.each(self._opened)
        try:
            ranks.first(self._keep_others_out)
            fcntl.flock(self._lock, fcntl.LOCK_SH)
            yield
        finally:
            with suppress(OSError):  # others are still at work, or have left parts
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self.folder.rmdir()
            os.close(self._lock)

    def _opened(self) -> int:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise ValueError(
                f"{printable(self.folder)}: is no folder, which parts of the output are kept in "
                "until it is whole; move it, or choose another --out"
            ) from None
        return os.open(self.folder, os.O_RDONLY)

    def _keep_others_out(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"{printable(self.folder)}: another job is making these; wait for it, or choose "
                "another --out"
            ) from None

    def missing(self, numbers: Sequence[int]) -> list[int]:
        """Return which of the parts are not there as they should be; damaged ones are named. Raise
        ValueError (one line) where they were made with other settings, or the folder holds
        anything else."""
        there, whole = self._names(), set()
        found = [number for number in numbers if self._name(number) in there]
        for number in follow(found, "checksums", len(found), "parts"):
            try:
                self._read(number)
                whole.add(number)
            except Damaged as error:
                say(f"{error}; making it anew")
        if foreign := sorted(there - set(map(self._name, range(self.count)))):
            raise ValueError(
                f"{printable(self.folder)}: holds {printable(foreign[0])}, which is no part of "
                "this; move it, or choose another --out"
            )
        return [number for number in numbers if number not in whole]

    def add(self, number: int, arrays: Arrays) -> None:
        settings = np.frombuffer(json.dumps(self._settings).encode(), dtype=np.uint8)
        kept = {**arrays, SETTINGS: settings}
        write_npz(
            self.folder / self._name(number), {name: (len(x), [x]) for name, x in kept.items()}
        )

    def there(self) -> int:
        """Return how many parts are there."""
        names = self._names()
        return sum(self._name(number) in names for number in range(self.count))

    def assemble(self, write: Callable[[Iterator[Arrays]], None]) -> bool:
        """Let ``write`` make the whole of all parts in turn, which then go; return whether it did.

        It does nothing where parts are missing, which others still make, or where another process
        was faster. Call it while they are ``claimed``. Raise ValueError (one line) where a part is
        damaged.
        """
        if self.there() < self.count:
            return False
        fcntl.flock(self._lock, fcntl.LOCK_EX)  # the others are all here by now, or gone
        if self.there() < self.count:
            return False
        parts = map(self._read, range(self.count))
        write(follow(parts, "writing", self.count, "parts", shown=self.count > 1))
        with temporary_folder(self.folder) as gone:  # at once: half of them would be continued
            os.replace(self.folder, gone)
        return True

    def _name(self, number: int) -> str:
        return f"{number:06d}.npz"

    def _names(self) -> set[str]:
        """Return the names of all files but hidden ones, which are in the making."""
        try:
            return {name for name in os.listdir(self.folder) if not name.startswith(".")}
        except FileNotFoundError:
            return set()

    def _read(self, number: int) -> Arrays:
        file = self.folder / self._name(number)
        content = read_file(file)
        try:
            arrays = read_arrays(content)
            settings = json.loads(arrays.pop(SETTINGS).tobytes())
        except Exception as error:  # of many kinds: any byte may be another
            raise Damaged(f"{printable(file)}: is damaged ({error})") from None
        names = {**self._settings, **settings}
        other = [name for name in names if settings.get(name) != self._settings.get(name)]
        if other:
            raise ValueError(
                f"{printable(self.folder)}: was begun with another {', '.join(other)}; repeat that "
                "command, remove the folder, or choose another --out"
            )
        return arrays


def read_arrays(npz: bytes) -> Arrays:
    """Return what an .npz file holds, of which checksums are compared before arrays are made."""
    with zipfile.ZipFile(io.BytesIO(npz)) as members:
        contents = {name: members.read(name) for name in members.namelist()}
    return {
        name.removesuffix(".npy"): np.lib.format.read_array(io.BytesIO(content))
        for name, content in contents.items()
    }


def write_npz(path: Path, arrays: Mapping[str, tuple[int, Iterable[np.ndarray]]]) -> None:
    """Write what ``numpy.savez`` would, byte for byte, of arrays that need not fit into memory:
    each by its length and its rows (n, ...) in turn, some at a time."""
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as file:
        for name, (length, parts) in arrays.items():
            with file.open(f"{name}.npy", "w", force_zip64=True) as member:
                for index, part in enumerate(map(np.ascontiguousarray, parts)):
                    if not index:
                        header = np.lib.format.header_data_from_array_1_0(part)
                        header["shape"] = (length, *part.shape[1:])
                        np.lib.format.write_array_header_1_0(member, header)
                    member.write(part.tobytes())
