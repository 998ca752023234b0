"""`msf evaluate FILE.npz`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from inceptions import pixels
from msf.cli import main
from msf.evaluation import metrics

from .helpers import answer

WRONG = {
    "{x}": "x.npz: give the file to compare it with as --reference",
    "{x} --reference {x}": "give FID's Inception as --inception: pt_inception-2015-12-05",
    "{x} --reference {x} --inception {none}": "none: no such file; get pt_inception-2015-12-05",
    "{x} --reference {x} --inception {x}": "x.npz: not a readable file of weights; get pt_incep",
    "{x} --reference {none}.npz --inception {w}": "none.npz: No such file or directory",
    "{none}.npz --reference {x} --inception {w}": "none.npz: No such file or directory",
    "{x} --reference {w} --inception {w}": "weights.pth: must hold images (arr_0) or statistics",
    "{x} --reference {x} --inception {w} --batch-size 0": "--batch-size must be at least 1, got 0",
    "{x} --reference {x} --inception {w} --out {x}": "x.npz: exists already; choose another --out",
    "{x} --reference {x} --inception {w} --samples 9": "--samples is for a model's folder; ",
    "{x} --reference {x} --inception {w} --steps 9": "--steps is for a model's folder; ",
    "{x} --reference {x} --inception {w} --samples 0": "--samples is for a model's folder; ",
    "{x} --reference {x} --inception {w} --precision bf16": "--precision is for a model's folder",
    "{x} --reference {x} --inception {w} --prior-noise 0": "--prior-noise is for a model's folder",
    "{none}.NPZ --reference {x} --inception {w}": "none.NPZ: No such file or directory",
    "{none} --reference {x}": "--reference is for images in a file .npz, got ",
    "{none} --inception {x}": "--inception is for images in a file .npz, got ",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory, inception_weights: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("npz")
    np.savez(folder / "x.npz", pixels(5, seed=0), np.arange(5))
    return {"x": folder / "x.npz", "none": folder / "none", "w": inception_weights}


@pytest.mark.parametrize("command", WRONG)
def test_bad_input_is_one_line(
    command: str, places: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", *command.format(**places).split()]) == 2
    error = capsys.readouterr().err
    assert error.startswith("msf evaluate: ") and error.count("\n") == 1
    assert WRONG[command] in error


def test_evaluate_images(
    places: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, weights = str(places["x"]), str(places["w"])
    reference = str(tmp_path / "statistics.npz")
    np.savez(reference, mu=np.full(2048, 0.5), sigma=4 * np.eye(2048))
    command = ["evaluate", images, "--reference", reference, "--inception", weights]
    found = answer(capsys, *command, "--out", tmp_path / "result.json")
    assert json.loads((tmp_path / "result.json").read_text()) == found
    assert set(found["figures"]) == {"fid", "inception_score"}
    assert found["images"]["images"] == 5 and found["conventions"]["neighbours"] == 3
    (kept,) = places["x"].parent.glob("x.npz.features-*.safetensors")
    pool = load_file(kept)["pool"].double()
    # tr((4 S)^1/2) is twice the sum of the singular values of the centred features / sqrt(n - 1).
    values = torch.linalg.svdvals(pool - pool.mean(0)) / 2
    mean, trace = (pool.mean(0) - 0.5).square().sum(), pool.var(0).sum()
    expected = mean + trace + 4 * 2048 - 2 * 2 * values.sum()
    # 2,044 eigenvalues of 4 S are 0 but for rounding of the largest, and have roots.
    rounding = 2 * 2048 * float(2**-53 * 4 * values[0] ** 2) ** 0.5
    assert found["figures"]["fid"] == pytest.approx(float(expected), abs=rounding)
    assert rounding < 1e-6 * float(expected)


def test_the_table_of_a_comparison(
    places: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(metrics, "gaussian_distance", lambda a, b: 12.345678)
    images, weights = str(places["x"]), str(places["w"])
    assert main(["evaluate", images, "--reference", images, "--inception", weights]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines] == [
        *("FID", "sFID", "Inception Score", "precision", "recall"),
        *("KID", "KID, mean of subsets", "its standard deviation", "images", "reference"),
        *("note", "note"),
    ]
    assert lines[0].split() == ["FID", "12.3457"]
    # Of a set and itself all is in the manifold.
    assert lines[3].split() == ["precision", "1.0000"] and lines[8].endswith(f"{images}, 5 images")
