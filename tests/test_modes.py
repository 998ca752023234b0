"""What a caller has set changes nothing: autocast, gradient modes, the default dtype."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import msf
from models import images, tiny_model
from msf.data import load_data
from msf.evaluation.features import extract, train_feature_network
from msf.modes import own_modes
from msf.training.stage import StageTrainer
from training_runs import TRAINING


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


CALLERS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": partial(torch.autocast, "cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "float64": partial(default_dtype, torch.float64),
}
callers = pytest.mark.parametrize("caller", CALLERS)


@pytest.mark.parametrize("caller", ["autocast", "no_grad", "inference_mode"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step(caller: str, precision: str) -> None:
    def trained(scope: Callable[[], AbstractContextManager[Any]]) -> list[Tensor]:
        config = dataclasses.replace(TRAINING, precision=precision, learning_rate=1e-2)
        trainer = StageTrainer(tiny_model(), 0, config)
        x, y = images(4), torch.arange(4) % 3
        with scope():
            losses = [trainer.step(x, y).clone() for _ in range(3)]
        return [*losses, *(parameter.detach() for parameter in trainer.parameters)]

    expected = trained(own_modes)
    assert len({float(loss) for loss in expected[:3]}) == 3
    assert all(map(torch.equal, trained(CALLERS[caller]), expected))


@callers
def test_features(caller: str) -> None:
    data = load_data("textures", split="features", image_size=(16, 16), channels=1, num_classes=0)
    x = data.images(torch.arange(8))
    expected, _ = extract(train_feature_network(data, steps=3), x)
    with CALLERS[caller]():
        got, _ = extract(train_feature_network(data, steps=3), x)
    assert got.dtype == torch.float64 and torch.equal(got, expected)


@callers
def test_images_of_a_seed(caller: str) -> None:
    def sampled() -> Tensor:
        return msf.sample(model, torch.tensor([0, 2]), seeds=[3, 4])

    model = tiny_model()
    expected = sampled()
    with CALLERS[caller]():
        got = sampled()
    assert got.dtype == torch.float32
    # Autocast is the caller's wish here: the same noise, computed in bfloat16.
    torch.testing.assert_close(got, expected, rtol=0, atol=0.3 if caller == "autocast" else 0)


def test_losses_draw_float32_whatever_the_default_is() -> None:
    model, x, y = tiny_model(), images(2), torch.tensor([0, 1])
    expected = model(x, y, generator=torch.Generator().manual_seed(0))
    with default_dtype(torch.float64):
        got = model(x, y, generator=torch.Generator().manual_seed(0))
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_the_callers_modes_are_back_afterwards() -> None:
    with default_dtype(torch.float64), torch.no_grad():
        with pytest.raises(KeyError), own_modes():
            assert torch.is_grad_enabled() and torch.get_default_dtype() == torch.float32
            raise KeyError
        assert not torch.is_grad_enabled() and torch.get_default_dtype() == torch.float64
