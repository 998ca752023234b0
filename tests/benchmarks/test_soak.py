"""A soak sees what is lost."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from benchmarks import soak
from models import tiny_model


def test_a_torn_file_is_a_loss(tmp_path: Path) -> None:
    tiny_model().save_pretrained(tmp_path)
    found = soak.Soak(random.Random(0))
    found.check("train", partial(soak.look_at, tmp_path))
    assert not found.losses
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    found.check("train", partial(soak.look_at, tmp_path))
    assert len(found.losses) == 1 and str(file) in found.losses[0]


def test_another_bit_is_a_loss(tmp_path: Path) -> None:
    for name, value in (("a", 1.0), ("b", 1.0), ("c", 1.0 + 2**-23)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([0.0, value])}, tmp_path / name / "state.safetensors")
    soak.same(tmp_path / "a", tmp_path / "b")
    with pytest.raises(AssertionError, match=r"state\.safetensors: w differs"):
        soak.same(tmp_path / "a", tmp_path / "c")


def test_a_command_that_fails_by_itself_is_a_loss() -> None:
    found = soak.Soak(random.Random(0))
    assert not found.killed("train", ["train", "--nonsense"], 1e4)
    assert len(found.losses) == 1 and "ended by itself with status 2" in found.losses[0]
