"""What a resumed run may do otherwise."""

from dataclasses import replace

import pytest

from msf.files import printable
from msf.training.config import read_run
from msf.training.interrupts import Interrupted
from msf.training.train import train
from training_runs import MODEL, TRAINING, digest, interrupt_at, run, saved_step, steps


def resume(out, source="digits", model=MODEL, stages=None, **changes):
    training = replace(TRAINING, **changes)
    return train(model, training, source, out, stages=stages, resume=True, progress=False)


def test_more_steps_than_before_equal_as_many_at_once(whole, tmp_path, capsys):
    train(MODEL, replace(TRAINING, steps=(3, 6)), "digits", tmp_path / "run", progress=False)
    resume(tmp_path / "run")
    assert capsys.readouterr().err == f"{tmp_path / 'run'}: resuming with steps 8 6 (was 3 6)\n"
    assert digest(tmp_path / "run") == digest(whole)
    assert read_run(tmp_path / "run").training == TRAINING


def test_fewer_steps_are_not_fewer_than_were_taken(tmp_path):
    run(tmp_path, stages=["base"])
    for stages in (None, ["residual"]):  # though base itself is not to be trained
        with pytest.raises(
            ValueError, match=r"from 1 to 7, got 8; a stage cannot have fewer steps"
        ):
            resume(tmp_path, stages=stages, steps=(7, 6))
        assert read_run(tmp_path).training == TRAINING  # what is refused changes nothing
    resume(tmp_path, steps=(8, 2))
    assert saved_step(tmp_path, "residual") == 2


@pytest.mark.parametrize("stages", [None, ["base"]])
def test_where_no_step_is_left_only_their_number_and_place_change(photos, tmp_path, capsys, stages):
    """A model was trained as its card and files say."""
    out = tmp_path / "run"
    train(MODEL, TRAINING, str(photos), out, progress=False)
    names = ("training.json", "README.md", "files.json", "contents.json")
    files = {name: (out / name).read_bytes() for name in names}
    capsys.readouterr()
    changes = {"batch_size": 4, "learning_rate": 0.5, "extra_ema_decays": (0.5,)}
    (photos / "0").rename(photos / "x")
    train(
        MODEL,
        replace(TRAINING, **changes),
        str(photos),
        out,
        stages=stages,
        resume=True,
        data_changed=True,
        progress=False,
    )
    told = capsys.readouterr().err
    assert told.startswith(
        f"{out}: no step is left to take with batch_size 4 (was 16), learning_rate 0.5 (was 0.01), "
        "extra_ema_decays 0.5 (was ), classes gone: 0, classes new: x, 1 is now"
    )
    assert told.count("\n") == 1
    assert {name: (out / name).read_bytes() for name in names} == files
    assert not (out / "ema-0.5").exists()
    (photos / "x").rename(photos / "0")
    moved = photos.rename(tmp_path / "moved")
    resume(out, str(moved), stages=["base"], steps=(8, 9), batch_size=4)
    assert capsys.readouterr().err == (
        f"{out}: no step is left to take with batch_size 4 (was 16)\n"
        f"{out}: resuming with steps 8 9 (was 8 6), data {moved} (was {photos})\n"
    )
    assert read_run(out).training == replace(TRAINING, steps=(8, 9))
    assert read_run(out).data == str(moved)


def test_more_averages_than_before(tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        interrupt_at(5, patch)
        with pytest.raises(Interrupted):
            run(tmp_path)
    resume(tmp_path, extra_ema_decays=(0.5,))
    assert capsys.readouterr().err == f"{tmp_path}: resuming with extra_ema_decays 0.5 (was )\n"
    assert (tmp_path / "ema-0.5" / "model.safetensors").exists()


def test_batch_size_learning_rate_and_intervals_may_change(tmp_path, capsys):
    run(tmp_path, stages=["base"])
    resume(tmp_path, batch_size=4, learning_rate=0.5, sample_every=2, log_every=1)
    assert capsys.readouterr().err == (
        f"{tmp_path}: resuming with batch_size 4 (was 16), learning_rate 0.5 (was 0.01), "
        "log_every 1 (was 2), sample_every 2 (was 3), checkpoint_every 2 (was 3)\n"
    )
    assert steps(tmp_path)[-6:] == [("residual", step) for step in range(1, 7)]
    assert (tmp_path / "samples-residual-000004.png").exists()


def test_where_no_interval_of_checkpoints_is_given_it_is_told_in_steps(tmp_path, capsys):
    training = replace(TRAINING, checkpoint_every=2)
    train(MODEL, training, "digits", tmp_path, stages=["base"], progress=False)
    resume(tmp_path)
    assert capsys.readouterr().err == f"{tmp_path}: resuming with checkpoint_every 3 (was 2)\n"
    resume(tmp_path, checkpoint_every=3)
    assert capsys.readouterr().err == ""


def test_the_data_may_have_moved(photos, tmp_path, capsys):
    train(MODEL, TRAINING, str(photos), tmp_path / "whole", progress=False)
    arguments = (MODEL, TRAINING, str(photos), tmp_path / "run")
    train(*arguments, stages=["base"], progress=False)
    moved = photos.rename(tmp_path / "moved\udce9\n")
    capsys.readouterr()
    resume(tmp_path / "run", str(moved))
    assert capsys.readouterr().err == (
        f"{tmp_path / 'run'}: resuming with data {printable(moved)} (was {photos})\n"
    )
    assert f"Trained on `{tmp_path}/moved\ufffd\ufffd`." in (
        (tmp_path / "run" / "README.md").read_text()
    )
    assert digest(tmp_path / "run") == digest(tmp_path / "whole")
    assert read_run(tmp_path / "run").data == str(moved)


def test_other_data_is_refused(whole, photos, tmp_path):
    before = digest(whole)
    with pytest.raises(ValueError, match="trained on: it was digits, and had no files; restore"):
        resume(whole, str(photos))
    train(MODEL, TRAINING, str(photos), tmp_path / "run", stages=["base"], progress=False)
    with pytest.raises(ValueError, match="250 of 250 images are gone"):
        resume(tmp_path / "run")
    assert digest(whole) == before


def test_model_and_seed_stay(whole):
    before = digest(whole)
    with pytest.raises(ValueError) as error:
        resume(whole, model=replace(MODEL, steps=(3, 1)), seed=5, learning_rate=1.0)
    assert str(error.value) == (
        f"{whole}: the run in this folder differs in model.steps, training.seed; "
        "resume with steps 2 1 (not 3 1), seed 0 (not 5), or choose another --out"
    )
    assert digest(whole) == before and read_run(whole).training == TRAINING


def test_another_holdout_is_refused(photos, tmp_path):
    """Images that an evaluation tests with would be trained on."""
    training, run = replace(TRAINING, holdout=0.5), tmp_path / "run"
    train(MODEL, training, str(photos), run, stages=["base"], progress=False)
    with pytest.raises(ValueError, match=r"differs in training.holdout; .* holdout 0.5 \(not 0.2"):
        resume(run, str(photos))
    resume(run, str(photos), holdout=0.5, flip=True)
    assert read_run(run).training.holdout == 0.5 and read_run(run).training.flip
