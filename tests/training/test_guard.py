"""Steps that would spoil the weights are not taken, and weights that are spoilt are left."""

import dataclasses
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models import images, tiny_model
from msf import MSF
from msf.training.guard import HORIZON, Guard
from msf.training.interrupts import Interrupted
from msf.training.stage import NotFinite, StageTrainer
from msf.training.train import train
from training_runs import MODEL, TRAINING, interrupt_at, run, saved_step


def judged(guard, norms):
    return [float(guard.judge(torch.tensor(norm))) for norm in norms]


def test_a_norm_that_is_no_number_is_never_taken():
    guard = Guard(0.0, torch.device("cpu"))
    assert judged(guard, [1.0, float("nan"), 3.0, float("inf")]) == [0, 1, 0, 1]
    assert guard.average_norm() == 2.0  # of the two that were taken
    assert guard.skipped() == 2
    guard.count_anew()
    assert guard.skipped() == 0 and guard.average_norm() == 2.0


def test_a_spike_counts_as_one_only_when_the_usual_norm_is_known():
    guard = Guard(10.0, torch.device("cpu"))
    assert judged(guard, [1e-3] + [1.0] * (HORIZON - 1)) == [0.0] * HORIZON
    assert judged(guard, [9.0, 12.0]) == [0, 1]
    assert judged(Guard(0.0, torch.device("cpu")), [1.0] * HORIZON + [1e9])[-1] == 0


def test_a_step_that_is_not_taken_changes_no_weights(monkeypatch):
    trainer = StageTrainer(tiny_model(), 0, TRAINING)
    labels = torch.zeros(4, dtype=torch.int64)
    trainer.step(images(4), labels)
    before = {k: v.clone() for k, v in trainer.state().items() if not k.startswith("ema")}
    image_losses = MSF.image_losses

    def overflowing(self, *args, **kwargs):
        losses, times = image_losses(self, *args, **kwargs)
        return losses * 1e38 * 1e38, times

    with monkeypatch.context() as patch:
        patch.setattr(MSF, "image_losses", overflowing)
        trainer.step(images(4), labels)
    after = trainer.state()
    assert trainer.step_number == 2 and trainer.guard.skipped() == 1
    counted = ("guard", "window.sums", "window.counts")
    assert all(torch.equal(after[k], v) for k, v in before.items() if k not in counted)
    trainer.step(images(4), labels)
    assert not torch.equal(
        trainer.state()["weights.output.weight"], before["weights.output.weight"]
    )


def poisoned(monkeypatch, steps):
    """Let these steps of training have no loss that is a number."""
    image_losses, calls = MSF.image_losses, []

    def losses_of(self, *args, **kwargs):
        losses, times = image_losses(self, *args, **kwargs)
        if not losses.requires_grad:  # held-out images
            return losses, times
        calls.append(None)
        return losses * (float("nan") if len(calls) in steps else 1.0), times

    monkeypatch.setattr(MSF, "image_losses", losses_of)


def logged_steps(folder):
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [row["step"] for row in rows]


@pytest.mark.parametrize("log_every", [1, 2])
def test_after_steps_that_all_fail_training_goes_on_from_the_checkpoint(
    tmp_path, monkeypatch, capsys, log_every
):
    poisoned(monkeypatch, (5, 6))
    monkeypatch.setattr("msf.training.recorder.PATIENCE", 2)
    config = dataclasses.replace(TRAINING, log_every=log_every)
    train(MODEL, config, "digits", tmp_path, stages=["base"], progress=False)
    assert (
        "base: no step before step 6 could be taken; going on with the weights of step 3"
        in capsys.readouterr().err
    )
    assert saved_step(tmp_path, "base") == 8
    assert logged_steps(tmp_path) == [
        n for n in (1, 2, 3, 4, 7, 8) if log_every == 1 or n not in (1, 7)
    ]


def test_a_single_step_that_fails_is_no_reason_to_go_back(tmp_path, monkeypatch, capsys):
    """However often losses are logged, and in the last step too."""
    poisoned(monkeypatch, (5, 8))
    config = dataclasses.replace(TRAINING, log_every=1)
    train(MODEL, config, "digits", tmp_path, stages=["base"], progress=False)
    assert capsys.readouterr().err.splitlines() == [
        f"base: 1 of 1 steps before step {step} were not taken" for step in (5, 8)
    ]
    assert saved_step(tmp_path, "base") == 8
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 6, 7]


def test_nothing_is_saved_amid_steps_that_fail(tmp_path, monkeypatch):
    """What led to them would take the place of the last good checkpoint."""
    poisoned(monkeypatch, (5, 6, 7, 8))
    monkeypatch.setattr("msf.training.recorder.PATIENCE", 3)
    with pytest.raises(NotFinite, match="base: the loss became nan before step 8"):
        run(tmp_path, stages=["base"])
    assert saved_step(tmp_path, "base") == 3


def test_steps_that_fail_are_counted_over_a_stop(tmp_path, monkeypatch, capsys):
    poisoned(monkeypatch, (4, 5, 6))
    monkeypatch.setattr("msf.training.recorder.PATIENCE", 3)
    config = dataclasses.replace(TRAINING, log_every=1)
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(Interrupted):
            train(MODEL, config, "digits", tmp_path, stages=["base"], progress=False)
    train(MODEL, config, "digits", tmp_path, stages=["base"], resume=True, progress=False)
    assert "base: no step before step 6 could be taken" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["full", "selective"])
def test_checkpointing_changes_no_bit(kind):
    def trained(kind):
        torch.manual_seed(0)
        config = dataclasses.replace(TRAINING, checkpointing=kind)
        trainer = StageTrainer(tiny_model(), 0, config)
        for _ in range(3):
            trainer.step(images(4), torch.arange(4) % 3)
        return trainer.state()

    plain, checkpointed = trained("none"), trained(kind)
    assert all(torch.equal(plain[k], v) for k, v in checkpointed.items())


def test_selective_checkpointing_computes_no_product_again():
    def flops(kind):
        trainer = StageTrainer(tiny_model(), 0, dataclasses.replace(TRAINING, checkpointing=kind))
        with FlopCounterMode(display=False) as counter:
            trainer.step(images(4), torch.zeros(4, dtype=torch.int64))
        return counter.get_total_flops()

    assert flops("none") == flops("selective") < flops("full")


def test_a_batch_in_parts_is_the_same_as_their_mean():
    labels = torch.arange(8) % 3
    trainer = StageTrainer(tiny_model(), 0, dataclasses.replace(TRAINING, accumulation=2))
    parts = []
    image_losses = trainer.model.image_losses

    def remembered(x, y, **options):
        losses, times = image_losses(x, y, **options)
        parts.append((len(x), losses.mean().item()))
        return losses, times

    trainer.model.image_losses = remembered
    loss = trainer.step(images(8), labels)
    assert [n for n, _ in parts] == [4, 4] and parts[0] != parts[1]
    assert float(loss) == pytest.approx((parts[0][1] + parts[1][1]) / 2, rel=1e-6)
    with pytest.raises(ValueError, match="a multiple of accumulation 2, got 7"):
        trainer.step(images(7), labels[:7])
