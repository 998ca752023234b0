"""``--out`` may be a symbolic link: what it leads to is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from msf.cli import main

from .test_bad_input import PLACES


def contents(place: Path) -> dict[str, bytes]:
    files = place.rglob("*") if place.is_dir() else [place]
    return {str(file.relative_to(place)): file.read_bytes() for file in files if file.is_file()}


@pytest.mark.parametrize("there", [False, True], ids=["dangling", "there"])
@pytest.mark.parametrize("name", ["x.npz", "x.png", "x.safetensors", "x"])
def test_sample_writes_through_a_link(
    name: str, there: bool, workspace: Path, tmp_path: Path
) -> None:
    link, target = tmp_path / name, tmp_path / "disk" / "target"
    target.parent.mkdir()
    command = ["sample", str(workspace / "run"), "--num-images", "2", "--overwrite", "--out"]
    assert main([*command, str(tmp_path / f"plain{name}")]) == 0
    if there and link.suffix:
        target.write_text("old")
    elif there:
        target.mkdir()
        (target / "000007.png").touch()
    link.symlink_to("disk/target")
    assert main([*command, str(link)]) == 0
    assert str(link.readlink()) == "disk/target" and list(target.parent.iterdir()) == [target]
    assert contents(target) == contents(tmp_path / f"plain{name}")


@pytest.mark.parametrize("out", ["link", "link/x"])
@pytest.mark.parametrize(
    "command",
    [
        "sample {run} --num-images 1 --out {out}",
        "evaluate {run} --samples 20 --out {out}",
        "factorize {image} --out {out}",
        "train --config {tiny} --data digits --steps 1 --out {out}",
    ],
)
def test_a_link_that_leads_to_nothing_yet(
    command: str, out: str, workspace: Path, tmp_path: Path
) -> None:
    places = {name: workspace / file for name, file in PLACES.items()}
    (tmp_path / "link").symlink_to("target")
    assert main(command.format(**places, out=tmp_path / out).split()) == 0
    assert str((tmp_path / "link").readlink()) == "target" and contents(tmp_path / "target")
