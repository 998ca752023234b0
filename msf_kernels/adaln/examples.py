"""Example calls of adaLN and the gated residual, on views of one modulation as a block has them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from ..dtypes import compute_dtype
from ..examples import Example, New, Shape
from .op import adaln_modulate, gate_residual, gate_residual_adaln

# The widths of DiT-S, B, L and XL, and 1536, at the 256 tokens of 256 pixels.
AUDITED = tuple((64, 256, width) for width in (384, 768, 1024, 1152, 1536))
VARIANTS_AUDITED = ((64, 256, 384), (64, 256, 1152))  # they need less than those with a bias

# Tokens, modulations, and which of these a variant broadcasts.
OPERATORS: tuple[tuple[Callable[..., Any], str, str, str], ...] = (
    (adaln_modulate, "x", "shift scale", "shift scale"),
    (gate_residual, "x y", "gate", "gate"),
    (gate_residual_adaln, "x y", "gate shift scale", "gate scale"),
)


def inputs(
    new: New, shape: Shape, tokens: str, modulations: str, broadcast: str = "", bias: bool = False
) -> dict[str, Tensor]:
    """Make tokens (B, N, D) of these names, and modulations (B, D), or (1, D) to broadcast.

    A bias (D,) of y is of the dtype that parameters have under autocast.
    """
    batch, _, channels = shape
    own = iter(new(batch, 6 * channels).chunk(6, 1))
    common = iter(new(1, 6 * channels).chunk(6, 1) if broadcast else ())
    made = {name: new(*shape) for name in tokens.split()}
    parts = modulations.split()
    made |= {name: next(common if name in broadcast.split() else own) for name in parts}
    if bias:
        made["y_bias"] = new(channels, dtype=compute_dtype(new(1)))
    return made


def examples() -> Iterator[Example]:
    for function, *names, broadcast in OPERATORS:
        drawn = partial(inputs, tokens=names[0], modulations=names[1])
        gradients = len(" ".join(names).split())
        gated = "gate" in names[1]
        example = Example(
            op=function.__name__,
            function=function,
            inputs=drawn,
            shape=(2, 3, 5),
            gradients=gradients,
            audited=VARIANTS_AUDITED if gated else AUDITED,
            audited_forward=VARIANTS_AUDITED if "scale" in names[1] else (),
        )
        yield example
        as_eager = partial(function, rounding="eager")
        yield replace(
            example, variant="eager rounding", function=as_eager, audited=VARIANTS_AUDITED
        )
        if "scale" in names[1]:
            as_rms = partial(function, norm="rms")
            yield replace(example, variant="rms norm", function=as_rms, audited=VARIANTS_AUDITED)
        common = partial(drawn, broadcast=broadcast)
        yield replace(example, variant="broadcast", inputs=common, audited=(), audited_forward=())
        if gated:
            biased = partial(drawn, bias=True)
            yield replace(
                example, variant="bias", inputs=biased, gradients=gradients + 1, audited=AUDITED
            )


EXAMPLES = tuple(examples())
