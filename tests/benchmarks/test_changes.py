"""Before and now, from files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import changes
from benchmarks.results import Report, Row
from benchmarks.roofline import Roofline
from benchmarks.store import save

NOW = "2026-11-27T00:00:00+00:00"
BEFORE = "2026-11-26T00:00:00+00:00"
LONG_BEFORE = "2026-11-25T00:00:00+00:00"


def op(name: str, us: float | None, noise: float = 0.5, **changes: object) -> Row:
    row = Row(name, name, (64, 256), "bfloat16", 8, 0, "triton", median_us=us, noise=noise)
    return replace(row, **changes)  # type: ignore[arg-type]


def block(us: float, arm: str = "ours") -> Row:
    return Row("block", "block", (64, 256, 1152), "bfloat16", 0, 8, arm, median_us=us, images=64)


def write(folder: Path, date: str, *found: Row) -> None:
    save(Report(date, {}, 0, Roofline(1.0, 1.0, ""), list(found)), folder)


def said(folder: Path, capsys: pytest.CaptureFixture[str]) -> str:
    assert changes.main([str(folder)]) == 0
    return capsys.readouterr().out


def test_the_last_run_beside_all_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, LONG_BEFORE, op("a", 50.0), op("b", 1e4), op("wrong", 8.0), op("slow", 10.0))
    failed = op("b", None, status="failed")
    blocks = block(1000.0), block(2000.0, "eager")
    write(tmp_path, BEFORE, op("a", 40.0), failed, op("noisy", 10.0, noise=3.0), *blocks)
    write(
        tmp_path,
        NOW,
        *(op("a", 20.0), op("b", 10150.0), op("wrong", None, status="incorrect"), op("new", 1.0)),
        *(
            op("noisy", 10.5, noise=2.5),
            op("slow", 10.3),
            op("a", None, status="skipped", arm="cuda"),
        ),
        block(1200.0),
    )
    assert said(tmp_path, capsys) == (
        f"Now: {NOW}.\n\n"
        "| row | before | now | now/before |\n"
        "| --- | --- | --- | --- |\n"
        "| a 64x256 bfloat16 triton | 40 µs | 20 µs | 0.500 |\n"
        "| b 64x256 bfloat16 triton | 10 ms | 10.15 ms | 1.015 |\n"
        "| wrong 64x256 bfloat16 triton | 8 µs | incorrect |  |\n"
        "| noisy 64x256 bfloat16 triton | 10 µs | 10.5 µs | 1.050 |\n"
        "| slow 64x256 bfloat16 triton | 10 µs | 10.3 µs | 1.030 |\n"
        "| block 64x256x1152 bfloat16 ours | 1 ms | 1.2 ms | 1.200 |\n"
        "\n"
        "Got worse:\n"
        "\n"
        "- wrong 64x256 bfloat16 triton: incorrect\n"
        "- slow 64x256 bfloat16 triton: 3.0 % slower, noise 2.0 %\n"
        "- block 64x256x1152 bfloat16 ours: 20.0 % slower, noise 2.0 %\n"
    )


def test_nothing_got_worse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, BEFORE, op("a", 50.0))
    write(tmp_path, NOW, op("a", 50.9))
    assert said(tmp_path, capsys).endswith("| 1.018 |\n\nNothing got worse.\n\n")


def test_nothing_to_compare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f"{tmp_path}: no row was measured before and again, to compare.\n"
    assert said(tmp_path, capsys) == f"Now: nothing.\n\n{line}"
    write(tmp_path, BEFORE, op("a", 50.0))
    assert said(tmp_path, capsys) == f"Now: {BEFORE}.\n\n{line}"
    write(tmp_path, NOW, op("b", 50.0))
    assert said(tmp_path, capsys) == f"Now: {NOW}.\n\n{line}"


def test_a_file_that_is_no_result_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "1.json").write_text("{}")
    with pytest.raises(SystemExit) as caught:
        changes.main([str(tmp_path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.changes: {tmp_path}/1.json: not a result of ")


def test_a_folder_that_is_not_there_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        changes.main([str(tmp_path / "none")])
    assert caught.value.code == 2
    line = f"benchmarks.changes: {tmp_path}/none: no such folder of results\n"
    assert capsys.readouterr().err == line
