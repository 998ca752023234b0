"""Damaged runs that --resume mends."""

import shutil

import pytest

from training_runs import digest, run, steps


@pytest.fixture
def damaged(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize("place", [0, 4, 9])
@pytest.mark.parametrize(
    "line", [b"garbage\n", b"\0\0\0\0\n", b"\xff\n", b'{"stage": "ba{"a": 1}\n', b"[]\n", b"\n"]
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
        f"{damaged}: rebuilt {' and '.join(names)} from the states of all stages\n"
    )


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
