"""What is registered: counted bytes, sizes past the caches, names."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from calls import call_of
from torch import Tensor
from torch._subclasses import FakeTensorMode

import msf_kernels
from benchmarks.operators import gradients
from benchmarks.registry import Benchmark, find, tensors
from msf_kernels import dispatch

names = pytest.mark.parametrize("benchmark", find(), ids=lambda benchmark: benchmark.name)
H200_L2 = 60_000_000
UNREAD = {"qk_norm_rope": lambda qkv, *_: qkv.nbytes // 3}  # v


def small(benchmark: Benchmark) -> tuple[int, ...]:
    return min(benchmark.shapes, key=math.prod)


def storages(found: Iterable[Tensor | None]) -> dict[int, int]:
    """Address -> bytes: a gradient that is passed on as it came counts once."""
    return {tensor.data_ptr(): tensor.nbytes for tensor in found if tensor is not None}


@names
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bytes_are_those_of_the_tensors(benchmark: Benchmark, dtype: torch.dtype) -> None:
    call = call_of(benchmark, small(benchmark), dtype)
    case, counted = call.case, call.row.bytes
    if not benchmark.gradients:
        outputs = tensors(case.call(*case.args))
        unread = UNREAD.get(benchmark.op, lambda *_: 0)(*case.args)
        assert counted == sum(storages((*case.args, *outputs)).values()) - unread
        return
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        outputs = tensors(case.call(*case.args))
    moved = storages((*case.cotangents, *gradients(outputs, benchmark, case)))
    # What the forward saved may be read, or only looked at for its dtype.
    assert sum(moved.values()) <= counted <= sum((moved | storages(saved)).values())


@names
def test_sizes_are_those_of_the_operator(
    benchmark: Benchmark, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, tuple[int, ...]]] = []

    def automatic_order(op: str, _: torch.device, sizes: tuple[int, ...]) -> tuple[str, ...]:
        asked.append((op, sizes))
        return ("reference",)

    monkeypatch.setattr(dispatch, "automatic_order", automatic_order)
    monkeypatch.setattr(dispatch, "generation", object())  # what was chosen before does not count
    shape = small(benchmark)
    case = call_of(benchmark, shape).case
    outputs = tensors(case.call(*case.args))
    if benchmark.gradients:
        gradients(outputs, benchmark, case)
    op = benchmark.op + "_backward" * bool(benchmark.gradients)
    assert (op, benchmark.sizes(shape)) in asked


@names
def test_the_largest_shape_is_past_the_cache(benchmark: Benchmark) -> None:
    with FakeTensorMode():
        shape = max(benchmark.shapes, key=math.prod)
        forward = replace(benchmark, gradients=0)  # a fake call draws no gradients of outputs
        args = call_of(forward, shape, torch.bfloat16).case.args
        options = benchmark.example.options(shape)
        assert benchmark.bytes(*args, **options) >= 4 * H200_L2


@names
def test_shapes_on_a_cpu_are_small(benchmark: Benchmark) -> None:
    assert benchmark.shapes_for(torch.device("cuda")) == benchmark.shapes
    few = benchmark.shapes_for(torch.device("cpu"))
    assert few and set(few) < set(benchmark.shapes)


def test_names_are_unique_and_operators_exist() -> None:
    known = [benchmark.name for benchmark in find()]
    assert len(set(known)) == len(known)
    assert {benchmark.op for benchmark in find()} <= set(msf_kernels.OPERATORS)
    both = {name for name in known if f"{name} backward" in known}
    assert both == {
        *(f"pyramid_{op} {mode}" for op in ("split", "merge") for mode in ("nearest", "bilinear")),
        *("merge_tokens", "qk_norm_rope", "adaln_modulate", "gate_residual", "gate_residual_adaln"),
        *("gate_residual bias", "gate_residual_adaln bias"),
        *("attention", "attention norm-rope", "bias_gelu", "bias_gelu erf"),
    }


@names
def test_no_arm_has_the_name_of_another(benchmark: Benchmark) -> None:
    known = [arm.name for arm in benchmark.arms]
    assert len(set(known)) == len(known)


def test_arms_are_peers_then_ours() -> None:
    def arms(op: str) -> list[str]:
        return [arm.name for arm in find(op)[0].arms]

    attention = arms("attention")
    assert attention[:3] == ["eager", "compile", "sdpa-flash"]
    assert attention[-4:] == ["cudnn", "flash", "efficient", "flash-attn"]
    assert arms("pyramid_merge") == ["eager", "compile", "reference", "triton", "cuda"]
    assert {"compile-no-mix", "cudnn-frontend"} <= {*arms("adaln_modulate")}
    ours = [[arm.ours for arm in benchmark.arms] for benchmark in find()]
    assert all(flags == sorted(flags) and not flags[0] and flags[-1] for flags in ours)


def test_inputs_are_fresh() -> None:
    (benchmark,) = find("flow_interpolate")
    call = call_of(benchmark, (1, 4, 8, 8))
    first, second = call.case.args[0], call.cases[0].args[0]
    assert not torch.equal(first, second)


def test_unknown_op() -> None:
    with pytest.raises(ValueError, match=r"^unknown op 'conv': known are [\w, ]+pyramid_merge"):
        find("conv")
