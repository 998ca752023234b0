"""The command that hands over hostile input sees every way to take it badly."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from benchmarks import hostile
from benchmarks.hostile_changes import Bomb
from benchmarks.hostile_kinds import KINDS, Kind

GOOD = "import sys; print('msf flops: x: no good', file=sys.stderr); sys.exit(2)"
KIND = Kind("configuration", "flops x", "x", "x", lambda file: None, "no good")


def problem(code: str, folder: Path, seconds: float = 30) -> str | None:
    outcome = hostile.run([sys.executable, "-c", code], folder / "log", seconds)
    return outcome.problem(KIND)


def test_one_clear_line_is_good(tmp_path: Path) -> None:
    assert problem(GOOD, tmp_path) is None


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("raise KeyError('x')", "a traceback that ends in KeyError: 'x'"),
        (GOOD.replace("good'", "good\\nand'"), "wants one printable line, got"),
        (GOOD.replace("good'", "good\\033[2J'"), "wants one printable line, got"),
        (GOOD.replace("exit(2)", "exit(1)"), "ended with status 1, not 2: msf flops: x: no good"),
        ("pass", "ended with status 0, not 2"),
        (GOOD.replace("no good", "bad"), "wants 'no good' in msf flops: x: bad"),
        (GOOD.replace("msf", "fsm"), "wants the command before the message, got fsm flops"),
    ],
)
def test_what_is_no_clear_line_is_seen(code: str, found: str, tmp_path: Path) -> None:
    assert (problem(code, tmp_path) or "").startswith(found)


def test_a_hang_is_seen_and_ended_with_its_workers(tmp_path: Path) -> None:
    code = "import os, time; os.fork(); time.sleep(1000)"  # the worker holds stderr open
    assert (problem(code, tmp_path, seconds=1) or "").startswith("hung, was killed")


@pytest.mark.parametrize("load", ["pickle.load(file)", "pickle._load(file)"])
def test_a_pickle_that_is_loaded_is_seen(load: str, tmp_path: Path) -> None:
    file = tmp_path / "x"
    file.write_bytes(pickle.dumps(Bomb(file)))
    code = f"import pickle; file = open({str(file)!r}, 'rb'); {load}; {GOOD}"
    assert problem(code, tmp_path) == "unpickled a file"
    assert (tmp_path / "exploded").is_dir()


def test_pickles_of_other_things_are_not_the_users(tmp_path: Path) -> None:
    code = f"import pickle, decimal; pickle.loads(pickle.dumps(decimal.Decimal(1))); {GOOD}"
    assert problem(code, tmp_path) is None


def test_a_process_without_watch_is_seen(tmp_path: Path) -> None:
    command = [sys.executable, "-S", "-c", GOOD]
    assert hostile.run(command, tmp_path / "log").problem(KIND) == "was not watched"


def test_kinds_have_names_of_their_own() -> None:
    assert len({(kind.sort, kind.name) for kind in KINDS}) == len(KINDS) >= 40


def test_some_kinds_for_real(tmp_path: Path) -> None:
    hostile.make_inputs(tmp_path / "whole")
    chosen = {"configuration, a key twice", "image, pickle", "image, pipe", "image, empty folder"}
    kinds = [kind for kind in KINDS if f"{kind.sort}, {kind.name}" in chosen]
    found = hostile.check(kinds, tmp_path)
    assert not found["failures"] and found["kinds"] == {"configuration": 1, "image": 3}
    assert set(found["lines"]) == chosen


def test_a_kind_that_is_taken_is_a_failure(tmp_path: Path) -> None:
    hostile.make_inputs(tmp_path / "whole")
    kind = Kind("x", "flops --config {here}/config.json", "config.json", "y", lambda file: None, "")
    found = hostile.check([kind], tmp_path)
    assert found["failures"] == ["x, y: ended with status 0, not 2: "]
