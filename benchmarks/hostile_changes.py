"""The ways in which `benchmarks.hostile` spoils a file, each a function of its path."""

from __future__ import annotations

import fcntl
import json
import os
import pickle
import random
import shutil
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

Change = Callable[[Path], object]


class Bomb:
    """A Bomb makes a folder when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.folder = str(file.with_name("exploded"))

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def pickled(file: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(file)))


def torch_zip(file: Path) -> None:
    torch.save({"weight": Bomb(file)}, file)


def npy(file: Path) -> None:
    with open(file, "wb") as opened:
        np.save(opened, np.array([Bomb(file)], dtype=object), allow_pickle=True)


def npz(file: Path) -> None:
    with open(file, "wb") as opened:
        np.savez(opened, x=np.array([Bomb(file)], dtype=object))


def leave(file: Path) -> None:
    """Change nothing: the command line is what is bad."""


def content(data: bytes) -> Change:
    return lambda file: file.write_bytes(data)


def added(*, before: bytes = b"", after: bytes = b"") -> Change:
    return lambda file: file.write_bytes(before + file.read_bytes() + after)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def noise(file: Path) -> None:
    file.write_bytes(random.Random(0).randbytes(5000))


def removed(file: Path) -> None:
    if file.is_dir():
        shutil.rmtree(file)
    else:
        file.unlink(missing_ok=True)


def empty_file(file: Path) -> None:
    removed(file)
    file.touch()


def folder(file: Path) -> None:
    removed(file)
    file.mkdir()


def pipe(file: Path) -> None:
    removed(file)
    os.mkfifo(file)


def loop(file: Path) -> None:
    """Put a link to itself there."""
    removed(file)
    file.symlink_to(file)


def forbidden(file: Path) -> None:
    file.chmod(0o500 if file.is_dir() else 0)


def locked(logs: Path) -> None:
    """Train the stage of these logs, as it looks to others as long as this process lives."""
    fcntl.flock(os.open(logs, os.O_RDONLY), fcntl.LOCK_EX)


def header(length: int, text: bytes = b"", data: bytes = b"") -> Change:
    """Write a safetensors file that says that its header is so long."""
    return content(struct.pack("<Q", length) + text + data)


def overlapping(file: Path) -> None:
    """Write a safetensors file of two tensors that share bytes."""
    tensor = {"dtype": "F32", "shape": [2]}
    tensors = {f"at {start}": {**tensor, "data_offsets": [start, start + 8]} for start in (0, 4)}
    text = json.dumps(tensors).encode()
    header(len(text), text, bytes(12))(file)


def tensors(change: Callable[[dict[str, Tensor]], object], step: str = "30") -> Change:
    """Change the tensors of a safetensors file in place."""

    def spoil(file: Path) -> None:
        held = load_file(file)
        change(held)
        save_file(held, file, metadata={"step": step})

    return spoil


def every(change: Callable[[Tensor], Tensor], part: str = "") -> Change:
    """Change each tensor whose name holds ``part``."""
    return tensors(lambda held: held.update({k: change(v) for k, v in held.items() if part in k}))


def without(part: str) -> Change:
    """Take out the tensors whose names hold ``part``."""
    return tensors(lambda held: [held.pop(name) for name in list(held) if part in name])


def nan(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan)


def setting(*keys: str | int, value: Any) -> Change:
    """Set the value at ``keys`` of a JSON file."""

    def spoil(file: Path) -> None:
        document = place = json.loads(file.read_text())
        for key in keys[:-1]:
            place = place[key]
        place[keys[-1]] = value
        file.write_text(json.dumps(document))

    return spoil


def replaced(old: str, new: str) -> Change:
    def spoil(file: Path) -> None:
        text = file.read_text()
        assert old in text, text
        file.write_text(text.replace(old, new, 1))

    return spoil


def png(width: int, height: int) -> Change:
    """Write a PNG file that says how large it is and holds hardly a byte of that."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return content(b"\x89PNG\r\n\x1a\n" + size + chunk(b"IDAT", zlib.compress(b"\0" * 9)))


def picture(width: int, height: int, mode: str = "L") -> Change:
    return lambda file: Image.new(mode, (width, height)).save(file, "PNG")


def cut_picture(kind: str) -> Change:
    def spoil(file: Path) -> None:
        Image.effect_noise((64, 64), 90).save(file, kind)
        cut(file)

    return spoil


def all_in(change: Change) -> Change:
    """Change every file of a folder."""
    return lambda photos: [change(file) for file in list(photos.iterdir())]


def only(name: str, change: Change) -> Change:
    """Leave a folder with one thing in it."""

    def spoil(photos: Path) -> None:
        folder(photos)
        change(photos / name)

    return spoil
