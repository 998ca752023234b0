"""The loss on images that training never sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import ImageData, UnreadableImage
from ..modes import own_modes
from ..precision import autocast
from ..progress import say
from ..seeds import generator
from .stage import StageTrainer

IMAGES, BATCH = 1024, 64
VALIDATION = (2, 0, 0, 0)  # the purpose of its draws; no other has as many numbers


class Validation:
    """A Validation measures the loss of averaged weights on up to 1,024 images of ``data``, the
    same images with the same noise and times each time: what changes is the weights alone.

    ``problems`` say by index which of them could not be read, in this process; they are left out.
    """

    def __init__(self, data: ImageData, seed: int) -> None:
        self._data, self._seed = data, seed
        self.problems: dict[int, str] = {}
        order = torch.randperm(len(data), generator=generator(seed, *VALIDATION))
        self._parts = list(order[:IMAGES].split(BATCH))

    @own_modes()
    @torch.no_grad()
    def loss(self, trainer: StageTrainer) -> float | None:
        """Return the mean loss of an image of ``trainer``'s stage, None where none can be read,
        which is said once; all processes call it, and each takes some of the batches."""
        total = torch.zeros(2, dtype=torch.float64, device=trainer.device)  # losses, images
        ranks = trainer.ranks
        with trainer.averaged():
            # With FSDP2 every process has to call the stage equally often.
            for first in range(0, len(self._parts), ranks.count):
                mine = first + ranks.rank
                losses = self._losses(trainer, min(mine, len(self._parts) - 1))
                if mine < len(self._parts):
                    total += torch.stack([losses.double().sum(), total.new_tensor(len(losses))])
        loss, images = ranks.sum(total).tolist()
        if images:
            return loss / images
        if self._parts and ranks.is_first:
            say("data: none of the held-out images can be read, so there is no validation loss")
        self._parts = []
        return None

    def _losses(self, trainer: StageTrainer, part: int) -> Tensor:
        """Return the loss of each readable image of a part."""
        key, config = (*VALIDATION, part), trainer.model.config
        images, labels = self._read(part)
        count = len(images)
        if not count:  # the stage is called all the same
            images = torch.zeros(1, config.channels, *config.image_size)
            labels = torch.zeros(1, dtype=torch.int64)
        labels = labels.to(trainer.device)
        with autocast(trainer.device, trainer.config.precision):
            return trainer.model.image_losses(
                images.to(trainer.device),
                labels if config.num_classes else None,
                stage=trainer.name,
                generator=generator(self._seed, *key, trainer.index, device=trainer.device),
            )[0][:count]

    def _read(self, part: int) -> tuple[Tensor, Tensor]:
        """Return the readable images of a part, which keeps no others, and their labels."""
        while len(indices := self._parts[part]):
            try:
                return self._data.batch(indices, generator(self._seed, *VALIDATION, part))
            except UnreadableImage as error:
                self.problems[error.index] = error.problem
                self._parts[part] = indices[indices != error.index]
        return torch.empty(0), torch.empty(0)
