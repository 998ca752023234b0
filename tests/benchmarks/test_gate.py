"""The gate lets right arms pass and no wrong one, and what is wrong is never timed."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import call_of, operator_target, session, verdict
from torch import Tensor
from torch.nn import functional as F

from benchmarks.arms import needs_gpu, peer
from benchmarks.measure import measure
from benchmarks.ops import attention
from benchmarks.registry import Benchmark, find
from benchmarks.results import Row

FP32, BF16 = torch.float32, torch.bfloat16
SHAPE = (16, 4, 32, 32)
FORWARD, BACKWARD = (
    benchmark for benchmark in find("pyramid_merge") if "nearest" in benchmark.name
)
names = pytest.mark.parametrize("benchmark", find(), ids=lambda benchmark: benchmark.name)
dtypes = pytest.mark.parametrize("dtype", [FP32, BF16], ids=["fp32", "bf16"])


def wrong(function: Callable[..., Any], benchmark: Benchmark, dtype: torch.dtype = FP32) -> str:
    return verdict(call_of(benchmark, SHAPE, dtype), function, ours=True).wrong or ""


def rows_of(
    benchmark: Benchmark,
    names: list[str],
    shape: tuple[int, ...] = SHAPE,
    dtype: torch.dtype = FP32,
) -> list[Row]:
    return measure(session(), operator_target(call_of(benchmark, shape, dtype)), names)


def smallest(benchmark: Benchmark) -> list[tuple[int, ...]]:
    return sorted(benchmark.shapes, key=math.prod)


@names
@dtypes
@pytest.mark.parametrize("name", ["eager", "reference"])
def test_right_arms_pass(benchmark: Benchmark, dtype: torch.dtype, name: str) -> None:
    call = call_of(benchmark, smallest(benchmark)[0], dtype)
    found = verdict(call, benchmark.eager if name == "eager" else None)
    assert found.wrong is None
    assert found.error is not None and found.bound is not None
    assert 0 < found.error <= found.bound < (1e-5 if dtype == FP32 else 1e-2)


def element_off(x: Tensor) -> Tensor:
    """A quarter instead of zero: in the norm of 65536 elements less than their rounding."""
    x = x.clone()
    x.view(-1)[x.abs().argmin()] = 0.25
    return x


def last_row_unwritten(x: Tensor) -> Tensor:
    out = torch.empty_like(x)
    out[..., :-1, :] = x[..., :-1, :]
    return out


PLANTED: dict[str, tuple[Callable[[Tensor], Any], torch.dtype, str]] = {
    "scale off by 0.1 %": (lambda x: 1.001 * x, FP32, r"output 0 errs by 1\.0e-03, more than"),
    "last row zero": (lambda x: x.index_fill(2, torch.tensor(31), 0), BF16, r"output 0 errs by"),
    "last row unwritten": (last_row_unwritten, BF16, "output 0 holds NaN"),
    "uninitialised": (torch.empty_like, FP32, "output 0 holds NaN"),
    "one NaN": (lambda x: x.index_fill(3, torch.tensor(5), torch.nan), FP32, "output 0 holds NaN"),
    "one element": (element_off, BF16, "one element of output 0 is off"),
    "dtype": (Tensor.float, BF16, "output 0 is .* torch.float32, not .* torch.bfloat16"),
    "shape": (lambda x: x[:-1], FP32, r"output 0 is \(15, 4, 32, 32\)"),
    "number": (lambda x: (x, x), FP32, "2 results, not 1"),
}


@pytest.mark.parametrize(("change", "dtype", "line"), PLANTED.values(), ids=PLANTED)
def test_wrong_output(change: Callable[[Tensor], Any], dtype: torch.dtype, line: str) -> None:
    assert re.match(
        line,
        wrong(lambda *args, **options: change(FORWARD.eager(*args, **options)), FORWARD, dtype),
    )


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 1.001 * grad


GRADIENTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "right": (Tensor.clone, ""),
    "scale off by 0.1 %": (ScaledGradient.apply, r"gradient 1 errs by 1\.0e-03"),
    "missing": (Tensor.detach, "gradient 1 is missing"),
}


@pytest.mark.parametrize(("change", "line"), GRADIENTS.values(), ids=GRADIENTS)
def test_wrong_gradient_of_the_second_input(change: Callable[[Tensor], Tensor], line: str) -> None:
    def planted(a: Tensor, b: Tensor, *others: Tensor, **options: Any) -> Any:
        return BACKWARD.eager(a, change(b), *others, **options)

    found = wrong(planted, BACKWARD)
    assert re.match(line, found) if line else not found


def test_a_peer_may_round_its_intermediates_and_ours_may_not() -> None:
    (benchmark,) = (b for b in find("pyramid_split") if "nearest" in b.name and b.gradients)
    call = call_of(benchmark, SHAPE, BF16)
    assert verdict(call, benchmark.eager).wrong is None
    assert verdict(call, benchmark.eager, ours=True).wrong


def test_only_what_is_right_is_timed() -> None:
    planted = replace(
        FORWARD, eager=lambda *args, **options: 1.001 * FORWARD.eager(*args, **options)
    )
    eager, reference = rows_of(planted, ["eager", "reference"])
    assert eager.status == "incorrect" and eager.note and eager.error
    assert eager.median_us is None and eager.percent is None
    assert reference.status == "ok" and reference.median_us
    assert reference.peer_ratio is None  # there is no correct peer


@pytest.mark.parametrize("calls_before", [0, 1], ids=["in the gate", "in the timing"])
def test_an_exception_is_one_line_and_the_others_go_on(calls_before: int) -> None:
    calls = 0

    def fails(*args: Tensor, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > calls_before:
            raise RuntimeError("out of luck\nand of memory")
        return FORWARD.eager(*args, **options)

    planted = replace(FORWARD, eager=fails)
    eager, reference = rows_of(planted, ["eager", "reference"])
    assert (eager.status, eager.note) == ("failed", "RuntimeError: out of luck")
    assert eager.median_us is None
    assert reference.status == "ok" and reference.median_us


def test_a_backend_that_cannot_run_is_skipped_with_its_reason() -> None:
    (cuda,) = rows_of(FORWARD, ["cuda"])
    assert cuda.status == "skipped" and cuda.note and cuda.median_us is None


def test_peers_of_a_benchmark() -> None:
    entered = []

    @contextmanager
    def scope() -> Iterator[None]:
        entered.append(True)
        yield

    peers = (
        peer("present", FORWARD.eager, scope=scope),
        peer("absent", len, lambda device: f"not on this {device.type}"),
    )
    names = [arm.name for arm in peers]
    assert rows_of(FORWARD, names) == []
    present, absent = rows_of(replace(FORWARD, peers=peers), names)
    assert present.status == "ok" and present.peer_ratio == 1 and entered
    assert (absent.status, absent.note) == ("skipped", "not on this cpu")


def test_what_needs_a_gpu_and_a_package_says_what_is_missing() -> None:
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert needs_gpu(cpu) == "it needs a GPU" and needs_gpu(cuda, "torch") is None
    assert needs_gpu(cuda, "no_such_package") == "No module named 'no_such_package'"


WITH_PEERS = [benchmark for benchmark in find() if benchmark.peers and benchmark.gradients]


@pytest.mark.parametrize("benchmark", WITH_PEERS, ids=lambda benchmark: benchmark.name)
def test_peers_that_run_here_are_right(benchmark: Benchmark) -> None:
    peers = [arm.name for arm in benchmark.peers]
    if reason := benchmark.peers[0].unsupported_reason(torch.device("cpu")):
        pytest.skip(reason)
    # Two shapes: what was compiled for one is compiled anew for the next.
    for shape in smallest(benchmark)[:2]:
        first, *others = rows_of(benchmark, peers, shape, BF16)
        assert first.status == "ok", first.note
        assert all(row.status == "skipped" for row in others)


@pytest.mark.parametrize("variant", ["", "norm-rope"])
def test_flash_attn_is_given_heads_behind_tokens(
    variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flash_attn_func(*heads: Tensor) -> tuple[Tensor, None]:
        q, k, v = (x.transpose(1, 2) for x in heads)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2), None

    module = SimpleNamespace(flash_attn_func=flash_attn_func)
    monkeypatch.setattr(attention.flash_attn, "installed", lambda: (3, module))
    (benchmark,) = (
        b for b in find("attention") if b.example.variant == variant and not b.gradients
    )
    call = call_of(benchmark, (2, 6, 3, 8), BF16)
    assert verdict(call, attention.flash_attn_func).wrong is None


def test_compiled_backward_is_right_and_timed() -> None:
    eager, compiled = rows_of(BACKWARD, ["eager", "compile"])
    assert compiled.status == "ok", compiled.note
    assert compiled.median_us and eager.median_us
    best = min(compiled.median_us, eager.median_us)
    assert compiled.peer_ratio == best / compiled.median_us
