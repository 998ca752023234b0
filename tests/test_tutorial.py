"""The operator of docs/adding-an-operator.md, taken from the page into a copy of the sources."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "adding-an-operator.md"
BLOCK = re.compile(r"^```(\w+)\n(?:#|//) ([\w./]+)\n(.*?)^```$", re.M | re.S)
# What is installed in editable mode would be imported from here, and not from the copy.
COPY_FIRST = "import sys; sys.meta_path = [f for f in sys.meta_path if 'Redirect' not in str(f)]"


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources with the page's files in it and its lines added."""
    root = tmp_path_factory.mktemp("copy")
    ignored = shutil.ignore_patterns("__pycache__", "*.so", "results")
    for name in ("msf_kernels", "csrc", "python", "tests", "benchmarks"):
        shutil.copytree(ROOT / name, root / name, ignore=ignored)
    (ROOT / "build").mkdir(exist_ok=True)
    (root / "build").symlink_to(ROOT / "build")  # what was compiled once is not compiled again
    for name in ("pyproject.toml", ".clang-format"):
        shutil.copy(ROOT / name, root)
    for language, name, text in BLOCK.findall(PAGE.read_text()):
        file = root / name
        if not file.parent.exists():
            file.parent.mkdir()
            (file.parent / "__init__.py").touch()
        file.write_text(added(file.read_text(), text) if language == "diff" else text)
    return root


def added(text: str, lines: str) -> str:
    """The text with the lines that start with +, each below the line shown before it."""
    kept = text.splitlines()
    place = 0
    for line in lines.splitlines():
        if line.startswith("+"):
            place += 1
            kept.insert(place, line[1:])
        else:
            place = kept.index(line[1:], place)
    return "\n".join(kept) + "\n"


def run(copy: Path, code: str, **variables: str) -> str:
    paths = os.pathsep.join(map(str, (copy, copy / "python", copy / "tests")))
    ran = subprocess.run(
        [sys.executable, "-c", f"{COPY_FIRST}; {code}"],
        cwd=copy,
        env={**os.environ, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    return ran.stdout


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="compiles kernels for the host")


@no_gpu
def test_its_tests_pass_on_every_backend(copy: Path) -> None:
    pytest.importorskip("triton", minversion="3.5")
    words = ["-q", "-k", "scaled_add", "-p", "no:cacheprovider"]
    words += [
        f"tests/kernels/test_{name}.py"
        for name in ("scaled_add", "library", "tangents", "dispatch")
    ]
    code = f"import pytest; status = pytest.main({words}); print(status); sys.exit(status)"
    passed = run(copy, code)
    assert " passed" in passed and "failed" not in passed and "skipped" not in passed


def test_the_audit_compiles_it(copy: Path) -> None:
    pytest.importorskip("triton", minversion="3.5")
    code = (
        "from msf_kernels.audit import triton; rows = triton.rows_of('scaled_add', 90);"
        "assert not any(row.problem() for row in rows); print(*(row.kernel for row in rows))"
    )
    found = run(copy, code, TRITON_INTERPRET="0")
    assert found.split() == ["scaled_add.scaled_add_kernel"] * 2  # float32 and bfloat16


def test_it_is_formatted(copy: Path) -> None:
    files = {name for _, name, _ in BLOCK.findall(PAGE.read_text())}
    code = [name for name in files if name.endswith(".py")]
    commands = [
        ("ruff", "check", "--no-cache", *code),
        ("ruff", "format", "--check", "--no-cache", *code),
        ("clang-format", "--dry-run", "--Werror", *files.difference(code)),
    ]
    for command in commands:
        if shutil.which(command[0]) is None:
            pytest.skip(f"no {command[0]}")
        ran = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr


@no_gpu
def test_the_benchmark_runs(copy: Path) -> None:
    words = ["scaled_add", "--arms", "eager", "reference"]
    printed = run(copy, f"from benchmarks import run; sys.exit(run.main({words}))")
    assert "### scaled_add\n" in printed and "### scaled_add backward" not in printed
    assert "| reference |" in printed and "incorrect" not in printed
