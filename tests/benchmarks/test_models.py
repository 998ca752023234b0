"""The command as a process; arms that are wrong; and that nothing stays patched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from calls import session, target_of
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import msf
from benchmarks import fingerprint, models, run
from benchmarks.arms import Arm
from benchmarks.block import BlockPass
from benchmarks.gate import SLACK
from benchmarks.measure import _is_kernel, measure
from benchmarks.models import CPU, GPU, SECONDS, Sizes
from benchmarks.results import Row
from benchmarks.sampler import Sampling
from benchmarks.store import load
from benchmarks.subject import Subject
from benchmarks.training import TrainingStep
from benchmarks.transformers import ARMS, EAGER, PLAIN, arm
from msf.seeds import generator
from msf_kernels import dispatch
from numerics import relative_error

ROOT = Path(__file__).resolve().parents[2]
DEVICE = torch.device("cpu")
OURS = arm("ours", ours=True)
IN_BLOCKS = ("gate_residual_adaln", "attention", "bias_gelu")
COMPILED = replace(arm("compiled", ours=True, mode="default"), unsupported_reason=lambda _: None)


def block(backward: bool = True) -> BlockPass:
    return BlockPass.draw(CPU.stage, (2, 5), 2, backward, DEVICE)


def sampling() -> Sampling:
    return Sampling.draw("digits", (2, 1), 2, DEVICE)


def training() -> TrainingStep:
    return TrainingStep.draw("digits", 2, DEVICE)


SUBJECTS: dict[str, Callable[[], Subject]] = {
    "block": partial(block, False),
    "block and backward": block,
    "sampling": sampling,
    "training step": training,
}


def rows_of(subject: Subject, *arms: Arm) -> list[Any]:
    return measure(session(), target_of(subject, arms), [arm.name for arm in arms])


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


WRONG = [
    *((subject, name) for subject in ("block", "block and backward") for name in IN_BLOCKS),
    *((subject, name) for subject in ("sampling", "training step") for name in PLAIN),
]


@pytest.mark.parametrize(("subject", "name"), WRONG)
def test_a_wrong_operator_is_refused(
    subject: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = attrgetter(name)(msf.transformer)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        outputs = right(*args, **kwargs)
        if isinstance(outputs, Tensor):
            return 1.3 * outputs
        return outputs[0], 1.3 * outputs[1]

    monkeypatch.setattr(f"msf.transformer.{name}", wrong)
    eager, ours = rows_of(SUBJECTS[subject](), EAGER, OURS)
    assert eager.status == "ok" and eager.median_us > 0
    assert ours.status == "incorrect" and ours.median_us is None
    assert ours.error > SLACK * eager.error
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
    plain, ours = (subject.results(arm) for arm in (EAGER, OURS))
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
    math_attention = arm("math", attention=SDPBackend.MATH)  # whose products are counted
    with FlopCounterMode(display=False) as counter:
        drawn.work(math_attention).run()
    # The gradients of images and times, which nobody asks for, are 0.4 % of a small model's step.
    few = 0.004 if isinstance(drawn, TrainingStep) else 0
    assert drawn.row.flops == pytest.approx(counter.get_total_flops(), rel=few, abs=0)


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


def test_every_call_is_the_same_step() -> None:
    subject = training()
    weights = [tensor.clone() for tensor in subject.model.parameters()]
    first, second = (subject.work(EAGER).run()[0] for _ in range(2))
    assert all(map(torch.equal, first, second))
    assert all(map(torch.equal, weights, subject.model.parameters()))
    # A loss for each stage, and the gradient of each parameter as autograd leaves it.
    losses = subject.model.training_losses(
        subject.images, subject.labels, stage="base", generator=generator(0, 0, 0)
    )
    losses["total"].backward()
    base = [tensor.grad for tensor in subject.model.stages[0].parameters()]
    exact = subject.exact()
    assert len(exact) == len(weights) + 2
    for got, right in zip(exact, [*base, losses["total"][None]]):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-6)


def settings() -> list[Any]:
    """All that an arm's scope changes."""
    return [
        *(attrgetter(name)(msf.transformer) for name in PLAIN),
        dispatch._requested,
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch._functorch.config.enable_autograd_cache,
    ]


@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: arm.name)
@torch._functorch.config.patch(enable_autograd_cache=True)
def test_the_patches_are_undone(arm: Arm) -> None:
    before = settings()
    with pytest.raises(RuntimeError, match="in between"), arm.scope():
        assert settings() != before
        assert not torch._functorch.config.enable_autograd_cache
        assert (msf.transformer.attention is PLAIN["attention"]) == (not arm.ours)
        raise RuntimeError("in between")
    assert settings() == before


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
