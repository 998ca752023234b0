"""A comparison of what Triton asked the assembler for, PTX, with what ptxas made of it, SASS.

ptxas 12.8 and 12.9 take `selp.b32 d, acc, 0, p` for zero, whatever p is, where `acc` is an
accumulator of wgmma that started at zero. The products before it then vanish, or stay as null
instructions whose operands are all RZ. Triton 3.6 bundles 12.8: on an H200 a gradient was zero.
"""

from __future__ import annotations

import re

from .uniform import uninitialised_reads

# Instructions of PTX, and those of SASS that stand for them. ptxas may repeat them, as it unrolls
# loops, and has no reason to drop one.
KEPT = {"wgmma.mma_async": "HGMMA.", "mma.sync": "HMMA.", "ex2.approx": "MUFU.EX2"}
NULL = re.compile(r"HGMMA\.\S+ RZ, gdesc\[URZ\], RZ")
PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync)\S*\s*\{([^}]*)\}")  # its accumulators
MOVE = re.compile(r"\bmov\.\w+\s+(\{[^}]*\}|%\w+), (\{[^}]*\}|\S+);")  # braces pack registers
SELECT = re.compile(r"\bselp\.\w+\s+%\w+, (\S+), (\S+), %\w+;")
NAMES = re.compile(r"%\w+")
ZEROS = {"0", "0f00000000"}


def fault(ptx: str, sass: str) -> str | None:
    """Return one line on what is wrong with products and exponentials; None if nothing is."""
    if count := selects_against_zero(ptx):
        return (
            f"selects {count} times between the accumulator of a product and zero, "
            "which ptxas 12.8 and 12.9 fold to zero: multiply by 0 or 1 instead"
        )
    if count := len(NULL.findall(sass)):
        return f"has {count} null HGMMA: ptxas took the result of a product for zero"
    for asked, made in KEPT.items():
        wanted, found = ptx.count(asked), sass.count(made)
        if found < wanted:
            return f"has {found} {made.rstrip('.')} in its SASS for {wanted} {asked} in its PTX"
    if "HGMMA." in sass and (lost := uninitialised_reads(sass)):
        return f"reads uniform registers that nothing has written: {lost[0]}"
    return None


def selects_against_zero(ptx: str) -> int:
    """Return how many selects have zero and the accumulator of a product as operands."""
    accumulators = _copies(
        ptx, {name for names in PRODUCT.findall(ptx) for name in NAMES.findall(names)}
    )
    zeros = _copies(ptx, ZEROS)
    return sum(
        (a in accumulators and b in zeros) or (b in accumulators and a in zeros)
        for a, b in SELECT.findall(ptx)
    )


def _copies(ptx: str, operands: set[str]) -> set[str]:
    """Return these operands, and all registers that their values are moved to."""
    targets: dict[str, list[str]] = {}
    for target, source in MOVE.findall(ptx):
        for name in NAMES.findall(source) or [source]:
            targets.setdefault(name, []).extend(NAMES.findall(target))
    reached, waiting = set(operands), list(operands)
    while waiting:
        found = set(targets.get(waiting.pop(), ())) - reached
        reached |= found
        waiting += found
    return reached
