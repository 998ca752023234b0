"""One transformer block, forward and with its backward, and guided sampling of whole models.

Beside ours run the same weights in plain PyTorch: eager, and compiled with the attention of flash
or cuDNN, or with CUDA graphs. On a GPU the result goes to
benchmarks/results/<device>/model[-quick].json. On a CPU small models run, none compiled, and are
only printed unless --out names a folder.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

import msf
from msf_kernels.measured import slug

from . import machine
from .block import BlockPass
from .compare import Subject, compare
from .markdown import heading
from .parser import Parser
from .results import Report, save
from .roofline import measure_roofline
from .rows import Row, table
from .run import RESULTS
from .sampler import Sampling
from .timing import side_stream
from .transformers import WAYS, Way


@dataclass(frozen=True)
class Sizes:
    """What is measured: a stage's block on grids of tokens, and samplers (preset, steps)."""

    stage: msf.StageConfig
    grids: tuple[tuple[int, int], ...]
    tokens: int  # of a block's whole batch
    samplers: tuple[tuple[str, tuple[int, ...]], ...]
    batches: tuple[int, ...]
    rounds: int

    def subjects(self, device: torch.device) -> Iterator[Subject]:
        for backward in (False, True):
            for grid in self.grids:
                yield BlockPass.draw(self.stage, grid, self.tokens, backward, device)
        for name, steps in self.samplers:
            for batch in self.batches:
                yield Sampling.draw(name, steps, batch, device)


FULL = Sizes(
    stage=msf.preset("msf-xl-256").model.stages[0],
    grids=((8, 8), (8, 10), (16, 16), (32, 32)),
    tokens=16384,
    samplers=(("msf-xl-256", (50, 5)), ("dit-xl-256", (50,))),
    batches=(1, 64),
    rounds=10,
)
# Minutes go to compiling the stages of XL, once for each way and batch.
QUICK = replace(FULL, grids=((8, 8), (16, 16)), samplers=FULL.samplers[:1], batches=(64,), rounds=5)
CPU = Sizes(
    stage=msf.StageConfig(width=64, depth=1, heads=2, patch=2),
    grids=((4, 4), (2, 5)),
    tokens=64,
    samplers=(("digits", (2, 1)),),
    batches=(1, 2),
    rounds=3,
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.model", description=__doc__)
    names = [way.name for way in WAYS]
    parser.add_argument("--quick", action="store_true", help="few sizes, fewer rounds")
    parser.add_argument("--ways", nargs="+", choices=names, default=names, metavar="WAY")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder of the result")
    args = parser.parse_args(argv)
    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    on_gpu = device.type == "cuda"
    ways = [way for way in WAYS if way.name in args.ways and (on_gpu or not way.mode)]
    if not ways:
        parser.error("on a CPU nothing is compiled: there are eager and ours")
    folder = args.out or (RESULTS / slug(device) if on_gpu else None)
    try:
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(str(error))
    sizes = CPU if not on_gpu else QUICK if args.quick else FULL
    name = "model" + ("-quick" if args.quick else "")
    with side_stream(device):
        for report in run(sizes, ways, device):
            if folder:  # after each measurement, so that a crash keeps those before it
                save(report, folder / f"{name}.json")
    return 0


def run(sizes: Sizes, ways: Sequence[Way], device: torch.device) -> Iterator[Report[Row]]:
    """Print the table of each measurement and yield the report so far."""
    seed = torch.seed()  # another one each time, so that no run repeats another's numbers
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = Report[Row](date, machine.describe(device), seed, measure_roofline(device), [])
    print(heading(report))
    for subject in sizes.subjects(device):
        suited = [way for way in ways if subject.suits(way)]
        if suited:
            rows = compare(subject, suited, device, report.roofline, sizes.rounds)
            print(table(rows), flush=True)
            report.rows.extend(rows)
            yield report


if __name__ == "__main__":
    sys.exit(main())
