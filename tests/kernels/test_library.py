"""What every operator promises to PyTorch, checked on one small call of each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import msf_kernels as msf
from msf_kernels.library import by_name, define
from numerics import DEVICE, normal
from processes import process

from .cases import CASES, Case, leaves

DTYPES = pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.bfloat16, torch.float16],
    ids=["fp64", "fp32", "bf16", "fp16"],
)
GRADIENT = pytest.mark.gradient
# What PyTorch makes of an operator is the same for all its options, and above the kernels.
FIRST_EXAMPLE = pytest.mark.first_example()
FIRST_ON_KERNELS = pytest.mark.first_example("reference")
Outputs = tuple[Tensor, ...]
IMPLEMENTATION = ("test_schema", "test_faketensor")


def gradients(
    case: Case, inputs: list[Tensor], outputs: Outputs, cotangents: Sequence[Tensor | None]
) -> tuple[Tensor | None, ...]:
    """Of the inputs, from the cotangents that are there; none of an operator without a gradient."""
    if not case.gradient:
        return ()
    pairs = [pair for pair in zip(outputs, cotangents, strict=True) if pair[1] is not None]
    used, grads = zip(*pairs, strict=True)
    moving = leaves(inputs)
    return torch.autograd.grad(used, moving, grads, retain_graph=True, allow_unused=True)


def cotangents_of(outputs: Outputs) -> list[Tensor]:
    return [normal(*output.shape, dtype=output.dtype) for output in outputs]


class Recorder(TorchDispatchMode):
    """Records the operators of ours that run, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "msf":
            self.calls.append((func, args))
        return func(*args, **(kwargs or {}))


def test_cases_cover_every_operator() -> None:
    assert {case.op for case in CASES} == set(msf.OPERATORS)


@GRADIENT
def test_gradcheck(case: Case) -> None:
    # In random directions: the whole Jacobian takes hundreds of calls. Absent gradients have a test
    # of their own.
    options = {"fast_mode": True, "check_undefined_grad": False}
    assert torch.autograd.gradcheck(case.call, case.inputs(), **options)


@GRADIENT
@FIRST_ON_KERNELS
def test_gradients_of_several_cotangents_at_once(case: Case) -> None:
    inputs = case.inputs()
    outs, moving = case.outputs(inputs), leaves(inputs)
    cotangents = [torch.randn(2, *out.shape, dtype=out.dtype, device=out.device) for out in outs]
    expected = [
        torch.autograd.grad(outs, moving, grads, retain_graph=True) for grads in zip(*cotangents)
    ]
    got = torch.autograd.grad(outs, moving, cotangents, is_grads_batched=True)
    torch.testing.assert_close(list(got), list(map(torch.stack, zip(*expected))))


def test_opcheck_of_forward_and_backward(case: Case, backend_name: str) -> None:
    # Of a backend it can be wrong what it writes to and which strides its outputs have.
    kernels = {} if backend_name == "reference" else {"test_utils": IMPLEMENTATION}
    inputs = case.inputs(torch.float32)
    with Recorder() as recorder:
        outputs = case.outputs(inputs)
        gradients(case, inputs, outputs, cotangents_of(outputs))
    name = case.op
    (forward, forward_args), *backward_calls = recorder.calls
    torch.library.opcheck(forward, forward_args, **kernels)
    # The gradients of flow_interpolate and guided_euler_step are plain PyTorch.
    own_backward = case.gradient and hasattr(torch.ops.msf, f"{name}_backward")
    assert [op._opname for op, _ in backward_calls] == [f"{name}_backward"] * own_backward
    for backward, backward_args in backward_calls:
        detached = (arg.detach() if isinstance(arg, Tensor) else arg for arg in backward_args)
        torch.library.opcheck(backward, tuple(detached), **kernels)


@GRADIENT
@FIRST_EXAMPLE
@DTYPES
def test_every_input_gets_a_gradient_of_its_dtype(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    outputs = case.outputs(inputs)
    assert all(output.dtype == inputs[0].dtype for output in outputs)
    assert all(output.is_contiguous() for output in outputs)
    grads = gradients(case, inputs, outputs, cotangents_of(outputs))
    for tensor, grad in zip(leaves(inputs), grads, strict=True):
        assert grad is not None and grad.dtype == tensor.dtype and grad.shape == tensor.shape
        assert grad.isfinite().all() and grad.any()


def test_repeats_are_bitwise_equal(case: Case) -> None:
    inputs = case.inputs(torch.bfloat16)
    first, second = case.outputs(inputs), case.outputs(inputs)
    cotangents = cotangents_of(first)
    assert all(map(torch.equal, first, second))
    grads = [gradients(case, inputs, outputs, cotangents) for outputs in (first, second)]
    assert all(map(torch.equal, *grads))


@FIRST_ON_KERNELS
def test_compiles_without_a_graph_break(case: Case) -> None:
    torch.compiler.reset()
    inputs = case.inputs(torch.float32)
    compiled = torch.compile(case.call, fullgraph=True, backend="aot_eager")
    got, expected = replace(case, call=compiled).outputs(inputs), case.outputs(inputs)
    cotangents = cotangents_of(expected)
    assert all(map(torch.equal, got, expected))
    grads = [gradients(case, inputs, outputs, cotangents) for outputs in (got, expected)]
    assert all(map(torch.equal, *grads))


def test_strided_inputs_and_gradients(case: Case) -> None:
    inputs = case.inputs()
    expected = case.outputs(inputs)
    cotangents = cotangents_of(expected)
    # Same values, reversed strides.
    strided = [
        t.detach().mT.contiguous().mT.requires_grad_(t.requires_grad) if t.dim() > 1 else t
        for t in inputs
    ]
    strided_cotangents = [t.mT.contiguous().mT for t in cotangents]
    got = case.outputs(strided)
    assert all(output.is_contiguous() for output in got)
    torch.testing.assert_close(got, expected)
    plain = partial(gradients, case, inputs, expected)
    torch.testing.assert_close(gradients(case, strided, got, strided_cotangents), plain(cotangents))
    expanded = [t.new_ones(()).expand(t.shape) for t in cotangents]
    torch.testing.assert_close(plain(expanded), plain([torch.ones_like(t) for t in cotangents]))


@GRADIENT
@pytest.mark.several_outputs
def test_an_absent_gradient_counts_as_zero(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.outputs(inputs)
    cotangents, of = cotangents_of(outputs), partial(gradients, case, inputs, outputs)
    for present in range(len(cotangents)):
        absent = [c if i == present else None for i, c in enumerate(cotangents)]
        zeros = [c if i == present else torch.zeros_like(c) for i, c in enumerate(cotangents)]
        for got, expected in zip(of(absent), of(zeros), strict=True):
            torch.testing.assert_close(torch.zeros_like(expected) if got is None else got, expected)


def test_an_absent_gradient_costs_nothing() -> None:
    x, y = normal(2, 3, 5).requires_grad_(), normal(2, 3, 5)
    x_out, _ = msf.gate_residual_adaln(x, y, normal(2, 5), normal(2, 5), normal(2, 5))
    with Recorder() as recorder:
        x_out.sum().backward()
    assert [op._opname for op, _ in recorder.calls] == ["gate_residual_backward"]


@GRADIENT
@FIRST_ON_KERNELS
def test_one_input_alone_can_need_a_gradient(case: Case) -> None:
    inputs = case.inputs()
    outputs = case.outputs(inputs)
    cotangents = cotangents_of(outputs)
    expected = gradients(case, inputs, outputs, cotangents)
    for index, tensor in enumerate(leaves(inputs)):
        alone = [t if t is tensor else t.detach() for t in inputs]
        pairs = zip(case.outputs(alone), cotangents, strict=True)
        outputs, grads = zip(*((o, c) for o, c in pairs if o.requires_grad), strict=True)
        (grad,) = torch.autograd.grad(outputs, tensor, grads)
        torch.testing.assert_close(grad, expected[index])


@GRADIENT
@FIRST_ON_KERNELS
def test_checkpoints(case: Case) -> None:
    inputs = case.inputs()
    call = partial(checkpoint, case.call, use_reentrant=False)
    outputs = case.outputs(inputs)
    cotangents = cotangents_of(outputs)
    got, expected = (
        gradients(case, inputs, made, cotangents)
        for made in (replace(case, call=call).outputs(inputs), outputs)
    )
    assert all(one is other or torch.equal(one, other) for one, other in zip(got, expected))


def test_empty_batch(case: Case) -> None:
    inputs = case.inputs(torch.float32, batch=0)
    outputs = case.outputs(inputs)
    assert all(output.shape[0] == 0 for output in outputs)
    grads = gradients(case, inputs, outputs, cotangents_of(outputs))
    for tensor, grad in zip(leaves(inputs), grads, strict=True):
        assert grad is not None and grad.shape == tensor.shape and not grad.any()


@FIRST_ON_KERNELS
def test_autocast_does_not_reach_inside(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    expected = case.outputs(inputs)
    with torch.autocast(inputs[0].device.type, dtype=torch.bfloat16):
        got = case.outputs(inputs)
    assert all(map(torch.equal, got, expected))


def test_a_first_call_inside_a_transform_leaves_others_their_plans() -> None:
    code = """
import torch, msf_kernels
from msf_kernels.library import is_plain
table = torch.ones(2)
step = lambda x: msf_kernels.guided_euler_step(x, x, None, table, table, step=torch.tensor(1))
torch.func.grad(lambda x: step(x).sum())(table)
print(is_plain(table))
"""
    assert process(code).stdout == "True\n"


def test_functions_take_the_arguments_that_they_name() -> None:
    def function(gate: str, x: str, absent: int = 3) -> tuple[str, str, int]:
        return x, gate, absent

    assert by_name("gate_residual", function)("x", "y", None, "gate", False) == ("x", "gate", 3)


def test_a_gradient_has_the_name_of_an_argument() -> None:
    op = define(
        "wrong_gradient(Tensor x) -> Tensor",
        reference=lambda x: x + 1,
        fake=lambda x: x.new_empty(x.shape),
        backward=lambda ctx, grad: {"y": grad},
    )
    out = op(normal(2).requires_grad_())
    with pytest.raises(AssertionError, match=r"^msf::wrong_gradient has no argument y$"):
        out.sum().backward()


@pytest.mark.operator("adaln_modulate")
def test_numbers_that_nobody_has_negated_yet() -> None:
    """The imaginary part of a conjugate is a view of the numbers as they were, and a flag."""
    numbers = torch.randn(2, 3, 8, dtype=torch.complex64, device=DEVICE)
    x = torch.conj(numbers).imag
    assert x.is_neg()
    shift, scale = normal(2, 2, 8, dtype=torch.float32).unbind()
    assert torch.equal(
        msf.adaln_modulate(x, shift, scale), msf.adaln_modulate(-numbers.imag, shift, scale)
    )


@pytest.mark.operator("adaln_modulate")
@pytest.mark.parametrize("grad", [False, True])
def test_modes_traces_and_profilers_see_the_operator(grad: bool) -> None:
    inputs = normal(2, 3, 8).requires_grad_(grad), normal(2, 8), normal(2, 8)
    seen = []

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    with Mode():
        msf.adaln_modulate(*inputs)
    assert "msf.adaln_modulate.default" in seen
    with torch.profiler.profile() as profile:
        msf.adaln_modulate(*inputs)
    assert "msf::adaln_modulate" in {event.name for event in profile.events()}
    trace = torch.jit.trace(msf.adaln_modulate, [x.detach() for x in inputs], check_trace=False)
    assert "msf::adaln_modulate" in str(trace.graph)
