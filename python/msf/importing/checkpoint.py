"""The files of checkpoints: their tensors, and how they were trained; nothing in them is run."""

from __future__ import annotations

import argparse
import pickle
import re
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..files import check_is_file, printable

AVERAGED = ("ema", "model")  # where a file holds several, what their own samplers take comes first
OWN = "holds weights of msf itself, which need no import"
ZIP = b"PK\x03\x04"
WRAPPED = r"^((module|_orig_mod)\.)+"  # by DistributedDataParallel, torch.compile


@dataclass
class Checkpoint:
    """A Checkpoint has ``tensors`` by name, and the settings that a training wrote beside them.

    ``take`` and ``finish`` raise ValueError (one line) for tensors that are missing, of another
    shape or unknown.
    """

    path: Path
    tensors: dict[str, Tensor]
    settings: dict[str, Any] = field(default_factory=dict)

    def error(self, message: str) -> ValueError:
        return ValueError(f"{printable(self.path)}: {message}")

    def dims(self, name: str, count: int) -> tuple[int, ...]:
        """Return the shape of the tensor of this name, which has ``count`` dimensions."""
        if name not in self.tensors:
            raise self.error(f"{name} is missing; these are no weights of a known model")
        shape = tuple(self.tensors[name].shape)
        if len(shape) != count or 0 in shape:
            raise self.error(f"{name} must have {count} dimensions, none empty, got {shape}")
        return shape

    def depth(self) -> int:
        return len({m[1] for name in self.tensors if (m := re.match(r"blocks\.(\d+)\.", name))})

    def take(self, name: str, *shape: int) -> Tensor:
        """Return the tensor of this name, and forget it: float32, or float64 where it is that."""
        if self.dims(name, len(shape)) != shape:
            got = tuple(self.tensors[name].shape)
            raise self.error(f"{name} must be {shape}, got {got}")
        x = self.tensors.pop(name)
        if not x.is_floating_point():
            raise self.error(f"{name} must be of floats, got {x.dtype}")
        if x.is_meta or x.layout != torch.strided:
            kind = "without values" if x.is_meta else str(x.layout)
            raise self.error(f"{name} must be a dense tensor, got one {kind}")
        return x if x.dtype == torch.float64 else x.float()

    def finish(self) -> None:
        if left := sorted(self.tensors):
            others = f" and {len(left) - 3} more" if len(left) > 3 else ""
            names = ", ".join(map(printable, left[:3])) + others
            raise self.error(f"holds tensors that are not part of a known model: {names}")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a .safetensors file or what ``torch.save`` wrote. Raise ValueError (one line) where it
    is damaged, or would run something."""
    check_is_file(path)
    with path.open("rb") as file:
        is_zip = file.read(4) == ZIP
    is_safe = path.suffix == ".safetensors"
    values = _load_safetensors(path) if is_safe else _load_pickle(path, is_zip)
    settings = _settings(values)
    for name in AVERAGED:
        if isinstance(values.get(name), dict):
            values = values[name]
            break
    source = Checkpoint(path, {}, settings)
    for name, x in values.items():
        if isinstance(x, Tensor):
            own = re.sub(WRAPPED, "", name)
            if own in source.tensors:
                raise source.error(f"holds {printable(own)} twice, as {printable(name)} too")
            source.tensors[own] = x.detach()
    if "pyramid.mean" in source.tensors:
        raise source.error(OWN)
    if not source.tensors:
        raise source.error("holds no tensors by name")
    return source


def _load_safetensors(path: Path) -> dict[str, Any]:
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{printable(path)}: not a readable safetensors file ({error})") from None


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the training: "args" of DiT and its like, "config" of LightningDiT."""
    args, config = values.get("args"), values.get("config")
    if isinstance(args, (argparse.Namespace, dict)):
        return dict(args if isinstance(args, dict) else vars(args))
    if not isinstance(config, dict):
        return {}
    parts = (config.get(name) for name in ("model", "transport"))
    model, transport = (part if isinstance(part, dict) else {} for part in parts)
    return {**transport, "model": model.get("model_type", "")}


def _load_pickle(path: Path, is_zip: bool) -> dict[str, Any]:
    name = printable(path)
    try:
        if is_zip and not zipfile.is_zipfile(path):
            raise ValueError("it is cut off")
        if is_zip:  # torch does not look at the checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise ValueError(f"the checksum of {printable(damaged)} does not agree")
        # DiT's trainings keep their options beside the weights.
        with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
            warnings.simplefilter("ignore")  # of the protocol of a pickle that it then refuses
            values = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        if found := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(
                f"{name}: is a pickle that wants to run {printable(found[1])}, which is refused; "
                "save its weights alone, as safetensors"
            ) from None
        raise ValueError(f"{name}: not a readable checkpoint of torch, or one cut off") from None
    except Exception as error:  # of many kinds: any byte may be another
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: not a readable checkpoint of torch ({reason})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{name}: must hold tensors by name, holds a {type(values).__name__}")
    return {key: value for key, value in values.items() if isinstance(key, str)}
