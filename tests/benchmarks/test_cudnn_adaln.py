"""The peer of cuDNN, with a module in place of its own: which plan it takes, and how it runs."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import cudnn_adaln
from benchmarks.timing import HostStopwatch

MILLISECONDS = (9.0, None, 4.0, 5.0)  # of the four plans; the second cannot be built


class Unsupported(Exception):
    pass


class Name:
    """A tensor of the graph: a key of the pack."""

    def set_output(self, _: bool) -> Name:
        return self

    def set_data_type(self, _: torch.dtype) -> Name:
        return self


class Graph:
    """Computes adaLN on whichever plan, in the time of that plan."""

    def __init__(self, log: list[Any]) -> None:
        self.log, self.ins, self.outs, self.now = log, {}, [], 0.0
        log.append(self)

    def tensor_like(self, _: Tensor) -> Name:
        return Name()

    def adalayernorm(self, *, name: str, norm_forward_phase: str, **ins: Name) -> list[Name]:
        assert norm_forward_phase == "training"
        self.ins, self.outs = ins, [Name() for _ in range(3)]
        return self.outs

    def adalayernorm_backward(self, *, name: str, **ins: Name) -> list[Name]:
        self.ins, self.outs = ins, [Name() for _ in range(3)]
        return self.outs

    def __getattr__(self, name: str) -> Any:
        return lambda *args: self.log.append((name, *args))

    def get_execution_plan_count(self) -> int:
        return len(MILLISECONDS)

    def get_workspace_size_plan_at_index(self, index: int) -> int:
        if MILLISECONDS[index] is None:
            raise RuntimeError("not built")
        return index

    def execute_plan_at_index(
        self, pack: Mapping[Name, Tensor], workspace: Tensor, index: int, handle: str
    ) -> None:
        assert handle == "handle" and len(workspace) == index
        self.now += MILLISECONDS[index] or 0.0
        self.log.append(index)
        values = {key: pack[name] for key, name in self.ins.items()}
        for out, value in zip(self.outs, (backward if "grad" in values else forward)(**values)):
            pack[out].copy_(value)


def forward(input: Tensor, scale: Tensor, bias: Tensor, epsilon: Tensor) -> tuple[Tensor, ...]:
    mean = input.mean(-1, keepdim=True)
    rstd = (input.var(-1, keepdim=True, correction=0) + epsilon).rsqrt()
    return (input - mean) * rstd * scale + bias, mean, rstd


def backward(
    grad: Tensor, input: Tensor, scale: Tensor, mean: Tensor, inv_variance: Tensor
) -> tuple[Tensor, ...]:
    normal, dy = (input - mean) * inv_variance, grad * scale
    centred = dy - dy.mean(-1, keepdim=True) - normal * (dy * normal).mean(-1, keepdim=True)
    return centred * inv_variance, (grad * normal).sum(1, True), grad.sum(1, True)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What happens to the graphs, in that order."""
    found: list[Any] = []
    cudnn: Any = ModuleType("cudnn")
    cudnn.cudnnGraphNotSupportedError = Unsupported
    cudnn.create_handle = lambda: "handle"
    cudnn.set_stream = lambda handle, stream: None
    cudnn.data_type = SimpleNamespace(FLOAT="float")
    cudnn.norm_forward_phase = SimpleNamespace(TRAINING="training")
    cudnn.heur_mode = SimpleNamespace(A="A", B="B", FALLBACK="fallback")
    cudnn.build_plan_policy = SimpleNamespace(ALL="all")
    cudnn.pygraph = lambda **_: Graph(found)
    monkeypatch.setitem(sys.modules, "cudnn", cudnn)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(
        cudnn_adaln, "stopwatch_of", lambda _: HostStopwatch(lambda: found_graph(found).now)
    )
    cudnn_adaln.executor.cache_clear()
    yield found
    cudnn_adaln.executor.cache_clear()


def found_graph(log: list[Any]) -> Graph:
    return [entry for entry in log if isinstance(entry, Graph)][-1]


def test_the_fastest_of_all_plans_is_taken_both_ways(log: list[Any]) -> None:
    x, shift, scale = torch.randn(2, 5, 8), torch.randn(2, 8), torch.randn(2, 8)
    inputs = [tensor.requires_grad_() for tensor in (x, shift, scale)]
    for _ in range(2):
        y = cudnn_adaln.modulate(x, shift, scale)
    grads = torch.autograd.grad(y, inputs, torch.ones_like(y).cumsum(1))
    right = F.layer_norm(x, (8,), eps=1e-6) * (1 + scale[:, None]) + shift[:, None]
    torch.testing.assert_close(y, right)
    exact = torch.autograd.grad(right, inputs, torch.ones_like(y).cumsum(1))
    torch.testing.assert_close(grads, exact)

    steps = [entry for entry in log if isinstance(entry, tuple)]
    built = [
        ("validate",),
        ("build_operation_graph",),
        ("create_execution_plans", ["A", "B", "fallback"]),
        ("check_support",),
        ("build_plans", "all"),
    ]
    assert steps == 2 * built  # one graph forward and one backward, however often they are called
    plans = [entry for entry in log if isinstance(entry, int)]
    tried = len(plans) - 3  # two calls forward and one backward
    assert set(plans) == {0, 2, 3}
    assert plans[-1] == 2 and plans[tried // 2 : tried // 2 + 2] == [2, 2]


def test_without_a_plan_that_runs_it_says_so(
    log: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def execute(*_: Any, **__: Any) -> None:
        raise Unsupported

    monkeypatch.setattr(Graph, "execute_plan_at_index", execute)
    x, row = torch.randn(2, 5, 8), torch.randn(2, 8)
    with pytest.raises(RuntimeError, match=r"^cuDNN has no plan that can run this$"):
        cudnn_adaln.modulate(x, row, row)
