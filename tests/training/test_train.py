import dataclasses
import json
import multiprocessing
import sys
import threading

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from models import images
from msf import MSF
from msf.data import ImageData
from msf.training.config import RunConfig
from msf.training.folder import RunFolder
from msf.training.recorder import plot_losses
from msf.training.stage import StageTrainer
from msf.training.state import write_state
from msf.training.train import train
from msf.training.window import Window
from training_runs import MODEL, TRAINING, digest, run, steps


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
        *(("base", n) for n in (2, 3, 4, 6, 8)),
        *(("residual", n) for n in (2, 3, 4, 6)),
    ]
    with Image.open(whole / "samples-residual-000003.png") as grid:
        assert grid.width > 2 * grid.height


def test_the_kept_model_is_the_average_and_standardised_by_the_data(whole):
    state = load_file(whole / "state-residual.safetensors")
    kept = load_file(whole / "model.safetensors")
    assert torch.equal(kept["stages.1.output.weight"], state["ema.output.weight"])
    assert not torch.equal(kept["stages.1.output.weight"], state["weights.output.weight"])
    assert not torch.equal(kept["pyramid.std"], torch.ones(2, 1))


def test_the_model_card_says_what_is_known(whole):
    card = (whole / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: msf\n") and "Trained on `digits`.\n" in card
    rows = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    base = next(row for row in reversed(rows) if row["stage"] == "base")
    assert f"| base | 8 | {base['loss']:.4f} | {base['validation_loss']:.4f} |\n" in card
    config, training = (json.loads(text.split("```")[0]) for text in card.split("```json")[1:])
    assert config == json.loads((whole / "config.json").read_text())
    assert training["batch_size"] == TRAINING.batch_size


def test_a_model_that_does_not_standardise_measures_nothing(tmp_path):
    config = dataclasses.replace(MODEL, standardize=False)
    training = dataclasses.replace(TRAINING, steps=(2, 2))
    train(config, training, "digits", tmp_path, progress=False)
    kept = load_file(tmp_path / "model.safetensors")
    assert not kept["pyramid.mean"].any() and (kept["pyramid.std"] == 1).all()


def test_not_finite_loss_stops_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    original, calls = Window.add, []

    def poisoned(self, loss, by_time):
        calls.append(None)
        original(self, loss * float("nan") if len(calls) >= 4 else loss, by_time)

    monkeypatch.setattr(Window, "add", poisoned)
    monkeypatch.setattr("msf.training.recorder.PATIENCE", 2)
    with pytest.raises(ValueError, match="base: the loss became nan before step 8"):
        run(tmp_path)
    assert steps(tmp_path)[-1] == ("base", 3)
    assert MSF.from_pretrained(tmp_path)


def test_one_logged_point_is_plotted_visibly(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_losses([{"stage": "base", "step": 1, "loss": 0.5}], tmp_path / "loss.png")
    (line,) = figures[0].axes[0].lines
    assert line.get_xydata().tolist() == [[1, 0.5]]
    assert line.get_marker() != "None"


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


def test_progress_ends_at_its_total_with_less_data_than_a_batch(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    training = dataclasses.replace(TRAINING, steps=(2, 1), batch_size=10_000)
    train(MODEL, training, "digits", tmp_path, stages=["base"])
    assert "base: 100%" in capsys.readouterr().err


def test_checkpoints_and_sample_grids_have_intervals_of_their_own(tmp_path, monkeypatch):
    kept = []

    def save(path, tensors, step):
        kept.append(step)
        write_state(path, tensors, step)

    monkeypatch.setattr("msf.training.folder.write_state", save)
    training = dataclasses.replace(TRAINING, sample_every=4, checkpoint_every=3)
    train(MODEL, training, "digits", tmp_path, stages=["base"], progress=False)
    assert kept == [3, 6, 8]
    grids = sorted(path.name for path in tmp_path.glob("samples-*"))
    assert grids == ["samples-base-000004.png", "samples-base-000008.png"]


def test_doubtful_settings_are_told(tmp_path, capsys):
    training = dataclasses.replace(TRAINING, batch_size=2000, warmup=100)
    train(MODEL, training, "digits", tmp_path, stages=["base"], progress=False)
    assert capsys.readouterr().err.splitlines() == [
        "batch_size 2000: there are only 1,077 images, all of them are in each batch",
        "base: training ends within the warm-up of 100 steps, below the full learning rate",
    ]


class Latents(ImageData):
    class_names = tuple("0123456789")
    labels = torch.arange(20) % 10

    def _choose(self, split):
        pass

    def read(self, indices):
        return images(len(indices), channels=4)


def test_latents_are_trained_without_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr("msf.training.train.load_data", lambda *_, **__: Latents())
    monkeypatch.setattr("msf.training.loop.preview", lambda *_: pytest.fail("sampled a picture"))
    config = dataclasses.replace(MODEL, channels=4)
    train(config, TRAINING, "latents", tmp_path, stages=["base"], progress=False)
    assert not list(tmp_path.glob("samples-*"))


def test_latents_are_shown_as_what_they_are_decoded_to(tmp_path, monkeypatch):
    monkeypatch.setattr("msf.training.train.load_data", lambda *_, **__: Latents())
    config, sides = dataclasses.replace(MODEL, channels=4), []

    def decode(latents):
        sides.append(tuple(latents.shape))
        return latents[:, :3].clamp(-1, 1)

    train(config, TRAINING, "latents", tmp_path, decode=decode, progress=False)
    assert sides == [(25, 4, 4, 4)] * 3 + [(25, 4, 8, 8)] * 2
    with Image.open(tmp_path / "samples-residual-000006.png") as grid:
        assert grid.mode == "RGB" and grid.size == (5 * 9, 5 * 9)  # with gaps of a pixel


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stages": ["top"]}, "stage must be one of base, residual, got 'top'"),
        (
            {
                "config": dataclasses.replace(
                    MODEL, stages=MODEL.stages[:1], steps=(2,), prediction="noise"
                )
            },
            "this model predicts noise, and only velocities are trained; take another, as msf impo",
        ),
        (
            {"config": dataclasses.replace(MODEL, num_classes=9)},
            "digits has 10 classes, the model 9",
        ),
        ({"config": dataclasses.replace(MODEL, image_size=(16, 16))}, "digits"),
        (
            {"training": dataclasses.replace(TRAINING, steps=(8,))},
            "training steps must be 2 numbers",
        ),
        (
            {"training": dataclasses.replace(TRAINING, batch_size=10_771)},
            "batch_size must be at most 10 times the 1,077 images for training, got 10771",
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
    other = dataclasses.replace(TRAINING, seed=1)
    with pytest.raises(
        ValueError, match=r"folder differs in training.seed; resume with seed 0 \(not 1\),"
    ):
        train(MODEL, other, "digits", whole, resume=True, progress=False)
    wider = dataclasses.replace(MODEL, label_dropout=0.2)
    with pytest.raises(ValueError, match=r"in model.label_dropout; resume with label_d.* 0.1"):
        train(wider, TRAINING, "digits", whole, resume=True, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        run(tmp_path / "file")


def test_trains_outside_the_main_thread(tmp_path):
    worker = threading.Thread(target=run, args=(tmp_path,), kwargs={"stages": ["base"]})
    worker.start()
    worker.join()
    assert (tmp_path / "state-base.safetensors").exists()


OTHER = dataclasses.replace(TRAINING, learning_rate=1.0)


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_that_saved_nothing_may_start_over(whole, tmp_path, monkeypatch, resume):
    def fail(_):
        raise ValueError("try a lower learning rate")

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "check_finite", fail)
        for stage in reversed(MODEL.stage_names):
            with pytest.raises(ValueError, match="try a lower learning rate"):
                train(MODEL, OTHER, "digits", tmp_path, stages=[stage], progress=False)
            assert steps(tmp_path) == [(stage, 2), (stage, 3)]
    run(tmp_path, resume=resume)
    assert digest(tmp_path) == digest(whole)
    assert steps(tmp_path) == steps(whole)


def test_nobody_trains_into_a_run_that_another_process_is_training(tmp_path, monkeypatch):
    original, refusals = StageTrainer.step, []

    def step(self, *args):
        if self.step_number == 1:  # nothing is saved yet
            for options in ({"resume": True}, {"training": OTHER, "resume": True}, {}):
                with pytest.raises(ValueError) as error:
                    train(
                        **{"training": TRAINING, **options},
                        config=MODEL,
                        source="digits",
                        out=tmp_path,
                        stages=["base"],
                    )
                refusals.append(str(error.value).removeprefix(f"{tmp_path}: "))
        return original(self, *args)

    monkeypatch.setattr(StageTrainer, "step", step)
    run(tmp_path, stages=["base"])
    assert refusals == [
        "another process is training base here; wait for its end or choose another --out",
        "another process is training here; wait for its end to resume with "
        "learning_rate 1.0 (was 0.01)",
        "exists and is not empty; continue its run with --resume or choose another --out",
    ]
    assert steps(tmp_path) == [("base", n) for n in (2, 3, 4, 6, 8)]


def test_workers_that_outlive_a_killed_run_do_not_hold_its_stages(tmp_path):
    folder = RunFolder(tmp_path, MODEL, RunConfig("digits", TRAINING), resume=True)
    fork = multiprocessing.get_context("fork")
    running, end = fork.Event(), fork.Event()
    worker = fork.Process(target=lambda: (running.set(), end.wait(60)), daemon=True)
    folder.begin([])
    with folder.claimed(["base"]):
        worker.start()
        assert running.wait(60)
    with folder.claimed(["base"]):
        assert worker.is_alive()
    end.set()
    worker.join()
