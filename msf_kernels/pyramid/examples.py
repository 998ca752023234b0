"""Example calls of pyramid_split and pyramid_merge, with and without the statistics of a scale."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from ..examples import Example, New, Shape
from .op import pyramid_merge, pyramid_split

# Of bilinear kernels a thread owns pixels side by side, but where these do not fill a row: 62.
AUDITED = {"nearest": ((256, 16, 64, 64),), "bilinear": ((256, 16, 64, 64), (256, 16, 64, 62))}


def statistics(new: New, channels: int) -> dict[str, Tensor]:
    """Make a mean and a standard deviation (C,) of 0.5 or more, float32 as a model keeps them."""
    mean, std = new(channels, dtype=torch.float32), new(channels, dtype=torch.float32)
    return {"mean": mean, "std": 0.5 + std.abs()}


def split_inputs(new: New, shape: Shape, standardised: bool) -> dict[str, Tensor]:
    made = {"x": new(*shape)}
    return made | statistics(new, shape[1]) if standardised else made


def merge_inputs(new: New, shape: Shape, standardised: bool) -> dict[str, Tensor]:
    batch, channels, height, width = shape
    made = {"base": new(batch, channels, height // 2, width // 2), "residual": new(*shape)}
    return made | statistics(new, channels) if standardised else made


def merge_with_mean(new: New, shape: Shape) -> dict[str, Tensor]:
    made = merge_inputs(new, shape, standardised=True)
    return {name: tensor for name, tensor in made.items() if name != "std"}


def split_base(**arguments: Any) -> Tensor:
    """Split, and use the base alone, so that no gradient comes from the residual."""
    return pyramid_split(**arguments)[0]


def examples() -> Iterator[Example]:
    for mode, standardised in product(("nearest", "bilinear"), (True, False)):
        variant = mode if standardised else f"{mode} without statistics"
        for op, function, inputs, gradients in (
            ("pyramid_split", pyramid_split, split_inputs, 1),
            ("pyramid_split", split_base, split_inputs, 1),
            ("pyramid_merge", pyramid_merge, merge_inputs, 2),
        ):
            if function is split_base and standardised:
                continue
            yield Example(
                op=op,
                function=function,
                inputs=partial(inputs, standardised=standardised),
                shape=(2, 3, 4, 6),
                options=partial(_options, mode),
                gradients=gradients,
                variant=f"{mode} of the base" if function is split_base else variant,
                audited=AUDITED[mode],
            )
    yield Example(
        op="pyramid_merge",
        function=pyramid_merge,
        inputs=merge_with_mean,
        shape=(2, 3, 4, 6),
        gradients=2,
        variant="nearest with mean",
    )


def _options(mode: str, _: Shape) -> dict[str, Any]:
    return {"mode": mode}


EXAMPLES = tuple(examples())
