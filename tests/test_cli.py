"""Every command as a process, every bad input as one line."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from msf import MSF, PRESETS, MSFConfig, StageConfig
from msf.cli import main
from msf.cli.errors import explain

STAGE = {"width": 16, "depth": 1, "heads": 2, "patch": 1}
TINY = {
    "model": {
        "image_size": [8, 8],
        "channels": 1,
        "num_classes": 10,
        "stages": [STAGE, {**STAGE, "patch": 2}],
        "steps": [4, 2],
    },
    "training": {"steps": [6, 6], "batch_size": 8, "learning_rate": 0.01, "log_every": 2},
}


def msf(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "msf.cli", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


def document(process: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What ``--json`` printed: one JSON document and nothing else."""
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout, parse_constant=pytest.fail)


def write_config(path: Path, **changes: dict[str, Any]) -> Path:
    path.write_text(json.dumps({key: {**TINY[key], **changes.get(key, {})} for key in TINY}))
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with tiny.json, image.png and a trained model in run/."""
    folder = tmp_path_factory.mktemp("cli")
    write_config(folder / "tiny.json")
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    out = folder / "run"
    config = folder / "tiny.json"
    process = msf("train", "--config", config, "--data", "digits", "--out", out, "--json")
    stages = document(process)["stages"]
    assert {name: row["step"] for name, row in stages.items()} == {"base": 6, "residual": 6}
    assert "base" in process.stderr  # the progress bar
    return folder


@pytest.fixture
def run(workspace: Path, tmp_path: Path) -> Path:
    """A copy of the trained model, to be damaged."""
    return Path(shutil.copytree(workspace / "run", tmp_path / "run"))


def test_help_answers_without_torch() -> None:
    code = (
        "import sys; from msf.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: sys.exit(end.code or 3 * ('torch' in sys.modules))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert process.returncode == 0
    assert "doctor" in process.stdout


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out.startswith("msf ")


def test_flops_process(workspace: Path) -> None:
    costs = document(msf("flops", workspace / "run", "--steps", 10, 3, "--json"))
    assert [stage["steps"] for stage in costs["stages"]] == [10, 3]
    per_image = sum(stage["gmacs_per_forward"] * stage["steps"] for stage in costs["stages"])
    assert costs["gmacs_per_image"] == pytest.approx(per_image, rel=1e-12)
    assert costs["dit_xl_2"] is None


def test_flops_of_every_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["flops"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(PRESETS)


def test_a_reader_that_has_seen_enough_is_no_error() -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "msf.cli", "flops"]
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True)
    os.close(write)
    assert (process.returncode, process.stderr) == (0, "")


def test_doctor_process() -> None:
    import msf_kernels

    found = document(msf("doctor", "--json"))
    assert found["versions"]["torch"] == torch.__version__
    assert list(found["operators"]) == list(msf_kernels.OPERATORS)
    for operator in found["operators"].values():
        assert operator["backend"] in ("cuda", "triton", "reference")
        assert operator["backend"] not in operator["reasons"]
        assert all(operator["reasons"].values())


def test_doctor_finds_a_wrong_backend(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MSF_BACKEND", "metal")
    assert main(["doctor"]) == 1
    assert "MSF_BACKEND: unknown backend 'metal': choose auto" in capsys.readouterr().out


def test_inspect_process_of_an_image(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "parts"
    found = document(
        msf("inspect", workspace / "image.png", "--levels", 2, "--out", out, "--json")
    )
    names = [part["name"] for part in found["components"]]
    assert names == ["base", "residual_1", "residual_2"]
    assert sum(part["variance_share"] for part in found["components"]) == pytest.approx(1)
    assert found["max_error"] <= 4 * torch.finfo(torch.float32).eps
    assert sorted(file.stem for file in out.iterdir()) == sorted([*names, "merged"])
    merged, image = (np.array(Image.open(f)) for f in (out / "merged.png", workspace / "image.png"))
    assert (merged == image).all()
    assert Image.open(out / "base.png").size == (5, 3)


def test_inspect_a_model(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(workspace / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    model = MSF.from_pretrained(workspace / "run")
    assert MSFConfig.from_dict(found["config"]) == model.config
    assert [stage["trained"] for stage in found["stages"]] == [True, True]
    assert [stage["std"] for stage in found["stages"]] == model.pyramid.std.tolist()
    assert found["training"]["data"] == "digits"
    assert main(["inspect", str(workspace / "run")]) == 0
    assert "residual  8x8" in capsys.readouterr().out


def test_sample_process_writes_a_grid(workspace: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "grid.png"
    found = document(msf("sample", workspace / "run", "--out", out, "--count", 12, "--json"))
    assert found["labels"] == [*range(10), 0, 1]
    assert [file.name for file in out.parent.iterdir()] == ["grid.png"]
    width, height = Image.open(out).size
    assert width > 2.5 * height  # base, residual and merged image


def test_samples_depend_on_seed_and_label_alone(workspace: Path, tmp_path: Path) -> None:
    def sample(name: str, *options: str) -> Path:
        assert main(["sample", str(workspace / "run"), "--out", str(tmp_path / name), *options]) == 0
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
    one = load_file(sample("one.safetensors", "--label=4", "--seed=8", "--steps", "4", "2"))["images"]
    # Another batch size changes the order of float32 sums, no more.
    torch.testing.assert_close(one[0], images[1], rtol=1e-4, atol=1e-4)


def test_ctrl_c_saves_and_resume_finishes_bit_for_bit(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.json", training={"steps": [250, 5], "log_every": 5, "sample_every": 100}
    )
    train = ["train", "--config", str(config), "--data", "digits", "--out"]
    command = [sys.executable, "-m", "msf.cli", *train, str(tmp_path / "stopped")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "stopped" / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert messages.splitlines()[-1].startswith("msf train: stopped at step ")
    assert "continue with --resume" in messages
    assert main([*train, str(tmp_path / "stopped"), "--resume"]) == 0
    assert main([*train, str(tmp_path / "whole")]) == 0
    for file in ("model.safetensors", "state-base.safetensors", "state-residual.safetensors"):
        stopped, whole = (load_file(tmp_path / name / file) for name in ("stopped", "whole"))
        assert stopped.keys() == whole.keys()
        for key, value in stopped.items():
            assert value.equal(whole[key]), f"{file}: {key}"


@contextmanager
def full_disk(after: int) -> Iterator[None]:
    """No file may grow beyond ``after`` bytes; Python ignores SIGXFSZ, so writes raise EFBIG."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (after, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize(
    "command",
    [
        "sample {run} --out {out}/grid.png",
        "sample {run} --out {out}/folder",
        "sample {run} --out {out}/images.safetensors",
        "inspect {image} --out {out}/parts",
        "train --config {tiny} --data digits --out {out}/run",
    ],
)
def test_full_disk_leaves_nothing_half_written(
    command: str, workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = {"run": workspace / "run", "image": workspace / "image.png", "out": tmp_path}
    arguments = command.format(**places, tiny=workspace / "tiny.json").split()
    # Room for training.json, not for weights; no room for any image.
    with full_disk(after=10_000 if arguments[0] == "train" else 60):
        status = main(arguments)
    assert status == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith(f"msf {arguments[0]}: cannot write: File too large; free some space")
    left = {file.name for file in tmp_path.rglob("*") if file.is_file()}
    assert {name for name in left if not name.startswith("events.out")} == (
        {"training.json", "metrics.jsonl"} if arguments[0] == "train" else set()
    )


def test_full_disk_under_tensorboard_shows_no_traceback(workspace: Path, tmp_path: Path) -> None:
    process = msf(
        *("train", "--config", workspace / "tiny.json", "--data", "digits"),
        *("--out", tmp_path / "run"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (450, 450)),
    )
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("msf train: cannot write: File too large")
