"""The weights of one model as the first weights of another's training: fine-tuning."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..config import MSFConfig
from ..model import MSF
from ..transformer import StageTransformer
from .config import class_names_of, read_run

KEPT = (
    "stages",
    "channels",
    "positions",
    "qk_norm",
    "norm",
    "mlp",
    "upsample",
    "standardize",
    "prediction",
    "time_range",
    "time_period",
    "rope_theta",
)


@torch.no_grad()
def started_from(
    directory: str | os.PathLike[str], config: MSFConfig, class_names: Sequence[str]
) -> MSF:
    """Return a model of ``config`` with the weights of the one in ``directory``, but for its
    statistics, which are those of new data.

    Sizes may differ, as positions are computed. A class keeps the embedding of the class of its
    name there (where one of the two has no names, of its number, if there are as many), and any
    other begins as no class does; so does a model without classes. A model of a single stage
    (N = 0), as ``msf import`` makes, may also begin the base of one that has residuals, which begin
    anew. Raise ValueError (one line) where the rest of the configurations differs.
    """
    directory = Path(directory)
    source = MSF.from_pretrained(directory)
    for name in KEPT:
        old, new = getattr(source.config, name), getattr(config, name)
        if not source.config.levels and config.levels:
            if name == "upsample":  # there was nothing to upsample
                continue
            new = new[:1] if name == "stages" else new
        if old != new:
            raise ValueError(
                f"{directory}: has other {name} than the model to train, {old} and not {new}; "
                "these must be the same"
            )
    classes = source.config.num_classes
    known = class_names_of(directory, read_run(directory), classes)
    rows = _rows(known, classes, class_names, config.num_classes)
    model = MSF(config)
    for old_stage, new_stage in zip(source.stages, model.stages):
        _copy(cast(StageTransformer, old_stage), cast(StageTransformer, new_stage), rows, source)
    return model


def _rows(known: Sequence[str], classes: int, names: Sequence[str], wanted: int) -> list[int]:
    """Return for each of the classes ``wanted`` which of ``classes`` it was, ``classes`` itself for
    none of them."""
    if known and names and wanted:
        numbers = {name: number for number, name in enumerate(known)}
        return [numbers.get(name, classes) for name in names]
    return list(range(classes)) if classes == wanted else [classes] * wanted


def _copy(old: StageTransformer, new: StageTransformer, rows: list[int], source: MSF) -> None:
    """Copy the weights of ``old``, a stage of ``source``, and of its classes the ``rows``."""
    name = "label_embedding.weight"
    state = {key: x for key, x in old.state_dict().items() if key != name}
    table = _labels(old.label_embedding, old.stage.width, source)
    if new.label_embedding is not None:
        state[name] = table[[*rows, -1]]
    else:  # what it adds for no class, and always
        state["time_embedding.2.bias"] = state["time_embedding.2.bias"] + table[-1]
    new.load_state_dict(state)


def _labels(embedding: nn.Embedding | None, width: int, source: MSF) -> Tensor:
    """Return what the classes of ``source`` add to the condition, and in the last row what no class
    adds: the mean of them all where it was never trained."""
    if embedding is None:
        return torch.zeros(1, width)
    table = embedding.weight
    if source.config.label_dropout:
        return table
    return torch.cat([table[:-1], table[:-1].mean(0, keepdim=True)])
