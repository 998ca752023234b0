"""The counters of Nsight Compute: the table of its CSV, and every way to have none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from benchmarks import profile
from benchmarks.profile import DRAM, DURATION, L2, OCCUPANCY, Kernel, counted, kernels, named

STALLS = ("barrier", "long_scoreboard", "long_scoreboard_not_issued", "selected", "wait")


def row(*cells: str) -> str:
    return ",".join(f'"{cell}"' for cell in cells)


# Written by hand as NVIDIA's manual describes it: names, then units, then a row for each launch.
STALL_NAMES = [f"smsp__average_warps_issue_stalled_{n}_per_issue_active.ratio" for n in STALLS]
OUTPUT = "\n".join(
    [
        "==PROF== Connected to process 4711 (/usr/bin/python3.12)",
        'a warning of the command itself, "quoted", and more',
        '==PROF== Profiling "merge_kernel": 0%....50%....100% - 4 passes',
        "==PROF== Disconnected from process 4711",
        row("ID", "Kernel Name", "Block Size", DRAM, DURATION, L2, OCCUPANCY, *STALL_NAMES),
        row("", "", "", "byte", "nsecond", "Kbyte", "%", *["inst"] * 5),
        row("0", "merge_kernel", "(128, 1, 1)", "1,500,000", "12,345", "4,000", "71.5", *"16512"),
        row("1", "void sum<float, (int)4>", "(256, 1, 1)", "n/a", "500", "2,000", "50", *"00010"),
    ]
)


def test_the_table_of_a_call() -> None:
    merge, total = kernels(OUTPUT)
    assert merge.name == "merge_kernel"
    assert merge.metrics[DURATION] == pytest.approx(12.345e-6)
    assert merge.metrics[L2] == 4e6
    # 6 of 10: the time of issuing counts too, and what did not issue is counted already.
    assert merge.top_stall == ("long_scoreboard", 0.6)
    expected = ["merge_kernel", "12.3", "1.5", "1.50", "4.0", "71.5", "long_scoreboard 60%"]
    assert merge.cells(fewest=1_000_000) == expected
    assert total.cells(fewest=1_000_000) == [total.name, "0.5", "", "", "2.0", "50.0", ""]


@pytest.mark.parametrize("output", ["", "==WARNING== No kernels were profiled.", '"ID","x"\n'])
def test_no_kernels_are_no_error_of_the_parser(output: str) -> None:
    assert kernels(output) == []


def fake_ncu(folder: Path, monkeypatch: pytest.MonkeyPatch, output: str) -> None:
    """A program of that name that prints this, whatever it is asked."""
    (folder / "output").write_text(output)
    program = folder / "ncu"
    program.write_text(f"#!/bin/sh\ncat {folder}/output\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_what_ncu_prints_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_ncu(tmp_path, monkeypatch, OUTPUT)
    found = counted(["true"])
    assert [type(kernel) for kernel in found] == [Kernel, Kernel]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (
            "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission to access NVIDIA GPU "
            "Performance Counters on the target device 0.\nmore\n",
            "may not read the counters of the GPU .ERR_NVGPUCTRPERM.",
        ),
        ("==WARNING== No kernels were profiled.\n", "^ncu counted no kernel: ==WARNING== No kern"),
        ("", "^ncu counted no kernel: it printed nothing$"),
    ],
)
def test_no_counters_are_one_line(
    output: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_ncu(tmp_path, monkeypatch, output)
    with pytest.raises(ValueError, match=message) as caught:
        counted(["true"])
    assert "\n" not in str(caught.value)


def test_without_ncu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="needs ncu, of NVIDIA's Nsight Compute"):
        counted(["true"])


def test_a_benchmark_by_its_name_or_its_operator() -> None:
    assert named("adaln_modulate").name == "adaln_modulate"
    assert named("adaln_modulate backward").gradients == 3
    assert named("pyramid_merge").op == "pyramid_merge"
    with pytest.raises(ValueError, match="unknown op 'adaln'"):
        named("adaln")


BAD = [
    (["nothing"], "unknown op 'nothing': known are adaln_modulate"),
    (["attention", "--shape", "3", "4"], "--shape must be like 256 256 16 72, got 3 4"),
]
if not torch.cuda.is_available():
    BAD.append((["attention"], "needs an NVIDIA GPU and a torch with CUDA, and finds none"))


@pytest.mark.parametrize(("words", "message"), BAD)
def test_bad_input_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        profile.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.profile: {message}") and error.count("\n") == 1
