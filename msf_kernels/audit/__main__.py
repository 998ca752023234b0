"""List the registers, shared memory and spills of every kernel on every GPU. No GPU is needed.

The exit status is 1 if a kernel spills, exceeds its budget of registers or has faulty instructions,
or if a backend cannot be audited.
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
from .row import ARCHITECTURES, Row

BACKENDS = ("cuda", "triton")
COLUMNS = ("backend", "architecture", "registers", "shared", "spill", "kernel")


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
        lines.append((row.backend, row.architecture, registers, str(row.shared), spill, kernel))
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
