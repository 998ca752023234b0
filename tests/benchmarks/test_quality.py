from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from benchmarks import quality
from msf.data import load_data
from msf.evaluation import Evaluator

DIGITS = quality.STUDIES["digits"][0]


def test_the_mean_is_of_what_was_sampled_alike() -> None:
    found = [
        {"steps": steps, "report": {"fd_ratio": {"value": value}}}
        for steps, value in (([16, 4], 1.0), ([16, 16], 7.0), ([16, 4], 2.0))
    ]
    assert quality.mean_fd_ratio(found, (16, 4)) == 1.5


def test_training_images_are_drawn_by_their_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_data("digits", split="train", image_size=(8, 8), channels=1, num_classes=10)
    every = data.images(torch.arange(len(data))).flatten(1)
    drawn: list[Tensor] = []

    class Recorder(Evaluator):
        def __init__(self, *args, **options):
            super().__init__(*args, **options, replicates=2)

        def evaluate(self, generate, **options):
            images = generate(self.labels, self.seeds, None).flatten(1)
            at = (images[:, None] == every).all(2).double().argmax(1)
            assert torch.equal(every[at], images)
            assert torch.equal(data.labels[at], self.labels)
            drawn.append(at)
            return super().evaluate(generate, **options)

    monkeypatch.setattr(quality, "Evaluator", Recorder)
    ratio = quality.resampled_fd_ratio(replace(DIGITS, seeds=2))
    assert all(len(at.unique()) < len(at) for at in drawn) and not torch.equal(*drawn)
    assert 0.8 < ratio < 1.6
