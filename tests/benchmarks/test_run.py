"""The commands as processes, and their files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import fingerprint, machine, run, table
from benchmarks.markdown import heading, markdown
from benchmarks.results import Report, Row
from benchmarks.roofline import Roofline
from benchmarks.store import load, save
from msf_kernels.measurements import slug

ROOT = Path(__file__).resolve().parents[2]
RATES = Roofline(4000.0, 800.0, "invented")


def command(module: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", f"benchmarks.{module}", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120)


def files() -> set[Path]:
    return set((ROOT / "benchmarks" / "results").rglob("*"))


def rows_in(text: str) -> set[str]:
    return {line for line in text.splitlines() if line.startswith("| ")}


def test_a_run_and_its_table(tmp_path: Path) -> None:
    before = files()
    out = tmp_path / "new" / "folder"
    arms = ("eager", "reference", "cuda")
    ran = command("run", "flow_interpolate", "--arms", *arms, "--out", out)
    assert ran.returncode == 0, ran.stderr
    (path,) = out.iterdir()
    assert re.fullmatch(r"\d{4}-\d\d-\d\d-\d{6}\.json", path.name)
    document = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert document["machine"]["torch"] == torch.__version__
    assert {row["arm"] for row in document["rows"]} == set(arms)
    assert {row["dtype"] for row in document["rows"]} == {"float32", "bfloat16"}
    timed = [row for row in document["rows"] if row["arm"] != "cuda"]
    assert all(row["status"] == "ok" and row["p10_us"] <= row["median_us"] for row in timed)
    now = {"reference": fingerprint.of_operator("flow_interpolate", "reference")}
    assert all(row["fingerprint"] == now.get(row["arm"]) for row in document["rows"])
    assert [row["dtype"] for row in document["rows"]] == ["bfloat16"] * 9 + ["float32"] * 9
    assert "torch.neg" in document["roofline"]["how"] and document["objection"] is None

    tabled = command("table", path)
    assert tabled.returncode == 0, tabled.stderr
    # The run printed the same rows, as it measured them.
    assert rows_in(tabled.stdout) == rows_in(ran.stdout)
    assert tabled.stdout.count("### flow_interpolate\n") == 1
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert len(list(out.iterdir())) == 2 and files() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the results are kept")
def test_on_a_cpu_nothing_is_written_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    before = files()
    assert run.main(["flow_interpolate", "--arms", "reference"]) == 0
    assert "| reference |" in capsys.readouterr().out and files() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU every arm can run")
def test_without_an_arm_that_can_run_there_is_no_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(["flow_interpolate", "--arms", "cuda", "--out", str(tmp_path / "new")])
    assert caught.value.code == 2 and not (tmp_path / "new").exists()
    out, error = capsys.readouterr()
    assert error.startswith("benchmarks.run: no cuda: ") and error.count("\n") == 1 and not out


def row(**changes: object) -> Row:
    fields = {"op": "a", "benchmark": "a b", "shape": (2, 3), "dtype": "float32", "arm": "eager"}
    return Row(**{**fields, "bytes": 10**9, "flops": 0, **changes})  # type: ignore[arg-type]


TIMED = row(
    median_us=500.0, p10_us=490.0, p90_us=510.0, host_us=7.0, percent=50.0, peer_ratio=1.0, noise=1
)
ROWS = [
    TIMED,
    row(arm="compile", status="incorrect", note="output 0 errs by 1, more than 2", error=1.0),
    row(arm="cuda", status="skipped", note="no kernel"),
    row(benchmark="c", flops=10**12, median_us=2500.0, p10_us=1.0, p90_us=2.0, percent=50.0),
]


def test_the_heading_says_what_percentages_are_of() -> None:
    machine = {"device": "NVIDIA H200", "torch": "2.11.0", "triton": None, "capability": "9.0"}
    machine |= {"driver": "1", "cuda": "13.0", "commit": "abc"}
    report = Report("2026-01-01T00:00:00+00:00", machine, 7, RATES, ROWS)
    said = (
        "NVIDIA H200 (driver 1, cuda 13.0, torch 2.11.0, commit abc), 2026-01-01T00:00:00+00:00. "
        "100 % is 4000 GB/s read and written or 800 TFLOP/s in bfloat16: invented."
    )
    assert heading(report) == said
    fast = Report(report.date, machine, 7, RATES, [row(percent=150.0)])
    assert (
        heading(fast)
        == f"{said} But the ceiling is wrong: a b 2x3 float32 eager reached 150 % of it."
    )


def test_a_row_past_the_ceiling_ends_in_an_error_with_all_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu = {**machine.describe(torch.device("cpu")), "capability": "9.0"}
    monkeypatch.setattr(machine, "describe", lambda _: gpu)
    monkeypatch.setattr(run, "measure_roofline", lambda _: Roofline(1e-4, 1e-9, "invented"))
    with pytest.raises(SystemExit) as caught:
        run.main(["flow_interpolate", "--arms", "reference", "--out", str(tmp_path)])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert error.startswith("benchmarks.run: the ceiling is wrong: ") and error.count("\n") == 1
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["objection"] == error.partition(": ")[2].strip()
    assert len({row.case for row in load(path).rows}) == 6


def test_what_is_left_out_for_lack_of_time_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = ["flow_interpolate", "--arms", "reference"]
    assert run.main([*some, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.endswith(
        "\nLeft out for lack of time, 6 of 6:\n\n- flow_interpolate: 64x4x32x32 bfloat16, "
        "1x4x64x64 bfloat16, 1x4x32x32 bfloat16, 64x4x32x32 float32, 1x4x64x64 float32, "
        "1x4x32x32 float32\n"
    )
    assert not list(tmp_path.iterdir())


def test_markdown() -> None:
    first, second = markdown(ROWS, RATES).split("\n### ")[1:]
    lines = first.splitlines()
    assert lines[0] == "a b"
    assert lines[4] == (
        "| 2x3 | fp32 | eager | 500 µs | 490 µs to 510 µs | 7 | 2000 GB/s | 50 | 1.00x "
        "| ±1.0 % |  |"
    )
    assert "| compile | incorrect: output 0 errs by 1, more than 2 |" in lines[5]
    assert lines[7] == "No cuda: no kernel."
    assert "| 400 TFLOP/s | 50 |" in second
    cells = [line.count("|") for line in lines[2:6]]
    assert set(cells) == {12}


def test_the_table_of_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    block = row(benchmark="block", bytes=0, flops=10**9, error=1e-3, images=64, kernels=8.0)
    timed = replace(block, median_us=2e3, p10_us=1.9e3, p90_us=2.1e6, percent=30.0, peak_mib=70.2)
    wrong = replace(block, arm="ours", status="incorrect", note="errs")
    gpu = machine.describe(torch.device("cpu"))
    report = Report("2026-01-01T00:00:00+00:00", gpu, 7, RATES, [timed, wrong])
    path = save(report, tmp_path)
    assert table.main([str(path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"{heading(report)}\n\n### block\n")
    cells = "2 ms | 1.9 ms to 2.1 s | 3.2e+04 images/s | 30 | 1.0e-03 | 8 | 70"
    assert f"\n| 2x3 | fp32 | eager | {cells} |\n" in out
    assert "\n| 2x3 | fp32 | ours | incorrect: errs |" in out


BAD_RUNS = {
    "what": (("conv",), "unknown 'conv': known are operators, models, adaln_modulate, "),
    "arm": (("models", "--arms", "tpu"), "no arm 'tpu' of block, block and backward, training"),
    "arm of another": (
        ("gate_residual", "--arms", "flex"),
        "no arm 'flex' of gate_residual: known are eager, compile, ",
    ),
    "out": (
        ("flow_interpolate", "--out", __file__),
        "--out must be a folder that can be written to: [Errno 17] File exists",
    ),
    "minutes": (
        ("--minutes", "0"),
        "argument --minutes: must be a number of minutes above 0, got ",
    ),
    "option": (("--fast",), "unrecognized arguments: --fast"),
}


@pytest.mark.parametrize(("arguments", "line"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_arguments_are_one_line(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.run: {line}") and error.count("\n") == 1


BAD_RESULTS = {
    "missing": (None, "[Errno 2] No such file or directory"),
    "no JSON": ("{", "{path}: not valid JSON"),
    "a list": ("[]", "{path}: must be a JSON object, got list"),
    "another JSON": ("{}", "{path}: not a result of benchmarks.run"),
    "another row": ('{"rows": [{"shape": [], "speed": 1}]}', "{path}: not a result of"),
}


@pytest.mark.parametrize(("text", "line"), BAD_RESULTS.values(), ids=BAD_RESULTS)
def test_bad_result_is_one_line(
    text: str | None, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit) as caught:
        table.main([str(path)])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.table: {line.format(path=path)}")
    assert error.count("\n") == 1 and not path.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100-sxm4-80gb"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_folder_of_a_device(name: str, folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    assert slug(torch.device("cuda")) == folder
    assert slug(torch.device("cpu")) == "cpu"
