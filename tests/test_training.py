import dataclasses
import json
import os
import signal
import threading

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from models import images, tiny_model
from msf import MSF, MSFConfig, StageConfig, TrainingConfig
from msf.data import ImageData
from msf.training.batches import batches
from msf.training.stage import StageTrainer, computes_bf16
from msf.training.train import Interrupted, train

STAGE = StageConfig(width=16, depth=1, heads=2, patch=2)
MODEL = MSFConfig(
    image_size=(8, 8), channels=1, num_classes=10, stages=(STAGE, STAGE), steps=(2, 1)
)
TRAINING = TrainingConfig(
    steps=(8, 6),
    batch_size=16,
    learning_rate=1e-2,
    warmup=2,
    log_every=2,
    sample_every=3,
    precision="fp32",
)


def run(out, **options):
    return train(MODEL, TRAINING, "digits", out, progress=False, **options)


def digest(folder):
    files = [f for f in folder.iterdir() if f.suffix == ".safetensors"]
    return {f.name: {k: v.numpy().tobytes() for k, v in load_file(f).items()} for f in files}


def steps(folder):
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["stage"], row["step"]) for row in rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run from start to end."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    run(out)
    return out


def test_run_leaves_everything_a_user_needs(whole):
    names = {path.name for path in whole.iterdir()}
    assert names >= {
        *(
            "config.json",
            "model.safetensors",
            "training.json",
            "metrics.jsonl",
            "tensorboard",
            "loss.png",
        ),
        *("state-base.safetensors", "state-residual.safetensors"),
        *("samples-base-000008.png", "samples-residual-000003.png"),
    }
    assert not [name for name in names if "tmp" in name]
    model = MSF.from_pretrained(whole)
    assert model.config == MODEL and model.untrained_stages == ()
    assert steps(whole) == [
        *(("base", n) for n in (2, 3, 5, 6, 8)),
        *(("residual", n) for n in (2, 3, 5, 6)),
    ]
    with Image.open(whole / "samples-residual-000003.png") as grid:
        assert grid.width > 2 * grid.height


def test_the_kept_model_is_the_average_and_standardised_by_the_data(whole):
    state = load_file(whole / "state-residual.safetensors")
    kept = load_file(whole / "model.safetensors")
    assert torch.equal(kept["stages.1.output.weight"], state["ema.output.weight"])
    assert not torch.equal(kept["stages.1.output.weight"], state["weights.output.weight"])
    assert not torch.equal(kept["pyramid.std"], torch.ones(2, 1))


def interrupt_at(step, monkeypatch):
    """Send this process a Ctrl-C during the given step, counted over both stages."""
    original, calls = StageTrainer.step, []

    def counted(self, *args):
        calls.append(None)
        if len(calls) == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args)

    monkeypatch.setattr(StageTrainer, "step", counted)


@pytest.mark.parametrize("step", [4, 11])
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted, match="continue with --resume"):
            run(out)
    assert digest(out) != digest(whole)
    run(out, resume=True)
    assert digest(out) == digest(whole)
    stages = [stage for stage, _ in steps(out)]
    assert stages == sorted(stages)


def test_resume_forgets_what_was_logged_beyond_the_checkpoint(whole, tmp_path):
    run(tmp_path / "run")
    (tmp_path / "run" / "state-residual.safetensors").unlink()
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "resi')
    run(tmp_path / "run", resume=True)
    assert steps(tmp_path / "run") == steps(whole)
    assert digest(tmp_path / "run") == digest(whole)


def test_resume_forgets_a_line_that_was_cut_short(whole, tmp_path):
    run(tmp_path / "run", stages=["base"])
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write('{"stage": "ba')
    run(tmp_path / "run", resume=True)
    assert steps(tmp_path / "run") == steps(whole)


def test_stages_trained_one_by_one_equal_both_at_once(whole, tmp_path):
    assert run(tmp_path / "run", stages=["residual"]).untrained_stages == ("base",)
    run(tmp_path / "run", stages=["base"], resume=True)
    assert digest(tmp_path / "run") == digest(whole)


@pytest.mark.parametrize("writer", [MSF.save_pretrained, StageTrainer.save])
def test_resume_after_a_checkpoint_that_could_not_be_written(whole, tmp_path, monkeypatch, writer):
    original = StageTrainer.step

    def last_step_fills_the_disk(self, *args):
        loss = original(self, *args)
        if self.name == "residual" and self.step_number == self.total_steps:
            patch.setattr(*place, full)
        return loss

    def full(*_):
        raise OSError(28, "No space left on device")

    place = (MSF if writer is MSF.save_pretrained else StageTrainer, writer.__name__)
    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "step", last_step_fills_the_disk)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path / "run")
    run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_resume_keeps_the_statistics_that_the_stages_were_trained_with(tmp_path):
    for name in (str(digit) for digit in range(10)):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("L", (8, 8), 255 - 20 * int(name)).save(tmp_path / "data" / name / "0.png")
        Image.new("L", (8, 8), 20 * int(name)).save(tmp_path / "data" / name / "1.png")
    arguments = (MODEL, TRAINING, str(tmp_path / "data"), tmp_path / "run")
    first = train(*arguments, stages=["base"], progress=False)
    for name in (str(digit) for digit in range(10)):
        for index in range(2, 6):
            Image.new("L", (8, 8), 0).save(tmp_path / "data" / name / f"{index}.png")
    resumed = train(*arguments, resume=True, progress=False)
    assert torch.equal(resumed.pyramid.mean, first.pyramid.mean)


def test_resume_does_not_train_over_what_is_no_run(tmp_path):
    MSF(MODEL).save_pretrained(tmp_path)
    before = digest(tmp_path)
    with pytest.raises(ValueError, match="holds files but no run"):
        run(tmp_path, resume=True)
    assert digest(tmp_path) == before


def test_finished_run_resumes_to_itself(whole):
    before = digest(whole)
    run(whole, resume=True)
    assert digest(whole) == before


@pytest.mark.parametrize("native", [True, False])
def test_auto_precision_follows_what_the_gpu_computes_itself(monkeypatch, native):
    def supported(including_emulation=True):
        return native or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", supported)
    assert computes_bf16(torch.device("cuda")) == native


def test_loss_falls():
    torch.manual_seed(0)
    model = tiny_model(num_classes=0)
    trainer = StageTrainer(model, 0, dataclasses.replace(TRAINING, steps=(60, 1)))
    losses = [float(trainer.step(images(16), None)) for _ in range(60)]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_clipping_bounds_the_gradient(monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def recorded(parameters, limit):
        parameters = list(parameters)
        norms.append(float(clip(parameters, limit)))
        after = torch.stack([p.grad.norm() for p in parameters]).norm()
        assert after <= limit * (1 + 1e-4)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", recorded)
    trainer = StageTrainer(tiny_model(), 0, dataclasses.replace(TRAINING, clip=1e-3))
    trainer.step(images(4), torch.zeros(4, dtype=torch.int64))
    assert norms[0] > 1e-3


def test_learning_rate_warms_up_and_decays():
    config = dataclasses.replace(TRAINING, steps=(100, 1), warmup=10, schedule="cosine")
    trainer, rates = StageTrainer(tiny_model(), 0, config), []
    for trainer.step_number in range(100):
        rates.append(trainer.learning_rate())
    assert rates[0] < rates[9] and max(rates) == max(rates[8:12])
    assert rates[-1] < 1e-3 * config.learning_rate


class Numbers:
    """A data set of ``n`` numbered images."""

    def __init__(self, n):
        self.n = n

    def __len__(self):
        return self.n

    def batch(self, indices):
        return indices, indices


def test_every_epoch_sees_every_image_once_in_another_order():
    order = [images.tolist() for images, _ in batches(Numbers(10), 5, 0, 6, seed=0)]
    epochs = [order[i] + order[i + 1] for i in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    resumed = [images.tolist() for images, _ in batches(Numbers(10), 5, 3, 6, seed=0)]
    assert resumed == order[3:]
    assert len(next(iter(batches(Numbers(3), 8, 0, 1, seed=0)))[0]) == 3


def test_not_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original = StageTrainer.step

    def poisoned(self, *args):
        loss = original(self, *args)
        return loss * float("nan") if self.step_number == 5 else loss

    monkeypatch.setattr(StageTrainer, "step", poisoned)
    with pytest.raises(ValueError, match="base: the loss became nan before step 5"):
        run(tmp_path)
    assert steps(tmp_path)[-1] == ("base", 3)
    assert MSF.from_pretrained(tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path, monkeypatch):
    original = StageTrainer._average

    def poisoned(self):
        if self.step_number == 6:  # a checkpoint's last update: no later loss will show it
            torch.nn.init.constant_(self.stage.output.bias, float("inf"))
        original(self)

    monkeypatch.setattr(StageTrainer, "_average", poisoned)
    with pytest.raises(ValueError, match="base: the weights are not finite after step 6"):
        run(tmp_path)
    assert all(value.isfinite().all() for value in MSF.from_pretrained(tmp_path).parameters())
    with safe_open(tmp_path / "state-base.safetensors", "pt") as file:
        assert file.metadata()["step"] == "3"


def test_tensorboard_has_every_point_once_after_a_resume(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "save", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)  # logged until step 3, saved nothing
    run(tmp_path, resume=True)
    for stage in MODEL.stage_names:
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        points = [(stage, event.step) for event in events.Scalars("loss")]
        assert points == [row for row in steps(tmp_path) if row[0] == stage]


def test_progress_ends_at_its_total_with_less_data_than_a_batch(tmp_path, capsys):
    training = dataclasses.replace(TRAINING, steps=(2, 1), batch_size=10_000)
    train(MODEL, training, "digits", tmp_path, stages=["base"])
    assert capsys.readouterr().err.splitlines()[-1].startswith("base: 100%")


class Latents(ImageData):
    class_names = tuple("0123456789")
    labels = torch.arange(20) % 10

    def images(self, indices):
        return images(len(indices), channels=4)


def test_latents_are_trained_without_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("msf.training.train.load_data", lambda *_, **__: Latents())
    monkeypatch.setattr("msf.training.train.preview", lambda *_: pytest.fail("sampled a picture"))
    config = dataclasses.replace(MODEL, channels=4)
    train(config, TRAINING, "latents", tmp_path, stages=["base"], progress=False)
    assert not list(tmp_path.glob("samples-*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["top"]}, "stage must be one of base, residual, got 'top'"),
        (
            {"config": dataclasses.replace(MODEL, num_classes=9)},
            "digits has 10 classes, the model 9",
        ),
        ({"config": dataclasses.replace(MODEL, image_size=(16, 16))}, "digits"),
        (
            {"training": dataclasses.replace(TRAINING, steps=(8,))},
            "training steps must be 2 numbers",
        ),
        ({"source": "/nonexistent"}, "neither 'digits', 'textures' nor an existing folder"),
    ],
)
def test_bad_requests_are_one_clear_line_and_leave_nothing(tmp_path, options, message):
    arguments = {"config": MODEL, "training": TRAINING, "source": "digits", **options}
    with pytest.raises(ValueError, match=message) as error:
        train(out=tmp_path / "run", progress=False, **arguments)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_existing_folder_is_not_overwritten(whole, tmp_path):
    with pytest.raises(ValueError, match="exists and is not empty; continue its run with --resume"):
        run(whole)
    other = dataclasses.replace(TRAINING, learning_rate=1.0)
    with pytest.raises(ValueError, match=r"folder differs in training.learning_rate; resume with"):
        train(MODEL, other, "digits", whole, resume=True, progress=False)
    wider = dataclasses.replace(MODEL, label_dropout=0.2)
    with pytest.raises(ValueError, match=r"folder differs in model.label_dropout; resume with"):
        train(wider, TRAINING, "digits", whole, resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path / "file")


def test_corrupt_state_is_one_clear_line(whole, tmp_path):
    run(tmp_path / "run", stages=["base"])
    state = tmp_path / "run" / "state-base.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable training state") as error:
        run(tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


def test_trains_outside_the_main_thread(tmp_path):
    worker = threading.Thread(target=run, args=(tmp_path,), kwargs={"stages": ["base"]})
    worker.start()
    worker.join()
    assert (tmp_path / "state-base.safetensors").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": ()}, "must be positive"),
        ({"batch_size": 0}, "must be positive"),
        ({"sample_every": 0}, "sample_every must be positive"),
        ({"learning_rate": 0.0}, "learning_rate and clip must be positive"),
        ({"ema_decay": 1.0}, r"ema_decay in \[0, 1\)"),
        ({"schedule": "step"}, "schedule must be constant or cosine"),
        ({"precision": "fp16"}, "precision must be one of"),
        ({"seed": -1}, "seed, warmup and weight_decay must not be negative"),
        ({"betas": (0.9, 1.0)}, r"betas must be in \[0, 1\)"),
    ],
)
def test_bad_training_configuration(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TRAINING, **changes)
