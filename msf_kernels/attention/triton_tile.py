"""How programs of Triton's attention share the tokens of a head, and in which pieces they hold it.

A program owns a tile of a head's tokens and goes through the others in chunks: 272 = 4 * 64 + 16,
the last padded to a multiple of 16. Of so few keys it keeps all scores in registers, so that there
is one maximum; compiled for sm_90, which has room for those of 272 keys, that is a fifth fewer
instructions than online softmax, which takes over above. A tile has 128 queries: with 64 as many
keys would be normed and turned for half the scores, a third more instructions at N = 256, d = 64.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

from ..triton_support.launch import power_of_2


@dataclass(frozen=True)
class Tile:
    """A tile says which tokens a program has, through which it goes, and the pieces of a head."""

    alone: bool  # whether a program of the backward has all tokens of a head, and no steps
    block_m: int  # a program's own tokens
    block_n: int  # tokens of a step
    steps: int
    rest: tuple[tuple[int, int], ...]  # (first, width) of chunks of tokens after all steps
    masked: bool  # whether the last of these chunks reaches beyond the last token
    warps: int
    stages: int
    head_dim: int
    pieces: tuple[tuple[int, int, bool], ...]  # (first, width, joined), see triton_heads.py

    @classmethod
    @functools.cache
    def of(cls, tokens: int, dim: int, element_size: int, backward: bool, wgmma: bool) -> Tile:
        """Make tiles as large as the audit finds no spills at.

        With wgmma, operands stay in shared memory. Else those of a step are copied to registers,
        and joined halves without ldmatrix. Products of float32 are none for tensor cores.
        """
        alone = backward and wgmma and element_size == 2 and fits_alone(tokens, dim)
        block_m, block_n, stages = 128, 64, 2
        if backward:
            block_m = 128 if wgmma and (alone or dim <= 72) else 64
            block_n, stages = (32, 3) if wgmma else (16, 1)
        elif dim > 96 or (tokens <= 64 and not wgmma):
            block_n = 32
        if element_size > 2:
            block_m = block_n = 128 // element_size
        block_m = min(block_m, max(16, power_of_2(tokens)))
        block_n = min(block_n, max(16, power_of_2(tokens + 1) // 2))
        once = max_keys_at_once(dim, wgmma) if not backward and element_size == 2 else 0
        steps = tokens // block_n if tokens > once else 0
        rest, masked = chunks(tokens - steps * block_n, block_n), tokens % 16 > 0
        # Alone, joined halves of more than 64 channels and their tail spill some 200 bytes.
        joined = (wgmma and not (alone and dim > 64)) or element_size > 2
        cut = pieces(dim, 64 if element_size == 2 else 16, joined)
        max_dim = 64 if wgmma or masked else 72  # channels that four warps and 64 rows do not spill
        tight = backward and not alone and element_size == 2 and dim > max_dim
        warps = 8 if block_m == 128 or (block_m == 64 and tight) else 4
        return cls(alone, block_m, block_n, steps, rest, masked, warps, stages, dim, cut)

    def arguments(self) -> dict[str, Any]:
        """Return the compile-time arguments of a kernel with these tiles."""
        arguments = {"HEAD_DIM": self.head_dim, "PIECES": self.pieces, "BLOCK_M": self.block_m}
        if self.alone:
            return arguments
        return {
            **arguments,
            "BLOCK_N": self.block_n,
            "STEPS": self.steps,
            "REST": self.rest,
            "MASKED": self.masked,
        }


def max_keys_at_once(dim: int, wgmma: bool) -> int:
    """Return how many keys' scores a program of the forward can have in its registers at once."""
    return (272 if wgmma else 192) - (64 if dim > 80 else 0)


def fits_alone(tokens: int, dim: int) -> bool:
    """Tell whether a program of the backward can have all gradients of a head in its registers.

    With more than 64 channels and a mask beyond the last token it would spill some 30 bytes.
    """
    if dim <= 64:
        return tokens <= 128
    return dim <= 80 and tokens <= 64 and tokens % 16 == 0


def chunks(tokens: int, widest: int) -> tuple[tuple[int, int], ...]:
    """Return (first, width) of chunks, powers of two, that cover the tokens rounded up to 16."""
    cut, first = [], 0
    while first < tokens:
        width = min(widest, power_of_2((tokens - first + 15) // 16 * 16 + 1) // 2)
        cut.append((first, width))
        first += width
    return tuple(cut)


def pieces(dim: int, widest: int, joined: bool) -> tuple[tuple[int, int, bool], ...]:
    """Return (first, width, joined) of powers of two that cover half a head with least waste.

    Halves narrower than a tensor core's 16 are joined in any case.
    """
    half = (dim + 1) // 2
    main = min(widest, max(8, power_of_2(half + 1) // 2))
    count = max(1, half // main)
    rest = max(0, half - count * main)
    tail = max(8, power_of_2(rest)) if rest else 0
    if tail == main < widest:
        return ((0, 2 * main, joined),)
    cut = [(i * main, main, joined or main < 16) for i in range(count)]
    return (*cut, (count * main, tail, joined or tail < 16)) if tail else tuple(cut)
