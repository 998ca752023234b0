"""What the commands print and leave behind."""

from __future__ import annotations

import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msf import MSF, PRESETS, MSFConfig
from msf.cli import main
from msf.cli.commands import inspect

from .helpers import TINY, answer, msf


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from msf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    assert "doctor" in process.stdout


def test_help_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "msf.cli", "flops", "--help"]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    assert "--steps" in process.stdout


@pytest.mark.parametrize("chosen", [None, "active"])
def test_threads_give_up_their_core_while_they_wait(
    chosen: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    if chosen:
        monkeypatch.setenv("OMP_WAIT_POLICY", chosen)
    main(["flops"])
    assert os.environ["OMP_WAIT_POLICY"] == (chosen or "passive")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("msf ")


def test_flops_of_a_run(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = answer(capsys, "flops", workspace / "run", "--steps", 10, 3)
    assert [stage["steps"] for stage in costs["stages"]] == [10, 3]
    per_image = sum(stage["gmacs_per_forward"] * stage["steps"] for stage in costs["stages"])
    assert costs["gmacs_per_image"] == pytest.approx(per_image, rel=1e-12)
    assert costs["dit_xl_2"] is None


def test_flops_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)
    assert [line for line in lines if "arXiv 2501.13349v2 claims (4x)" in line]


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "msf.cli", "flops"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_closed_terminal_ends_a_command_as_its_signal_does(both: bool, tmp_path: Path) -> None:
    controller, terminal = pty.openpty()
    with open(tmp_path / "stderr", "w") as file:
        stderr = terminal if both else file
        command = [sys.executable, "-m", "msf.cli", "flops", "--config", "/dev/stdin"]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=terminal, stderr=stderr)
    os.close(controller)
    os.close(terminal)
    process.communicate(json.dumps(TINY).encode(), timeout=60)
    assert process.returncode == 130
    told = "" if both else "msf flops: the terminal was closed\n"
    assert (tmp_path / "stderr").read_text() == told


@pytest.mark.parametrize("closed", [(1,), (0, 1, 2)])
def test_streams_may_be_closed(closed: tuple[int, ...], workspace: Path, tmp_path: Path) -> None:
    image = str(workspace / "image.png")
    command = [sys.executable, "-m", "msf.cli", "factorize", image, "--out", str(tmp_path / "new")]
    process = subprocess.run(
        command, preexec_fn=lambda: [os.close(number) for number in closed], capture_output=True
    )
    assert process.returncode == 0
    assert bool(process.stdout) == (1 not in closed)
    assert not process.stderr
    assert (tmp_path / "new" / "merged.png").exists()


def test_a_console_may_lack_letters(workspace: Path, tmp_path: Path) -> None:
    image, out = workspace / "image.png", tmp_path / "é"
    process = msf("factorize", image, "--out", out, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0, process.stderr
    assert re.search(r"^written to +\S+/\\xe9$", process.stdout, re.MULTILINE)


def test_factorize(workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "parts"
    found = answer(capsys, "factorize", workspace / "image.png", "--levels", 2, "--out", out)
    names = [part["name"] for part in found["components"]]
    assert names == ["base", "residual_1", "residual_2"]
    assert sum(part["variance_share"] for part in found["components"]) == pytest.approx(1)
    assert found["max_error"] <= 4 * torch.finfo(torch.float32).eps
    assert sorted(file.stem for file in out.iterdir()) == sorted([*names, "merged"])
    merged, image = (np.array(Image.open(f)) for f in (out / "merged.png", workspace / "image.png"))
    assert (merged == image).all()
    assert Image.open(out / "base.png").size == (5, 3)


def test_factorize_shows_white_behind_what_is_transparent(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (10, 20, 30, 0)).save(tmp_path / "x.png")
    assert main(["factorize", str(tmp_path / "x.png"), "--out", str(tmp_path / "parts")]) == 0
    assert (np.array(Image.open(tmp_path / "parts" / "merged.png")) == 255).all()


def test_inspect_a_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workspace / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = MSF.from_pretrained(workspace / "run")
    assert MSFConfig.from_dict(found["config"]) == model.config
    assert [stage["trained"] for stage in found["stages"]] == [True, True]
    assert [stage["std"] for stage in found["stages"]] == model.pyramid.std.tolist()
    assert found["training"]["data"] == "digits"
    assert main(["inspect", str(workspace / "run")]) == 0
    out = capsys.readouterr().out
    assert "residual  8x8" in out
    assert re.search(r"^class names +0 0, 1 1, .*, 9 9$", out, re.MULTILINE)
    found["config"] |= {"num_classes": 0, "qk_norm": "layer"}
    text = inspect.text(found)
    assert "class names" not in text and "QK-norm by LayerNorm" in text


def test_sample_writes_a_grid(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "grid.png"
    found = answer(capsys, "sample", workspace / "run", "--out", out, "--num-images", 12)
    assert found["labels"] == [*range(10), 0, 1]
    assert [file.name for file in out.parent.iterdir()] == ["grid.png"]
    width, height = Image.open(out).size
    assert width > 2.5 * height  # base, residual and merged image


def test_samples_depend_on_seed_and_label_alone(workspace: Path, tmp_path: Path) -> None:
    def sample(name: str, *options: str) -> Path:
        assert (
            main(["sample", str(workspace / "run"), "--out", str(tmp_path / name), *options]) == 0
        )
        return tmp_path / name

    tensors = sample("all.safetensors", "--labels", "3,4,10,3", "--seed", "7")
    images = load_file(tensors)["images"]
    assert images.shape == (4, 1, 8, 8)
    folder = sample("folder", "--labels=3,4,10,3", "--seed=7", "--batch-size=3")
    assert sorted(file.name for file in folder.iterdir()) == [f"00000{i}.png" for i in range(4)]
    for index in range(4):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"00000{index}.png")))
        wanted = images[index, 0].clamp(-1, 1) * 127.5 + 127.5
        assert (pixels - wanted).abs().max() <= 0.5 + 1e-3
    sample("folder", "--labels=5", "--overwrite")
    assert [file.name for file in folder.iterdir()] == ["000000.png"]
    one = load_file(sample("one.safetensors", "--label=4", "--seed=8", "--steps", "4", "2"))[
        "images"
    ]
    # Another batch size changes the order of float32 sums, no more.
    torch.testing.assert_close(one[0], images[1], rtol=1e-4, atol=1e-4)


def test_precision_is_fp32_on_a_cpu_unless_asked_for(workspace: Path, tmp_path: Path) -> None:
    def sample(precision: str) -> torch.Tensor:
        out = tmp_path / f"{precision}.safetensors"
        command = ["sample", str(workspace / "run"), "--device", "cpu", "--precision", precision]
        assert main([*command, "--out", str(out)]) == 0
        return load_file(out)["images"]

    fp32, bf16 = sample("fp32"), sample("bf16")
    assert sample("auto").equal(fp32) and not bf16.equal(fp32)
    # Data minus noise is below 5; its relative error of 2^-8 a rounding, six deep, is followed from
    # t = 0 to 1 by both stages.
    assert (bf16 - fp32).abs().max() < 2 * 6 * 5 * 2**-8
