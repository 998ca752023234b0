"""The order of the data, as a function of (seed, step): so a resumed run sees what it would have
seen."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler

from ..data import ImageData, ImageFolder
from ..seeds import generator
from .interrupts import leave_signals_to_the_parent
from .skipped import ReadableBatches, Skipped


class _Steps(Sampler[Tensor]):
    """_Steps are the indices of the batches of steps ``first`` to ``last`` - 1: one shuffle an
    epoch, whose short rest is dropped."""

    def __init__(self, length: int, batch_size: int, first: int, last: int, seed: int) -> None:
        self.length, self.batch_size = length, min(batch_size, length)
        self.first, self.last, self.seed = first, last, seed

    def __len__(self) -> int:
        return self.last - self.first

    def __iter__(self) -> Iterator[Tensor]:
        epoch, order = -1, torch.empty(0)
        for step in range(self.first, self.last):
            step_epoch, position = divmod(step * self.batch_size, self._epoch_length())
            if step_epoch != epoch:
                epoch = step_epoch
                key = generator(self.seed, epoch)
                order = torch.randperm(self.length, generator=key)
            yield order[position : position + self.batch_size]

    def _epoch_length(self) -> int:
        return self.length - self.length % self.batch_size


def batches(
    data: ImageData,
    batch_size: int,
    first: int,
    last: int,
    seed: int,
    *,
    skipped: Skipped | None = None,
    pin: bool = False,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (images, labels) of steps ``first`` to ``last`` - 1; worker processes decode
    files. ``skipped`` counts those that cannot be read. With ``pin`` batches are in page-locked
    memory, from where copies to a GPU need not be waited for."""
    workers = 0 if not isinstance(data, ImageFolder) else min(8, os.cpu_count() or 1)
    steps = _Steps(len(data), batch_size, first, last, seed)
    loader = DataLoader(
        ReadableBatches(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_shared if workers else None,
        worker_init_fn=leave_signals_to_the_parent,
        pin_memory=pin,
    )
    for images, labels, problems in loader:
        if skipped is not None:
            skipped.add(problems)
        yield images, labels


def _shared(batch: Any) -> tuple[Tensor, Tensor, dict[int, str]]:
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
