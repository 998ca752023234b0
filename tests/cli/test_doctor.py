"""What `msf doctor` finds."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from msf.cli import main

from .helpers import document, msf


def test_doctor_process() -> None:
    import msf_kernels

    found = document(msf("doctor", "--json"))
    assert torch.__version__.startswith(found["versions"]["torch"])  # some leave out "+cu124"
    assert list(found["operators"]) == list(msf_kernels.OPERATORS)
    for op, operator in found["operators"].items():
        assert operator["backend"] in msf_kernels.backends_of(op)
        assert operator["backend"] not in operator["reasons"]
        assert all(operator["reasons"].values())


def test_doctor_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSF_BACKEND", "metal")
    assert main(["doctor"]) == 1
    assert "MSF_BACKEND: unknown backend 'metal': choose auto" in capsys.readouterr().out


def test_doctor_says_what_calls_take(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import msf_kernels

    request = "reference,attention=flash"
    monkeypatch.setenv("MSF_BACKEND", request)
    assert main(["doctor", "--json"]) == 0
    operators = json.loads(capsys.readouterr().out)["operators"]
    with msf_kernels.backend(request):
        expected = {op: msf_kernels.chosen_backend(op) for op in msf_kernels.OPERATORS}
    assert {op: found["backend"] for op, found in operators.items()} == expected
    assert expected["attention"] == "flash" and expected["merge_tokens"] == "reference"
    assert set(operators["attention"]["reasons"]) >= {"cudnn", "efficient", "flash-attn"}
    assert operators["attention"]["reasons"]["reference"] == "flash was asked for"
    monkeypatch.setenv("MSF_BACKEND", "auto,attention=flash")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["operators"]["merge_tokens"]["reasons"]
    assert not [reason for reason in found.values() if reason.endswith("asked for")]


@pytest.mark.parametrize(
    ("gpu", "capability", "measured", "order"),
    [
        ("NVIDIA H200", (9, 0), True, "measured on h200"),
        ("NVIDIA H100", (9, 0), True, "measured on h200, the nearest to sm_90"),
        ("NVIDIA A100", (8, 0), True, "measured on h200, the nearest to sm_80"),
        ("NVIDIA H200", (9, 0), False, "not measured on any GPU"),
    ],
)
def test_doctor_says_which_gpu_was_measured(
    gpu: str,
    capability: tuple[int, int],
    measured: bool,
    order: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from msf.cli.commands import doctor
    from msf_kernels import measurements

    if not measured:
        monkeypatch.setattr(measurements, "FOLDER", tmp_path)
    monkeypatch.setattr(doctor.models, "unsupported_reason", lambda device: None)
    monkeypatch.setattr(doctor, "_gpu", lambda: {"name": gpu})
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    measurements.table_for.cache_clear()
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    measurements.table_for.cache_clear()
    assert re.search(rf"^order +{order}$", out, re.MULTILINE)
    assert ("\nmeasured on h200\nadaln_modulate 64x256x1152 bfloat16 " in out) == measured
