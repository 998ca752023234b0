"""What a run tells of its losses: by time, on held-out images, and to Weights & Biases."""

import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import pytest
import torch

from models import images, tiny_model
from msf.data import load_data
from msf.parsing import parse
from msf.training.stage import StageTrainer
from msf.training.train import train
from msf.training.validation import Validation
from training_runs import MODEL, TRAINING


def rows(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_losses_are_told_by_the_tenth_of_their_time(monkeypatch):
    trainer = StageTrainer(tiny_model(), 0, dataclasses.replace(TRAINING, accumulation=2))
    given = iter(
        [
            (torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.31])),
            (torch.tensor([4.0, float("nan")]), torch.tensor([0.35, 1.0])),
        ]
    )
    weight = trainer.parameters[0]
    monkeypatch.setattr(
        trainer.model,
        "image_losses",
        lambda *_, **__: (lambda losses, t: (losses + 0 * weight.sum(), t))(*next(given)),
    )
    trainer.step(images(4), torch.zeros(4, dtype=torch.int64))
    expected = torch.zeros(2, 11, dtype=torch.float64)  # that of the step is no number
    expected[:, 1], expected[:, 4] = torch.tensor([1.0, 1.0]), torch.tensor([6.0, 2.0])
    assert torch.equal(trainer.window.sums, expected) and trainer.window.steps == 1


def test_every_line_tells_the_loss_by_time_and_some_that_on_held_out_images(whole):
    lines = rows(whole)
    assert all(len(line["loss_by_time"]) == 10 for line in lines)
    validated = [(row["stage"], row["step"]) for row in lines if "validation_loss" in row]
    assert validated == [("base", n) for n in (3, 6, 8)] + [("residual", n) for n in (3, 6)]
    assert parse([None, 1], tuple[float | None, ...], "x") == (None, 1.0)
    with pytest.raises(ValueError, match="must be a number"):
        parse("a", float | None, "x")


def test_a_line_tells_the_rate_of_its_last_step(tmp_path):
    training = dataclasses.replace(
        TRAINING, steps=(4, 1), warmup=2, schedule="cosine", log_every=1, learning_rate=1.0
    )
    train(MODEL, training, "digits", tmp_path, stages=["base"], progress=False)
    rates = [row["learning_rate"] for row in rows(tmp_path)]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    assert rates == pytest.approx([0.5 * cosine[0], *cosine[1:]])


def test_the_loss_on_held_out_images_is_that_of_the_average():
    held_out = load_data("digits", split="features", image_size=(8, 8), channels=1)
    validation = Validation(held_out, seed=0)
    torch.manual_seed(0)
    model = tiny_model(channels=1, num_classes=10)
    model.pyramid.measure([held_out.images(torch.arange(len(held_out)))])
    trainer = StageTrainer(model, 0, TRAINING)
    with torch.no_grad():
        trainer.ema.output.weight.zero_()
        trainer.ema.output.bias.zero_()
    # Of a velocity of zero it is the mean of (f - noise)^2, both of which have a variance of 1. The
    # square of a normal of variance 2 deviates by 2.8, so the mean of 362 x 16 by 0.037.
    loss = validation.loss(trainer)
    assert loss == pytest.approx(2, abs=5 * 0.037)
    trainer.step(images(4, channels=1), torch.zeros(4, dtype=torch.int64))
    with torch.no_grad():
        trainer.ema.output.weight.zero_()
        trainer.ema.output.bias.zero_()
    assert validation.loss(trainer) == loss  # the same images and draws, whatever came between
    with torch.no_grad():
        trainer.ema.output.bias.fill_(1.0)
    assert validation.loss(trainer) == pytest.approx(loss + 1, abs=5 * 2 * 1.4 / (362 * 16) ** 0.5)
    assert model.stages[0] is trainer.stage


def test_without_images_that_are_held_out_there_is_no_such_loss(photos, tmp_path):
    training = dataclasses.replace(TRAINING, holdout=0.0, steps=(2, 2))
    train(MODEL, training, str(photos), tmp_path / "run", progress=False)
    assert not any("validation_loss" in row for row in rows(tmp_path / "run"))


def test_weights_and_biases_gets_a_run_a_stage_which_continues(tmp_path, monkeypatch):
    """Against what wandb 0.31 was seen to take; it is no dependency."""
    started, logged = [], []

    def init(**options):
        started.append(options)
        return SimpleNamespace(
            define_metric=lambda *_, **__: None, log=logged.append, finish=lambda: None
        )

    fake = SimpleNamespace(init=init, Image=lambda pixels: pixels.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    training = dataclasses.replace(TRAINING, steps=(4, 2), wandb="project")
    for steps, resume in (((4, 2), False), ((6, 2), True)):
        train(
            MODEL,
            dataclasses.replace(training, steps=steps),
            "digits",
            tmp_path / "run",
            progress=False,
            resume=resume,
        )
    ids = [options["id"] for options in started]
    assert ids[:2] == ids[2:] and ids[0] != ids[1]
    assert [options["name"] for options in started] == ["run-base", "run-residual"] * 2
    assert {options["project"] for options in started} == {"project"}
    losses = [row["loss"] for row in rows(tmp_path / "run")]
    assert [values["loss"] for values in logged if "loss" in values] == losses
    assert all(len(values["samples"]) == 2 for values in logged if "samples" in values)


def test_weights_and_biases_that_is_missing_is_told_before_anything(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"^--wandb needs wandb: pip install wandb$"):
        train(MODEL, dataclasses.replace(TRAINING, wandb="p"), "digits", tmp_path / "run")
    assert not (tmp_path / "run").exists()
