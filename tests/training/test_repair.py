"""Damaged runs that --resume mends."""

import os
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from msf import MSF
from msf.training.train import train
from training_runs import MODEL, STAGE, TRAINING, digest, interrupt_at, run, steps


@pytest.fixture
def damaged(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize(
    "line",
    [
        *(b"garbage\n", b"\0\0\0\0\n", b"\xff\n", b'{"stage": "ba{"a": 1}\n', b"[]\n", b"\n"),
        b'{"stage": "\\u001b[2Jtop", "step": 1, "loss": 1, "learning_rate": 1, '
        b'"images_per_second": 1}\n',  # well-formed, but no stage of the model
    ],
)
def test_damaged_lines_of_metrics_are_dropped_and_told(whole, damaged, line, place, capsys):
    file = damaged / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:place], line, *lines[place:]]))
    run(damaged, resume=True)
    assert steps(damaged) == steps(whole) and digest(damaged) == digest(whole)
    assert capsys.readouterr().err == f"{file}: dropped 1 of its 10 lines, damaged or cut short\n"


def test_a_line_whose_writing_was_cut_is_dropped_and_told(whole, damaged, capsys):
    file = damaged / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + file.read_bytes()[:20])
    run(damaged, resume=True)
    assert steps(damaged) == steps(whole)
    assert capsys.readouterr().err == f"{file}: dropped 1 of its 10 lines, damaged or cut short\n"


@pytest.mark.parametrize(
    "names", [["model.safetensors"], ["config.json"], ["config.json", "model.safetensors"]]
)
def test_a_missing_model_is_rebuilt_from_the_states(whole, damaged, names, capsys):
    for name in names:
        (damaged / name).unlink()
    run(damaged, resume=True)
    assert digest(damaged) == digest(whole)
    assert (damaged / "config.json").read_bytes() == (whole / "config.json").read_bytes()
    assert capsys.readouterr().err == (
        f"{damaged}: rebuilt {' and '.join(names)} from the states\n"
    )


@pytest.mark.parametrize(
    ("taken", "lost", "file", "other"),
    [
        (["state-base"], [], "state-base", "model"),
        (["state-base", "model"], [], "state-residual", "model"),
        (["state-base"], ["model"], "state-base", "state-residual"),
    ],
)
def test_files_of_another_run_are_refused(damaged, photos, tmp_path, taken, lost, file, other):
    train(MODEL, TRAINING, str(photos), tmp_path / "other", progress=False)
    for name in taken:
        shutil.copy(tmp_path / "other" / f"{name}.safetensors", damaged)
    for name in lost:
        (damaged / f"{name}.safetensors").unlink()
    before = digest(damaged)
    message = f"{file}.safetensors: its statistics of the data are not those of .*/{other}.saf"
    with pytest.raises(ValueError, match=message):
        run(damaged, resume=True)
    assert digest(damaged) == before


def truncate(file):
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("model.safetensors", "rebuilds it from the states"),
        ("config.json", "rebuilds it with --config or --preset"),
        ("training.json", "goes on with --config or --preset"),
    ],
)
def test_a_damaged_file_beside_states_is_refused_with_what_mends_it(whole, damaged, name, remedy):
    truncate(damaged / name)
    before = digest(whole)
    with pytest.raises(ValueError) as error:
        run(damaged, resume=True)
    line = str(error.value)
    assert line.startswith(f"{damaged / name}: ") and "\n" not in line
    assert line.endswith(f"; remove it, and msf train --resume {remedy}")
    (damaged / name).unlink()
    run(damaged, resume=True)
    assert digest(damaged) == before


def test_a_model_of_one_trained_stage_is_rebuilt_from_its_state(whole, tmp_path, capsys):
    out = tmp_path / "run"
    run(out, stages=["base"])
    before = digest(out)
    truncate(out / "model.safetensors")
    with pytest.raises(ValueError, match=r"; remove it, and msf train --resume rebuilds it"):
        run(out, resume=True, stages=["base"])
    (out / "model.safetensors").unlink()
    run(out, resume=True, stages=["base"])
    assert digest(out) == before
    (out / "model.safetensors").unlink()
    run(out, resume=True)
    assert digest(out) == digest(whole)
    assert "rebuilt model.safetensors from the states" in capsys.readouterr().err


def test_a_model_is_rebuilt_from_the_newest_states_that_are_whole(tmp_path, capsys):
    training, out = replace(TRAINING, keep_last=2), tmp_path / "run"
    train(MODEL, training, "digits", out, progress=False)
    before = digest(out)
    truncate(out / "state-base.safetensors")
    (out / "model.safetensors").unlink()
    train(MODEL, training, "digits", out, resume=True, progress=False)
    assert digest(out) == before
    damaged, rebuilt = capsys.readouterr().err.splitlines()
    assert "put aside as state-base.safetensors.damaged" in damaged
    assert rebuilt == f"{out}: rebuilt model.safetensors from the states"


@pytest.fixture
def averaged(tmp_path):
    """A function that trains with another average, which it returns from the folder given, and
    that folder with its base trained."""
    training = replace(TRAINING, extra_ema_decays=(0.5,))

    def trained(name, **options):
        train(MODEL, training, "digits", tmp_path / name, progress=False, **options)
        return digest(tmp_path / name / "ema-0.5")

    trained("run", stages=["base"])
    return trained, tmp_path / "run" / "ema-0.5"


@pytest.mark.parametrize("gone", ["model.safetensors", "config.json", ""])
def test_a_lost_average_is_rebuilt_from_the_states(averaged, gone, capsys):
    trained, folder = averaged
    (folder / gone).unlink() if gone else shutil.rmtree(folder)
    assert trained("run", resume=True) == trained("whole")
    line = f"{folder}: rebuilt {gone} from the states\n" if gone else ""
    assert line in capsys.readouterr().err


def test_a_damaged_average_is_refused_before_training(averaged):
    trained, folder = averaged
    truncate(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"; remove it, and msf train --resume rebuilds it") as e:
        trained("run", resume=True)
    assert str(e.value).startswith(f"{folder}/model.safetensors: ")
    assert not (folder.parent / "state-residual.safetensors").exists()


def test_an_average_of_another_run_is_refused(averaged):
    trained, folder = averaged
    model = MSF.from_pretrained(folder)
    model.pyramid.std *= 1.01
    model.save_pretrained(folder)
    with pytest.raises(
        ValueError, match=r"ema-0\.5/model\.safetensors: its statistics of the data"
    ):
        trained("run", stages=["base"], resume=True)


def test_copies_beside_checkpoints_are_left_alone(tmp_path):
    out = tmp_path / "run"
    run(out, stages=["base"])
    copies = [out / "checkpoints" / f"base-{name}.safetensors" for name in ("best", "000000003-1")]
    for copy in copies:
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(out / "state-base.safetensors", copy)
    longer = replace(TRAINING, steps=(12, 6))
    train(MODEL, longer, "digits", out, stages=["base"], resume=True, progress=False)
    assert all(copy.exists() for copy in copies)


def test_a_damaged_model_that_states_cannot_rebuild_has_no_such_hint(damaged):
    (damaged / "state-base.safetensors").unlink()
    truncate(damaged / "model.safetensors")
    with pytest.raises(ValueError, match=r"not a readable safetensors file \([^;]*\)$"):
        run(damaged, resume=True)


@pytest.mark.parametrize("stages", [["base"], ["base", "residual"]])
def test_a_lost_run_goes_on_with_settings_given_anew(stages, whole, tmp_path, capsys):
    run(tmp_path / "run", stages=stages)
    file = tmp_path / "run" / "training.json"
    before = file.read_bytes()
    file.unlink()
    run(tmp_path / "run", resume=True, stages=stages)
    assert file.read_bytes() == before
    assert capsys.readouterr().err.endswith(
        f"{file.parent}: resuming with settings given anew, seed and holdout too (training.json is "
        "lost)\n"
    )
    run(tmp_path / "run", resume=True)
    assert digest(tmp_path / "run") == digest(whole)


def test_a_lost_run_is_not_continued_with_another_model(damaged):
    (damaged / "training.json").unlink()
    before = digest(damaged)
    other = replace(MODEL, label_dropout=0.5)
    with pytest.raises(ValueError, match=r"differs in model.label_dropout; resume with"):
        train(other, TRAINING, "digits", damaged, resume=True, progress=False)
    (damaged / "config.json").unlink()  # then weights tell
    other = replace(MODEL, stages=(STAGE, replace(STAGE, width=32)))
    with pytest.raises(ValueError, match=r"state-residual.safetensors: made by another config"):
        train(other, TRAINING, "digits", damaged, resume=True, progress=False)
    assert digest(damaged) == before


@pytest.mark.parametrize(
    ("gone", "line"),
    [("0/3.png", "1 of 250 images are gone (0/3.png first)"), ("", "other files, 251 images (")],
)
def test_a_lost_run_knows_its_images(photos, tmp_path, capsys, gone, line):
    arguments = (MODEL, TRAINING, str(photos), tmp_path / "run")
    train(*arguments, stages=["base"], progress=False)
    (tmp_path / "run" / "training.json").unlink()
    if gone:
        (photos / gone).unlink()
        with pytest.raises(ValueError, match=re.escape(line)):
            train(*arguments, resume=True, progress=False)
    else:
        shutil.copy(photos / "0" / "3.png", photos / "0" / "another.png")
        train(*arguments, resume=True, progress=False, stages=["base"])
        assert line in capsys.readouterr().err


@pytest.mark.parametrize("stage", ["base", "residual"])
def test_without_all_states_what_is_missing_is_told(damaged, stage):
    for name in ("model.safetensors", f"state-{stage}.safetensors"):
        (damaged / name).unlink()
    before = digest(damaged)
    with pytest.raises(ValueError) as error:
        run(damaged, resume=True)
    assert str(error.value) == (
        f"{damaged}: model.safetensors is missing, and state-{stage}.safetensors, without which "
        "it cannot be rebuilt; restore one of them or choose another --out"
    )
    assert digest(damaged) == before


@pytest.mark.parametrize("stages", [["base"], ["residual"], ["base", "residual"]])
def test_a_trained_stage_without_its_state_is_not_trained_anew(damaged, stages):
    for stage in stages:
        (damaged / f"state-{stage}.safetensors").unlink()
    before, metrics = digest(damaged), (damaged / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError) as error:
        run(damaged, resume=True)
    assert str(error.value) == (
        f"{damaged}: state-{stages[0]}.safetensors is missing, without which {stages[0]} would be "
        "trained anew, over what is there; restore it or choose another --out, with --from "
        f"{damaged} to begin with its weights"
    )
    assert digest(damaged) == before and (damaged / "metrics.jsonl").read_bytes() == metrics


def test_a_stage_does_not_need_the_state_of_another(whole, damaged):
    state = damaged / "state-base.safetensors"
    content = state.read_bytes()
    state.unlink()
    run(damaged, resume=True, stages=["residual"])
    state.write_bytes(content)
    assert digest(damaged) == digest(whole)


def run_until_a_state_gets_its_name(out):
    rename = os.replace

    def killed(old, new):
        if new.name.startswith("state-"):
            os._exit(9)
        rename(old, new)

    os.replace = killed
    run(out, stages=["base"])


def test_killed_between_the_model_and_its_first_state_is_repeated(whole, tmp_path, monkeypatch):
    out = tmp_path / "run"
    context = torch.multiprocessing.get_context("spawn")
    process = context.Process(target=run_until_a_state_gets_its_name, args=(out,))
    process.start()
    process.join()
    assert process.exitcode == 9 and (out / "model.safetensors").exists()
    assert not (out / "state-base.safetensors").exists()
    with monkeypatch.context() as patch:  # and stopped once more before it is back there
        interrupt_at(1, patch)
        patch.setattr("msf.training.folder.write_state", None)
        with pytest.raises(TypeError):
            run(out, resume=True)
    run(out, resume=True)
    run(out, resume=True)  # which removes what is left of the killed one
    assert digest(out) == digest(whole)


def test_a_resume_removes_what_killed_processes_left(whole, damaged):
    process = subprocess.Popen(["true"])
    process.wait()
    names = ["model.safetensors", "state-base.safetensors", "samples-base-000003.png", "loss.png"]
    for name in map(Path, names):
        (damaged / f".{name.stem}.{process.pid}.tmp{name.suffix}").mkdir()
    (damaged / f".config.{process.pid}.tmp.json").write_text("of an earlier version")
    living = damaged / f".metrics.{os.getppid()}.tmp.jsonl"
    living.mkdir()
    run(damaged, resume=True)
    assert [path for path in damaged.iterdir() if path.name.startswith(".")] == [living]
    assert digest(damaged) == digest(whole)


def test_a_state_that_is_not_whole_rebuilds_nothing(damaged):
    (damaged / "model.safetensors").unlink()
    state = damaged / "state-base.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"state-base.safetensors: not a readable training state"):
        run(damaged, resume=True)
    assert not (damaged / "model.safetensors").exists()


def test_a_model_that_is_there_is_not_touched(damaged):
    before = (damaged / "model.safetensors").stat().st_mtime_ns
    run(damaged, resume=True)
    assert (damaged / "model.safetensors").stat().st_mtime_ns == before
