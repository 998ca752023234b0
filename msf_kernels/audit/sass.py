"""The machine code of a kernel, as nvdisasm or cuobjdump prints it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

LABEL = re.compile(r"(\.L\w+):")
INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([\w.]+)\s*(.*?)\s*;")
TARGET = re.compile(r"\.L\w+|\b0x[0-9a-f]+\b")  # nvdisasm names a label, cuobjdump an address
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
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.match(line):
            address, guard, opcode, operands = found.groups()
            labels[hex(int(address, 16))] = len(instructions)
            text = " ".join(filter(None, (guard, opcode, operands)))
            parts = tuple(COMMA.split(operands)) if operands else ()
            instructions.append(Instruction(text, bool(guard), opcode, parts))
    successors = [
        [to for to in _successors(at, instruction, labels) if to < len(instructions)]
        for at, instruction in enumerate(instructions)
    ]
    return instructions, successors


def _successors(at: int, instruction: Instruction, labels: dict[str, int]) -> Iterator[int]:
    if instruction.kind in ("BRA", "CALL"):
        yield from (labels[name] for name in TARGET.findall(instruction.text) if name in labels)
    always = instruction.kind in ("EXIT", "RET") or (
        instruction.kind == "BRA" and len(instruction.operands) == 1
    )
    if not always or instruction.guarded:
        yield at + 1
