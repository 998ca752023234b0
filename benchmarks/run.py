"""Check and time operators and models beside plain PyTorch and torch.compile.

    python -m benchmarks.run                       all
    python -m benchmarks.run operators             all operators
    python -m benchmarks.run attention sampling    an operator; models: block, "block and backward",
                                                   "training step", sampling

On a GPU the result becomes a file of its own in benchmarks/results/<device>. On a CPU, where few
and small shapes are run, it is only printed unless --out names a folder.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch

from . import machine, models, operators, store
from .markdown import heading, markdown
from .measure import Session, measure
from .parser import MINUTES, Parser, minutes
from .results import Report, Row
from .roofline import measure_roofline
from .schedule import by_value, measure_until
from .subject import Target
from .timing import side_stream

GROUPS = ("operators", "models")


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = Parser(
        prog="benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", nargs="*", metavar="WHAT", help="default: all")
    parser.add_argument("--minutes", type=minutes, default=math.inf, metavar="M", help=MINUTES)
    parser.add_argument("--arms", nargs="+", metavar="ARM", help="only these; after WHAT")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator(device)
    folder = args.out or (store.folder_of(device) if device.type == "cuda" else None)
    try:
        targets = select(generator, args.what)
        arms = check_arms(targets, device, args.arms)
        known = store.newest(store.history(store.folder_of(device)))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    except ValueError as error:
        parser.error(str(error))
    with side_stream(device):
        reports = run(targets, generator, arms, known, started + 60 * args.minutes)
        objection = store.keep(reports, folder)
    if objection:
        parser.exit(1, f"benchmarks.run: {objection}\n")
    return 0


def select(generator: torch.Generator, what: Sequence[str] = ()) -> list[Target]:
    """Return the targets that the words name, all by default.

    Raise ValueError for a word that names nothing.
    """
    groups = operators.targets(generator), models.targets(generator.device)
    known = [(group, target) for group, found in zip(GROUPS, groups) for target in found]
    names = list(dict.fromkeys((*GROUPS, *(target.op for _, target in known))))
    for word in what:
        if word not in names:
            raise ValueError(f"unknown {word!r}: known are {', '.join(names)}")
    return [target for group, target in known if not what or {group, target.op} & {*what}]


def check_arms(
    targets: Sequence[Target], device: torch.device, names: Sequence[str] | None
) -> list[str]:
    """Return the names of the arms to run, all by default.

    Raise ValueError for an unknown name, and where none of the arms can run.
    """
    known = dict.fromkeys(arm.name for target in targets for arm in target.arms)
    for name in names or ():
        if name not in known:
            ops = ", ".join(dict.fromkeys(target.op for target in targets))
            raise ValueError(f"no arm {name!r} of {ops}: known are {', '.join(known)}")
    chosen = [name for name in known if names is None or name in names]
    reasons: dict[str, str] = {}
    for target in targets:
        for arm in target.arms:
            if arm.name in chosen:
                reason = arm.unsupported_reason(device)
                if reason is None:
                    return chosen
                reasons.setdefault(arm.name, reason)
    raise ValueError("; ".join(f"no {name}: {reason}" for name, reason in reasons.items()))


def run(
    targets: Sequence[Target],
    generator: torch.Generator,
    arms: Sequence[str],
    known: Sequence[Row] = (),
    deadline: float = math.inf,
) -> Iterator[Report]:
    """Print the table of each measurement and yield the report so far.

    Args:
        known: earlier rows of this GPU, on which the order depends.
        deadline: when to end, by time.monotonic().
    """
    device = generator.device
    on_gpu = device.type == "cuda"
    seed = generator.seed()  # another one each time, so that no run repeats another's inputs
    torch.manual_seed(seed)  # models draw from torch's own generator
    session = Session(device, measure_roofline(device))
    report = Report(store.now(), machine.describe(device), seed, session.roofline, [])
    print(heading(report))
    with_arms = [target for target in targets if {arm.name for arm in target.arms} & {*arms}]

    def least(target: Target) -> float:
        return target.seconds * sum(arm.name in arms for arm in target.arms) if on_gpu else 0.0

    for rows in measure_until(
        deadline,
        by_value(with_arms, known, arms),
        partial(measure, session, names=arms),
        least,
    ):
        print(markdown(rows, session.roofline), flush=True)
        report.rows.extend(rows)
        yield report


if __name__ == "__main__":
    sys.exit(main())
