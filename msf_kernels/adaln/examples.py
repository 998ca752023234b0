"""Example calls of adaLN and the gated residual, on views of one modulation as a block has them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from torch import Tensor

from ..examples import Example, New, Shape
from .op import adaln_modulate, gate_residual, gate_residual_adaln

# The widths of DiT-S, B, L and XL, and 1536, at the 256 tokens of 256 pixels.
AUDITED = tuple((64, 256, width) for width in (384, 768, 1024, 1152, 1536))


def inputs(
    new: New, shape: Shape, tokens: str, modulations: str, broadcast: str = ""
) -> dict[str, Tensor]:
    """Make tokens (B, N, D) of these names, and modulations (B, D), or (1, D) to broadcast."""
    batch, _, channels = shape
    own = iter(new(batch, 6 * channels).chunk(6, 1))
    common = iter(new(1, 6 * channels).chunk(6, 1) if broadcast else ())
    made = {name: new(*shape) for name in tokens.split()}
    parts = modulations.split()
    return made | {name: next(common if name in broadcast.split() else own) for name in parts}


def examples() -> Iterator[Example]:
    for function, *names, broadcast in (
        (adaln_modulate, "x", "shift scale", "shift scale"),
        (gate_residual, "x y", "gate", "gate"),
        (gate_residual_adaln, "x y", "gate shift scale", "gate scale"),
    ):
        drawn = partial(inputs, tokens=names[0], modulations=names[1])
        example = Example(
            op=function.__name__,
            function=function,
            inputs=drawn,
            shape=(2, 3, 5),
            gradients=len(" ".join(names).split()),
            audited=AUDITED,
        )
        yield example
        as_eager = partial(function, rounding="eager")
        yield replace(example, variant="eager rounding", function=as_eager)
        common = partial(drawn, broadcast=broadcast)
        yield replace(example, variant="broadcast", inputs=common, audited=())


EXAMPLES = tuple(examples())
