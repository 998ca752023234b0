"""The choice of an assembler for Hopper that does not get Triton's wgmma wrong.

Triton 3.5 and 3.6 assemble for Hopper with ptxas 12.8. In 23 of 200 shapes of an attention that had
all scores of a query in registers it built the descriptor of an operand of wgmma from a register
that nothing has written (`audit/uniform.py` finds them). ptxas 12.9, which Triton 3.6 carries for
Blackwell, did so in none.
It still folds selects, which our kernels do not have (`audit/instructions.py`).
"""

from __future__ import annotations

import os

from triton import knobs

OLDEST = (12, 9)


def choose() -> str | None:
    """Return why the products of a Hopper GPU would be assembled wrongly, None where they are not.

    Where Triton's own choice is too old and TRITON_PTXAS_PATH names none, Triton takes the newer of
    the two assemblers that it carries from here on, for all kernels of this process, ours or not,
    and of its child processes: Triton sets that variable. This comes before the first of our
    kernels is compiled.
    """
    own, newer = knobs.nvidia.ptxas, getattr(knobs.nvidia, "ptxas_blackwell", None)
    if _version(own) >= OLDEST:
        return None
    if newer and "TRITON_PTXAS_PATH" not in os.environ and _version(newer) >= OLDEST:
        knobs.nvidia.ptxas = newer.path
        return None
    return (
        f"ptxas {own.version} gets products on this GPU wrong: "
        "set TRITON_PTXAS_PATH to that of CUDA 12.9 or later"
    )


def _version(tool: knobs.NvidiaTool) -> tuple[int, ...]:
    return tuple(map(int, tool.version.split(".")))
