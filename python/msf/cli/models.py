"""Trained models and the device they run on."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import hinted
from ..pretrained import CONFIG_FILE, WEIGHTS_FILE
from ..training.config import REBUILDS, REBUILDS_CONFIG, RUN_FILE, has_states

if TYPE_CHECKING:
    import torch

    from ..model import MSF


MAX_THREADS = 1024


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="auto: a GPU where there is one",
    )
    parser.add_argument(
        "--threads", type=int, default=1, metavar="N", help="CPU threads of torch (default 1)"
    )


def device(args: argparse.Namespace) -> torch.device:
    """Return the device asked for and set torch's threads. Raise ValueError if it is not there."""
    import torch

    if not 1 <= args.threads <= MAX_THREADS:
        raise ValueError(f"--threads must be 1 to {MAX_THREADS}, got {args.threads}")
    torch.set_num_threads(args.threads)
    if args.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if reason := unsupported_reason(args.device):
        raise ValueError(f"--device {args.device}: {reason}; use --device cpu")
    return torch.device(args.device)


def files(directory: Path) -> list[Path]:
    """Return the files of a model and its training that no output may replace."""
    names = (CONFIG_FILE, WEIGHTS_FILE, RUN_FILE)
    return [*(directory / name for name in names), *directory.glob("state-*.safetensors")]


def check_batch_size(args: argparse.Namespace) -> None:
    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {args.batch_size}")


def unsupported_reason(device: str) -> str | None:
    """Return why torch cannot use the device ("cpu" or "cuda") here, None where it can."""
    import torch

    if device == "cpu":
        return None
    if torch.version.cuda is None:
        return "this torch is built without CUDA"
    return None if torch.cuda.is_available() else "torch finds no usable NVIDIA GPU or driver"


def read(directory: Path) -> MSF:
    """Return the model in a directory. Raise ValueError if it is missing or corrupt."""
    from ..model import MSF
    from ..pretrained import read_config

    can_be_rebuilt = has_states(directory)
    if can_be_rebuilt:
        for name, remedy in ((CONFIG_FILE, REBUILDS_CONFIG), (WEIGHTS_FILE, REBUILDS)):
            if not (directory / name).exists():
                raise ValueError(f"{directory}: {name} is missing; {remedy}")
        with hinted(True, REBUILDS_CONFIG):
            read_config(directory)
    with hinted(can_be_rebuilt, REBUILDS):
        return MSF.from_pretrained(directory)


def load(directory: Path, device: torch.device) -> MSF:
    """Return the model in a directory, on ``device``. Raise ValueError if it is missing, corrupt or
    half trained."""
    model = read(directory)
    if untrained := model.untrained_stages:
        raise ValueError(
            f"{directory}: not trained yet: {', '.join(untrained)}; "
            "finish it with msf train --resume"
        )
    return model.to(device)
