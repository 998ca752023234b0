import json
import math
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import load_file

from processes import kill_all

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES_BY_NAME = {page.name: page.read_text() for page in PAGES}
SUFFIXES = r"(?:py|md|png|json|toml|txt|cpp|cuh|hpp)"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", prose)
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    names = set(re.findall(rf"`((?:[\w.-]+/)+[\w.-]+\.{SUFFIXES})`", page.read_text()))
    places = [ROOT, ROOT / "python" / "msf", ROOT / "msf_kernels"]
    missing = [
        name
        for name in names
        if not name.startswith("runs/") and not any((place / name).exists() for place in places)
    ]
    assert not missing


def blocks(language: str, section: str) -> list[str]:
    """Return the code in ``language`` of a section of docs/imagenet.md."""
    (text,) = re.findall(
        rf"^## {section}$(.*?)(?=^## |\Z)", PAGES_BY_NAME["imagenet.md"], re.M | re.S
    )
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.M | re.S)


def test_the_loop_of_ones_own_saves_and_resumes(tmp_path, monkeypatch):
    (code,) = blocks("python", "A loop of one's own")
    monkeypatch.chdir(tmp_path)
    first: dict[str, Any] = {}
    exec(code, first)
    assert first["trainer"].step_number == 40 and float(first["loss"]) < 2
    second: dict[str, Any] = {}
    exec(code.replace("(40, 40)", "(60, 40)"), second)  # continues from step 40
    assert second["trainer"].step_number == 60
    assert len(code.splitlines()) <= 20


def shell(command: str, folder: Path) -> subprocess.Popen[bytes]:
    """Start a command of the page in ``folder``, with the commands of this environment, quietly."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return subprocess.Popen(
        ["bash", "-euc", command],
        cwd=folder,
        env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=open(folder / "errors.txt", "w"),
    )


def run(command: str, folder: Path) -> None:
    job = shell(command, folder)
    try:
        status = job.wait(timeout=120)
    except subprocess.TimeoutExpired:
        kill_all(job.pid)
        raise
    assert status == 0, (folder / "errors.txt").read_text()


def kill_between(command: str, folder: Path, once: str, never: str) -> None:
    """Kill ``command`` once there is one file, and before there is another."""
    job, deadline = shell(command, folder), time.monotonic() + 100
    while not any(folder.glob(once)):
        assert job.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    kill_all(job.pid)
    job.wait(timeout=60)
    assert not any(folder.glob(never))


@pytest.mark.xdist_group("distributed")
def test_the_small_run_ends_in_the_same_bits_when_its_training_is_killed(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="needs diffusers (the latents extra)")
    prepare, train, sample, evaluate = blocks("sh", "All of it, small")
    run(prepare, tmp_path)
    run(train, tmp_path)
    out, once = tmp_path / "runs" / "small", tmp_path / "once"
    assert list(out.glob("samples-residual-000040.png"))
    out.rename(once)
    kill_between(train, tmp_path, "runs/small/state-base.safetensors", "runs/small/state-r*")
    run(train, tmp_path)
    for name in ("model", "state-base", "state-residual"):
        tensors, expected = (load_file(folder / f"{name}.safetensors") for folder in (out, once))
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(x, expected[key]) for key, x in tensors.items())

    run(sample, tmp_path)  # of which test_sample_processes.py kills one
    assert len(numpy.load(tmp_path / "small.npz")["arr_0"]) == 48

    run(evaluate, tmp_path)
    figures = json.loads((tmp_path / "table.json").read_text())["figures"]
    assert figures.keys() >= {"fid", "sfid", "inception_score", "precision", "recall"}
    assert all(math.isfinite(value) for value in figures.values() if isinstance(value, float))
