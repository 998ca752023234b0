"""Damaged runs that --resume mends."""

import shutil

import pytest

from training_runs import digest, run, steps


@pytest.fixture
def damaged(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


@pytest.mark.parametrize(
    "line", [b'{"stage": "resi', b"garbage\n", b"\0\0\0\0\n", b"\xff\n", b'{"stage": "ba{"a": 1}\n']
)
def test_a_torn_last_line_of_metrics_is_dropped_and_told(whole, damaged, line, capsys):
    with open(damaged / "metrics.jsonl", "ab") as file:
        file.write(line)
    run(damaged, resume=True)
    assert steps(damaged) == steps(whole) and digest(damaged) == digest(whole)
    assert capsys.readouterr().err == (
        f"{damaged / 'metrics.jsonl'}: dropped its last line, whose writing was cut short\n"
    )


@pytest.mark.parametrize("line", [b"[]\n", b'{"a": 1}\n'])
def test_a_last_line_of_something_else_is_an_error(damaged, line):
    with open(damaged / "metrics.jsonl", "ab") as file:
        file.write(line)
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 10: "):
        run(damaged, resume=True)


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
