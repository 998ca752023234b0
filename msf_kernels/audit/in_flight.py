"""The bytes of global loads that a thread has in flight at the same time, read from its SASS.

By Little's law memory gives no more than what is in flight, divided by its latency. A load is in
flight until an instruction names one of its registers; a copy to shared memory (cp.async, LDGSTS)
until a wait for its group (DEPBAR). A kernel that streams through a loop has in flight what an
iteration of it loads ahead. So loads outside of loops do not count where a loop has some, nor do
those in a loop whose addresses it never changes: after the first time L1 has them.

If all loads counted, in all blocks that fit, the CUDA adaln_modulate of commit 9fd1612 would have
had 30 KB on a multiprocessor, though it ran at 38 % of a copy's rate on an H200: but these were
modulations, while it waited for each 16 bytes of a token, and its grid had 4.4 blocks for a
multiprocessor, not 6. So it had 11 KB, and Triton's gate_residual_adaln, which ran at 80 %, 45.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable

from .sass import Instruction, parse

REGISTER = re.compile(r"\b(U?R)(\d+)\b(\.64)?")
PREDICATE = re.compile(r"!?U?P[0-7TR]")
SIZES = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}  # else 4 bytes
MAX_GROUPS = 8  # of cp.async in a loop that never waits for one

# The loads in flight, as bits: those to registers, those to shared memory of no group yet, and the
# groups, the newest first.
State = tuple[int, ...]


def bytes_in_flight(sass: str) -> int:
    """Return the most bytes that a thread has in flight anywhere in its code."""
    code, successors = parse(sass)
    loads = _streaming_loads(code, successors)
    bits = {at: 1 << number for number, at in enumerate(loads)}
    ends = _ends(code, bits)
    before: dict[int, State] = {0: (0, 0)} if loads else {}
    waiting = list(before)
    while waiting:
        at = waiting.pop()
        after = _after(before[at], code[at], bits.get(at, 0), ends[at])
        for to in successors[at]:
            merged = _merged(before[to], after) if to in before else after
            if before.get(to) != merged:
                before[to] = merged
                waiting.append(to)
    states = {_after(before[at], code[at], bits[at], ends[at]) for at in loads if at in before}
    return max((_size(state, [code[at] for at in loads]) for state in states), default=0)


def _ends(code: list[Instruction], bits: dict[int, int]) -> list[int]:
    """Return for each instruction the loads, as bits, that must be over before it."""
    of_register: dict[str, int] = defaultdict(int)  # the loads that write it
    for at, bit in bits.items():
        for register in _written(code[at]):
            of_register[register] |= bit
    ends = [0] * len(code)
    for at, instruction in enumerate(code):
        for register in _named(instruction):
            ends[at] |= of_register.get(register, 0)
    return ends


def _after(state: State, instruction: Instruction, load: int, ends: int) -> State:
    """Return what is in flight after an instruction, which is the load of this bit or none."""
    to_registers, open_group, *groups = state
    to_registers &= ~ends
    if instruction.kind == "LDGSTS":
        open_group |= load
    elif instruction.kind == "LDGDEPBAR":
        open_group, groups = 0, [open_group, *groups][:MAX_GROUPS]
    elif instruction.kind == "DEPBAR":
        groups = groups[: int(instruction.operands[1], 16)]
    else:
        to_registers |= load
    return to_registers, open_group, *groups


def _merged(a: State, b: State) -> State:
    longest = max(len(a), len(b))
    padded = [(*state, *[0] * (longest - len(state))) for state in (a, b)]
    return tuple(x | y for x, y in zip(*padded))


def _size(state: State, loads: list[Instruction]) -> int:
    """Return the bytes in flight. A register counts once, which two ways through the code load."""
    to_registers, *to_shared = state
    of_register: dict[str, int] = defaultdict(int)
    for load in _chosen(loads, to_registers):
        registers = _written(load)
        for register in registers:
            size = _width(load) // len(registers)
            of_register[register] = max(of_register[register], size)
    groups = sum(_width(load) for group in to_shared for load in _chosen(loads, group))
    return sum(of_register.values()) + groups


def _chosen(loads: list[Instruction], bits: int) -> Iterable[Instruction]:
    return (load for number, load in enumerate(loads) if bits >> number & 1)


def _streaming_loads(code: list[Instruction], successors: list[list[int]]) -> list[int]:
    """Return the positions of the loads that count: see the docstring of the module."""
    loads = [at for at, instruction in enumerate(code) if instruction.kind in ("LDG", "LDGSTS")]
    reached = _reachable(successors)
    # Of instructions that may come after themselves, those that reach the same are one loop.
    changed: dict[int, set[str]] = defaultdict(set)  # the registers that a loop writes
    looped = [at for at in range(len(code)) if reached[at] >> at & 1]
    for at in looped:
        changed[reached[at]] |= _written(code[at])
    repeated = set(looped) & set(loads)
    streaming = [at for at in loads if at in repeated and _address(code[at]) & changed[reached[at]]]
    return streaming if repeated else loads


def _address(load: Instruction) -> set[str]:
    """Return the registers that a load has its address from, without the descriptor's."""
    address = [operand for operand in load.operands if "[" in operand][-1]
    return _registers([re.sub(r"desc\[[^\]]*\]", "", address)])


def _reachable(successors: list[list[int]]) -> list[int]:
    """Return the positions that may come after each, as bits."""
    reached = [0] * len(successors)
    changed = True
    while changed:
        changed = False
        for at in reversed(range(len(successors))):
            found = 0
            for to in successors[at]:
                found |= 1 << to | reached[to]
            changed |= found != reached[at]
            reached[at] = found
    return reached


def _width(instruction: Instruction) -> int:
    """Return the bytes that a load or store moves."""
    parts = instruction.opcode.split(".")
    return next((size for part, size in SIZES.items() if part in parts), 4)


def _named(instruction: Instruction) -> set[str]:
    """Return the registers that an instruction reads or writes, as far as its text tells."""
    named = _registers(instruction.operands)
    if instruction.kind in ("STG", "STS"):  # names the first of those that it stores
        named |= _following(instruction.operands[-1], _width(instruction) // 4)
    return named


def _written(instruction: Instruction) -> set[str]:
    """Return the registers that an instruction writes; predicates may precede them."""
    if "SETP" in instruction.opcode or instruction.kind == "FCHK":
        return set()  # writes predicates, and reads the first register
    for operand in instruction.operands:
        if re.fullmatch(r"U?R\d+(\.reuse)?", operand):
            wide = instruction.kind.startswith("D") or "WIDE" in instruction.opcode
            return _following(operand, max(_width(instruction) // 4, 2 if wide else 1))
        if not PREDICATE.fullmatch(operand):
            break
    return set()


def _registers(operands: Iterable[str]) -> set[str]:
    found = set()
    for file, number, pair in REGISTER.findall(" ".join(operands)):
        found |= {f"{file}{int(number) + i}" for i in range(2 if pair else 1)}
    return found


def _following(register: str, count: int) -> set[str]:
    """Return the names of a register and of those behind it, `count` in all."""
    if not (found := REGISTER.match(register)):
        return set()
    return {f"{found[1]}{int(found[2]) + i}" for i in range(max(1, count))}
