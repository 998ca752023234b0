"""The folder that ``msf encode`` fills, several processes at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from ..data.latent_index import (
    INDEX_FILE,
    LatentIndex,
    Shard,
    damage,
    is_latents,
    read_index,
    shard_name,
    write_index,
)
from ..files import check_folder, check_utf8, make_folder
from ..progress import follow, say
from ..training.locks import locked
from ..training.skipped import too_many

WHAT = {
    "source": "another folder",
    "fingerprint": "images of other names or sizes",
    "vae": "another VAE",
    "image_size": "another size",
    "latent_shape": "another shape",
    "class_names": "other classes",
    "found": "another number of images",
    "shard_images": "larger or smaller shards",
}


class EncodedFolder:
    """An EncodedFolder opens ``path`` for latents of which ``index`` says what they are of. Raise
    ValueError (one line) where it holds something else; an index of no shards is nothing yet.

    Its index is read and written under a lock, and has a shard after the shard's file is there: so
    what is in the index is whole, whatever process ends when.
    """

    def __init__(self, path: Path, index: LatentIndex) -> None:
        self.path, self.index = path, index
        check_utf8(path)
        check_folder(path)
        self.read()

    def begin(self) -> None:
        """Make the folder with an index of no shards, unless another process has."""
        make_folder(self.path)
        with locked(self.path):
            if self.read() is self.index:
                write_index(self.path, self.index)

    def read(self) -> LatentIndex:
        """Return what is there already, ``self.index`` itself where that is nothing. Raise
        ValueError where it is something else."""
        if not is_latents(self.path):
            # What another process is just writing has a hidden name.
            if self.path.exists() and any(p.name[0] != "." for p in self.path.iterdir()):
                raise ValueError(
                    f"{self.path}: holds files but no latents ({INDEX_FILE}); choose another --out"
                )
            return self.index
        there = read_index(self.path)
        other = [
            what for name, what in WHAT.items() if getattr(there, name) != getattr(self.index, name)
        ]
        if other and there.shards:
            raise ValueError(
                f"{self.path}: holds latents of {', '.join(other)}; encode what they are of, or "
                "choose another --out"
            )
        return self.index if other else there

    def missing(self, numbers: Sequence[int], *, shown: bool) -> list[int]:
        """Return which of the shards are not there as they should be; those that are damaged are
        named and go from the index."""
        names = {shard_name(number): number for number in numbers}
        there = [shard for shard in self.read().shards if shard.name in names]
        damaged = []
        for shard in follow(there, "checksums", len(there), "shards", shown=shown):
            if found := damage(self.path, shard):
                say(f"{found}; making it anew")
                damaged.append(shard)
        if damaged:
            self._change(without=damaged)
        sound = {names[shard.name] for shard in there if shard not in damaged}
        return [number for number in numbers if number not in sound]

    def add(self, shard: Shard, skipped: Iterable[str]) -> None:
        """Put a shard that has been written into the index, and the names of what was ``skipped``
        for it. Raise ValueError where that would be more than one in a hundred of all."""
        self._change(shard, skipped)

    def _change(
        self,
        added: Shard | None = None,
        skipped: Iterable[str] = (),
        without: Sequence[Shard] = (),
    ) -> None:
        with locked(self.path):
            index = self.read()
            shards = {shard.name: shard for shard in index.shards if shard not in without}
            if added:
                shards[added.name] = added
            index = replace(
                index,
                images=sum(shard.images for shard in shards.values()),
                shards=tuple(shards[name] for name in sorted(shards)),
                skipped=tuple(sorted({*index.skipped, *skipped})),
            )
            if why := too_many(index.skipped, index.found):
                raise ValueError(why)
            write_index(self.path, index)
