"""How programs of Triton's attention share the tokens and channels of a head.

The sides of Triton's tiles are powers of two, so the d channels of a head are cut into pieces:
72 = 64 + 8, the 8 padded to 16, the fewest that a tensor core multiplies.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from ..triton_support.launch import power_of_2


@dataclass(frozen=True)
class Tile:
    """A tile says which tokens a program has and through which it goes; kernels know it all."""

    unit: int  # elements, in which the strides of Heads are counted
    dim: int
    pieces: tuple[tuple[int, int], ...]  # (first, width) of channels
    block: int  # a program's own tokens
    step: int  # tokens of a step
    steps: int
    rest: int  # tokens after the steps, padded to a power of two; 0 for none
    masked: bool  # whether all these reach beyond the last token
    warps: int
    stages: int

    @classmethod
    @functools.cache
    def of(
        cls, tokens: int, dim: int, unit: int, element_size: int, backward: bool, wgmma: bool
    ) -> Tile:
        """Make tiles as large as the audit finds no spills at.

        With wgmma, operands stay in shared memory; else those of a step are copied to registers.
        Products of float32 are none for tensor cores.
        """
        stages = 3 if wgmma and dim <= 96 and not backward else 2
        if not backward:
            block, step = 128, 64 if wgmma else 32
        elif wgmma:
            block, step = 128 if dim <= 96 else 64, 64 if dim <= 80 else 32
        else:
            block, step = 64 if dim <= 72 else 32, 16
        if element_size > 2:
            block = step = 128 // element_size
        block = min(block, max(16, power_of_2(tokens)))
        step = min(step, max(16, power_of_2(tokens + 1) // 2))
        steps, rest = divmod(tokens, step)
        rest = max(16, power_of_2(rest)) if rest else 0
        if rest == step:
            steps, rest = steps + 1, 0
        masked = steps * step + rest > tokens
        warps = 8 if block == 128 or (backward and block == 64) else 4
        cut = pieces(dim)
        return cls(unit, dim, cut, block, step, steps, rest, masked, warps, stages)

    @classmethod
    def of_head(cls, tokens: int, dim: int, unit: int) -> Tile:
        """Make the tile of a program that has all tokens of a head, whose pieces are of halves."""
        block = max(16, power_of_2(tokens))
        return cls(unit, dim, pieces((dim + 1) // 2), block, 0, 0, 0, block > tokens, 8, 1)


def pieces(channels: int) -> tuple[tuple[int, int], ...]:
    """Return (first, width) of powers of two from 16 on that cover the channels with least waste.

    There are at most two, the second narrower than the first.
    """
    main = max(16, power_of_2(channels + 1) // 2)
    rest = max(16, power_of_2(channels - main)) if channels > main else 0
    if rest == main:
        return ((0, 2 * main),)
    return ((0, main), (main, rest)) if rest else ((0, main),)
