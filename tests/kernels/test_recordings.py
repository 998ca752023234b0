"""What of a call can be replayed, and what a replay launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from msf_kernels.recording import Recording
from numerics import normal


@pytest.mark.parametrize(
    "call",
    [
        lambda x, recording: x + 1,
        lambda x, recording: x.clone(),
        lambda x, recording: torch.empty_like(x).fill_(x.sum().item()),
        lambda x, recording: x[:1],
        lambda x, recording: torch.empty_like(x)[:1],
    ],
)
def test_what_cannot_be_replayed(call: Callable[..., Tensor]) -> None:
    x = normal(2, 4)
    with Recording([x]) as recording:
        result = call(x, recording)
    assert recording.replay(result, lambda args: args, call) is None


def test_an_address_that_no_recording_was_asked_for_is_not_replayed() -> None:
    x = normal(2, 4)
    for address in (x.data_ptr(), x[1].data_ptr()):
        with Recording([x]) as recording:
            out = torch.empty_like(x)
            recording.launches.append((print, (recording.address(out), address)))
        assert recording.replay(out, lambda args: args, print) is None


def test_addresses_of_views_are_replayed() -> None:
    launched: list[Any] = []
    x = normal(2, 4)
    with Recording([x]) as recording:
        out = torch.empty_like(x)
        args = (recording.address(x[1]), (recording.address(out), 2, None, float("inf"), True))
        recording.launches.append((lambda *args: launched.append(args), args))
        result = out.view(8)
    replay = recording.replay(result, lambda args: args, print)
    assert replay is not None
    other = normal(2, 4)
    got = replay(other)
    assert got.shape == (8,) and got.data_ptr() != out.data_ptr()
    expected = (other[1].data_ptr(), (got.data_ptr(), 2, None, float("inf"), True))
    assert launched == [expected]


def test_numbers_are_replayed_as_they_come() -> None:
    launched: list[Any] = []

    def call(x: Tensor, stands: Tensor, recording: Recording) -> Tensor:
        out = torch.empty_like(x)
        args = (recording.address(out), (recording.number(stands), 0))
        recording.launches.append((lambda *args: launched.append(args), args))
        return out

    x, stands = normal(2, 4), torch.tensor(0.5)
    with Recording([x], {1: stands}) as recording:
        result = call(x, stands, recording)
    replay = recording.replay(result, lambda args: args[:1], print)
    assert replay is not None
    for number in (0.25, -0.0, float("inf"), 3):
        got = replay(x, number)
        ((address, (value, _)),) = launched
        assert address == got.data_ptr() and value is number
        launched.clear()
    for numbers in ({}, {1: torch.tensor(0.5)}):  # of a tensor that stands for none
        with Recording([x], numbers) as recording:
            result = call(x, stands, recording)
        assert recording.replay(result, lambda args: args[:1], print) is None


def test_nothing_is_computed_from_a_number() -> None:
    x, stands = normal(2, 4), torch.tensor(0.5)
    with Recording([x], {1: stands}) as recording, pytest.raises(TypeError, match="Number"):
        recording.number(stands) * 2  # type: ignore[operator]
    with Recording([x], {1: stands}) as recording:
        out = torch.empty_like(x)
        recording.launches.append((print, (recording.address(out), float(stands))))
    assert recording.replay(out, lambda args: args[:1], print) is None


def test_results_that_are_absent() -> None:
    launched: list[Any] = []
    x = normal(2, 4)
    with Recording([x]) as recording:
        out = torch.empty_like(x)
        args = recording.address(out), 0
        recording.launches.append((lambda *args: launched.append(args), args))
    replay = recording.replay((out, None), lambda args: args, print)
    assert replay is not None
    got, absent = replay(x)
    assert launched == [(got.data_ptr(), 0)] and absent is None
