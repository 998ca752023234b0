"""Damaged and lost files of a run: every command says in a line what mends it, and that does."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from msf.cli import main

from .helpers import answer

REBUILT = "msf train --resume rebuilds it "
MENDED = {
    "model.safetensors": (f"{REBUILT}from the states", []),
    "config.json": (f"{REBUILT}with --config or --preset", ["--config"]),
    "training.json": ("msf train --resume goes on with --config or --preset", ["--config"]),
}


@pytest.fixture
def run(workspace: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(workspace / "run", tmp_path / "run"))


def resume(run: Path, *more: object) -> list[str]:
    return [*map(str, ("train", "--data", "digits", "--out", run, "--resume", "--quiet", *more))]


@pytest.mark.parametrize("command", ["train", "sample", "inspect", "evaluate"])
@pytest.mark.parametrize("name", MENDED)
def test_a_damaged_file_is_told_with_what_mends_it(
    name: str, command: str, run: Path, workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = {
        "train": resume(run),
        "sample": ["sample", str(run), "--labels", "1", "--out", str(run / "x.png")],
        "inspect": ["inspect", str(run)],
        "evaluate": ["evaluate", str(run)],
    }
    remedy, options = MENDED[name]
    (run / name).write_bytes((run / name).read_bytes()[:60])
    assert main(commands[command]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"msf {command}: {run / name}: ") and told.count("\n") == 1
    assert told.endswith(f"; remove it, and {remedy}\n")
    (run / name).unlink()
    if command in ("sample", "inspect") and name != "training.json":
        assert main(commands[command]) == 2
        assert capsys.readouterr().err == f"msf {command}: {run}: {name} is missing; {remedy}\n"
    if command == "train":
        given = [word for option in options for word in (option, workspace / "tiny.json")]
        assert main(resume(run, *given)) == 0
        assert main(commands["sample"]) == 0


@pytest.mark.parametrize("content", [None, b"", b"garbage\n"])
def test_a_run_that_is_complete_goes_without_its_metrics(
    content: bytes | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_bytes(content)
    assert main(resume(run)) == 0
    out, err = capsys.readouterr()
    assert "Warning" not in err and out == f"{run}\nstage  step  loss\n"
    assert answer(capsys, *resume(run))["stages"] == {}
