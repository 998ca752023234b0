"""Check and time the operators beside plain PyTorch and torch.compile.

On a GPU the result becomes a file of its own in benchmarks/results/<device>. On a CPU, where few
and small shapes are run, it is only printed unless --out names a folder.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from . import fingerprint, machine, store
from .arms import OURS, names_of, runnable_arms
from .markdown import heading, markdown
from .measure import Session, measure
from .parser import MINUTES, Parser, minutes
from .registry import Benchmark, find
from .results import AnyRow, Report, Row
from .roofline import measure_roofline
from .schedule import Group, by_value, measure_until
from .timing import side_stream, stopwatch_of

# In order of value: what most of a model's time between its matrix products goes to comes first.
FAMILIES = ("adaln", "attention", "qk_norm_rope", "interpolation", "euler", "pyramid", "tokens")


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = Parser(prog="benchmarks.run", description=__doc__)
    parser.add_argument("--op", help="only this operator")
    parser.add_argument("--minutes", type=minutes, default=math.inf, metavar="M", help=MINUTES)
    known = names_of(find())
    parser.add_argument("--arms", nargs="+", choices=known, default=known, metavar="ARM")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    folder = args.out or (store.folder_of(device) if device.type == "cuda" else None)
    arms = [arm for arm in known if arm in args.arms]
    try:
        benchmarks = find(args.op)
        check_arms(benchmarks, device, arms)
        measured = store.newest(store.history(store.folder_of(device), "ops"))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    except ValueError as error:
        parser.error(str(error))
    with side_stream(device):
        reports = run(benchmarks, device, arms, measured, started + 60 * args.minutes)
        objection = store.keep(reports, folder)
    if objection:
        parser.exit(1, f"benchmarks.run: {objection}\n")
    return 0


def check_arms(benchmarks: Sequence[Benchmark], device: torch.device, arms: Sequence[str]) -> None:
    """ValueError with the reasons where none of the arms can run."""
    if not any(runnable_arms(benchmark, arms, device)[0] for benchmark in benchmarks):
        skipped = runnable_arms(benchmarks[0], arms, device)[1]
        reasons = (f"no {arm}: {reason}" for arm, reason in skipped.items())
        raise ValueError("; ".join(reasons) or f"{benchmarks[0].op} has no {' and no '.join(arms)}")


def run(
    benchmarks: Sequence[Benchmark],
    device: torch.device,
    arms: Sequence[str],
    measured: Sequence[AnyRow] = (),
    deadline: float = math.inf,
) -> Iterator[Report[Row]]:
    """Print the table of each measurement and yield the report so far.

    Args:
        measured: rows of this GPU, by which the order is chosen.
        deadline: of time.monotonic().
    """
    generator = torch.Generator(device)
    seed = generator.seed()  # another one each time, so that no run repeats another's inputs
    rounds = 5 if device.type == "cpu" else 15
    session = Session(generator, measure_roofline(device), stopwatch_of(device), rounds)
    report = Report[Row]("ops", store.now(), machine.describe(device), seed, session.roofline, [])
    print(heading(report))
    groups = [group for benchmark in benchmarks for group in groups_of(benchmark, session, arms)]
    for rows in measure_until(deadline, by_value(groups, measured)):
        print(markdown(rows, session.roofline), flush=True)
        report.rows.extend(rows)
        yield report


def groups_of(benchmark: Benchmark, session: Session, arms: Sequence[str]) -> Iterator[Group[Row]]:
    """bfloat16, in which models run, comes first; then each benchmark's most telling shape, before
    the second of any."""
    ours = {
        arm: fingerprint.of_operator(benchmark.op, arm)
        for arm in names_of([benchmark])
        if arm in OURS and arm in arms
    }
    family = FAMILIES.index(fingerprint.family_of(benchmark.op))
    for place, shape in enumerate(benchmark.shapes_for(session.device)):
        for dtype in benchmark.dtypes:
            case = benchmark.name, shape, str(dtype).removeprefix("torch.")
            value = int(dtype != torch.bfloat16), place, family
            yield Group(case, value, ours, partial(measure, session, benchmark, shape, dtype, arms))


if __name__ == "__main__":
    sys.exit(main())
