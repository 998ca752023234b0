"""What `msf sample` takes and shows."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from msf import sampling
from msf.cli import main, outputs
from msf.cli.commands.sample import class_number, split_labels


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
    made = json.loads(capsys.readouterr().out)
    assert made["labels"] == [2, 1, 10, 0] and made["classes"] == [
        "cat",
        "bee",
        None,
        "ant",
    ]
    assert main([*command, "--labels", "dog"]) == 2
    assert capsys.readouterr().err == (
        "msf sample: --labels: no class is named or numbered 'dog'; "
        "choose from ant, bee, cat and 7 more, or 0 to 9, or 10 for no class\n"
    )
    command.remove("--json")
    assert main([*command, "--count", "12"]) == 0
    assert capsys.readouterr().out.endswith(" seeds 0 to 11, classes ant, bee, cat and 7 more\n")
    assert main(["inspect", str(run)]) == 0
    assert "0 ant, 1 bee, 2 cat, 3 3" in capsys.readouterr().out
    (run / "training.json").unlink()
    assert main([*command, "--labels", "cat"]) == 2
    assert capsys.readouterr().err.endswith("'cat'; choose from 0 to 9, or 10 for no class\n")
    assert main([*command, "--count", "1"]) == 0
    assert capsys.readouterr().out.endswith(" seeds 0 to 0\n")


def test_a_name_wins_over_a_number() -> None:
    names = ["1", "2", "3"]
    assert [class_number(label, names, 3) for label in ("1", "3", "0")] == [0, 2, 0]
    with pytest.raises(ValueError, match="no class is named or numbered '4'; choose from 1, 2, 3,"):
        class_number("4", names, 3)


def test_a_class_may_have_a_comma_in_its_name() -> None:
    names = ["a", "a,b", "c", "d,e,f"]
    split = {
        "d,e,f": ["d,e,f"],
        "a,b,a": ["a,b", "a"],
        "c,a,b": ["c", "a,b"],
        "a,c,b": ["a", "c", "b"],
        "": [""],
    }
    assert {text: list(split_labels(text, names)) for text in split} == split


@pytest.mark.parametrize("names", [["a", "b", "a,b,c", "c"], ["a,b", "a,b,c", "c"]])
def test_a_name_whose_parts_are_names_is_ambiguous(names: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        list(split_labels("c,a,b,c", names))
    assert str(error.value) == (
        '--labels: "a,b,c" is ambiguous, it is a class and its parts are classes too; '
        f"give their numbers, {names.index('a,b,c')} for the former"
    )
    assert list(split_labels("c,0", names)) == ["c", "0"]


def test_names_that_need_it_are_quoted(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(workspace / "run", run)
    values = json.loads((run / "training.json").read_text())
    values["class_names"] = ["(no class)", "", "a,b", 'say "c"', *"456789"]
    (run / "training.json").write_text(json.dumps(values))
    assert main(["inspect", str(run)]) == 0
    assert r'0 "(no class)", 1 "", 2 "a,b", 3 "say \"c\"", 4 4' in capsys.readouterr().out
    command = ["sample", str(run), "--overwrite", "--out", str(tmp_path / "x.png"), "--labels"]
    assert main([*command, "0,10"]) == 0
    assert capsys.readouterr().out.endswith(', classes "(no class)", (no class)\n')
    assert main([*command, "b"]) == 2
    assert 'choose from "(no class)", "", "a,b" and 7 more, or 0' in capsys.readouterr().err


def interrupt_after(batches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Send Ctrl-C when so many batches are done, and again while they are kept."""
    original, put, calls = sampling.sample_components, outputs._put, []

    def sample(*args: Any, **options: Any) -> Any:
        calls.append(None)
        if len(calls) > batches:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args, **options)

    def put_slowly(*args: Path) -> None:
        signal.raise_signal(signal.SIGINT)
        put(*args)

    monkeypatch.setattr(sampling, "sample_components", sample)
    monkeypatch.setattr(outputs, "_put", put_slowly)


@pytest.mark.parametrize("exists", [False, True])
def test_ctrl_c_keeps_the_images_that_are_done(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    exists: bool,
) -> None:
    out = kept = tmp_path / "images"
    if exists:  # what it holds stays until the new is whole
        kept = tmp_path / "images-interrupted-2"
        for name in ("images", "images-interrupted-1"):
            (tmp_path / name).mkdir()
            (tmp_path / name / "old.png").write_bytes(b"")
    interrupt_after(2, monkeypatch)
    command = ["sample", str(workspace / "run"), "--out", str(out), "--batch-size=4"]
    assert main([*command, "--count=20000", "--overwrite"]) == 130
    assert capsys.readouterr().err == (
        f"msf sample: interrupted; kept the 8 images that are done in {kept}\n"
    )
    assert not list(tmp_path.glob(".*"))
    assert sorted(file.name for file in kept.iterdir()) == [f"00000{i}.png" for i in range(8)]
    assert all(Image.open(file).size == (8, 8) for file in kept.iterdir())
    if exists:
        assert len(list(tmp_path.glob("images*/old.png"))) == 2


@pytest.mark.parametrize("stops", [[signal.SIGTERM], [signal.SIGINT] * 20])
def test_a_process_that_is_stopped_ends_in_one_line(
    workspace: Path, tmp_path: Path, stops: list[signal.Signals]
) -> None:
    command = [sys.executable, "-m", "msf.cli", "sample", str(workspace / "run"), "--batch-size=4"]
    process = subprocess.Popen(
        [*command, "--count=200000", "--out", str(tmp_path / "images")],
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list(tmp_path.glob(".*/0*.png")) and process.poll() is None:
        time.sleep(0.01)
    for stop in stops:
        process.send_signal(stop)
        time.sleep(0.01)
    _, messages = process.communicate(timeout=120)
    count = len(list((tmp_path / "images").iterdir()))
    assert process.returncode == 130
    assert messages == (
        f"msf sample: interrupted; kept the {count:,} images that are done in "
        f"{tmp_path / 'images'}\n"
    )


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_next_run_removes_what_a_killed_one_left(
    workspace: Path, tmp_path: Path, overwrite: bool
) -> None:
    out = tmp_path / "images"
    command = ["sample", str(workspace / "run"), "--out", str(out), "--batch-size=4"]
    if overwrite:
        assert main([*command, "--count=1"]) == 0
        command.append("--overwrite")
    process = subprocess.Popen([sys.executable, "-m", "msf.cli", *command, "--count=200000"])
    while not list(tmp_path.glob(".*/0*.png")) and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert list(tmp_path.glob(".images.*"))
    assert main([*command, "--count=2"]) == 0
    assert os.listdir(tmp_path) == ["images"] and len(os.listdir(out)) == 2


@pytest.mark.parametrize(("name", "batches"), [("images", 0), ("x.png", 2), ("x.safetensors", 2)])
def test_ctrl_c_leaves_nothing_else(
    workspace: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    batches: int,
) -> None:
    interrupt_after(batches, monkeypatch)
    command = ["sample", str(workspace / "run"), "--out", str(tmp_path / name), "--batch-size=4"]
    assert main([*command, "--count=2000"]) == 130
    assert capsys.readouterr().err == "msf sample: interrupted\n"
    assert not list(tmp_path.iterdir())


def test_a_terminal_shows_progress(workspace: Path, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    size = struct.pack("HHHH", 24, 80, 0, 0)  # it has none at first, and tqdm fills the width
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, size)
    command = [sys.executable, "-m", "msf.cli", "sample", str(workspace / "run"), "--count=12"]
    process = subprocess.run(
        [*command, "--batch-size=4", "--out", str(tmp_path / "images")],
        stdout=subprocess.PIPE,
        stderr=terminal,
    )
    os.close(terminal)
    shown = os.read(controller, 100_000).decode()
    os.close(controller)
    assert process.returncode == 0
    assert "0/3 " in shown and "3/3 " in shown and "100%" in shown
    assert len(list((tmp_path / "images").iterdir())) == 12
