"""What is kept of one call is right for the next: each is compared with a call that has no plan."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import msf_kernels as msf
from msf_kernels import dispatch
from msf_kernels.adaln import cuda as adaln_cuda
from msf_kernels.adaln import op as adaln_op
from msf_kernels.attention import op as attention_op
from msf_kernels.dispatch import Implementation
from numerics import DEVICE, normal

from .cases import Case, leaves
from .fresh import Watching, assert_right
from .stand_ins import ARGS, GATE, answering

ADALN = pytest.mark.operator("gate_residual_adaln")


def arguments(*shape: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Of gate_residual_adaln, in float32 with 16-byte vectors."""
    batch, _, channels = shape
    gate, shift, scale = normal(batch, 3 * channels, dtype=dtype).chunk(3, 1)
    x, y, bias = (normal(*size, dtype=dtype) for size in (shape, shape, (channels,)))
    return {"x": x, "y": y, "gate": gate, "shift": shift, "scale": scale, "y_bias": bias}


@pytest.mark.first_example("reference", "cuda")
def test_calls_of_one_signature(case: Case, backend_name: str) -> None:
    """With new tensors each: the first chooses, the second is recorded, others are replays. What is
    interpreted is run each time."""
    replayed = backend_name != "reference" and "cuda" in (backend_name, DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        for _ in range(4 if replayed else 2):
            inputs = case.inputs(dtype)
            assert_right(case.call, *(x.detach() for x in inputs))
            if case.gradient:
                assert_right(_with_gradients(case), *inputs)


def _with_gradients(case: Case) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        outputs = case.outputs(list(inputs))
        grads = [torch.sin(3 * out.detach()) for out in outputs]
        return *outputs, *torch.autograd.grad(outputs, leaves(list(inputs)), grads)

    return call


@ADALN
def test_calls_that_differ_in_one_thing() -> None:
    first = arguments(2, 3, 8)
    odd = normal(2, 3, 9, dtype=torch.float32)
    half = arguments(2, 3, 8, dtype=torch.bfloat16)
    changes: list[dict[str, Any]] = [
        {},
        {"y_bias": None},
        {"y_bias": first["y_bias"].bfloat16()},
        {"y_bias": torch.nn.Parameter(first["y_bias"])},
        {"eps": 0.5},
        {"eps": 1},
        {"eps": True},
        {"eps": 0.0},
        {"rounding": "eager"},
        {"norm": "rms"},
        {"gate": first["gate"][:1]},
        {"gate": first["gate"].contiguous()},
        {"gate": first["gate"].mT.contiguous().mT},
        {"x": first["x"].mT.contiguous().mT},
        {"y": odd[..., 1:]},
        {"y": half["y"]},
        {"x": first["x"].clone().requires_grad_()},
        {"y": first["x"]},  # one tensor as two arguments
        half,
        arguments(3, 3, 8),
        arguments(2, 4, 8),
        arguments(2, 3, 7),
        arguments(0, 3, 8),
    ]
    wrong: list[dict[str, Any]] = [
        {"y": normal(2, 4, 8, dtype=torch.float32)},
        {"gate": normal(3, 8, dtype=torch.float32)},
        {"y_bias": first["y_bias"].half()},
        {"scale": None},
        {"scale": first["scale"].int()},
        {"x": first["x"].to_sparse()},
        *({name: torch.nested.nested_tensor([*first[name]])} for name in ("x", "y", "scale")),
        {"eps": -0.5},
        {"eps": "small"},
        {"eps": 10**400},
        {"rounding": "Eager"},
        {"rounding": ["eager"]},
    ]
    for _ in range(2):  # the first calls choose, the second are recorded, others are replays
        for change in (*changes, *wrong, *changes):
            assert_right(msf.gate_residual_adaln, **{**first, **change})
    with torch.no_grad(), torch.inference_mode():
        assert_right(msf.gate_residual_adaln, **first)
        assert_right(msf.gate_residual_adaln, **arguments(2, 3, 8))
    with torch.autocast(DEVICE, torch.bfloat16):
        assert_right(msf.gate_residual_adaln, **first)


@pytest.mark.operator("attention")
def test_numbers_of_another_kind_are_another_signature() -> None:
    """Though 1, 1.0 and True are equal."""
    qkv = normal(2, 4, 3 * 64, dtype=torch.bfloat16)
    for heads in (1, 1.0, True, 2, "1", 1):
        for _ in range(3):
            assert_right(msf.attention, qkv, num_heads=heads)


@pytest.mark.operator("pyramid_merge")
def test_the_sign_of_zero() -> None:
    base, residual = -normal(1, 1, 2, 2).abs(), -normal(1, 1, 4, 4).abs()
    for _ in range(4):
        for zero in (0.0, -0.0):
            got = msf.pyramid_merge(base, residual, clamp=(zero, 1.0))
            with Watching():
                expected = msf.pyramid_merge(base, residual, clamp=(zero, 1.0))
            assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.operator("gate_residual")
def test_a_constant_becomes_one_that_asks_for_a_gradient() -> None:
    data, noise, t = normal(2, 3), normal(2, 3), normal(2)
    for _ in range(4):
        for wanted in (False, True):
            assert_right(msf.flow_interpolate, data, noise, t.clone().requires_grad_(wanted))


@ADALN
def test_tensors_at_other_addresses() -> None:
    """A kernel that reads 16 bytes at once gets a copy of what is not aligned."""
    first = arguments(2, 3, 8)
    room = normal(2 * 3 * 8 + 8, dtype=torch.float32)
    for _ in range(3):
        for offset in (0, 1, 4, 2):
            for name in ("x", "y"):
                moved = room[offset : offset + 48].view(2, 3, 8)
                assert_right(msf.gate_residual_adaln, **{**first, name: moved})
            bias = room[offset : offset + 8]
            assert_right(msf.gate_residual_adaln, **{**first, "y_bias": bias})


@ADALN
@pytest.mark.parametrize("aligned", [True, False])
def test_what_is_replayed(
    aligned: bool, backend_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the third call on the Python of the kernels does not run."""
    if backend_name != "cuda":
        pytest.skip("counts what the Python of kernels in CUDA launches")
    launched = []

    def launch(name: str, *args: Any) -> None:
        launched.append(name)
        original(name, *args)

    original = adaln_cuda.launch
    monkeypatch.setattr(adaln_cuda, "launch", launch)
    first = arguments(2, 5, 8)
    if not aligned:
        first["x"] = normal(2 * 5 * 8 + 1, dtype=torch.float32)[1:].view(2, 5, 8)
    counts = []
    for _ in range(4):
        msf.gate_residual_adaln(**first)
        counts.append(len(launched))
    assert counts == ([1, 2, 2, 2] if aligned else [1, 2, 3, 4])  # a copy is not replayed
    with msf.backend("reference"):
        msf.gate_residual_adaln(**first)
    with msf.backend(attention="reference"):
        msf.gate_residual_adaln(**first)
    assert len(launched) == counts[-1] + 1  # the first call of another request


@ADALN
def test_what_only_a_gradient_reads_is_made_for_one_alone(backend_name: str) -> None:
    """The first call chooses, the second is recorded, the third in CUDA a replay."""
    if backend_name == "reference":
        pytest.skip("the reference makes it always")
    bfloat16 = arguments(2, 3, 8, dtype=torch.bfloat16)
    x, y, gate, shift, scale, bias = bfloat16.values()
    qkv = normal(2, 4, 3 * 64, dtype=torch.bfloat16)
    for op, tensor, *others in (
        (adaln_op._adaln_modulate, x, shift, scale, 1e-6, "fp32", "layer"),
        (adaln_op._gate_residual_adaln, x, y, bias, gate, shift, scale, 1e-6, "fp32", "layer"),
        (attention_op._attention, qkv, *[None] * 6, 1, 1e-6, "rms"),
    ):
        for wanted in (False, True, False):
            for _ in range(3):
                *made, last = op(tensor.clone().requires_grad_(wanted), *others)
                assert isinstance(last, Tensor) == wanted and isinstance(made[-1], Tensor)
        with torch.no_grad():
            for _ in range(3):
                assert op(tensor.clone().requires_grad_(), *others)[-1] is None


@ADALN
def test_replays_in_threads(backend_name: str) -> None:
    if backend_name == "triton":
        pytest.skip("Triton's interpreter runs in one thread")
    first = arguments(2, 3, 8)
    errors = []

    def run() -> None:
        try:
            for _ in range(20):
                assert_right(msf.gate_residual_adaln, **first)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors


def answer() -> float:
    return msf.gate_residual(*ARGS)[0, 0, 0].item()


@pytest.mark.usefixtures("kernels")
def test_requests_follow_each_other() -> None:
    dispatch.register(GATE, "triton", answering(7.0, lasting=True))
    for _ in range(3):
        with msf.backend("triton"):
            assert answer() == 7
            with msf.backend("reference"):
                assert answer() != 7
            with msf.backend("cuda"), pytest.raises(msf.BackendUnavailable, match="no cuda kernel"):
                answer()
            assert answer() == 7
        with msf.backend("cuda", gate_residual="triton"):
            assert answer() == 7


@pytest.mark.usefixtures("kernels")
def test_a_backend_that_is_registered_later() -> None:
    dispatch.register(GATE, "triton", answering(7.0, lasting=True))
    with msf.backend("triton"):
        assert answer() == answer() == 7
        dispatch.register(GATE, "triton", answering(8.0, lasting=True))
        assert answer() == 8


def test_reasons_that_may_change_are_asked_for_each_time(
    kernels: dict[str, Implementation], monkeypatch: pytest.MonkeyPatch
) -> None:
    reasons: list[str | None] = [None, None, "switched off", None]
    kernels["cuda"] = answering(7.0, unsupported_args_reason=lambda *_: reasons.pop(0))
    kernels["triton"] = answering(8.0, lasting=True)
    monkeypatch.setattr(dispatch, "automatic_order", lambda *_: ("cuda", "triton"))
    with msf.backend("auto"):
        assert [answer() for _ in range(4)] == [7, 7, 8, 7]


def test_a_kernel_that_compiles_for_some_addresses_alone(
    kernels: dict[str, Implementation], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def run(x: Tensor, *_: Any) -> Tensor:
        calls.append(x)
        if len(calls) > 2:
            raise dispatch.CompilationFailed("no luck")
        return torch.full_like(x, 7.0)

    kernels["triton"] = Implementation(run, lasting=True)
    monkeypatch.setattr(dispatch, "automatic_order", lambda *_: ("triton", "reference"))
    monkeypatch.setattr(dispatch, "_failed", {})
    with msf.backend("auto"):
        assert [answer() == 7 for _ in range(5)] == [True, True, False, False, False]
    with msf.backend("triton"), pytest.raises(msf.BackendUnavailable, match="no luck"):
        answer()
