"""All Triton kernels load, widen, compute, and round once at the store."""

from __future__ import annotations

import triton
import triton.language as tl

from . import interpreted

# The interpreter's own conversions of bfloat16 truncate, and are wrong for subnormal numbers.
INTERPRETED = tl.constexpr(interpreted())


@triton.jit
def widen(x):
    """Return x in its compute dtype."""
    if x.dtype == tl.float64:
        return x
    elif INTERPRETED and x.dtype == tl.bfloat16:
        return (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        return x.to(tl.float32)


@triton.jit
def narrow(x, DTYPE: tl.constexpr):
    """Return x rounded to DTYPE, to nearest even."""
    if x.dtype == DTYPE:
        return x
    elif INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        return (rounded >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return x.to(DTYPE)


@triton.jit
def clamp(x, low, high):
    """Return x limited to [low, high] by comparisons, because tl.clamp drops NaN."""
    low, high = tl.full((), low, x.dtype), tl.full((), high, x.dtype)
    return tl.where(x < low, low, tl.where(x > high, high, x))


@triton.jit
def divide(x, y):
    """Return x / y correctly rounded, which Triton's own division of float32 is not."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)
