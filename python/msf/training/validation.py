"""The loss on images that training never sees."""

from __future__ import annotations

import torch
from torch import Tensor

from ..data import ImageData
from ..modes import own_modes
from ..precision import autocast
from ..seeds import generator
from .skipped import ReadableBatches
from .stage import StageTrainer

IMAGES, BATCH = 1024, 64
VALIDATION = (2, 0, 0, 0)  # the purpose of its draws; no other has as many numbers


class Validation:
    """A Validation measures the loss of averaged weights on up to 1,024 images of ``data``, the
    same images with the same noise and times each time: what changes is the weights alone."""

    def __init__(self, data: ImageData, seed: int) -> None:
        self._batches, self._seed = ReadableBatches(data), seed
        order = torch.randperm(len(data), generator=generator(seed, *VALIDATION))
        self._parts = order[:IMAGES].split(BATCH)

    @own_modes()
    @torch.no_grad()
    def loss(self, trainer: StageTrainer) -> float:
        """Return the mean loss of an image of ``trainer``'s stage; all processes call it, and each
        takes some of the batches."""
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
        return loss / images

    def _losses(self, trainer: StageTrainer, part: int) -> Tensor:
        key = (*VALIDATION, part)
        images, labels, _ = self._batches.read(self._parts[part], (self._seed, *key))
        labels = labels.to(trainer.device)
        with autocast(trainer.device, trainer.config.precision):
            return trainer.model.image_losses(
                images.to(trainer.device),
                labels if trainer.model.config.num_classes else None,
                stage=trainer.name,
                generator=generator(self._seed, *key, trainer.index, device=trainer.device),
            )[0]
