"""Example calls of attention, with and without bias, QK-norm and RoPE."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import product

from ..examples import Example, Shape
from ..qk_norm_rope.examples import PREPARATIONS, inputs, options, with_norm
from .op import attention


def shapes(tokens: tuple[int, ...], dims: tuple[int, ...], heads: int = 4) -> tuple[Shape, ...]:
    return tuple((2, n, heads, d) for n, d in product(tokens, dims))


# Whole heads, whole steps, some tokens left over, a mask; heads of other widths and with a bias at
# few of them, as a backward compiles for up to 10 s.
AUDITED = (
    *shapes((63, 64, 80, 271, 272, 1024), (64, 72)),
    *shapes((63, 100, 272), (80, 128)),
    # Triton compiles other code for one head, and for strides that are no multiple of 16: 216
    # elements from token to token of one head of 72, and 108 of 36, which leave 8 bytes to read at
    # once.
    *((2, n, 1, d) for n, d in ((80, 72), (80, 96), (272, 72), (300, 64), (64, 36), (272, 36))),
)
AUDITED_OF = {"norm-rope": AUDITED, "bias-norm-rope": shapes((63,), (64, 72, 128))}
# Without a gradient, which compiles other code too.
AUDITED_FORWARD = shapes((64, 80, 272), (48, 72, 96))


def examples() -> Iterator[Example]:
    for variant, (parameters, rope) in {"": ("", False), **PREPARATIONS}.items():
        yield Example(
            op="attention",
            function=with_norm(attention, variant),
            inputs=partial(inputs, parameters=parameters, rope=rope),
            shape=(2, 6, 2, 32),  # the least that CUDA takes
            options=options,
            gradients=1 + len(parameters.split()),
            variant=variant,
            audited=AUDITED_OF.get(variant, ()),
            audited_forward=AUDITED_FORWARD if variant == "norm-rope" else (),
        )


EXAMPLES = tuple(examples())
