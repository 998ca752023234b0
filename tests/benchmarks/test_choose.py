from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import choose
from benchmarks.results import Report, Row, save
from benchmarks.roofline import Roofline


def row(arm: str, microseconds: float | None, size: int = 1, op: str = "gate_residual") -> Row:
    status = "ok" if microseconds else "incorrect"
    return Row(op, op, (size,), "float32", 8, 0, arm, status, median_us=microseconds)


def test_the_fastest_comes_first_by_the_geometric_mean() -> None:
    rows = [row("cuda", 1), row("triton", 3), row("cuda", 40, 2), row("triton", 10, 2)]
    assert choose.orders([*rows, row("eager", 0.1), row("eager", 0.1, 2)]) == {
        "gate_residual": ["triton", "cuda"]
    }


def test_what_was_wrong_once_is_never_chosen() -> None:
    rows = [row("cuda", 9), row("triton", 3), row("cuda", 9, 2), row("triton", None, 2)]
    assert choose.orders(rows) == {"gate_residual": ["cuda"]}
    assert choose.orders([row("cuda", None)]) == {}


def test_the_table_is_named_after_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "FOLDER", tmp_path / "measured")
    (tmp_path / "h200").mkdir()
    report = Report("today", {}, 0, Roofline(1.0, 1.0), [row("cuda", 2), row("reference", 5)])
    save(report, tmp_path / "h200" / "all.json")
    assert choose.main([str(tmp_path / "h200" / "all.json")]) == 0
    table = json.loads((tmp_path / "measured" / "h200.json").read_text())
    assert table == {"gate_residual": ["cuda", "reference"]}


def test_a_result_without_our_arms_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(Report("today", {}, 0, Roofline(1.0, 1.0), [row("eager", 2)]), tmp_path / "all.json")
    with pytest.raises(SystemExit):
        choose.main([str(tmp_path / "all.json")])
    assert "no time of a backend of ours in it" in capsys.readouterr().err
