"""What a writer that was killed leaves behind, and who removes it."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path

import pytest

from msf.cli.outputs import atomic_folder
from msf.files import atomic_write
from processes import process

KILLED = """
import os
from pathlib import Path
from msf.cli.outputs import atomic_folder
from msf.files import atomic_write
with {writer}(Path({path!r})) as temporary:
    (temporary / "x" if temporary.is_dir() else temporary).write_text("half")
    # safetensors writes to a hidden name of its own in the same folder, and renames that
    (temporary.parent / ".tmpXYZ").write_text("half") if temporary.is_file() else None
    os.kill(os.getpid(), 9)
"""


def killed_over(path: Path, writer: str) -> list[str]:
    """Return what a killed writer of ``path`` has left."""
    before = set(os.listdir(path.parent))
    assert process(KILLED.format(writer=writer, path=str(path))).returncode == -signal.SIGKILL
    return sorted(set(os.listdir(path.parent)) - before)


@pytest.mark.parametrize("writer", ["atomic_write", "atomic_folder"])
@pytest.mark.parametrize("name", ["x.tensors", "x", "x.y.z", "x[1]"])
def test_a_writer_removes_what_dead_processes_left_of_its_target(
    tmp_path: Path, writer: str, name: str
) -> None:
    path, other = tmp_path / name, tmp_path / f"o{name}"
    stays = killed_over(other, writer)
    assert len(stays) == 1 and stays[0].startswith(".")
    living = tmp_path / f".{path.stem}.{os.getppid()}.tmp{path.suffix}"
    living.mkdir()
    for _ in range(2):
        assert len(killed_over(path, writer)) == 1
    (tmp_path / f".{path.stem}.{2**40}.tmp{path.suffix}").write_text("no process's number")
    (earlier,) = re.findall(r"\.(\d+)-[0-9a-f]{8}\.tmp", stays[0])
    (tmp_path / f".{path.stem}.{earlier}.tmp{path.suffix}").write_text("of an earlier version")
    with (atomic_folder if writer == "atomic_folder" else atomic_write)(path):
        pass
    kept = {path.name, living.name, *stays, f".{path.stem}.{2**40}.tmp{path.suffix}"}
    assert set(os.listdir(tmp_path)) == kept


def test_a_failed_write_removes_nothing_of_others(tmp_path: Path) -> None:
    """A run that was killed over its first state is known by that, see ``RunFolder``."""
    (left,) = killed_over(tmp_path / "x", "atomic_write")
    with pytest.raises(KeyError), atomic_write(tmp_path / "x"):
        raise KeyError
    assert os.listdir(tmp_path) == [left]


def test_a_dead_process_may_have_had_our_number(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with atomic_folder(tmp_path / "x") as folder:
            (folder / content).write_text("")
        if content == "old":
            os.rename(tmp_path / "x", folder)
    assert os.listdir(tmp_path) == ["x"] and os.listdir(tmp_path / "x") == ["new"]


def test_processes_of_another_machine_may_be_alive(tmp_path: Path) -> None:
    (left,) = killed_over(tmp_path / "x", "atomic_write")
    elsewhere = re.sub(r"-[0-9a-f]{8}\.", "-01234567.", left)
    os.rename(tmp_path / left, tmp_path / elsewhere)
    with atomic_write(tmp_path / "x"):
        pass
    assert sorted(os.listdir(tmp_path)) == sorted([elsewhere, "x"])
