"""Arms that are wrong are refused, and what is counted is right."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import Any

import pytest
import torch
from subjects import SUBJECTS, block, rows_of, sampling, training
from torch import Tensor
from torch.nn.attention import SDPBackend
from torch.utils.flop_counter import FlopCounterMode

import msf
from benchmarks.arms import Arm
from benchmarks.block import BlockPass
from benchmarks.gate import SLACK
from benchmarks.subject import Subject
from benchmarks.training import TrainingStep
from benchmarks.transformers import ARMS, EAGER, PLAIN, arm
from msf.seeds import generator
from msf_kernels import dispatch
from numerics import relative_error

OURS = arm("ours", ours=True)
IN_BLOCKS = ("gate_residual_adaln", "attention", "bias_gelu")


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
