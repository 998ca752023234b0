"""The folder of a model: what its files are called, and its configuration."""

from __future__ import annotations

import os
from pathlib import Path

from .config import MSFConfig
from .files import read_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def read_config(directory: str | os.PathLike[str]) -> MSFConfig:
    """Read the configuration that ``save_pretrained`` wrote. Raise ValueError (one line) if it is
    corrupt."""
    file = Path(directory) / CONFIG_FILE
    text = read_file(file)
    try:
        return MSFConfig.from_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
