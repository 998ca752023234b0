"""The command as a process; ways that are wrong; and that nothing stays patched."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import msf
from benchmarks import model
from benchmarks.block import BlockPass
from benchmarks.compare import Subject, _is_kernel, compare
from benchmarks.model import CPU, FULL, QUICK
from benchmarks.roofline import Roofline
from benchmarks.sampler import Sampling
from benchmarks.transformers import EAGER, PLAIN, WAYS, Way
from numerics import relative_error

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cpu")
OURS = Way("ours", ours=True)
IN_BLOCKS = ("gate_residual_adaln", "attention")
COMPILED = Way("compiled", ours=True, mode="default")


def block(backward: bool = True) -> BlockPass:
    return BlockPass.draw(CPU.stage, (2, 5), 20, backward, DEVICE)


def sampling() -> Sampling:
    return Sampling.draw("digits", (2, 1), 2, DEVICE)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "block": partial(block, False),
    "block and backward": block,
    "sampling": sampling,
}


def rows_of(subject: Subject, *ways: Way) -> list[Any]:
    return compare(subject, ways, DEVICE, Roofline(copy_gb_s=1.0, matmul_tflop_s=1.0), rounds=1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_command(tmp_path: Path) -> None:
    before = set((ROOT / "benchmarks" / "results").rglob("*"))
    words = [sys.executable, "-m", "benchmarks.model", "--quick", "--out", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        words, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert set((ROOT / "benchmarks" / "results").rglob("*")) == before
    document = json.loads((tmp_path / "model-quick.json").read_text(), parse_constant=pytest.fail)
    rows = document["rows"]
    assert {row["way"] for row in rows} == {"eager", "ours"}
    assert {row["what"] for row in rows} == set(SUBJECTS)
    assert all(row["status"] == "ok" and row["p10_ms"] <= row["ms"] for row in rows)
    assert all(row["kernels"] is None and row["peak_mib"] is None for row in rows)
    assert ran.stdout.count("\n| ours |") == len(rows) / 2
    assert "### sampling, digits, batch 2\n" in ran.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every way can run")
def test_on_a_cpu_nothing_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        model.main(["--ways", "compile-flash"])
    assert caught.value.code == 2
    assert capsys.readouterr().err.startswith("benchmarks.model: on a CPU nothing is compiled")


WRONG = [
    *((subject, name) for subject in ("block", "block and backward") for name in IN_BLOCKS),
    *(("sampling", name) for name in PLAIN),
]


@pytest.mark.parametrize(("subject", "name"), WRONG)
def test_a_wrong_operator_is_refused(
    subject: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = getattr(msf.transformer, name)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        outputs = right(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return 1.3 * outputs
        return outputs[0], 1.3 * outputs[1]

    monkeypatch.setattr(msf.transformer, name, wrong)
    eager, ours = rows_of(SUBJECTS[subject](), EAGER, OURS)
    assert eager.status == "ok" and eager.ms > 0
    assert ours.status == "incorrect" and ours.ms is None and ours.error > 2 * eager.error
    assert "more than" in ours.note


def test_nan_is_refused_even_if_plain_pytorch_gives_it() -> None:
    subject = block()
    exact = subject.exact()
    with torch.no_grad():
        subject.block.mlp[0].bias[0] = torch.nan

    class Known(BlockPass):
        def exact(self) -> tuple[Tensor, ...]:
            return exact

    rows = rows_of(Known(**vars(subject)), EAGER, OURS)
    assert [(row.status, row.error) for row in rows] == [("incorrect", None)] * 2


@pytest.mark.parametrize("name", ["adaln_modulate", "attention"])
def test_an_operator_that_raises_is_one_failed_row(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no kernel\nfor this")

    monkeypatch.setattr(msf.transformer, name, broken)
    ours, eager = rows_of(sampling(), OURS, EAGER)
    assert (ours.status, ours.note) == ("failed", "RuntimeError: no kernel")
    assert eager.status == "ok"


def test_plain_pytorch_computes_what_ours_do() -> None:
    """In float64, where no rounding hides a difference."""
    subject = block()
    subject = replace(
        subject,
        block=subject.block.double(),
        inputs=tuple(x.detach().double().requires_grad_() for x in subject.inputs),
        cotangents=tuple(x.double() for x in subject.cotangents),
    )
    plain, ours = (subject.work(way).run()[0] for way in (EAGER, OURS))
    assert len(plain) == 2 + 3 + len(list(subject.block.parameters()))
    assert max(map(relative_error, plain, ours)) < 1e-12


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=SUBJECTS)
def test_flops_are_those_of_the_matrix_products(
    subject: Callable[[], Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The counter cannot follow torch.autograd.grad.
    monkeypatch.setattr(
        torch.autograd, "grad", lambda y, _, grads: torch.autograd.backward(y, grads) or ()
    )
    drawn = subject()
    math_attention = Way("math", attention=SDPBackend.MATH)  # whose products are counted
    with FlopCounterMode(display=False) as counter:
        drawn.work(math_attention).run()
    assert drawn.row.flops == counter.get_total_flops()


def compiled_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with this backend in place of Inductor, which takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, **options: compile(f, backend=backend, **options)
    )


def test_each_compiled_way_has_the_attention_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled_by(aot_autograd(fw_compiler=keep), monkeypatch)
    subject = block(backward=False)
    for attention in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        subject.work(Way(attention.name, attention=attention, mode="default")).run()
    flash, math = graphs
    assert "scaled_dot_product_flash_attention" in flash
    assert "scaled_dot_product" not in math and "softmax" in math


def test_a_compiled_stage_stands_in_its_place_only_while_it_samples(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[int] = []

    def compile(forward: Callable[..., Any], mode: str, **_: Any) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            calls.append(len(args[0]))
            return forward(*args, **kwargs)

        return run

    monkeypatch.setattr(torch, "compile", compile)
    subject = sampling()
    (row,) = rows_of(subject, COMPILED)
    assert row.status == "ok"
    # Twice the batch for guidance; three steps; checked, warmed up for the round, and timed.
    assert calls == [4] * 3 * 3
    subject.work(EAGER).run()
    assert len(calls) == 9 and not any("forward" in vars(stage) for stage in subject.model.stages)


def settings() -> list[Any]:
    """All that a way's scope changes."""
    return [
        *(getattr(msf.transformer, name) for name in PLAIN),
        importlib.import_module("msf_kernels.backend")._requested,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._functorch.config.enable_autograd_cache,
    ]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.name)
def test_the_patches_are_undone(way: Way) -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="in between"), way.scope():
        assert settings() != before
        assert not torch._functorch.config.enable_autograd_cache
        assert (msf.transformer.attention is PLAIN["attention"]) == (not way.ours)
        raise RuntimeError("in between")
    assert settings() == before


def test_a_quick_run_measures_some_of_a_full_one() -> None:
    assert set(QUICK.grids) < set(FULL.grids) and set(QUICK.batches) < set(FULL.batches)
    assert set(QUICK.samplers) < set(FULL.samplers) and QUICK.rounds < FULL.rounds


def test_copies_and_annotations_are_no_kernels() -> None:
    def is_kernel(name: str, device: DeviceType, is_user_annotation: bool = False) -> bool:
        return _is_kernel(
            SimpleNamespace(name=name, device_type=device, is_user_annotation=is_user_annotation)
        )

    assert is_kernel("nvjet_tst_128x256", DeviceType.CUDA)
    assert not is_kernel("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA)
    assert not is_kernel("## Call CompiledFxGraph", DeviceType.CUDA, is_user_annotation=True)
    assert not is_kernel("cudaLaunchKernel", DeviceType.CPU)
