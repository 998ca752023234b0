"""The file that holds a stage's training, to continue from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import check_is_file
from ..model import MSF
from ..weights import check_tensors, tensor_checksum
from .parallel import like


def write_state(path: Path, tensors: dict[str, Tensor], step: int) -> None:
    """Write a state to a file that none was read from: with old versions of torch and safetensors
    that lies in its file still."""
    metadata = {"step": str(step), "crc32": tensor_checksum(tensors, str(step))}
    save_file(tensors, path, metadata=metadata)


def read_state(path: Path) -> tuple[dict[str, Tensor], int]:
    """Return the tensors of a state, on the CPU, and its step. Raise ValueError (one line) when it
    is corrupt: a single bit is enough."""
    with _opened(path) as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
        step = int(metadata["step"])
    # States of earlier versions have no checksum.
    if metadata.get("crc32", "") not in ("", tensor_checksum(tensors, str(step))):
        raise ValueError(f"{path}: damaged, its contents do not have the checksum that it names")
    check_tensors(tensors, path)
    return tensors, step


def step_of(path: Path) -> int:
    """Return the step of a state. Raise ValueError (one line) when even that cannot be read."""
    with _opened(path) as file:
        return int(file.metadata()["step"])


def check_step(path: Path, step: int, total: int) -> None:
    """Raise ValueError where the ``step`` of the state at ``path`` is none of ``total`` steps."""
    if not 1 <= step <= total:
        hint = "; a stage cannot have fewer steps than it has taken" if step > total else ""
        raise ValueError(f"{path}: its step must be from 1 to {total}, got {step}{hint}")


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_is_file(path)
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a readable training state ({error})") from None


def load_average(path: Path, model: MSF, index: int, part: str) -> None:
    """Load the averaged weights ``part`` and the statistics of the state at ``path`` into ``model``
    and its stage ``index``. Raise ValueError when it is corrupt or does not fit."""
    tensors, _ = read_state(path)
    load_part(model.stages[index], known_average(part, tensors), tensors, path)
    load_part(model.pyramid, "pyramid.", tensors, path)


def check_statistics(path: Path, pyramid: nn.Module, other: Path) -> None:
    """Raise ValueError where the state or model at ``path`` has other statistics than ``pyramid``,
    whose file is ``other``: then the two are of different runs. Jobs on different machines, which
    measure the same data, may differ by rounding."""
    with _opened(path) as file:
        names = {name: f"pyramid.{name}" for name in pyramid.state_dict()}
        found = {name: file.get_tensor(key) for name, key in names.items() if key in file.keys()}  # noqa: SIM118
    for name, own in pyramid.state_dict().items():
        if name in found and not torch.allclose(found[name], own.cpu(), rtol=1e-4, atol=1e-5):
            raise ValueError(
                f"{path}: its statistics of the data are not those of {other}, so one of the two "
                "is of another run; restore that or choose another --out"
            )


def known_average(part: str, tensors: Mapping[str, Tensor]) -> str:
    """Return the prefix of the average ``part``. One that a state does not have, as it was not
    asked for before, begins as the first does."""
    return f"{part}." if any(key.startswith(f"{part}.") for key in tensors) else "ema."


def load_part(module: nn.Module, prefix: str, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load the tensors whose names begin with ``prefix``. Raise ValueError when they do not fit."""
    own = module.state_dict()
    part = {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}
    fits = {k for k, x in part.items() if k in own and x.shape == own[k].shape}
    try:
        module.load_state_dict({k: like(x, own[k]) if k in fits else x for k, x in part.items()})
    except RuntimeError as error:
        detail = str(error).splitlines()[1].strip()
        raise ValueError(f"{path}: made by another configuration: {detail}") from None
