"""Count with Nsight Compute what each kernel of one call of an operator does.

    python -m benchmarks.profile attention
    python -m benchmarks.profile "adaln_modulate backward" --arm triton --shape 64 256 1152

The call is that of the benchmark of this name, or of the operator's first benchmark, in bfloat16
and by default at its largest shape. ncu flushes the caches before each kernel and leaves the clocks
alone. ncu has not run this yet: its options and its CSV format are taken from NVIDIA's manual.
"""

from __future__ import annotations

import csv
import math
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import torch

import msf_kernels

from .markdown import line
from .operators import OperatorCall
from .parser import Parser
from .registry import Benchmark, Shape, find

DURATION = "gpu__time_duration.sum"
DRAM = "dram__bytes.sum"
L2 = "lts__t_bytes.sum"
OCCUPANCY = "sm__warps_active.avg.pct_of_peak_sustained_active"
STALL = ("smsp__average_warps_issue_stalled_", "_per_issue_active.ratio")
STALLS = r"regex:smsp__average_warps_issue_stalled_.*_per_issue_active\.ratio"
OPTIONS = (
    *("--csv", "--page", "raw", "--print-units", "base", "--print-kernel-base", "function"),
    *("--clock-control", "none", "--profile-from-start", "off"),
    *("--metrics", ",".join((DURATION, DRAM, L2, OCCUPANCY, STALLS))),
)
# ncu has written nanoseconds as "nsecond" and as "ns"; with base units nothing else should come.
UNITS = {"nsecond": 1e-9, "ns": 1e-9, "usecond": 1e-6, "us": 1e-6, "msecond": 1e-3, "ms": 1e-3}
UNITS |= {"second": 1.0, "s": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
HEADINGS = ("kernel", "µs", "DRAM MB", "of the fewest", "L2 MB", "occupancy %", "top stall")


@dataclass(frozen=True)
class Kernel:
    """A Kernel is one launch of a kernel.

    Args:
        metrics: what ncu could count, by its names, in seconds, bytes and percent.
    """

    name: str
    metrics: dict[str, float]

    @property
    def top_stall(self) -> tuple[str, float] | None:
        """Return what warps wait for longest, and its share of their time, issuing included."""
        start, end = STALL
        times = {
            name.removeprefix(start).removesuffix(end): value
            for name, value in self.metrics.items()
            if name.startswith(start) and name.endswith(end) and "_not_issued" not in name
        }
        waits = {reason: time for reason, time in times.items() if reason != "selected"}
        if not any(waits.values()):
            return None
        reason = max(waits, key=lambda name: waits[name])
        return reason, waits[reason] / sum(times.values())

    def cells(self, fewest: int) -> list[str]:
        def number(name: str, unit: float, digits: int = 1) -> str:
            value = self.metrics.get(name)
            return "" if value is None else f"{value / unit:.{digits}f}"

        stall = self.top_stall
        return [
            self.name,
            number(DURATION, 1e-6),
            number(DRAM, 1e6),
            number(DRAM, fewest, digits=2),
            number(L2, 1e6),
            number(OCCUPANCY, 1),
            "" if stall is None else f"{stall[0]} {stall[1]:.0%}",
        ]


def kernels(output: str) -> list[Kernel]:
    """Parse ncu's CSV: a header that starts with "ID", a row of units, and one row a launch.

    Other lines may come before and after, such as ncu's own, which start with "==".
    """
    lines = output.splitlines()
    start = next((i for i, text in enumerate(lines) if text.startswith('"ID",')), len(lines))
    header, *rows = [*csv.reader(lines[start:])] or [[]]
    units, *launches = [dict(zip(header, row)) for row in rows if len(row) == len(header)] or [{}]
    return [Kernel(launch["Kernel Name"], _metrics(launch, units)) for launch in launches]


def _metrics(launch: dict[str, str], units: dict[str, str]) -> dict[str, float]:
    found = {}
    for name, text in launch.items():
        try:
            value = float(text.replace(",", ""))
        except ValueError:  # "n/a", or no number at all
            continue
        found[name] = value * UNITS.get(units[name], 1.0)
    return found


def named(name: str) -> Benchmark:
    """Return the benchmark of this name, or this operator's first. Raise ValueError for neither."""
    return next((known for known in find() if known.name == name), None) or find(name)[0]


def shape_of(benchmark: Benchmark, sizes: Sequence[int] | None) -> Shape:
    """Return these sizes, or else the benchmark's largest shape.

    Raise ValueError unless they fit the benchmark.
    """
    largest = max(benchmark.shapes, key=math.prod)
    if sizes and (len(sizes) != len(largest) or min(sizes) < 1):
        example = " ".join(map(str, largest))
        raise ValueError(f"--shape must be like {example}, got {' '.join(map(str, sizes))}")
    return tuple(sizes or largest)


def call(name: str, arm_name: str, shape: Shape) -> None:
    """Make the call that ncu profiles, after another that compiles and loads the kernels."""
    benchmark = named(name)
    (arm,) = (arm for arm in benchmark.arms if arm.name == arm_name)
    prepared = call_of(benchmark, shape).work(arm)
    prepared.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    prepared.run()
    torch.cuda.synchronize()
    torch.cuda.profiler.stop()


def call_of(benchmark: Benchmark, shape: Shape) -> OperatorCall:
    generator = torch.Generator(torch.device("cuda:0"))
    return OperatorCall(benchmark, shape, torch.bfloat16, generator, sets=1)


def check_arm(benchmark: Benchmark, name: str) -> None:
    """Raise ValueError unless the benchmark has an arm of this name that can run on this GPU."""
    arms = {arm.name: arm for arm in benchmark.arms}
    if name not in arms:
        raise ValueError(f"{benchmark.op} has no arm {name!r}: known are {', '.join(arms)}")
    if reason := arms[name].unsupported_reason(torch.device("cuda:0")):
        raise ValueError(f"no {name}: {reason}")


def counted(command: Sequence[str]) -> list[Kernel]:
    """Return what ncu counts in a command. Raise ValueError in one line if it counts nothing."""
    ncu = shutil.which("ncu")
    if ncu is None:
        raise ValueError("needs ncu, of NVIDIA's Nsight Compute, and finds none in PATH")
    process = subprocess.run(
        [ncu, *OPTIONS, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if "ERR_NVGPUCTRPERM" in process.stdout:
        raise ValueError(
            "this user may not read the counters of the GPU (ERR_NVGPUCTRPERM); "
            "be root, or have the administrator allow it"
        )
    if found := kernels(process.stdout):
        return found
    last = (process.stdout.strip().splitlines() or ["it printed nothing"])[-1]
    raise ValueError(f"ncu counted no kernel: {last}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = Parser(prog="benchmarks.profile", description=__doc__)
    parser.add_argument("op", metavar="OP")
    parser.add_argument("--arm", help="default: the backend that comes first here")
    parser.add_argument("--shape", type=int, nargs="+", metavar="N", help="default: the largest")
    args = parser.parse_args(argv)
    try:
        benchmark = named(args.op)
        shape = shape_of(benchmark, args.shape)
        if not torch.cuda.is_available():
            raise ValueError("needs an NVIDIA GPU and a torch with CUDA, and finds none")
        arm = args.arm or msf_kernels.available_backends(benchmark.op)[0]
        check_arm(benchmark, arm)
        fewest = call_of(benchmark, shape).row.bytes
        code = f"from benchmarks import profile; profile.call({args.op!r}, {arm!r}, {shape!r})"
        found = counted([sys.executable, "-c", code])
    except ValueError as error:
        parser.error(str(error))
    print(f"{benchmark.name}, {arm}, {'x'.join(map(str, shape))}, {fewest / 1e6:.1f} MB at least\n")
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(kernel.cells(fewest) for kernel in found)]
    print("\n".join(map(line, rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
