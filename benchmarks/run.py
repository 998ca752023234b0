"""Check and time the operators beside plain PyTorch and torch.compile.

On a GPU the result goes to benchmarks/results/<device>/<op or "all">[-quick].json. On a CPU, where
few and small shapes are run, it is only printed unless --out names a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path

import torch

from msf_kernels.measured import slug

from . import machine
from .arms import names_of, runnable_arms
from .markdown import heading, markdown
from .measure import Session, measure
from .parser import Parser
from .registry import Benchmark, find
from .results import Report, Row, save
from .roofline import measure_roofline
from .timing import side_stream, stopwatch_of

RESULTS = Path(__file__).parent / "results"


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--op", help="only this operator")
    parser.add_argument("--quick", action="store_true", help="few shapes, fewer rounds")
    known = names_of(find())
    parser.add_argument("--arms", nargs="+", choices=known, default=known, metavar="ARM")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = args.out or (RESULTS / slug(device) if device.type == "cuda" else None)
    arms = [arm for arm in known if arm in args.arms]
    try:
        benchmarks = find(args.op)
        check_arms(benchmarks, device, arms)
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    name = (args.op or "all") + ("-quick" if args.quick else "")
    with side_stream(device):
        for report in run(benchmarks, device, arms, args.quick):
            if folder:  # after each benchmark, so that a crash keeps those before it
                save(report, folder / f"{name}.json")
    return 0


def check_arms(benchmarks: Sequence[Benchmark], device: torch.device, arms: Sequence[str]) -> None:
    """ValueError with the reasons where none of the arms can run."""
    if not any(runnable_arms(benchmark, arms, device)[0] for benchmark in benchmarks):
        skipped = runnable_arms(benchmarks[0], arms, device)[1]
        reasons = (f"no {arm}: {reason}" for arm, reason in skipped.items())
        raise ValueError("; ".join(reasons) or f"{benchmarks[0].op} has no {' and no '.join(arms)}")


def run(
    benchmarks: Sequence[Benchmark], device: torch.device, arms: Sequence[str], quick: bool
) -> Iterator[Report]:
    """Print the table of each benchmark and yield the report so far."""
    generator = torch.Generator(device)
    seed = generator.seed()  # another one each time, so that no run repeats another's inputs
    rounds = 5 if quick or device.type == "cpu" else 15
    session = Session(generator, measure_roofline(device), stopwatch_of(device), rounds)
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report[Row](date, machine.describe(device), seed, session.roofline, [])
    print(heading(report))
    for benchmark in benchmarks:
        rows = [
            row
            for shape in benchmark.shapes_for(device, quick)
            for dtype in benchmark.dtypes
            for row in measure(session, benchmark, shape, dtype, arms)
        ]
        print(markdown(rows, session.roofline), flush=True)
        report.rows.extend(rows)
        yield report


if __name__ == "__main__":
    sys.exit(main())
