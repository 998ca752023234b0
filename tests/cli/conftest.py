from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from .helpers import document, msf, write_config


@pytest.fixture(scope="session")
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
