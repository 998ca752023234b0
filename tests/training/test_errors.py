"""Whatever ends the training loop, its last whole step is kept."""

import json
import os
import signal

import pytest
import torch

from msf import MSF
from msf.training import folder, loop
from msf.training.interrupts import Interrupted, StopSignal, uncut
from msf.training.stage import StageTrainer
from msf.training.state import write_state
from training_runs import digest, run, saved_step


def ctrl_c():
    os.kill(os.getpid(), signal.SIGINT)


def at(monkeypatch, place, name, step, action):
    """Do ``action`` before ``name`` of ``place`` when the base has taken ``step`` steps."""
    original = getattr(place, name)
    trainers = []
    remember = StageTrainer.__init__

    def init(self, *args):
        trainers.append(self)
        remember(self, *args)

    def wrapped(*args, **options):
        if trainers[0].step_number == step:
            action()
        return original(*args, **options)

    monkeypatch.setattr(StageTrainer, "__init__", init)
    monkeypatch.setattr(place, name, wrapped)


def failing(error):
    def fail():
        raise error

    return fail


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("out of memory"), KeyError("bug"), ValueError("data: too bad")]
)
def test_an_error_leaves_the_steps_before_it(whole, tmp_path, monkeypatch, error, capsys):
    with monkeypatch.context() as patch:
        at(patch, MSF, "image_losses", 5, failing(error))
        with pytest.raises(type(error)) as raised:
            run(tmp_path / "run")
    assert raised.value is error
    assert saved_step(tmp_path / "run", "base") == 5  # checkpoints come at 3 and 6
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("base: an error, but step 5 is saved in ") and line.endswith(
        "continue with --resume"
    )
    run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_an_error_inside_the_optimizer_keeps_the_last_checkpoint(whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        at(patch, torch, "_foreach_lerp_", 5, failing(KeyError("bug")))  # of the fifth step
        with pytest.raises(KeyError):
            run(tmp_path / "run")
    assert saved_step(tmp_path / "run", "base") == 3
    run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_an_error_in_the_first_step_saves_nothing(tmp_path, monkeypatch):
    at(monkeypatch, MSF, "image_losses", 0, failing(KeyError("bug")))
    with pytest.raises(KeyError):
        run(tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_an_error_while_saving_does_not_hide_the_first(tmp_path, monkeypatch, capsys):
    at(monkeypatch, MSF, "image_losses", 2, failing(KeyError("bug")))
    full = failing(OSError(28, "disk full"))
    monkeypatch.setattr("msf.training.folder.write_state", lambda *_: full())
    with pytest.raises(KeyError):
        run(tmp_path)
    assert "base: could not save step 2: [Errno 28] disk full\n" in capsys.readouterr().err


@pytest.mark.parametrize("place", ["step", "optimizer", "average", "save", "picture"])
def test_a_second_ctrl_c_tears_nothing(whole, tmp_path, monkeypatch, place):
    """The first one comes in the fifth step or, as there are pictures of it, the sixth, the second
    and third wherever."""
    owner, name, done, saved = {
        "step": (MSF, "image_losses", 4, 4),
        "optimizer": (torch.optim.AdamW, "step", 4, 5),
        "average": (torch, "_foreach_lerp_", 5, 5),
        "save": (folder, "write_state", 5, 5),
        "picture": (loop, "component_grid", 6, 6),
    }[place]
    with monkeypatch.context() as patch:
        at(patch, MSF, "image_losses", 5 if place == "picture" else 4, ctrl_c)
        at(patch, owner, name, done, lambda: [ctrl_c(), ctrl_c()])
        with pytest.raises(Interrupted, match=f"stopped at step {saved} of 8 of base; saved in"):
            run(tmp_path / "run")
    assert saved_step(tmp_path / "run", "base") == saved
    assert not [file for file in (tmp_path / "run").iterdir() if "tmp" in file.name]
    run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_two_ctrl_c_before_the_first_step_is_done(tmp_path, monkeypatch):
    at(monkeypatch, MSF, "image_losses", 0, lambda: [ctrl_c(), ctrl_c()])
    with pytest.raises(Interrupted, match="stopped at step 0 of 8 of base; nothing to save yet"):
        run(tmp_path)


def test_a_job_that_is_stopped_saves_and_does_nothing_else(tmp_path, monkeypatch):
    """torchrun gives it thirty seconds."""
    at(monkeypatch, MSF, "image_losses", 4, ctrl_c)
    with pytest.raises(Interrupted, match="stopped at step 5 of 8 of base; saved in"):
        run(tmp_path)
    assert [path.name for path in tmp_path.glob("samples-*")] == ["samples-base-000003.png"]
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], "validation_loss" in row) for row in rows] == [
        (2, False),
        (3, True),
        (4, False),  # none at the fifth, which a run that goes on has no line of
    ]


def test_what_could_not_be_saved_is_not_said_to_be(tmp_path, monkeypatch, capsys):
    at(monkeypatch, MSF, "image_losses", 4, lambda: [ctrl_c(), ctrl_c()])

    def full(path, tensors, step):
        if step == 4:
            raise OSError(28, "full")
        write_state(path, tensors, step)

    monkeypatch.setattr("msf.training.folder.write_state", full)
    with pytest.raises(Interrupted, match=r"at step 4 of 8 of base; step 3 is saved in "):
        run(tmp_path / "run")
    assert "base: could not save step 4: [Errno 28] full\n" in capsys.readouterr().err


def test_signals_are_a_flag_then_an_interrupt_then_nothing():
    with StopSignal() as stop:
        with uncut():
            ctrl_c()
            ctrl_c()
        assert stop.received
        with pytest.raises(KeyboardInterrupt):
            ctrl_c()
        ctrl_c()
    with pytest.raises(KeyboardInterrupt):
        ctrl_c()
