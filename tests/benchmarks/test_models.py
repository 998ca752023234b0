"""The command as a process; arms that are wrong; and that nothing stays patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from subjects import DEVICE, SUBJECTS, block, rows_of, sampling, training
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend

from benchmarks import fingerprint, models, run
from benchmarks.measure import _is_kernel
from benchmarks.models import CPU, GPU, SECONDS, Sizes
from benchmarks.results import Row
from benchmarks.store import load
from benchmarks.transformers import EAGER, arm

ROOT = Path(__file__).resolve().parents[2]
COMPILED = replace(arm("compiled", ours=True, mode="default"), unsupported_reason=lambda _: None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU it takes minutes")
def test_command(tmp_path: Path) -> None:
    before = set((ROOT / "benchmarks" / "results").rglob("*"))
    words = [sys.executable, "-m", "benchmarks.run", "models", "--out", str(tmp_path)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        words, cwd=ROOT, env=one_thread, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert set((ROOT / "benchmarks" / "results").rglob("*")) == before
    (path,) = tmp_path.glob("*.json")
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    rows = document["rows"]
    kinds = list(dict.fromkeys((row["op"], tuple(row["shape"])) for row in rows))[:4]
    assert [op for op, _ in kinds] == list(SECONDS)  # then every second size
    timed = [row for row in rows if row["status"] == "ok"]
    current = {"eager": None, "ours": fingerprint.of_models()}
    assert all(row["fingerprint"] == current[row["arm"]] for row in timed)
    assert load(path).rows == [
        Row(**{**row, "shape": tuple(row["shape"]), "sizes": ()}) for row in rows
    ]
    assert {row["arm"] for row in timed} == {"eager", "ours"}
    assert {row["op"] for row in timed} == set(SUBJECTS)
    assert all(row["p10_us"] <= row["median_us"] for row in timed)
    assert all(row["kernels"] is None and row["peak_mib"] is None for row in rows)
    assert {row["status"] for row in rows if row not in timed} == {"skipped"}
    assert ran.stdout.count(" | ours | ") == len(timed) / 2
    assert "### sampling digits\n" in ran.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every arm can run")
def test_on_a_cpu_nothing_is_compiled(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["models", "--arms", "compile-flash"])
    assert caught.value.code == 2
    line = "benchmarks.run: no compile-flash: to compile a model for a CPU takes minutes\n"
    assert capsys.readouterr().err == line


def compiled_by(backend: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile with this backend in place of Inductor, which takes minutes."""
    compile = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda f, mode, **options: compile(f, backend=backend, **options)
    )


def test_each_compiled_arm_has_the_attention_it_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs: list[str] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled_by(aot_autograd(fw_compiler=keep), monkeypatch)
    subject = block(backward=False)
    for attention in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        subject.work(arm(attention.name, attention=attention, mode="default")).run()
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


def test_blocks_of_a_stage_share_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo gives up after 8 graphs of a function, and a stage of XL has 28 blocks."""
    graphs: list[Any] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return make_boxed_func(graph.forward)

    compiled_by(
        aot_autograd(fw_compiler=keep, bw_compiler=lambda graph, _: make_boxed_func(graph.forward)),
        monkeypatch,
    )
    (row,) = rows_of(training(), COMPILED)
    assert row.status == "ok"
    assert len(graphs) == 2  # one a stage


@pytest.mark.parametrize("sizes", [CPU, GPU], ids=["CPU", "GPU"])
def test_every_target_is_of_a_kind_and_another_case(sizes: Sizes) -> None:
    targets = list(models.targets(DEVICE, sizes))
    assert (
        {target.op for target in targets} == {target.family for target in targets} == set(SECONDS)
    )
    assert len({target.case for target in targets}) == len(targets)


def test_subjects_are_what_their_targets_say() -> None:
    for target in models.targets(DEVICE):
        row = target.draw().row
        assert (row.op, row.case) == (target.op, target.case)


def test_what_makes_graphs_runs_where_it_is_not_captured_in_another() -> None:
    for target in models.targets(DEVICE):
        assert any(arm.makes_graphs for arm in target.arms) == (target.op == "sampling")


def test_copies_and_annotations_are_no_kernels() -> None:
    def is_kernel(name: str, device: DeviceType, is_user_annotation: bool = False) -> bool:
        return _is_kernel(
            SimpleNamespace(name=name, device_type=device, is_user_annotation=is_user_annotation)
        )

    assert is_kernel("nvjet_tst_128x256", DeviceType.CUDA)
    assert not is_kernel("Memcpy HtoD (Pageable -> Device)", DeviceType.CUDA)
    assert not is_kernel("## Call CompiledFxGraph", DeviceType.CUDA, is_user_annotation=True)
    assert not is_kernel("cudaLaunchKernel", DeviceType.CPU)
