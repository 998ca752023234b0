"""One transformer block, forward and with its backward; guided sampling and training of models.

Beside ours run the same weights in plain PyTorch: eager, and compiled with the attention of flash
or cuDNN, or with CUDA graphs. On a GPU the result becomes a file of its own in
benchmarks/results/<device>. On a CPU small models run, none compiled, and are only printed unless
--out names a folder.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import torch

import msf

from . import fingerprint, machine, store
from .block import BlockPass
from .compare import Subject, compare
from .markdown import heading
from .parser import MINUTES, Parser, minutes
from .results import AnyRow, Report
from .roofline import measure_roofline
from .rows import Row, table
from .sampler import Sampling
from .schedule import Group, by_value, measure_until
from .timing import side_stream
from .training import TrainingStep
from .transformers import WAYS, Way

# In order of value: what a change of a kernel shows in first, and soonest.
KINDS = ("block", "block and backward", "training step", "sampling")

Case = tuple[str, str, int]  # of the rows: what, model and size


@dataclass(frozen=True)
class Sizes:
    """What is measured: a stage's block on grids of tokens, samplers (preset, steps), training.

    Each tuple is in the order in which it is measured.
    """

    stage: msf.StageConfig
    grids: tuple[tuple[int, int], ...]
    tokens: int  # of a block's whole batch
    samplers: tuple[tuple[str, tuple[int, ...]], ...]
    batches: tuple[int, ...]
    trained: tuple[str, ...]
    training_batch: int
    rounds: int
    seconds: Mapping[str, float]  # a way takes at least, by kind

    def subjects(self, device: torch.device) -> Iterator[tuple[int, Case, Callable[[], Subject]]]:
        """Yield each with its place among those of its kind.

        It is drawn when it is measured: together they need more memory than there is.
        """
        for what, backward in (("block", False), ("block and backward", True)):
            for place, grid in enumerate(self.grids):
                case = what, f"width {self.stage.width}", math.prod(grid)
                draw = partial(BlockPass.draw, self.stage, grid, self.tokens, backward, device)
                yield place, case, draw
        batch = self.training_batch
        for place, name in enumerate(self.trained):
            case = "training step", name, batch
            yield place, case, partial(TrainingStep.draw, name, batch, device)
        for place, ((name, steps), batch) in enumerate(product(self.samplers, self.batches)):
            case = "sampling", name, batch
            yield place, case, partial(Sampling.draw, name, steps, batch, device)


FULL = Sizes(
    stage=msf.preset("msf-xl-256").model.stages[0],
    grids=((16, 16), (8, 8), (32, 32), (8, 10)),
    tokens=16384,
    samplers=(("msf-xl-256", (50, 5)), ("dit-xl-256", (50,))),
    batches=(64, 1),
    trained=("dit-xl-256", "msf-xl-256"),
    training_batch=128,
    rounds=10,
    # As on one H200, with some of the ways: most of the time is compiling.
    seconds={"block": 5, "block and backward": 4, "training step": 9, "sampling": 26},
)
CPU = Sizes(
    stage=msf.StageConfig(width=64, depth=1, heads=2, patch=2),
    grids=((4, 4), (2, 5)),
    tokens=64,
    samplers=(("digits", (2, 1)),),
    batches=(1, 2),
    trained=("digits",),
    training_batch=4,
    rounds=3,
    seconds={},
)


def main(argv: Sequence[str] | None = None) -> int:
    started = time.monotonic()
    parser = Parser(prog="benchmarks.model", description=__doc__)
    names = [way.name for way in WAYS]
    parser.add_argument("--minutes", type=minutes, default=math.inf, metavar="M", help=MINUTES)
    parser.add_argument("--ways", nargs="+", choices=names, default=names, metavar="WAY")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    ways = [way for way in WAYS if way.name in args.ways and (on_gpu or not way.mode)]
    if not ways:
        parser.error("on a CPU nothing is compiled: there are eager and ours")
    folder = args.out or (store.folder_of(device) if on_gpu else None)
    try:
        known = store.newest(store.history(store.folder_of(device), "models"))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out must be a folder that can be written to: {error}")
    except ValueError as error:
        parser.error(str(error))
    sizes = FULL if on_gpu else CPU
    with side_stream(device):
        reports = run(sizes, ways, device, known, started + 60 * args.minutes)
        objection = store.keep(reports, folder)
    if objection:
        parser.exit(1, f"benchmarks.model: {objection}\n")
    return 0


def run(
    sizes: Sizes,
    ways: Sequence[Way],
    device: torch.device,
    known: Sequence[AnyRow] = (),
    deadline: float = math.inf,
) -> Iterator[Report[Row]]:
    """Print the table of each measurement and yield the report so far.

    Args:
        known: rows of this GPU, by which the order is chosen.
        deadline: of time.monotonic().
    """
    seed = torch.seed()  # another one each time, so that no run repeats another's numbers
    report = Report[Row](
        "models", store.now(), machine.describe(device), seed, measure_roofline(device), []
    )
    print(heading(report))

    def measure(draw: Callable[[], Subject]) -> list[Row]:
        subject = draw()
        suited = [way for way in ways if subject.suits(way)]
        rows = compare(subject, suited, device, report.roofline, sizes.rounds) if suited else []
        if rows:
            print(table(rows), flush=True)
        return rows

    ours = {way.name: fingerprint.of_models() for way in ways if way.ours}
    groups = [
        Group(
            case,
            (place, KINDS.index(case[0])),  # the first size of every kind before any second one
            ours,
            partial(measure, draw),
            sizes.seconds.get(case[0], 0.0) * len(ways),
        )
        for place, case, draw in sizes.subjects(device)
    ]
    for rows in measure_until(deadline, by_value(groups, known)):
        report.rows.extend(rows)
        yield report


if __name__ == "__main__":
    sys.exit(main())
