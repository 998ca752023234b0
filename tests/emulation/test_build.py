from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import build as builder
from .build import CompileError, build


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program that prints VALUE of its header, and an empty cache."""
    monkeypatch.setattr(builder, "CACHE", tmp_path / "cache")
    (tmp_path / "value.hpp").write_text("#ifndef VALUE\n#define VALUE 1\n#endif\n")
    program = tmp_path / "program.cpp"
    program.write_text(
        '#include "value.hpp"\n#include <cstdio>\nint main() { std::printf("%d", VALUE); }\n'
    )
    return program


def output(executable: Path) -> str:
    return subprocess.check_output([executable], text=True)


def test_compiles_only_what_has_changed(source: Path) -> None:
    first = build([source])
    made = first.stat().st_mtime_ns
    assert build([source]) == first and first.stat().st_mtime_ns == made
    assert output(first) == "1"
    assert output(build([source], definitions=["VALUE=2"])) == "2"
    (source.parent / "value.hpp").write_text("#define VALUE 3\n")
    assert output(build([source])) == "3"


def test_a_source_is_compiled_once_with_what_it_includes(source: Path) -> None:
    other = source.parent / "one of two.cpp"
    other.write_text('#include "value.hpp"\nint other() { return VALUE; }\n')
    build([source, other])
    made = {file: file.stat().st_mtime_ns for file in builder.CACHE.glob("*.o")}
    other.write_text("int other() { return 2; }\n")
    build([source, other])
    objects = set(builder.CACHE.glob("*.o"))
    assert len(made) == 2 and len(objects) == 3
    assert all(file.stat().st_mtime_ns == time for file, time in made.items())


def test_two_builds_of_one_thing(source: Path) -> None:
    with ThreadPoolExecutor(2) as threads:
        first, second = threads.map(build, [[source], [source]])
    assert output(first) == "1" and first == second
    assert len([*builder.CACHE.iterdir()]) == 2  # it, and its object


def test_compiler_is_quoted_in_full(source: Path) -> None:
    source.write_text("int main() {\n  return missing;\n}\nint other() { return absent; }\n")
    with pytest.raises(CompileError, match=r"program.cpp:2:.*missing(.|\n)*program.cpp:4:.*absent"):
        build([source])
    assert not list(builder.CACHE.iterdir())


def test_compiler_that_is_missing(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(CompileError, match=r"no-such-compiler: not found; install g\+\+"):
        build([source])
