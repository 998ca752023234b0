"""What the tests of reliability share: a tiny run, the command, and the file of what was found."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from msf.files import atomic_write

from . import machine, store

STAGE = {"width": 16, "depth": 1, "heads": 2, "patch": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "model": {
        "image_size": [8, 8],
        "channels": 1,
        "num_classes": 10,
        "stages": [STAGE, STAGE],
        "steps": [2, 1],
    },
    "training": {"steps": [300, 200], "batch_size": 16, "sample_every": 20, "log_every": 10},
}
MSF_COMMAND = (sys.executable, "-m", "msf.cli")


def train(folder: Path, config: Path) -> list[str]:
    """Return the arguments of a training on the digits that continues what ``folder`` holds."""
    source = ["--config", str(config), "--data", "digits", "--precision", "fp32"]
    return ["train", *source, "--out", str(folder), "--resume"]


def report(found: dict[str, Any], out: Path | None) -> None:
    """Print what was found, when and on which machine, and write it to ``out``, if any."""
    document = {"date": store.now(), "machine": machine.describe(torch.device("cpu")), **found}
    text = json.dumps(document, indent=1)
    print(text)
    if out:
        with atomic_write(out) as temporary:
            temporary.write_text(text + "\n")
