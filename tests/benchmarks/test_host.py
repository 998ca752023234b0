from __future__ import annotations

import pytest

import msf_kernels
from benchmarks import host
from msf_kernels.cuda_support import extension


@pytest.fixture(autouse=True)
def one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "ROUNDS", 1)
    monkeypatch.setattr(host, "CALLS", 1)


def test_every_operator_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    host.main([])
    _, *lines, norm = capsys.readouterr().out.splitlines()
    assert norm.startswith("F.layer_norm") and float(norm.split()[1]) > 0
    rows = {line.split()[0]: [float(number) for number in line.split()[1:]] for line in lines}
    assert set(rows) == set(msf_kernels.OPERATORS)
    assert {op for op, row in rows.items() if len(row) == 2} == {"guided_euler_merge"}
    assert extension.emulation is None


def test_the_profile_of_an_operator_shows_its_kernels_module(
    capsys: pytest.CaptureFixture[str],
) -> None:
    host.main(["--profile", "bias_gelu"])
    assert "bias_gelu/cuda.py" in capsys.readouterr().out


def test_an_unknown_operator_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        host.main(["--profile", "gelu"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "invalid choice: 'gelu'" in line
