"""The folder of a model: where it is, what its files are called, and its configuration."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .config import MSFConfig
from .files import read_file

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"


def folder_of(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of a model: ``name`` itself, or, where that is a string owner/name and no
    folder is there, what the Hugging Face Hub has under it, fetched unless it was before.

    Raise ValueError (one line) where the Hub, or while HF_HUB_OFFLINE is set its cache, has none,
    ImportError where huggingface_hub is missing.
    """
    is_id = isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
    if not is_id or Path(name).exists():
        if revision is not None:
            raise ValueError(f"{name}: revision is for models of the Hub, this is a folder")
        return Path(name)
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name}: no such folder, and a model of the Hub needs huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    from .training.config import RUN_FILE  # with the names of classes

    try:
        files = [CONFIG_FILE, WEIGHTS_FILE, RUN_FILE]
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=files))
    except (OSError, ValueError, RuntimeError) as error:  # of its own kinds, and of the network
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: no such folder, nor a model of the Hub ({reason})") from None


def missing(directory: Path, name: str = CONFIG_FILE) -> str:
    """Return what is wrong with a model's ``directory`` that has no file ``name``."""
    if not directory.exists():
        return "no such folder"
    return f"no {name} here" if directory.is_dir() else "is no folder"


def read_config(directory: str | os.PathLike[str]) -> MSFConfig:
    """Read the configuration that ``save_pretrained`` wrote. Raise ValueError (one line) if it is
    corrupt."""
    file = Path(directory) / CONFIG_FILE
    text = read_file(file)
    try:
        return MSFConfig.from_json(text)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
