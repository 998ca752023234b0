"""The order of the data and what is drawn for it, as functions of (seed, step): so a resumed run
sees what it would have seen."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import ImageData
from ..modes import own_modes
from ..parsing import parse_whole
from ..seeds import generator
from .interrupts import leave_signals_to_the_parent
from .skipped import ReadableBatches, Skipped

# The purpose of what is drawn for images, before step and part: a stage's has two or three numbers.
DRAWS = (1, 0)


class _Part(NamedTuple):
    """A _Part is what one process reads of a batch at once: its indices and the key of what is
    drawn for them. It holds no tensor: see ``loader_of``."""

    indices: list[int]
    key: tuple[int, ...]


class _Steps(Sampler[_Part]):
    """_Steps are the parts of the batches of steps ``first`` to ``last`` - 1 that ``own`` names of
    ``slices`` equal ones: one shuffle an epoch, whose short rest is dropped."""

    def __init__(
        self,
        length: int,
        batch_size: int,
        first: int,
        last: int,
        seed: int,
        slices: int = 1,
        own: Sequence[int] = (0,),
    ) -> None:
        if parse_whole(batch_size, "batch_size", 1) % slices:
            raise ValueError(
                f"batch_size must be a multiple of {slices}, so that {slices} equal parts make it, "
                f"got {batch_size}"
            )
        if length < slices:
            raise ValueError(f"data: {length:,} images are too few for {slices} parts of a batch")
        self.length, self.batch_size = length, min(batch_size, length - length % slices)
        self.first, self.last, self.seed = first, last, seed
        self.slices, self.own = slices, own

    def __len__(self) -> int:
        return (self.last - self.first) * len(self.own)

    def __iter__(self) -> Iterator[_Part]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            step_epoch, position = divmod(step * self.batch_size, self._epoch_length())
            if step_epoch != epoch:
                epoch = step_epoch
                key = generator(self.seed, epoch)
                order = torch.randperm(self.length, generator=key)
            parts = order[position : position + self.batch_size].chunk(self.slices)
            for part in self.own:
                yield _Part(parts[part].tolist(), (self.seed, *DRAWS, step, part))

    def _epoch_length(self) -> int:
        return self.length - self.length % self.batch_size


class _Parts(Dataset):
    """_Parts are what ``data`` holds of a _Part, as ``ReadableBatches`` returns it."""

    def __init__(self, data: ImageData) -> None:
        self._batches = ReadableBatches(data)

    def __getitem__(self, part: _Part) -> tuple[Tensor, Tensor, dict[int, str]]:
        return self._batches.read(torch.tensor(part.indices), part.key)


def batches(
    data: ImageData,
    batch_size: int,
    first: int,
    last: int,
    seed: int,
    *,
    slices: int = 1,
    own: Sequence[int] = (0,),
    skipped: Skipped | None = None,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (images, labels) of steps ``first`` to ``last`` - 1; worker processes read
    files. ``skipped`` counts those that cannot be read. With ``pin`` batches are in page-locked
    memory, from where copies to a GPU need not be waited for.

    The batch of a step is cut into ``slices`` equal parts, of which the parts ``own`` are yielded,
    one after the other: so several processes share it. What is drawn for a part is a function of
    seed, step and part. Raise ValueError where ``slices`` does not divide ``batch_size``, or there
    are fewer images.
    """
    steps = _Steps(len(data), batch_size, first, last, seed, slices, own)
    workers = loader_workers() if data.on_disk else 0
    loader = loader_of(_Parts(data), steps, workers, pin=pin)
    # Not around the loop, in which the caller's code runs at each yield.
    loaded, following = own_modes()(iter)(loader), own_modes()(next)
    while batch := following(loaded, None):
        images, labels, problems = batch
        if skipped is not None:
            skipped.add(problems)
        yield images, labels


def loader_workers() -> int:
    """Return how many processes should read images for this one of those on this machine."""
    beside = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(8, (os.cpu_count() or 1) // beside))


def loader_of(
    dataset: Dataset, parts: Iterable[Any], workers: int, *, pin: bool = False
) -> DataLoader:
    """Return what yields what ``dataset``, of (images, labels, problems), holds of each of
    ``parts``, which ``workers`` processes read (0: this one). Raise ValueError where these could
    not open all the files that they need.

    Parts hold no tensors: those go through shared memory, and where that has no room the thread
    that sends them drops the error and the workers wait for ever."""
    if workers:
        _check_open_files(workers)
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=parts,
        num_workers=workers,
        collate_fn=_in_shared_memory if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin,
    )


def _check_open_files(workers: int) -> None:
    """Raise ValueError where so many ``workers`` might meet the limit of open files: some places of
    multiprocessing and of torch wait for ever then."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    # A worker was seen to take up to 7: its pipes, and tensors on their way. 16 leave room, and
    # this process gets as many.
    needed = len(os.listdir("/dev/fd")) + 16 * (workers + 1)
    if needed > limit:
        raise ValueError(
            f"data: too many open files for {workers} processes that read images; raise the limit "
            f"(ulimit -n) from {limit} to at least {needed}"
        )


def _in_shared_memory(batch: Any) -> tuple[Tensor, Tensor, dict[int, str]]:
    """Return ``batch`` in shared memory. The queue's thread would move it there too, but drops an
    error, and the parent would wait for ever."""
    try:
        images, labels, problems = batch
        return images.share_memory_(), labels.share_memory_(), problems
    except RuntimeError as error:
        raise ValueError(
            f"data: no shared memory for a batch ({error}); raise the limit (ulimit -f, /dev/shm) "
            "or use a smaller --batch-size"
        ) from None
