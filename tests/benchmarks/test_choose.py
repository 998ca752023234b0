from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import choose
from benchmarks.results import Report, Row, save
from benchmarks.roofline import Roofline

GPU = {"device": "NVIDIA H200", "multiprocessors": 132}


def row(arm: str, microseconds: float | None, size: int = 1, op: str = "gate_residual") -> Row:
    status = "ok" if microseconds else "incorrect"
    return Row(op, op, (size,), "float32", 8, 0, arm, status, median_us=microseconds)


def report(*rows: Row, machine: dict[str, Any] = GPU) -> Report:
    return Report("today", machine, 0, Roofline(1.0, 1.0), list(rows))


def test_the_fastest_comes_first_by_the_geometric_mean() -> None:
    rows = [row("cuda", 1), row("triton", 3), row("cuda", 40, 2), row("triton", 10, 2)]
    assert choose.orders([*rows, row("eager", 0.1), row("eager", 0.1, 2)]) == {
        "gate_residual": ["triton", "cuda"]
    }


def test_what_was_wrong_once_is_never_chosen() -> None:
    rows = [row("cuda", 9), row("triton", 3), row("cuda", 9, 2), row("triton", None, 2)]
    assert choose.orders(rows) == {"gate_residual": ["cuda"]}
    assert choose.orders([row("cuda", None)]) == {}


def test_a_backend_is_compared_where_it_runs() -> None:
    rows = [row("triton", 4), row("triton", 9, 2), row("cudnn", 2)]  # none of the second shape
    skipped = replace(row("cudnn", None, 2), status="skipped")
    assert choose.orders([*rows, skipped]) == {"gate_residual": ["cudnn", "triton"]}


def test_forward_backward_and_sizes_have_orders_of_their_own() -> None:
    rows = [
        replace(row(arm, cost, tokens), benchmark=benchmark, sizes=(tokens, 72, 0))
        for benchmark, arm, cost, tokens in (
            ("gate_residual", "triton", 2, 256),
            ("gate_residual", "cudnn", 3, 256),
            ("gate_residual", "triton", 9, 1024),
            ("gate_residual", "cudnn", 5, 1024),
            ("gate_residual backward", "cudnn", 5, 256),
        )
    ]
    assert choose.orders(rows) == {
        "gate_residual": [
            {"sizes": (256, 72, 0), "order": ["triton", "cudnn"]},
            {"sizes": (1024, 72, 0), "order": ["cudnn", "triton"]},
        ],
        "gate_residual_backward": [{"sizes": (256, 72, 0), "order": ["cudnn"]}],
    }


def test_the_table_is_named_after_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choose, "FOLDER", tmp_path / "measured")
    (tmp_path / "h200").mkdir()
    save(report(row("cuda", 2), row("reference", 5)), tmp_path / "h200" / "all.json")
    assert choose.main([str(tmp_path / "h200" / "all.json")]) == 0
    table = json.loads((tmp_path / "measured" / "h200.json").read_text())
    assert table == {"gate_residual": ["cuda", "reference"]}


@pytest.mark.parametrize(
    ("arm", "machine", "line"),
    [
        ("eager", GPU, "no time of a backend of ours in it"),
        (
            "reference",
            {"device": "CPU"},
            "measured on a CPU; only a GPU's result can be chosen from",
        ),
    ],
    ids=["none of our arms", "CPU"],
)
def test_a_result_that_says_nothing_of_a_gpu_is_refused(
    arm: str,
    machine: dict[str, Any],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(choose, "FOLDER", tmp_path / "measured")
    path = tmp_path / "all.json"
    save(report(row(arm, 2), machine=machine), path)
    with pytest.raises(SystemExit) as caught:
        choose.main([str(path)])
    assert caught.value.code == 2 and not choose.FOLDER.exists()
    assert capsys.readouterr().err == f"benchmarks.choose: {path}: {line}\n"
