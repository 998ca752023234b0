"""What goes wrong at a command is one line."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from models import tiny_model
from msf.cli import main
from msf.cli.errors import explain

from .helpers import msf, write_config


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
        "factorize {image} --out {out}/parts",
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
    assert message.startswith(
        f"msf {arguments[0]}: cannot write: File too large; free some space, "
    )
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


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu(workspace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(workspace / "run"), "--out", "x.png", "--device", "cuda"]) == 2
    assert "msf sample: --device cuda: " in (message := capsys.readouterr().err)
    assert message.endswith("; use --device cpu\n")


def test_missing_package_of_a_data_source(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    command = ["train", "--config", str(workspace / "tiny.json"), "--data", "digits", "--out"]
    assert main([*command, str(tmp_path / "run")]) == 2
    assert capsys.readouterr().err == (
        "msf train: data 'digits' needs scikit-learn; run in the checkout: pip install '.[train]'\n"
    )


@pytest.mark.parametrize("package", ["tensorboard", "matplotlib"])
def test_missing_package_of_training(workspace: Path, tmp_path: Path, package: str) -> None:
    """In a process of its own, because here the package is imported already."""
    code = (
        f"import sys; sys.modules['{package}'] = None; from msf.cli import main; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, "train", "--config", str(workspace / "tiny.json")]
    command += ["--data", "digits", "--out", str(tmp_path / "run")]
    process = subprocess.run(command, capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == (
        f"msf train: needs the package {package}; run in the checkout: pip install '.[train]'\n"
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("error", "line", "status"),
    [
        (KeyboardInterrupt(), "interrupted", 130),
        (ValueError("first\nsecond"), "first", 2),
        (ValueError("Caught ValueError in worker 0.\nTraceback:\nValueError: a: b"), "a: b", 2),
        (ValueError("a  b" * 200 + "; choose c"), "a  ba  b", 2),
        (FileNotFoundError(2, "No such file", "x"), "x: No such file", 2),
        (OSError(36, "File name too long", "x"), "x: File name too long", 2),
        (ModuleNotFoundError("no", name="tqdm"), "needs the package tqdm; run in the checkout", 2),
        (OSError(28, "No space left on device"), "cannot write: No space left on device;", 1),
        (RuntimeError("I/O error: x (os error 28)"), "cannot write: No space left on device;", 1),
        (OSError(24, "Too many open files", "x"), "too many open files; raise the limit (ulim", 2),
        (RuntimeError("cannot open x: Too many open files (24)"), "too many open files; raise", 2),
        (MemoryError(), "out of memory", 1),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), "out of memory", 1),
        (KeyError("x"), "internal error, please report it: KeyError: 'x'", 1),
    ],
)
def test_explain(error: BaseException, line: str, status: int) -> None:
    found = explain(error)
    assert found[0].startswith(line)
    assert "\n" not in found[0]
    assert found[1] == status


def test_a_long_line_keeps_its_ends() -> None:
    line, _ = explain(ValueError(f"{'x' * 1000}: is a file; choose another --out"))
    assert line.startswith("xxx") and line.endswith("xxx: is a file; choose another --out")
    assert len(line) < 500


def test_workers_without_room_in_shared_memory_do_not_hang(tmp_path: Path) -> None:
    (tmp_path / "photos" / "class").mkdir(parents=True)
    for index in range(20):
        Image.new("L", (32, 32)).save(tmp_path / "photos" / "class" / f"{index}.png")
    config = write_config(tmp_path / "c.json", model={"image_size": [32, 32], "num_classes": 0})
    process = msf(
        *("train", "--config", config, "--data", tmp_path / "photos", "--out", tmp_path / "run"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert process.returncode == 2, process.stderr
    # Not always the last line: a worker that is ended as it starts may say so behind it.
    assert "msf train: data: no shared memory for a batch (" in process.stderr


def test_a_model_that_makes_nan_writes_nothing(tmp_path: Path, capsys: Any) -> None:
    model = tiny_model(channels=1)
    with torch.no_grad():  # finite weights whose product is not
        model.stages[0].output.weight.fill_(3e38)
    model.save_pretrained(tmp_path / "run")
    out = tmp_path / "x.safetensors"
    assert main(["sample", str(tmp_path / "run"), "--num-images", "2", "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "msf sample: the model makes NaN or infinity; try it in float32 (--precision fp32)\n"
    )
    assert not out.exists()
