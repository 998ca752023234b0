"""What a run was trained with, its data above all, and what has changed in it since."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from ..config import MSFConfig
from ..files import atomic_write, hinted, printable, quoted, read_file
from ..parsing import parse_object
from .config import RunConfig

FILES_FILE = "files.json"
CONTENTS_FILE = "contents.json"
NAMED, MOVED = 10, 3
SAMPLED = 256  # files whose contents are compared: of all of ImageNet's it would take hours


def fingerprint(files: Mapping[str, int]) -> str:
    """Return a hash of names and sizes, whatever their order; "" for data without files."""
    if not files:
        return ""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(os.fsencode(name) + f"\0{files[name]}\0".encode())
    return digest.hexdigest()


def listed(names: Sequence[str], limit: int = NAMED) -> str:
    """Return the first ``limit`` names and how many more there are."""
    more = len(names) - limit
    first = ", ".join(map(printable, names[:limit]))
    return f"{first} and {more:,} more" if more > 0 else first


def write_files(directory: Path, files: Mapping[str, int]) -> None:
    """Keep the names and sizes, where there are any."""
    _write(directory / FILES_FILE, files)


def read_files(directory: Path) -> dict[str, int]:
    """Return the names and sizes that ``write_files`` kept, none where it did not. Raise ValueError
    (one line) when they are corrupt."""
    file = directory / FILES_FILE
    if not file.exists():
        return {}
    with hinted(True, "take the data as it is with --data-changed"):
        files = parse_object(read_file(file), file)
        for name, size in files.items():
            if type(size) is not int:
                raise ValueError(
                    f"{file}: the size of {name!r} must be a whole number, got {size!r}"
                )
    return files


def sample_contents(files: Mapping[str, int], digest: Callable[[str], str]) -> dict[str, str]:
    """Return the digests of 256 files at most, chosen by their names."""
    names = sorted(files, key=lambda name: hashlib.sha256(os.fsencode(name)).digest())
    return {name: digest(name) for name in names[:SAMPLED]}


def write_contents(directory: Path, contents: Mapping[str, str]) -> None:
    """Keep the digests, where there are any."""
    _write(directory / CONTENTS_FILE, contents)


def read_contents(directory: Path) -> dict[str, str]:
    """Return the digests that ``write_contents`` kept, none where it did not. Raise ValueError (one
    line) when they are corrupt."""
    file = directory / CONTENTS_FILE
    if not file.exists():
        return {}
    with hinted(True, "images are compared by their names and sizes"):
        contents = parse_object(read_file(file), file)
        for name, digest in contents.items():
            if not isinstance(digest, str):
                raise ValueError(f"{file}: the digest of {name!r} must be a string, got {digest!r}")
    return contents


def _write(file: Path, values: Mapping[str, object]) -> None:
    if values:
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(dict(values), indent=0) + "\n")


def compare_data(
    directory: Path,
    run: RunConfig,
    now: RunConfig,
    files: Mapping[str, int],
    digest: Callable[[str], str],
    *,
    accepted: bool,
    otherwise: str,
) -> str | None:
    """Return what is different between the data of the ``run`` in ``directory`` and that of
    ``now``, of which ``files`` are the names and sizes and ``digest`` hashes the file that it is
    given the name of; None where nothing is.

    Raise ValueError, unless it is ``accepted``, when anything is gone or another: new images are no
    other data. ``otherwise`` is what --data-changed would do.
    """
    change = _lost(directory, run, now, files, digest)
    if change and not accepted:
        raise ValueError(
            f"{directory}: not the data this run was trained on: {change}; restore it, or "
            f"{otherwise} what is there now with --data-changed"
        )
    if not change and run.fingerprint not in ("", now.fingerprint):
        before = len(read_files(directory))
        change = f"other files, {len(files):,} images (were {before:,})"
    return change


def _lost(
    directory: Path,
    run: RunConfig,
    now: RunConfig,
    files: Mapping[str, int],
    digest: Callable[[str], str],
) -> str | None:
    """Return what the data of ``run`` has no longer; None where it has all."""
    if not run.class_names:  # of an earlier version
        return None if run.data == now.data else f"it was {run.data}, is {now.data}"
    if change := changed_classes(run.class_names, now.class_names):
        return change
    if not run.fingerprint:
        return f"it was {run.data}, and had no files" if now.fingerprint else None
    if run.fingerprint != now.fingerprint and (
        change := changed_files(read_files(directory), files)
    ):
        return change
    return changed_contents(read_contents(directory), files, digest)


def changed_contents(
    before: Mapping[str, str], files: Collection[str], digest: Callable[[str], str]
) -> str | None:
    """Return how many of the sampled files hold something else; None where they do not."""
    other = [name for name in before if name not in files or digest(name) != before[name]]
    if not other:
        return None
    return (
        f"{len(other):,} of {len(before):,} images that were looked at hold something else "
        f"({printable(other[0])} first)"
    )


def changed_classes(before: Sequence[str], now: Sequence[str]) -> str | None:
    """Return how the classes, in order, have changed; None where they have not. One that stays with
    another number is told: the model knows it by that alone."""
    old, new = ({name: number for number, name in enumerate(names)} for names in (before, now))
    moved = [
        f"{quoted(name)} is now number {new[name]} (was {old[name]})"
        for name in old
        if name in new and new[name] != old[name]
    ]
    parts = [
        f"classes {word}: {listed([quoted(name) for name in one if name not in other])}"
        for word, one, other in (("gone", old, new), ("new", new, old))
        if not one.keys() <= other.keys()
    ]
    return ", ".join(parts + ([listed(moved, MOVED)] if moved else [])) or None


def changed_files(before: Mapping[str, int], now: Mapping[str, int]) -> str | None:
    """Return which files are gone or have another size; None where there are at most new ones.
    Without files of ``before`` all that is known is that they differ."""
    if not before:
        return f"names or sizes of its files ({FILES_FILE}, which lists them, is missing)"
    gone = [name for name in before if name not in now]
    other = [name for name in before if name in now and before[name] != now[name]]
    parts = [
        f"{len(names):,} of {len(before):,} images {word} ({printable(names[0])} first)"
        for word, names in (("are gone", gone), ("have another size", other))
        if names
    ]
    return ", ".join(parts) or None


def settings_of(config: MSFConfig, run: RunConfig) -> dict[str, Any]:
    """Return the settings of a run by name, as JSON gives them back."""
    training = replace(run.training, checkpoint_every=run.training.checkpoint_interval)
    settings = {
        **{f"model.{name}": value for name, value in asdict(config).items()},
        **{f"training.{name}": value for name, value in asdict(training).items()},
        "data": run.data,
    }
    return json.loads(json.dumps(settings))


def compare_settings(
    directory: Path, before: Mapping[str, Any], now: Mapping[str, Any]
) -> list[str]:
    """Return which settings of the run in ``directory`` are others ``now``, as a text each; both
    are as ``settings_of`` returns them. Raise ValueError where one is that has to stay."""
    differing = [name for name in now if now[name] != before[name]]
    # With another holdout an evaluation would test with images that were trained on.
    kept = ("model.", "training.seed", "training.holdout")
    if fixed := [name for name in differing if name.startswith(kept)]:
        values = ", ".join(
            f"{name.split('.')[1]} {_plain(before[name])} (not {_plain(now[name])})"
            for name in fixed
        )
        raise ValueError(
            f"{directory}: the run in this folder differs in {', '.join(fixed)}; resume with "
            f"{values}, or choose another --out"
        )
    return [
        f"{name.removeprefix('training.')} {_plain(now[name])} (was {_plain(before[name])})"
        for name in differing
    ]


def _plain(value: Any) -> str:
    """Write a number, or those of a list as on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list) else printable(str(value))
