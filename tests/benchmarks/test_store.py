"""Results as files, and the code that they are of."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import msf_kernels
from benchmarks import fingerprint, store
from benchmarks.registry import find
from benchmarks.results import Report, Row
from benchmarks.roofline import Roofline
from benchmarks.subject import OPERATORS

RATES = Roofline(4263.0, 791.0, "invented")
H200 = {"device": "NVIDIA H200", "capability": "9.0", "multiprocessors": 132}
OPERATOR = Row("gate_residual", "gate_residual", (2, 3), "bfloat16", 8, 0, "triton", sizes=(1, 2))
BLOCK = Row("block", "block", (64, 256, 1152), "bfloat16", 0, 10**9, "ours", images=64)


def report(row: Row, date: str, **changes: object) -> Report:
    return Report(date, H200, 7, RATES, [replace(row, **changes)])  # type: ignore[arg-type]


@pytest.mark.parametrize("row", [OPERATOR, BLOCK], ids=["operator", "model"])
def test_round_trip(row: Row, tmp_path: Path) -> None:
    saved = report(row, "2026-11-26T10:50:12+00:00")
    path = store.save(saved, tmp_path / "h200")
    assert path == tmp_path / "h200" / "2026-11-26-105012.json"
    assert store.load(path) == saved


def test_no_run_writes_over_another_and_the_newest_row_holds(tmp_path: Path) -> None:
    early, late = "2026-11-26T10:50:12+00:00", "2026-11-26T12:50:11+02:00"  # a second earlier
    store.save(report(OPERATOR, early, median_us=1.0), tmp_path)
    store.save(report(OPERATOR, late, median_us=2.0), tmp_path)
    store.save(report(OPERATOR, "2025-01-01T00:00:00+00:00", arm="cuda", median_us=3.0), tmp_path)
    (tmp_path / "digits.json").write_text("of benchmarks.quality")
    runs = store.history(tmp_path)
    assert [run.date for run in runs] == ["2025-01-01T00:00:00+00:00", late, early]
    assert {row.arm: row.median_us for row in store.newest(runs)} == {"cuda": 3.0, "triton": 1.0}
    assert store.history(tmp_path / "none") == []


def test_a_folder_is_of_one_device(tmp_path: Path) -> None:
    store.save(report(OPERATOR, "2026-11-26T10:50:12+00:00"), tmp_path)
    other = report(OPERATOR, "2026-11-26T10:50:13+00:00")
    store.save(replace(other, machine={**H200, "device": "NVIDIA A100"}), tmp_path)
    line = f"{tmp_path}: want the results of one device, got NVIDIA A100, NVIDIA H200"
    with pytest.raises(ValueError) as caught:
        store.history(tmp_path)
    assert str(caught.value) == line


def test_committed_results_can_be_believed() -> None:
    for folder in store.RESULTS.iterdir():
        for run in store.history(folder):
            assert run.objection() is None and run.machine["capability"]
            assert all((row.median_us is None) == (row.status != "ok") for row in run.rows)
            for row in run.rows:
                known = () if row.images else msf_kernels.backends_of(row.op)
                ours = row.arm.startswith("ours") if row.images else row.arm in known
                assert not row.fingerprint or ours
            assert len({(row.case, row.arm) for row in run.rows}) == len(run.rows)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the sources, to change."""
    for name in ("msf_kernels", "csrc", "python"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so")
        shutil.copytree(fingerprint.ROOT / name, tmp_path / name, ignore=ignored)
    return tmp_path


BACKENDS = [
    (op, backend)
    for op in ("gate_residual", "attention", "pyramid_merge")
    for backend in msf_kernels.backends_of(op)
]


@pytest.mark.parametrize(
    ("changed", "marked"),
    [
        ("msf_kernels/adaln/triton.py", {("gate_residual", "triton")}),
        (
            "msf_kernels/adaln/op.py",
            {("gate_residual", b) for b in ("reference", "triton", "cuda")},
        ),
        ("csrc/kernels/adaln_backward.cu", {("gate_residual", "cuda")}),
        (
            "msf_kernels/triton_support/rows.py",
            {
                *((op, "triton") for op in ("gate_residual", "attention", "pyramid_merge")),
                *(("attention", b) for b in ("cudnn", "flash", "efficient", "flash-attn")),
            },
        ),
        ("msf_kernels/library.py", set()),
    ],
)
def test_changed_kernels_are_marked(
    changed: str, marked: set[tuple[str, str]], checkout: Path
) -> None:
    def prints() -> dict[tuple[str, str], str]:
        fingerprint.of_operator.cache_clear()
        fingerprint.of_models.cache_clear()
        return {(op, name): fingerprint.of_operator(op, name, checkout) for op, name in BACKENDS}

    before, model = prints(), fingerprint.of_models(checkout)
    assert before == {(op, name): fingerprint.of_operator(op, name) for op, name in BACKENDS}
    assert model == fingerprint.of_models()
    with (checkout / changed).open("a") as file:
        file.write("\n")
    now = prints()
    assert {key for key in before if before[key] != now[key]} == marked
    assert fingerprint.of_models(checkout) != model


def test_every_family_has_a_value() -> None:
    assert {fingerprint.family_of(benchmark.op) for benchmark in find()} == set(OPERATORS)
