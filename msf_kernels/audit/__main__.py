"""List what every kernel takes of every GPU, and how much it loads ahead. No GPU is needed.

Of a thread it lists registers and spills, of a block shared memory, of a multiprocessor how many
blocks fit, where a launch is known, and on an H200 how many bytes of global loads these have in
flight.

The exit status is 1 if a kernel spills, exceeds its budget of registers, has faulty instructions or
too few bytes in flight for the memory of an H200, or if a backend cannot be audited.
"""

from __future__ import annotations

import argparse
import importlib
import json
import subprocess
import sys
from dataclasses import asdict

from ..examples import families
from ..triton_support import compiler_unsupported_reason
from . import latency_bound
from .row import ARCHITECTURES, Row

BACKENDS = ("cuda", "triton")
COLUMNS = (
    *("backend", "architecture", "registers", "shared", "spill"),
    *("blocks", "in flight", "kernel"),
)


def main() -> int:
    parser = argparse.ArgumentParser(prog="msf_kernels.audit", description=__doc__)
    parser.add_argument("--backend", choices=BACKENDS, help="only this one")
    parser.add_argument("--architecture", type=int, choices=ARCHITECTURES, help="only this one")
    parser.add_argument("--family", choices=families(), help="only its Triton kernels")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    rows: list[Row] = []
    problems: list[str] = []
    chosen = [args.backend] if args.backend else ["triton"] if args.family else BACKENDS
    for backend in chosen:
        try:
            if backend == "triton" and (reason := compiler_unsupported_reason()):
                raise RuntimeError(reason)
            module = importlib.import_module(f"msf_kernels.audit.{backend}")
            family = {"family": args.family} if backend == "triton" else {}
            found = list(module.rows(args.architecture, **family))
        except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError) as error:
            problems.append(f"{backend}: {error}")
            continue
        rows += found
        if not found:
            problems.append(f"{backend}: no kernel found in what the compiler printed")
    problems += [problem for row in rows if (problem := row.problem())]
    problems += latency_bound.outdated(rows)
    if args.json:
        print(json.dumps({"rows": [asdict(row) for row in rows], "problems": problems}, indent=1))
    else:
        print(_table(rows))
        print("\n".join([f"{len(rows)} kernels, {len(problems)} problems", *problems]))
    return bool(problems)


def _table(rows: list[Row]) -> str:
    lines = [COLUMNS]
    for row in rows:
        registers = f"{row.registers} of {row.budget}"
        spill, kernel = str(row.spill + row.stack), f"{row.kernel} ({row.configuration})"
        blocks = "-" if row.blocks is None else str(row.blocks)
        in_flight = "-" if row.in_flight is None else f"{row.in_flight / 1024:.1f} KB"
        taken = registers, str(row.shared), spill, blocks, in_flight
        lines.append((row.backend, row.architecture, *taken, kernel))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
