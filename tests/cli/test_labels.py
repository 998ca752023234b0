"""Classes by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from msf.cli import main
from msf.cli.commands.sample import class_number


def test_labels_are_numbers_or_names(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    values = json.loads((run / "training.json").read_text())
    values["class_names"] = ["ant", "bee", "cat", *"3456789"]
    (run / "training.json").write_text(json.dumps(values))
    command = ["sample", str(run), "--json", "--out", str(tmp_path / "x.png"), "--overwrite"]
    assert main([*command, "--labels", "cat,1,10,ant"]) == 0
    assert json.loads(capsys.readouterr().out)["labels"] == [2, 1, 10, 0]
    assert main([*command, "--labels", "dog"]) == 2
    assert capsys.readouterr().err == (
        "msf sample: --labels must be numbers like 3 or 0,1,2, got 'dog'; "
        "names are those of msf inspect, e.g. ant\n"
    )
    assert main(["inspect", str(run)]) == 0
    assert "0 ant, 1 bee, 2 cat, 3 3" in capsys.readouterr().out
    (run / "training.json").unlink()
    assert main([*command, "--labels", "cat"]) == 2
    assert "got 'cat'\n" in capsys.readouterr().err


def test_a_number_is_the_number_of_a_class_and_no_name() -> None:
    assert class_number("1", ["0", "10", "1"]) == 1
