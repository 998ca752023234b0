import json
import os
import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from msf import MSF
from msf.training.interrupts import Interrupted
from msf.training.stage import StageTrainer
from msf.training.train import train
from training_runs import MODEL, TRAINING, digest, interrupt_at, lines, run, steps


@pytest.mark.parametrize("step", [4, 5, 7, 11, 13])
def test_interrupted_and_resumed_equals_uninterrupted(whole, tmp_path, monkeypatch, step):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        interrupt_at(step, patch)
        with pytest.raises(Interrupted, match="continue with --resume"):
            run(out)
    assert digest(out) != digest(whole)
    run(out, resume=True)
    assert digest(out) == digest(whole)
    assert lines(out) == lines(whole)
    assert (out / "README.md").read_bytes() == (whole / "README.md").read_bytes()


def test_resume_forgets_what_was_logged_beyond_the_checkpoint(whole, tmp_path):
    run(tmp_path / "run", stages=["base"])
    log = (whole / "metrics.jsonl").read_text().splitlines(keepends=True)
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.writelines([log[-1], '{"stage": "resi'])
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


def test_two_processes_train_two_stages_at_once(whole, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    processes = [
        context.Process(
            target=run, args=(tmp_path / "run",), kwargs={"stages": [n], "resume": True}
        )
        for n in MODEL.stage_names
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert digest(tmp_path / "run") == digest(whole)
    assert sorted(steps(tmp_path / "run")) == sorted(steps(whole))


def test_a_stage_trained_elsewhere_meanwhile_is_returned_trained(whole, tmp_path, monkeypatch):
    original = StageTrainer.step

    def step(self, *args):
        if self.name == "base" and self.step_number == 4:  # between two checkpoints
            run(tmp_path / "run", stages=["residual"], resume=True)
        return original(self, *args)

    monkeypatch.setattr(StageTrainer, "step", step)
    model = run(tmp_path / "run", stages=["base"])
    expected = MSF.from_pretrained(whole).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_steps_before_a_stop_are_recorded_where_it_becomes_the_end(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    assert steps(tmp_path)[-1] == ("base", 4)
    for _ in range(2):  # once
        shorter = replace(TRAINING, steps=(5, 6))
        train(MODEL, shorter, "digits", tmp_path, stages=["base"], resume=True, progress=False)
        assert steps(tmp_path)[-2:] == [("base", 4), ("base", 5)]


def test_what_a_writer_fails_over_is_recorded_once(whole, tmp_path, monkeypatch):
    def full(*_):
        patch.undo()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("msf.training.writers.TensorBoard.scalars", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)
    run(tmp_path, resume=True)
    assert lines(tmp_path) == lines(whole)


@pytest.mark.parametrize("writer", ["msf.MSF.save_pretrained", "msf.training.folder.write_state"])
def test_resume_after_a_checkpoint_that_could_not_be_written(whole, tmp_path, monkeypatch, writer):
    original = StageTrainer.step

    def last_step_fills_the_disk(self, *args):
        loss = original(self, *args)
        if self.name == "residual" and self.step_number == self.total_steps:
            patch.setattr(writer, full)
        return loss

    def full(*_):
        raise OSError(28, "No space left on device")

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


def test_tensorboard_has_every_point_once_after_a_resume(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("msf.training.folder.write_state", full)
        with pytest.raises(OSError, match="No space left"):
            run(tmp_path)  # logged until step 3, saved nothing
    run(tmp_path, resume=True)
    for stage in MODEL.stage_names:
        events = EventAccumulator(str(tmp_path / "tensorboard" / stage)).Reload()
        points = [(stage, event.step) for event in events.Scalars("loss")]
        assert points == [row for row in steps(tmp_path) if row[0] == stage]


def test_corrupt_state_is_one_clear_line(whole, tmp_path):
    run(tmp_path / "run", stages=["base"])
    state = tmp_path / "run" / "state-base.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a readable training state") as error:
        run(tmp_path / "run", resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("step", "changes", "message"),
    [
        ("x", {}, "not a readable training state"),
        ("-5", {}, "its step must be from 1 to 8, got -5"),
        ("999999", {}, "its step must be from 1 to 8, got 999999"),
        ("8", {"step": None}, r"optimizer.step.output.bias must have shape \[\], got none"),
        ("8", {"exp_avg": None}, r"exp_avg.output.bias must have shape \[4\], got none"),
        ("8", {"exp_avg": torch.full((4,), torch.nan)}, "exp_avg.output.bias must be finite, but"),
        ("8", {"exp_avg": torch.ones(4).int()}, "exp_avg.output.bias must be of float16, "),
        ("8", {"exp_avg_sq": torch.ones(3)}, r"_sq.output.bias must have shape \[4\], got \[3\]"),
    ],
)
def test_state_that_does_not_fit_is_one_clear_line(whole, tmp_path, step, changes, message):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    state = tmp_path / "state-base.safetensors"
    tensors = load_file(state)
    tensors |= {f"optimizer.{key}.output.bias": value for key, value in changes.items()}
    kept = {key: value for key, value in tensors.items() if value is not None}
    save_file(kept, state, metadata={"step": step})
    with pytest.raises(ValueError, match=f"state-base.safetensors: .*{message}") as error:
        run(tmp_path, resume=True)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["state-base.safetensors", "metrics.jsonl", "training.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_file_is_one_clear_line(whole, tmp_path, name, make):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    (tmp_path / name).unlink()
    make(tmp_path / name)
    with pytest.raises(ValueError, match=f"{name}: is no file(;|$)"):
        run(tmp_path, resume=True)


@pytest.mark.parametrize("is_abandoned", [False, True])
@pytest.mark.parametrize(
    "name",
    ["files.json", "contents.json", "README.md", "loss.png", "checkpoints", "tensorboard"],
)
def test_what_is_written_late_is_looked_at_before(whole, tmp_path, name, is_abandoned):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    is_file, path = "." in name, tmp_path / name
    if is_file:
        path.unlink(missing_ok=True)
        path.mkdir()
    else:
        shutil.rmtree(path, ignore_errors=True)
        path.touch()
    if is_abandoned:
        for file in (*tmp_path.glob("*.safetensors"), tmp_path / "config.json"):
            file.unlink()
        settings = json.loads((tmp_path / "training.json").read_text())
        (tmp_path / "training.json").write_text(json.dumps({**settings, "trained": []}))
    with pytest.raises(ValueError) as error:
        run(tmp_path, resume=True)
    kind = "file" if is_file else "folder"
    assert str(error.value) == (
        f"{path}: is no {kind}; remove it, and msf train --resume writes it anew"
    )


def test_a_pipe_among_the_logs_is_not_waited_for(whole, tmp_path, capsys):
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    os.mkfifo(tmp_path / "tensorboard" / "pipe")
    train(MODEL, replace(TRAINING, log_every=1), "digits", tmp_path, resume=True, progress=False)
    assert (
        capsys.readouterr().err == f"{tmp_path}: no step is left to take with log_every 1 (was 2)\n"
    )
