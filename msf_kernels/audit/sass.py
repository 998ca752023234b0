"""The machine code of a kernel, as cuobjdump prints it, and nvdisasm without a cubin's labels."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([\w.]+)\s*(.*?)\s*;")
ADDRESS = re.compile(r"\b0x[0-9a-f]+\b")
COMMA = re.compile(r",\s*(?![^\[]*\])")  # not one inside brackets


@dataclass(frozen=True)
class Instruction:
    text: str
    guarded: bool  # by a predicate
    opcode: str
    operands: tuple[str, ...]

    @property
    def kind(self) -> str:
        """Return the opcode without its modifiers."""
        return self.opcode.partition(".")[0]


def parse(sass: str) -> tuple[list[Instruction], list[list[int]]]:
    """Return the instructions, and the positions of those that may follow each."""
    instructions: list[Instruction] = []
    positions: dict[str, int] = {}  # by address
    for line in sass.splitlines():
        if found := INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            positions[hex(int(address, 16))] = len(instructions)
            text = " ".join(filter(None, (guard, opcode, operands)))
            parts = tuple(COMMA.split(operands)) if operands else ()
            instructions.append(Instruction(text, bool(guard), opcode, parts))
    successors = [
        [to for to in _successors(at, instruction, positions) if to < len(instructions)]
        for at, instruction in enumerate(instructions)
    ]
    return instructions, successors


def _successors(at: int, instruction: Instruction, positions: dict[str, int]) -> Iterator[int]:
    if instruction.kind in ("BRA", "CALL"):
        yield from (positions[to] for to in ADDRESS.findall(instruction.text) if to in positions)
    always = instruction.kind in ("EXIT", "RET") or (
        instruction.kind == "BRA" and len(instruction.operands) == 1
    )
    if not always or instruction.guarded:
        yield at + 1
