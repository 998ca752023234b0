"""A tiny model's configuration, and the command as a process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from msf.cli import main

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


def answer(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    """What a command printed with ``--json`` in this process, which has imported torch already."""
    capsys.readouterr()
    assert main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out, parse_constant=pytest.fail)


def write_config(path: Path, **changes: dict[str, Any]) -> Path:
    path.write_text(json.dumps({key: {**TINY[key], **changes.get(key, {})} for key in TINY}))
    return path
