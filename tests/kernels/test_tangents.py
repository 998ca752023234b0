"""Tangents, transforms and compiled graphs of every operator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from numerics import normal

from .cases import Case, leaves

GRADIENT = pytest.mark.gradient
REFERENCE = pytest.mark.reference
# What PyTorch makes of an operator is the same for all its options, and above the kernels.
FIRST_EXAMPLE = pytest.mark.first_example()


@REFERENCE
def test_tangents_of_forward_mode(case: Case) -> None:
    """Against finite differences in float64, of every input that has the dtype of the call."""
    inputs = [tensor.detach() for tensor in case.inputs()]
    wide = [tensor.dtype == torch.float64 for tensor in inputs]
    tangents = [normal(*x.shape) if w else torch.zeros_like(x) for x, w in zip(inputs, wide)]

    def moved(by: float) -> tuple[Tensor, ...]:
        pairs = zip(inputs, tangents, wide)
        return case.outputs([x + by * tangent if w else x for x, tangent, w in pairs])

    def call(*moving: Tensor) -> tuple[Tensor, ...]:
        found = iter(moving)
        return case.outputs([next(found) if w else x for x, w in zip(inputs, wide)])

    moving, along = (
        tuple(value for value, w in zip(values, wide) if w) for values in (inputs, tangents)
    )
    step = 1e-6
    outputs, got = torch.func.jvp(call, moving, along)
    torch.testing.assert_close(outputs, moved(0))
    for tangent, above, below in zip(got, moved(step), moved(-step)):
        torch.testing.assert_close(tangent, (above - below) / (2 * step), rtol=1e-5, atol=1e-6)
        assert tangent.any()


@REFERENCE
@pytest.mark.first_example(operators=("gate_residual_adaln", "attention", "guided_euler_merge"))
def test_no_road_to_an_operator_loses_a_tangent(case: Case) -> None:
    """Graphs that were made before have the operator itself, not the function that we offer."""
    first, *others = (tensor.detach() for tensor in case.inputs())
    direction = normal(*first.shape)

    class Call(torch.nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            return case.outputs([x, *others])

    def of_dual(call: Callable[..., Any], x: Tensor) -> tuple[Tensor | None, ...]:
        with forward_ad.dual_level():
            outputs = call(forward_ad.make_dual(x, direction))
            return tuple(forward_ad.unpack_dual(output).tangent for output in outputs)

    _, expected = torch.func.jvp(Call(), (first,), (direction,))
    assert all(tangent.any() for tangent in expected)
    torch.compiler.reset()
    graphs = [
        make_fx(Call())(first),
        torch.export.export(Call(), (first,), strict=False).module(),
        *(torch.compile(Call(), backend=backend) for backend in ("eager", "aot_eager")),
    ]
    for graph in graphs:
        torch.testing.assert_close(torch.func.jvp(graph, (first,), (direction,))[1], expected)
        torch.testing.assert_close(of_dual(graph, first), expected)
    for backend in ("eager", "aot_eager"):
        compiled = torch.compile(of_dual, backend=backend, fullgraph=True)  # the level in the graph
        torch.testing.assert_close(compiled(Call(), first), expected)
    if case.gradient:
        torch.testing.assert_close(of_dual(graphs[0], first.requires_grad_()), expected)


@REFERENCE
@GRADIENT
@FIRST_EXAMPLE
def test_a_tangent_can_be_trained_beside_its_value(case: Case) -> None:
    """As a MeanFlow loss does: gradients of the value, with the tangent as a constant."""
    inputs = case.inputs()
    first, direction = inputs[0], normal(*inputs[0].shape)

    def loss(call: Callable[..., Any]) -> Tensor:
        def value(x: Tensor) -> tuple[Tensor, ...]:
            outputs = call(x, *inputs[1:])
            return (outputs,) if isinstance(outputs, Tensor) else outputs

        values, tangents = torch.func.jvp(value, (first,), (direction,))
        return sum((v * t.detach()).sum() for v, t in zip(values, tangents))

    (grad,) = torch.autograd.grad(loss(case.call), first)
    torch.compiler.reset()
    compiled = torch.compile(lambda: loss(case.call), fullgraph=True, backend="aot_eager")
    (again,) = torch.autograd.grad(compiled(), first)
    torch.testing.assert_close(again, grad)
    assert grad.any()


def squares(case: Case, fixed: Sequence[Tensor]) -> Callable[..., Tensor]:
    """The sum of all outputs' squares, of the inputs before those that are fixed."""
    return lambda *moving: sum(out.square().sum() for out in case.outputs([*moving, *fixed]))


@REFERENCE
@GRADIENT
def test_transforms_of_torch_func(case: Case) -> None:
    """Gradient, vjp, Hessians both ways and vmap, of the sum of all outputs' squares."""
    inputs = case.inputs()
    moving, fixed = leaves(inputs), inputs[len(leaves(inputs)) :]

    loss = squares(case, fixed)
    expected = torch.autograd.grad(loss(*moving), moving)
    plain = [tensor.detach() for tensor in moving]
    got = torch.func.grad(loss, argnums=tuple(range(len(plain))))(*plain)
    torch.testing.assert_close(got, expected)
    value, pull = torch.func.vjp(loss, *plain)
    torch.testing.assert_close(pull(torch.ones_like(value)), expected)
    first, *others = plain
    of_first = squares(case, [*others, *fixed])
    hessian = torch.func.hessian(of_first)(first)
    flat = hessian.reshape(first.numel(), -1)
    torch.testing.assert_close(flat, flat.T)
    twice_reverse = torch.func.jacrev(torch.func.jacrev(of_first))(first)
    torch.testing.assert_close(twice_reverse, hessian)
    step, direction = 1e-5, normal(*first.shape)
    above, below = (torch.func.grad(of_first)(first + by * direction) for by in (step, -step))
    along = torch.tensordot(hessian, direction, first.dim())
    torch.testing.assert_close((above - below) / (2 * step), along, rtol=1e-5, atol=1e-6)
    pair = torch.stack([first, 2 * first])
    vectorised = torch.func.vmap(of_first)(pair)
    strided = torch.stack([first, 2 * first], 1)
    torch.testing.assert_close(torch.func.vmap(of_first, in_dims=1)(strided), vectorised)
    torch.testing.assert_close(vectorised, torch.stack([loss(x, *others) for x in pair]))


@REFERENCE
@GRADIENT
@FIRST_EXAMPLE
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_transforms_in_a_compiled_graph(case: Case, transform: str) -> None:
    first, *others = (tensor.detach() for tensor in case.inputs())
    loss = squares(case, others)

    def derive(x: Tensor) -> Any:
        if transform == "vmap":
            return torch.func.vmap(loss)(torch.stack([x, 2 * x]))
        return torch.func.grad(loss)(x)

    torch.compiler.reset()
    compiled = torch.compile(derive, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(first), derive(first))


@REFERENCE
@GRADIENT
@FIRST_EXAMPLE
def test_backward_twice_is_right_or_refused(case: Case) -> None:
    inputs = case.inputs()
    moving, fixed = leaves(inputs), inputs[len(leaves(inputs)) :]

    loss = squares(case, fixed)

    def size(grads: Sequence[Tensor]) -> Tensor:
        return sum(grad.square().sum() for grad in grads)

    twice = size(torch.autograd.grad(loss(*moving), moving, create_graph=True))
    if hasattr(torch.ops.msf, f"{case.op}_backward"):  # other gradients are plain PyTorch
        line = r"^msf::\w+_backward has no derivative; torch.func.hessian has second ones$"
        with pytest.raises(NotImplementedError, match=line):
            twice.backward()
        return
    got = torch.autograd.grad(twice, moving)
    every = tuple(range(len(moving)))
    gradient = torch.func.grad(loss, argnums=every)
    plain = [tensor.detach() for tensor in moving]
    expected = torch.func.grad(lambda *x: size(gradient(*x)), argnums=every)(*plain)
    torch.testing.assert_close(got, expected)
