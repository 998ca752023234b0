"""A search for uniform registers that a Hopper kernel reads before any instruction writes them.

The descriptors of wgmma's operands lie in uniform registers. ptxas 12.8 computes some of them from
a register that nothing writes, so that the product reads whatever lies there. Of 200 shapes of
attention's forward that Triton 3.6 compiled for sm_90, 23 had one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+)?\s*([\w.]+)\s*(.*?)\s*;")
REGISTER = re.compile(r"\bUR(\d+)(\.64)?")
PREDICATE = re.compile(r"!?U?P[0-7TR]")
COMMA = re.compile(r",\s*(?![^\[]*\])")  # not one inside brackets


@dataclass(frozen=True)
class Instruction:
    text: str
    guarded: bool  # by a predicate
    opcode: str
    operands: tuple[str, ...]

    @property
    def target(self) -> int | None:
        """Return which operand is the uniform register written; predicates may precede it."""
        for position, operand in enumerate(self.operands[:3]):
            if re.fullmatch(r"UR\d+", operand):
                return position
            if not PREDICATE.fullmatch(operand):
                break
        return None

    @property
    def written(self) -> int:
        """Return the uniform registers that it writes, one bit each."""
        if self.target is None:
            return 0
        pair = any(part in self.opcode.split(".") for part in ("64", "WIDE"))
        return _bits(int(self.operands[self.target][2:]), 2 if pair else 1)

    @property
    def read(self) -> int:
        """Return the uniform registers that it reads, one bit each."""
        wide, found = self.opcode == "UIADD3.64", 0
        for position, operand in enumerate(self.operands):
            if position == self.target or operand.startswith("gdesc"):
                continue
            for number, pair in REGISTER.findall(operand):
                wide_too = pair or wide or operand.startswith("desc[")
                found |= _bits(int(number), 2 if wide_too else 1)
        return found | self._descriptors()

    def _descriptors(self) -> int:
        """Return the registers of gdesc[URn]: four, or the last two where A is in others."""
        for operand in self.operands:
            if found := re.match(r"gdesc\[UR(\d+)\]", operand):
                in_registers = not self.operands[1].startswith("gdesc")
                first = int(found[1]) + (2 if in_registers else 0)
                return _bits(first, 2 if in_registers else 4)
        return 0


def uninitialised_reads(sass: str) -> list[str]:
    """Return the instructions that read a uniform register written on no way to them."""
    instructions, successors = _parse(sass)
    if not instructions:
        return []
    written_before: list[int | None] = [0] + [None] * (len(instructions) - 1)
    waiting = [0]
    while waiting:
        at = waiting.pop()
        after = (written_before[at] or 0) | instructions[at].written
        for to in successors[at]:
            before = written_before[to]
            if before is None or after | before != before:
                written_before[to] = after | (before or 0)
                waiting.append(to)
    return [
        instruction.text
        for instruction, written in zip(instructions, written_before)
        if written is not None and instruction.read & ~written
    ]


def _parse(sass: str) -> tuple[list[Instruction], list[list[int]]]:
    """Return the instructions, and the positions of those that may follow each."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            guard, opcode, operands = found.groups()
            text = " ".join(filter(None, (guard, opcode, operands)))
            parts = tuple(COMMA.split(operands)) if operands else ()
            instructions.append(Instruction(text, bool(guard), opcode, parts))
    successors = [
        [to for to in _successors(at, instruction, labels) if to < len(instructions)]
        for at, instruction in enumerate(instructions)
    ]
    return instructions, successors


def _successors(at: int, instruction: Instruction, labels: dict[str, int]) -> Iterator[int]:
    kind = instruction.opcode.split(".")[0]
    if kind in ("BRA", "CALL"):
        yield from (labels[name] for name in re.findall(r"\.L\w+", instruction.text))
    always = kind in ("EXIT", "RET") or (kind == "BRA" and len(instruction.operands) == 1)
    if not always or instruction.guarded:
        yield at + 1


def _bits(first: int, count: int) -> int:
    return ((1 << count) - 1) << first
