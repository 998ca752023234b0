"""Compares what Triton asked of the assembler, PTX, with what ptxas made of it, SASS.

ptxas 12.8 and 12.9 take `selp.b32 d, acc, 0, p` for zero, whatever p is, where `acc` is an
accumulator of wgmma that started at zero. The products before it then vanish, or stay as null
instructions whose operands are all RZ. Triton 3.6 bundles 12.8: on an H200 a gradient was zero.
"""

from __future__ import annotations

import re

from .uniform import unwritten

# Instructions of PTX, and those of SASS that stand for them. ptxas may repeat them, as it unrolls
# loops, and has no reason to drop one.
KEPT = {"wgmma.mma_async": "HGMMA.", "mma.sync": "HMMA.", "ex2.approx": "MUFU.EX2"}
NULL = re.compile(r"HGMMA\.\S+ RZ, gdesc\[URZ\], RZ")
PRODUCT = re.compile(r"\b(?:wgmma\.mma_async|mma\.sync)\S*\s*\{([^}]*)\}")  # its accumulators
MOVE = re.compile(r"\bmov\.\w+\s+(%\w+), (%\w+);")
SELECT = re.compile(r"\bselp\.\w+\s+%\w+, (\S+), (\S+), %\w+;")
ZERO = re.compile(r"0(?:f0{8})?")


def fault(ptx: str, sass: str) -> str | None:
    """What is wrong with a kernel's products and exponentials in one line; None if nothing is."""
    if count := selects_against_zero(ptx):
        return (
            f"selects {count} times between the accumulator of a product and zero, "
            "which ptxas 12.8 folds to zero: mask an operand of the product instead"
        )
    if count := len(NULL.findall(sass)):
        return f"has {count} null HGMMA: ptxas took the result of a product for zero"
    for asked, made in KEPT.items():
        wanted, found = ptx.count(asked), sass.count(made)
        if found < wanted:
            return f"has {found} {made.rstrip('.')} in its SASS for {wanted} {asked} in its PTX"
    if "HGMMA." in sass and (lost := unwritten(sass)):
        return f"reads uniform registers that nothing has written: {lost[0]}"
    return None


def selects_against_zero(ptx: str) -> int:
    """How many selects have zero and the accumulator of a product as operands."""
    lists = (operands.split(",") for operands in PRODUCT.findall(ptx))
    accumulators = _moved(ptx, {name.strip() for names in lists for name in names})
    return sum(
        (a in accumulators and bool(ZERO.fullmatch(b)))
        or (b in accumulators and bool(ZERO.fullmatch(a)))
        for a, b in SELECT.findall(ptx)
    )


def _moved(ptx: str, registers: set[str]) -> set[str]:
    """These registers, and all that their values are moved to."""
    targets: dict[str, list[str]] = {}
    for target, source in MOVE.findall(ptx):
        targets.setdefault(source, []).append(target)
    reached, waiting = set(registers), list(registers)
    while waiting:
        found = set(targets.get(waiting.pop(), ())) - reached
        reached |= found
        waiting += found
    return reached
