"""Images that cannot be read: others take their place, and they are counted and named."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..data import ImageData, UnreadableImage
from ..progress import say
from ..seeds import generator
from .identity import listed
from .ranks import Ranks

LIMIT = 100  # training goes on with at most one unreadable image in so many
NAMED = 3


def too_many(unreadable: Sequence[str], total: int) -> str:
    """Return why nothing is done without the ``unreadable`` ones of ``total`` images, "" where they
    are at most one in a hundred."""
    if len(unreadable) * LIMIT <= total:
        return ""
    return (
        f"cannot read {len(unreadable):,} of {total:,} images, more than one in a hundred: "
        f"{listed(unreadable, NAMED)}; replace or remove them"
    )


class Skipped:
    """A Skipped counts the unreadable ones of ``total`` images; ``empty`` are known to be so."""

    def __init__(self, total: int, empty: Iterable[str] = ()) -> None:
        self.total = total
        self._problems: dict[str | int, str] = {name: f"{name}: an empty file" for name in empty}
        self._check()

    def add(self, problems: dict[int, str]) -> None:
        """Count images by their indices, each once. Raise ValueError where they are too many."""
        known = len(self._problems)
        for index, problem in problems.items():
            self._problems[index] = problem
        if len(self._problems) > known:
            self._check()

    def _check(self) -> None:
        if why := too_many(list(self._problems.values()), self.total):
            raise ValueError(f"data: {why}")

    def check_all(self, ranks: Ranks) -> None:
        """Count those that all processes, which call this together, have met. Raise ValueError
        where they are too many."""
        self._share(ranks)
        ranks.each(self._check)

    def _share(self, ranks: Ranks) -> None:
        for problems in ranks.gather(self._problems):
            self._problems |= problems

    def report(self, ranks: Ranks, held_out: Mapping[int, str]) -> None:
        """Say which were skipped, if any, in all processes, which call this together, with those
        ``held_out``, by their indices in a split of their own."""
        self._share(ranks)
        apart: dict[int, str] = {}
        for found in ranks.gather(held_out):
            apart |= found
        problems = [*self._problems.values(), *apart.values()]
        if problems and ranks.is_first:
            say(
                f"data: skipped {len(problems):,} of {self.total:,} images, as they cannot be "
                f"read: {listed(problems, NAMED)}; replace or remove them"
            )


class ReadableBatches(Dataset):
    """ReadableBatches are the batches of ``data`` by their indices: (images, labels, what is wrong
    with the unreadable ones by index).

    The next readable image of the same batch takes an unreadable one's place, so what a batch holds
    is still a function of its indices, and a resumed run sees what it would have seen.
    """

    def __init__(self, data: ImageData) -> None:
        self.data = data
        self._problems: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor, dict[int, str]]:
        return self.read(indices)

    def read(
        self, indices: Tensor, key: Sequence[int] = ()
    ) -> tuple[Tensor, Tensor, dict[int, str]]:
        """Return the batch at ``indices``, with what is random in it drawn from the generator of
        ``key``, a seed and a purpose; without a key nothing is random."""
        while True:
            chosen = self._replaced(indices)
            try:
                # Made anew for each try: how many there are depends on what was met before.
                images, labels = self.data.batch(chosen, generator(*key) if key else None)
            except UnreadableImage as error:
                self._problems[error.index] = error.problem
                if all(index in self._problems for index in indices.tolist()):
                    raise ValueError(str(error)) from None
            else:
                met = {i: self._problems[i] for i in indices.tolist() if i in self._problems}
                return images, labels, met

    def _replaced(self, indices: Tensor) -> Tensor:
        if not self._problems:
            return indices
        chosen = indices.tolist()
        readable = [index not in self._problems for index in chosen]
        if all(readable) or not any(readable):
            return indices
        for position in range(len(chosen)):
            following = position
            while not readable[following]:
                following = (following + 1) % len(chosen)
            chosen[position] = int(indices[following])
        return torch.tensor(chosen)
