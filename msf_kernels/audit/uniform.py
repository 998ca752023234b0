"""A search for uniform registers that a Hopper kernel reads before any instruction writes them.

The descriptors of wgmma's operands lie in uniform registers. ptxas 12.8 computes some of them from
a register that nothing writes, so that the product reads whatever lies there. Of 200 shapes of
attention's forward that Triton 3.6 compiled for sm_90, 23 had one.
"""

from __future__ import annotations

import re

from .sass import Instruction, parse

REGISTER = re.compile(r"\bUR(\d+)(\.64)?")
PREDICATE = re.compile(r"!?U?P[0-7TR]")


def uninitialised_reads(sass: str) -> list[str]:
    """Return the instructions that read a uniform register written on no way to them."""
    instructions, successors = parse(sass)
    if not instructions:
        return []
    written_before: list[int | None] = [0] + [None] * (len(instructions) - 1)
    waiting = [0]
    while waiting:
        at = waiting.pop()
        after = (written_before[at] or 0) | _written(instructions[at])
        for to in successors[at]:
            before = written_before[to]
            if before is None or after | before != before:
                written_before[to] = after | (before or 0)
                waiting.append(to)
    return [
        instruction.text
        for instruction, written in zip(instructions, written_before)
        if written is not None and _read(instruction) & ~written
    ]


def _target(instruction: Instruction) -> int | None:
    """Return which operand is the uniform register written; predicates may precede it."""
    for position, operand in enumerate(instruction.operands[:3]):
        if re.fullmatch(r"UR\d+", operand):
            return position
        if not PREDICATE.fullmatch(operand):
            break
    return None


def _written(instruction: Instruction) -> int:
    """Return the uniform registers that it writes, one bit each."""
    target = _target(instruction)
    if target is None:
        return 0
    pair = any(part in instruction.opcode.split(".") for part in ("64", "WIDE"))
    return _bits(int(instruction.operands[target][2:]), 2 if pair else 1)


def _read(instruction: Instruction) -> int:
    """Return the uniform registers that it reads, one bit each."""
    target, wide, found = _target(instruction), instruction.opcode == "UIADD3.64", 0
    for position, operand in enumerate(instruction.operands):
        if position == target or operand.startswith("gdesc"):
            continue
        for number, pair in REGISTER.findall(operand):
            wide_too = pair or wide or operand.startswith("desc[")
            found |= _bits(int(number), 2 if wide_too else 1)
    return found | _descriptors(instruction)


def _descriptors(instruction: Instruction) -> int:
    """Return the registers of gdesc[URn]: four, or the last two where A is in others."""
    for operand in instruction.operands:
        if found := re.match(r"gdesc\[UR(\d+)\]", operand):
            in_registers = not instruction.operands[1].startswith("gdesc")
            first = int(found[1]) + (2 if in_registers else 0)
            return _bits(first, 2 if in_registers else 4)
    return 0


def _bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first
