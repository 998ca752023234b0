import dataclasses
import os
from pathlib import Path

import pytest
import torch

from models import images, tiny_model
from msf.training import state
from msf.training.batches import batches
from msf.training.stage import StageTrainer
from training_runs import TRAINING


def test_loss_falls():
    torch.manual_seed(0)
    model = tiny_model(num_classes=0)
    trainer = StageTrainer(model, 0, dataclasses.replace(TRAINING, steps=(60, 1)))
    losses = [float(trainer.step(images(16), None)) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


@pytest.mark.parametrize("clip", [0.0, 1e-3])
def test_gradients_are_clipped_unless_the_limit_is_0(clip):
    trainer = StageTrainer(tiny_model(), 0, dataclasses.replace(TRAINING, clip=clip))
    trainer.step(images(4), torch.zeros(4, dtype=torch.int64))
    moments = [trainer.optimizer.state[p]["exp_avg"] for p in trainer.parameters]
    taken = torch.stack(torch._foreach_norm(moments)).norm() / (1 - TRAINING.betas[0])
    expected = min(clip, trainer.gradient_norm) if clip else trainer.gradient_norm
    assert taken.item() == pytest.approx(float(expected), rel=1e-4) and trainer.gradient_norm > 1e-2


def test_learning_rate_warms_up_and_decays():
    config = dataclasses.replace(TRAINING, steps=(100, 1), warmup=10, schedule="cosine")
    trainer, rates = StageTrainer(tiny_model(), 0, config), []
    for trainer.step_number in range(100):
        rates.append(trainer.learning_rate())
    assert rates[0] < rates[9] and max(rates) == max(rates[8:12])
    assert rates[-1] < 1e-3 * config.learning_rate


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_another_dtype_are_refused(dtype):
    with pytest.raises(ValueError, match=f"^StageTrainer: weights must be float32, got {dtype}; "):
        StageTrainer(tiny_model().to(dtype), 0, TRAINING)


@pytest.mark.parametrize(
    ("changes", "error", "line"),
    [
        ({"model": None}, TypeError, "model must be an MSF, got a NoneType"),
        ({"index": 2}, ValueError, "index must be below 2, got 2"),
        ({"index": -1}, ValueError, "index must be at least 0, got -1"),
        ({"index": "base"}, ValueError, "index must be a whole number, got 'base'"),
        ({"index": True}, ValueError, "index must be a whole number, got True"),
        ({"config": None}, TypeError, "config must be of class TrainingConfig, got NoneType"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(changes, error, line):
    with pytest.raises(error, match=f"^StageTrainer: {line}$"):
        StageTrainer(**{"model": tiny_model(), "index": 0, "config": TRAINING, **changes})


def test_a_state_is_written_whole_or_not_at_all_and_beside_the_one_before(tmp_path, monkeypatch):
    file, trainer = str(tmp_path / "base.safetensors"), StageTrainer(tiny_model(), 0, TRAINING)
    trainer.step(images(4), torch.arange(4) % 3)
    trainer.save(file)
    with open(file, "rb") as opened:  # as what was read from it may be
        before = opened.read()
        trainer.save(file)
        opened.seek(0)
        assert opened.read() == before and os.fstat(opened.fileno()).st_nlink == 0

    def torn(_, path, **__):
        Path(path).write_bytes(before[:100])
        raise OSError("no space")

    monkeypatch.setattr(state, "save_file", torn)
    with pytest.raises(OSError, match="no space"):
        trainer.save(file)
    trainer.load(file)
    assert trainer.step_number == 1 and os.listdir(tmp_path) == ["base.safetensors"]


class Numbers:
    """A data set of ``n`` numbered images."""

    on_disk = False

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def batch(self, indices, generator):
        return indices, indices


def test_every_epoch_sees_every_image_once_in_another_order():
    order = [images.tolist() for images, _ in batches(Numbers(10), 5, 0, 6, seed=0)]
    epochs = [order[i] + order[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = [images.tolist() for images, _ in batches(Numbers(10), 5, 3, 6, seed=0)]
    assert resumed == order[3:]
    assert len(next(iter(batches(Numbers(3), 8, 0, 1, seed=0)))[0]) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, r"steps must be positive numbers of at most 1000000000, got \(\)$"),
        ({"steps": (4, 0)}, r"steps must be positive numbers .*, got \(4, 0\)$"),
        ({"steps": (4, 10**10)}, r"of at most 1000000000, got \(4, 10000000000\)$"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0$"),
        ({"checkpoint_every": -1}, "checkpoint_every must not be negative, got -1$"),
        ({"warmup": 9}, "warmup must not be beyond the last step, 8, got 9$"),
        ({"sample_every": 0}, "sample_every must be at least 1, got 0$"),
        ({"learning_rate": 0.0}, "learning_rate must be positive, got 0.0$"),
        ({"ema_decay": 1.0}, r"ema_decay must be in \[0, 1\), got 1.0$"),
        ({"schedule": "step"}, r"schedule must be one of \('constant', 'cosine'\)"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"seed": -1}, "seed must not be negative, got -1$"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
        ({"betas": (0.9,)}, r"betas must be a list or tuple of 2, got \(0.9,\)$"),
        ({"batch_size": 1.5}, "batch_size must be a whole number, got 1.5$"),
        ({"log_every": 1.5}, "log_every must be a whole number, got 1.5$"),
        ({"seed": 1.5}, "seed must be a whole number, got 1.5$"),
        ({"seed": 2**64}, r"seed must be below 2\*\*64 in size, got a number of 65 bits$"),
        ({"learning_rate": float("nan")}, "learning_rate must be finite, got nan$"),
        ({"clip": float("inf")}, "clip must be finite, got inf$"),
        ({"weight_decay": float("nan")}, "weight_decay must be finite, got nan$"),
    ],
)
def test_bad_training_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **changes)
