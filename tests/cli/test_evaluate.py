"""What `msf evaluate` takes and knows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from msf.cli import main

from .helpers import answer, write_config


def test_evaluate_compares_settings(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "report.json"
    settings = ("--steps", 2, 1, "--steps", 1, "--samples", 32, "--guidance-scale", 1.5)
    found = answer(capsys, "evaluate", workspace / "run", *settings, "--out", out)
    assert json.loads(out.read_text()) == found
    assert found["data"] == "digits"
    assert [result["steps"] for result in found["results"]] == [[2, 1], [1, 1]]
    first, second = (result["report"] for result in found["results"])
    assert first["settings"] == second["settings"]
    assert first["real"] == second["real"]
    assert first["generated"]["fd"] != second["generated"]["fd"]
    # With the base given, two and one base steps are the same.
    assert first["bases"]["true"] == second["bases"]["true"]


def test_evaluate_more_samples_than_test_images(
    workspace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", str(workspace / "run"), "--steps", "1", "--samples", "400"]) == 0
    output = capsys.readouterr()
    assert (
        "400 samples are compared with all 358 images of the test split; without a floor, which "
        "takes as many\n"
    ) in output.err
    assert "Frechet distance  " in output.out and "floor" not in output.out


def test_evaluate_knows_the_data_of_the_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(300):
        path = tmp_path / "photos" / "abc"[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((8, 8), 20 + 20 * (index % 3)).save(path)
    config = write_config(tmp_path / "c.json", model={"num_classes": 3})
    photos, run = tmp_path / "photos", str(tmp_path / "run")
    assert main(["train", "--config", str(config), "--data", str(photos), "--out", run]) == 0
    evaluate = ["evaluate", run, "--steps", "1", "--samples", "8"]
    photos.rename(tmp_path / "moved")
    moved = [*evaluate, "--data", str(tmp_path / "moved")]
    gone = tmp_path / "moved" / "a" / "gone.png"
    gone.symlink_to(tmp_path / "unmounted")
    capsys.readouterr()
    assert main(moved) == 0
    assert "in the test split; ignored: 1 link that leads nowhere\n" in capsys.readouterr().err
    gone.unlink()
    _check_empty_files(tmp_path / "moved" / "b", [*moved, "--data-changed"], capsys)
    (tmp_path / "moved" / "a").rename(tmp_path / "moved" / "z")
    capsys.readouterr()
    assert main(moved) == 2
    change = "classes gone: a, classes new: z, b is now number 0 (was 1), c is now number 1 (was 2)"
    assert capsys.readouterr().err == (
        f"msf evaluate: {run}: not the data this run was trained on: {change}; "
        "restore it, or evaluate on what is there now with --data-changed\n"
    )
    assert main([*moved, "--data-changed"]) == 0
    assert f"{run}: evaluating with {change}\n" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "moved" / "z")
    shutil.copytree(tmp_path / "moved" / "b", tmp_path / "moved" / "a")
    assert main(moved) == 2  # the same classes with other images
    assert "100 of 300 images are gone (a/0.png first)" in capsys.readouterr().err


def _check_empty_files(
    folder: Path, command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """As copies that broke off leave them."""
    empty = [folder / f"new{index}.png" for index in range(4)]
    empty[0].touch()
    capsys.readouterr()
    assert main(command) == 0
    assert (
        f"data: skipped 1 of 301 images, as they cannot be read: {empty[0]}: an empty file; "
        "replace or remove them\n"
    ) in capsys.readouterr().err
    for file in empty:
        file.touch()
    assert main(command) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith(
        "msf evaluate: data: cannot read 4 of 304 images, more than one in a hun"
    )
    assert f"{empty[0]}: an empty file" in told
    for file in empty:
        file.unlink()
