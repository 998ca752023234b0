from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks import choose
from benchmarks.results import Report, Row
from benchmarks.roofline import Roofline
from benchmarks.store import RESULTS, load, newest, save
from msf_kernels.measurements import FOLDER

GPU = {"device": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}


def row(arm: str, microseconds: float | None, size: int = 1, op: str = "gate_residual") -> Row:
    status = "ok" if microseconds else "incorrect"
    return Row(op, op, (size,), "float32", 8, 0, arm, status, median_us=microseconds)


def report(*rows: Row, machine: dict[str, Any] = GPU) -> Report:
    date = "2026-11-26T00:00:00+00:00"
    return Report(date, machine, 0, Roofline(1.0, 1.0, "invented"), list(rows))


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
    arms = (("triton", 4, 1), ("triton", 9, 2), ("cudnn", 2, 1))  # none of the second shape
    rows = [row(*arm, op="attention") for arm in arms]
    skipped = replace(row("cudnn", None, 2, op="attention"), status="skipped")
    assert choose.orders([*rows, skipped]) == {"attention": ["cudnn", "triton"]}


def test_forward_backward_and_sizes_have_orders_of_their_own() -> None:
    rows = [
        replace(row(arm, cost, tokens, "attention"), benchmark=benchmark, sizes=(tokens, 72, 0))
        for benchmark, arm, cost, tokens in (
            ("attention", "triton", 2, 256),
            ("attention", "cudnn", 3, 256),
            ("attention", "triton", 9, 1024),
            ("attention", "cudnn", 5, 1024),
            ("attention backward", "cudnn", 5, 256),
        )
    ]
    assert choose.orders(rows) == {
        "attention": [
            {"sizes": (256, 72, 0), "order": ["triton", "cudnn"]},
            {"sizes": (1024, 72, 0), "order": ["cudnn", "triton"]},
        ],
        "attention_backward": [{"sizes": (256, 72, 0), "order": ["cudnn"]}],
    }


def test_the_best_of_the_first_shape_in_words() -> None:
    rows = [
        replace(row(arm, cost, size), dtype=dtype, percent=40.0, peer_ratio=ratio)
        for arm, cost, size, dtype, ratio in (
            ("cuda", 1, 1, "float32", None),
            ("eager", 1, 2, "bfloat16", 1.0),
            ("cuda", 4, 2, "bfloat16", 0.25),
            ("triton", 2, 2, "bfloat16", 0.5),
            ("cuda", 1, 3, "bfloat16", 2.0),
        )
    ]
    line = "gate_residual 2 bfloat16 triton 2 us, 40 % of the ceiling, 0.50x the best peer's speed"
    orders = {"gate_residual": ["triton", "cuda"]}
    assert choose.best(rows, orders) == {"gate_residual": line}
    alone = replace(rows[0], dtype="bfloat16", sizes=(256, 72))
    orders = {"gate_residual": [{"sizes": [256, 72], "order": ["cuda"]}]}
    assert choose.best([alone], orders) == {
        "gate_residual": "gate_residual 1 bfloat16 cuda 1 us, 40 % of the ceiling"
    }


def test_the_table_of_a_folder_is_named_after_the_gpu_and_the_newest_rows_decide(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(choose, "FOLDER", tmp_path / "measured")
    folder = tmp_path / "h200"
    old = report(row("cuda", 2), row("triton", 9), row("reference", 5))
    save(replace(old, date="2026-11-25T00:00:00+00:00"), folder)
    save(report(row("triton", 1)), folder)
    assert choose.main([str(folder)]) == 0
    table = json.loads((tmp_path / "measured" / "h200.json").read_text())
    assert table == {
        "capability": "9.0",
        "results": [file.name for file in sorted(folder.glob("*.json"))],
        "orders": {"gate_residual": ["triton", "cuda", "reference"]},
        "best": {},
    }


def test_the_shipped_tables_are_those_of_the_results_that_they_name() -> None:
    for file in FOLDER.glob("*.json"):
        table = json.loads(file.read_text())
        rows = newest(load(RESULTS / file.stem / name) for name in table["results"])
        orders = choose.orders(rows)
        assert table["orders"] == json.loads(json.dumps(orders))
        assert table["best"] == choose.best(rows, orders)


@pytest.mark.parametrize(
    ("arm", "machine", "line"),
    [
        ("eager", GPU, "no time of a backend of ours in it"),
        (
            "reference",
            {"device": "CPU"},
            "measured on a CPU; only a GPU's results can be chosen from",
        ),
        (None, GPU, "no result of benchmarks.run in it"),
    ],
    ids=["none of our arms", "CPU", "no file"],
)
def test_a_folder_that_says_nothing_of_a_gpu_is_refused(
    arm: str | None,
    machine: dict[str, Any],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(choose, "FOLDER", tmp_path / "measured")
    folder = tmp_path / "h200"
    if arm:
        save(report(row(arm, 2), machine=machine), folder)
    with pytest.raises(SystemExit) as caught:
        choose.main([str(folder)])
    assert caught.value.code == 2 and not choose.FOLDER.exists()
    assert capsys.readouterr().err == f"benchmarks.choose: {folder}: {line}\n"
