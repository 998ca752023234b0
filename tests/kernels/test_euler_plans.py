"""Steps like earlier ones, whose scalars change: each is compared with one that has no plan."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from msf_kernels import dispatch, guided_euler_merge, guided_euler_step
from msf_kernels.euler import cuda as euler_cuda
from numerics import DEVICE, normal

from .fresh import assert_right

pytestmark = pytest.mark.operator("guided_euler_step")
FP32, BF16 = torch.float32, torch.bfloat16
both = pytest.mark.parametrize("function", [guided_euler_step, guided_euler_merge])


def scalar(value: float, dtype: torch.dtype = FP32) -> Tensor:
    return torch.tensor(value, dtype=dtype, device=DEVICE)


def table(*values: float) -> Tensor:
    return torch.tensor(values, dtype=FP32, device=DEVICE)


def row(number: int) -> Tensor:
    return torch.tensor(number, device=DEVICE)


def arguments(function: Callable[..., Tensor], *shape: int) -> dict[str, Any]:
    """Of a step of images in float32 along velocities in bfloat16, without its scalars."""
    batch, channels, height, width = shape
    x, (v_cond, v_uncond) = normal(*shape, dtype=FP32), normal(2, *shape, dtype=BF16)
    made = {"x": x, "v_cond": v_cond, "v_uncond": v_uncond}
    if function is guided_euler_merge:
        made["base"] = normal(batch, channels, height // 2, width // 2, dtype=FP32)
    return made


@pytest.fixture
def launched(backend_name: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What the Python of the kernels in CUDA launches; replays run none of it."""
    if backend_name != "cuda":
        pytest.skip("counts what the Python of kernels in CUDA launches")
    names: list[str] = []
    original = euler_cuda.launch

    def launch(name: str, *args: Any) -> None:
        names.append(name)
        original(name, *args)

    monkeypatch.setattr(euler_cuda, "launch", launch)
    dispatch.generation += 1  # no plan of another test holds
    yield names


@both
@pytest.mark.parametrize(
    "given",
    [
        {"guidance_scale": 3.5, "dt": 0.1},
        {"guidance_scale": 3, "dt": np.float64(0.1)},
        {"guidance_scale": scalar(3.5), "dt": 0.1},
        {"guidance_scale": scalar(3.5), "dt": scalar(0.1)},
        {"guidance_scale": table(9, 3.5), "dt": table(9, 0.1), "step": row(1)},
    ],
    ids=["floats", "integer", "tensor and float", "tensors", "tables"],
)
def test_what_is_replayed(
    function: Callable[..., Tensor], given: dict[str, Any], launched: list[str]
) -> None:
    """From the third call on, with new floats at each."""
    first = arguments(function, 2, 3, 4, 6)
    kind, counts = type(given["dt"]), []
    for i in range(5):
        if kind is not Tensor:
            given = {**given, "dt": kind(0.1 / (i + 1))}
        function(**first, **given)
        counts.append(len(launched))
    assert counts == [1, 2, 2, 2, 2]


def test_bounds_of_zero_are_replayed(launched: list[str]) -> None:
    first = arguments(guided_euler_merge, 2, 3, 4, 6)
    for count, low in enumerate((0.0, -0.0, 0), 1):
        for _ in range(4):
            guided_euler_merge(**first, guidance_scale=3.5, dt=0.1, clamp=(low, 1.0))
        assert len(launched) == 2 * count


@both
def test_floats_that_change(function: Callable[..., Tensor]) -> None:
    first = arguments(function, 2, 3, 4, 6)
    numbers = 1.5, 0.1, 0.0, -0.0, 1.5, 1e9, 1, True, 4, np.float64(0.3), 2**-40
    for _ in range(3):
        for scale in (3.5, 1.0, -2.0):
            for dt in numbers:
                assert_right(function, **first, guidance_scale=scale, dt=dt)
                assert_right(function, **first, guidance_scale=dt, dt=scale)


@both
def test_the_sign_of_a_step_of_zero(function: Callable[..., Tensor]) -> None:
    first = arguments(function, 1, 1, 2, 2)
    x = torch.full_like(first["x"], -0.0)
    v = torch.ones_like(first["v_cond"])
    first |= {"x": x, "v_cond": v, "v_uncond": None, "guidance_scale": 1.0}
    if "base" in first:
        first["base"] = torch.full_like(first["base"], -0.0)
    for _ in range(4):
        for zero in (0.0, -0.0):
            got = function(**first, dt=zero)
            assert torch.equal(got.signbit(), torch.full_like(got, zero).signbit())


@both
def test_scalars_that_are_changed_in_place(function: Callable[..., Tensor]) -> None:
    first = arguments(function, 2, 3, 4, 6)
    x, scale, dt, step = first["x"], scalar(3.5), scalar(0.1), row(0)
    scales, steps = table(3.5, 1.0, -2.0), table(0.1, 0.2, 0.3)
    for i in range(6):
        assert_right(function, **first, guidance_scale=scale, dt=dt)
        assert_right(function, **first, guidance_scale=2.5, dt=dt)
        assert_right(function, **first, guidance_scale=scales, dt=steps, step=step)
        x.neg_()
        scale.add_(1)
        dt.div_(2)
        steps.neg_()
        step.fill_(i % 3)


@both
def test_calls_that_differ_in_one_thing(function: Callable[..., Tensor]) -> None:
    first = arguments(function, 2, 4, 4, 6) | {"guidance_scale": 3.5, "dt": 0.1}
    x, v = first["x"], first["v_cond"]
    tokens = normal(2, 6, 16, dtype=BF16)
    rows = {"guidance_scale": table(1, 2, 3), "dt": table(0.1, 0.2, 0.3), "step": row(2)}
    changes: list[dict[str, Any]] = [
        {},
        {"dt": 0.2},
        {"guidance_scale": 1.0},
        {"guidance_scale": 4},
        {"dt": 1},
        {"dt": scalar(0.3)},
        {"dt": scalar(0.3, torch.float64)},
        {"dt": scalar(0.3, BF16)},
        {"guidance_scale": scalar(2.0)},
        {"guidance_scale": scalar(2.0), "dt": scalar(0.3)},
        rows,
        {**rows, "step": row(0)},
        {"v_uncond": None},
        {"v_uncond": v},  # one tensor as two arguments
        {"v_cond": tokens, "v_uncond": None, "patch": 2},
        {"v_cond": tokens, "v_uncond": tokens.flip(0), "patch": 2},
        {"v_cond": tokens[:1].expand(2, -1, -1), "v_uncond": tokens, "patch": 2},
        {"x": x.contiguous(memory_format=torch.channels_last)},
        {"v_cond": v.contiguous(memory_format=torch.channels_last)},
        {"v_cond": v.mT.contiguous().mT},
        {"x": x.mT.contiguous().mT},
        {"x": torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)},
        {"v_cond": v.float(), "v_uncond": v.float() + 1},
        {"v_cond": torch.nn.Parameter(v)},
        {"x": x.clone().requires_grad_()},
        arguments(function, 3, 4, 4, 6),
        arguments(function, 2, 4, 4, 8),
        arguments(function, 0, 4, 4, 6),
        *(
            [{"start": normal(2, 4, 4, 6, dtype=FP32)}, {"start": x}]
            if function is guided_euler_step
            else [
                {"mode": "bilinear"},
                {"clamp": (-1, 1)},
                {"clamp": (-0.5, 0.5)},
                {"mean": table(1, 2, 3, 4)},
                {"std": table(1, 2, 3, 4)},
            ]
        ),
    ]
    wrong: list[dict[str, Any]] = [
        {"dt": "0.1"},
        {"dt": None},
        {"dt": 10**400},
        {"dt": table(0.1)},
        {"dt": scalar(0.1).requires_grad_()},
        {"guidance_scale": 2j},
        {"guidance_scale": [2.0]},
        {"step": row(0)},
        {**rows, "step": row(0).float()},
        {**rows, "dt": table(0.1)},
        {"patch": 0},
        {"patch": 3},
        {"x": x.bfloat16().double()},
        {"v_uncond": v.float()},
        *([{**rows, "step": row(3)}, {**rows, "step": row(-1)}] if DEVICE == "cpu" else []),
    ]
    for _ in range(2):  # the first calls choose, the second are recorded, others are replays
        for change in (*changes, *wrong, *changes):
            assert_right(function, **{**first, **change})
    with torch.inference_mode():
        assert_right(function, **first)


def test_gradients_of_steps_whose_floats_change() -> None:
    first = arguments(guided_euler_step, 2, 3, 4, 6)
    grad = normal(2, 3, 4, 6, dtype=FP32)

    def call(dt: Any, **inputs: Tensor) -> tuple[Tensor, ...]:
        moving = [tensor.detach().requires_grad_() for tensor in inputs.values()]
        out = guided_euler_step(*moving, 3.5, dt)
        return out, *torch.autograd.grad(out, moving, grad)

    for i in range(4):
        for dt in (0.5 / (i + 1), 1, scalar(0.3)):
            assert_right(call, dt, **first)


def test_steps_in_threads(backend_name: str) -> None:
    if backend_name == "triton":
        pytest.skip("Triton's interpreter runs in one thread")
    first = arguments(guided_euler_step, 2, 3, 4, 6)
    errors = []

    def run(scale: float) -> None:
        try:
            for i in range(20):
                assert_right(guided_euler_step, **first, guidance_scale=scale, dt=1 / (i + 1))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[i / 3]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
