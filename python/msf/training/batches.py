"""The order of the data, as a function of (seed, step): so a resumed run sees what it would have
seen."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import ImageData, ImageFolder
from ..seeds import generator
from .interrupts import leave_sigterm_to_the_parent


class _Steps(Sampler[Tensor]):
    """The indices of the batches of steps ``first`` to ``last`` - 1: one shuffle an epoch, short
    rest dropped."""

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


class _Batches(Dataset):
    """The images and labels of ``data``, indexed by a whole batch at once."""

    def __init__(self, data: ImageData) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, indices: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.batch(indices)


def batches(
    data: ImageData, batch_size: int, first: int, last: int, seed: int, *, pin: bool = False
) -> DataLoader:
    """Load batches (images, labels) of steps ``first`` to ``last`` - 1; worker processes decode
    files. With ``pin`` they are in page-locked memory, from where copies to a GPU need not be
    waited for."""
    workers = 0 if not isinstance(data, ImageFolder) else min(8, os.cpu_count() or 1)
    steps = _Steps(len(data), batch_size, first, last, seed)
    return DataLoader(
        _Batches(data),
        batch_size=None,
        sampler=steps,
        num_workers=workers,
        collate_fn=_shared if workers else None,
        worker_init_fn=leave_sigterm_to_the_parent,
        pin_memory=pin,
    )


def _shared(batch: Iterable[Tensor]) -> list[Tensor]:
    """Return ``batch`` in shared memory. The queue's thread would move it there too, but drops an
    error, and the parent would wait for ever."""
    try:
        return [tensor.share_memory_() for tensor in batch]
    except RuntimeError as error:
        raise ValueError(
            f"data: no shared memory for a batch ({error}); raise the limit (ulimit -f, /dev/shm) "
            "or use a smaller --batch-size"
        ) from None
