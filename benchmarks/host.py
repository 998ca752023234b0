"""Measure what a call costs the host: its checks, the choice of a backend, outputs and launches.

    python -m benchmarks.host [--backend triton] [--profile OPERATOR]

Calls are so small that kernels take no time; without a GPU launches do nothing. One without
autograd is compared with `F.layer_norm`, one with its gradient with the same in eager PyTorch.
"""

from __future__ import annotations

import cProfile
import pstats
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import msf_kernels
from msf_kernels.examples import Shape

from .no_gpu import no_cuda, no_triton, no_triton_reason
from .parser import Parser
from .registry import Benchmark, Drawn, draw, find, tensors

NO_KERNELS = {"cuda": no_cuda, "triton": no_triton}
ROUNDS, CALLS = 15, 200
HEADS = {"attention": (1, 16, 2, 64)}  # of a size that the kernels take


def main(arguments: Sequence[str] | None = None) -> None:
    benchmarks = {
        benchmark.op: benchmark for benchmark in reversed(find()) if not benchmark.gradients
    }
    parser = Parser(prog="benchmarks.host", description=__doc__)
    parser.add_argument("--backend", choices=NO_KERNELS, default="cuda", help="(cuda)")
    parser.add_argument("--profile", choices=benchmarks, metavar="OPERATOR", help="where it goes")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)
    if options.backend == "triton" and (reason := no_triton_reason()):
        parser.error(reason)
    on_cpu = NO_KERNELS[options.backend] if device.type == "cpu" else nullcontext
    with on_cpu(), msf_kernels.backend(options.backend):
        if options.profile:
            profile(benchmarks[options.profile], device)
        else:
            compare([*reversed(benchmarks.values())], device)


def compare(benchmarks: Sequence[Benchmark], device: torch.device) -> None:
    print(f"{'':24}   us  x layer_norm   with gradient, us  x eager")
    norm = partial(F.layer_norm, torch.randn(2, 3, 8, device=device), (8,))
    norms = []
    for benchmark in benchmarks:
        with torch.no_grad():
            alone, normed = microseconds([forward(benchmark, device), norm], device)
        norms.append(normed)
        line = f"{benchmark.op:24}{alone:5.1f}{alone / normed:14.1f}"
        if benchmark.example.gradients:
            functions = None, benchmark.eager
            calls = [both_ways(benchmark, device, function) for function in functions]
            ours, eager = microseconds(calls, device)
            line += f"{ours:20.1f}{ours / eager:9.1f}"
        print(line)
    print(f"F.layer_norm {min(norms):.1f} to {max(norms):.1f} us")


def profile(benchmark: Benchmark, device: torch.device) -> None:
    call = forward(benchmark, device)
    with torch.no_grad():
        _round(call, device)  # compiles
        with cProfile.Profile() as profiler:
            for _ in range(ROUNDS * CALLS):
                call()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(20)


def forward(benchmark: Benchmark, device: torch.device) -> Callable[[], Any]:
    drawn = _draw(benchmark, device)
    return partial(drawn.call, *drawn.args)


def both_ways(
    benchmark: Benchmark, device: torch.device, function: Callable[..., Any] | None
) -> Callable[[], Any]:
    """Return a call and its gradient, of ours or of a function in its place."""
    count = benchmark.example.gradients
    drawn = _draw(Benchmark(**vars(benchmark) | {"gradients": count}), device)
    options = benchmark.example.options(_shape(benchmark)) if function else {}
    call = partial(function or drawn.call, *drawn.args, **options)

    def run() -> None:
        torch.autograd.grad(tensors(call()), drawn.args[:count], drawn.cotangents)

    return run


def microseconds(calls: Sequence[Callable[[], Any]], device: torch.device) -> list[float]:
    """Return the shortest mean time of each call among some rounds, which the calls take in turn.

    So a machine that slows down for a while slows all of them.
    """
    rounds = [[_round(call, device) for call in calls] for _ in range(ROUNDS)]
    return [min(times) * 1e6 for times in zip(*rounds)]


def _round(call: Callable[[], Any], device: torch.device) -> float:
    start = time.perf_counter()
    for _ in range(CALLS):
        call()
    taken = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize()
    return taken / CALLS


def _draw(benchmark: Benchmark, device: torch.device) -> Drawn:
    generator = torch.Generator(device).manual_seed(0)
    drawn = draw(benchmark, _shape(benchmark), torch.bfloat16, generator)
    return replace(drawn, args=with_numbers(drawn.args))


def with_numbers(args: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return step sizes and guidance scales as numbers, as a sampler passes them."""
    return tuple(float(x) if x.dim() == 0 and x.is_floating_point() else x for x in args)


def _shape(benchmark: Benchmark) -> Shape:
    return HEADS.get(benchmark.op, benchmark.example.shape)


if __name__ == "__main__":
    main()
