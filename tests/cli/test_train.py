"""What `msf train` takes, and Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from msf.cli import main

from .helpers import write_config


def test_train_takes_its_options(tmp_path: Path) -> None:
    train = ["train", "--config", str(write_config(tmp_path / "c.json")), "--data", "digits"]
    options = ["--batch-size=4", "--learning-rate=0.5", "--sample-every=3", "--checkpoint-every=2"]
    assert main([*train, "--out", str(tmp_path / "run"), *options, "--flip", "--steps", "4"]) == 0
    training = json.loads((tmp_path / "run" / "training.json").read_text())["training"]
    assert training["batch_size"] == 4 and training["learning_rate"] == 0.5
    assert training["sample_every"] == 3 and training["checkpoint_every"] == 2
    assert training["flip"] is True and training["holdout"] == 0.2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_a_signal_on_and_on_ends_without_a_traceback(tmp_path: Path, number: int) -> None:
    config, out = write_config(tmp_path / "c.json"), tmp_path / "run"
    command = [sys.executable, "-m", "msf.cli", "train", "--config", str(config), "--steps=5000"]
    process = subprocess.Popen(
        [*command, "--data", "digits", "--out", str(out)], stderr=subprocess.PIPE, text=True
    )
    while not (out / "metrics.jsonl").exists() and process.poll() is None:
        time.sleep(0.01)
    for _ in range(60):
        process.send_signal(number)
        time.sleep(0.01)
    _, messages = process.communicate(timeout=120)
    assert process.returncode == 130, messages
    assert "Traceback" not in messages and "msf train: " in messages
    assert (out / "state-base.safetensors").exists()


def test_ctrl_c_saves_and_resume_finishes_bit_for_bit(tmp_path: Path) -> None:
    config = write_config(
        tmp_path / "c.json", training={"steps": [120, 4], "log_every": 4, "sample_every": 50}
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
