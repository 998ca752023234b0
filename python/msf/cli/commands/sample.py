"""Generate images with a trained model.

A .png file gets one grid: base, residuals and the merged image side by side. A folder gets one PNG
an image, named by its index. A .safetensors file gets the tensor "images" (B, C, H, W), the only
form for latents. A grid holds at most 10,000 images, a folder 1,000,000, and either file what takes
4 GiB as float32. Ctrl-C and SIGTERM leave the images that are done in the folder, or beside it in
another where --overwrite would replace what it holds, and no file. Up to rounding, an image does
not depend on --batch-size or --count.
"""

from __future__ import annotations

import argparse
import math
import reprlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import quoted
from ...progress import follow
from ...training.config import class_names_of, read_run
from ...training.identity import listed
from .. import models, outputs, sampling, tables

if TYPE_CHECKING:
    from torch import Tensor

    from ...config import MSFConfig
    from ...model import MSF
    from ...sampling import Sample

    Batches = Iterable[Sample]

COUNT = 16
NAMED = 3
NO_CLASS = "(no class)"
MAX_IN_GRID = 10_000
MAX_IN_FOLDER = 1_000_000  # six digits a name
PICTURES = (".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".svg", ".pdf")
OTHER_FILES = (*PICTURES, ".npy", ".npz", ".pt")
MAX_BYTES = 4 * 2**30  # a grid's or a tensor's images are in memory, twice at the end


def split_labels(text: str, names: Sequence[str]) -> Iterator[str]:
    """Yield the labels in ``text``, between commas; a class's name may hold commas itself. Raise
    ValueError where its parts are names too."""
    parts = text.split(",")
    while parts:
        joined = (",".join(parts[:n]) for n in range(len(parts), 1, -1))
        label = next((label for label in joined if label in names), parts[0])
        if _is_of_names(label, names):
            raise ValueError(
                f"--labels: {quoted(label)} is ambiguous, it is a class and its parts are classes "
                f"too; give their numbers, {names.index(label)} for the former"
            )
        yield label
        del parts[: label.count(",") + 1]


def _is_of_names(label: str, names: Sequence[str]) -> bool:
    """Return whether ``label`` can be parted at commas into classes' names."""
    parts = label.split(",")
    splits = ((",".join(parts[:n]), ",".join(parts[n:])) for n in range(1, len(parts)))
    return any(
        first in names and (rest in names or _is_of_names(rest, names)) for first, rest in splits
    )


def class_number(label: str, names: Sequence[str], classes: int) -> int:
    """Return the number of the class with this name or, where none has it, with this number, of
    which ``classes`` means no class."""
    if label in names:
        return names.index(label)
    try:
        number = int(label)
    except ValueError:
        number = -1
    if 0 <= number <= classes:
        return number
    named = f"{listed(list(map(quoted, names)), NAMED)}, or " if names else ""
    raise ValueError(
        f"--labels: no class is named or numbered {reprlib.repr(label)}; choose from {named}"
        f"0 to {classes - 1}, or {classes} for no class"
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, metavar="DIR", help="a trained model's folder")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="PATH", help="file or folder to write"
    )
    parser.add_argument(
        "--labels",
        "--label",
        metavar="K,...",
        help="classes in turn, each by its name or, where no class has that name, its number "
        "(default: all of them); the number of classes means none",
    )
    parser.add_argument(
        "--count", type=int, metavar="N", help=f"images (default: one a label, or {COUNT})"
    )
    parser.add_argument(
        "--steps", nargs="+", type=int, metavar="N", help="one for all stages or one a stage"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="image i uses seed S + i")
    sampling.add_arguments(parser)
    outputs.add_overwrite_argument(parser)
    models.add_device_arguments(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    device = models.device(args)
    model = models.load(args.model, device)
    config = sampling.read(args, args.steps, model.config)
    write = _writer(args, model.config.channels)
    names = class_names_of(args.model, read_run(args.model), model.config.num_classes)
    chosen = [] if args.labels is None else list(split_labels(args.labels, names))
    count = args.count if args.count is not None else len(chosen or range(COUNT))
    if count < 1:
        raise ValueError(f"--count must be at least 1, got {count}")
    if count > (maximum := _max_count(args.out, model.config)):
        raise ValueError(
            f"--count must be at most {maximum} for --out {args.out}, got {count}; "
            "sample in parts, each with its --seed and --out"
        )
    labels = _labels(args, model, chosen, names, count)
    seeds = range(args.seed, args.seed + count)
    batches = sampling.generate(model, labels, seeds, config, args)
    total = math.ceil(count / args.batch_size)
    write(args.out, model, follow(batches, "sample", total, "batches"))
    return {
        "out": str(args.out),
        "images": count,
        "size": list(model.config.image_size),
        "labels": None if labels is None else labels.tolist(),
        "classes": None if labels is None or not names else _named(labels, names),
        "seeds": [seeds[0], seeds[-1]],
    }


def text(document: dict[str, Any]) -> str:
    first, last = document["seeds"]
    size = tables.size(document["size"])
    line = f"{document['out']}: {document['images']} images of {size}, seeds {first} to {last}"
    if not document["classes"]:
        return line
    classes = [NO_CLASS if name is None else quoted(name) for name in document["classes"]]
    return f"{line}, classes {listed(classes, NAMED)}"


def _max_count(out: Path, config: MSFConfig) -> int:
    """Return how many images ``out`` may hold."""
    suffix = out.suffix.lower()
    if suffix not in (".png", ".safetensors"):
        return MAX_IN_FOLDER
    fitting = MAX_BYTES // (4 * config.channels * math.prod(config.image_size))
    return min(fitting, MAX_IN_GRID) if suffix == ".png" else fitting


def _labels(
    args: argparse.Namespace, model: MSF, chosen: Sequence[str], names: Sequence[str], count: int
) -> Tensor | None:
    import torch

    classes = model.config.num_classes
    if not classes and chosen:
        raise ValueError(f"{args.model} was trained without classes; leave --labels out")
    numbers = [class_number(label, names, classes) for label in chosen]
    labels = torch.tensor(numbers) if numbers else model.trained_labels(torch.arange(classes))
    return None if labels is None else labels[torch.arange(count) % len(labels)]


def _named(labels: Tensor, names: Sequence[str]) -> list[str | None]:
    """Return the names of the classes that labels (B,) have, each once, None for no class."""
    return [(*names, None)[label] for label in dict.fromkeys(labels.tolist())]


def _writer(args: argparse.Namespace, channels: int) -> Callable[[Path, MSF, Batches], None]:
    """Return how to write to --out, by its name. Raise ValueError when that is impossible or would
    overwrite."""
    suffix = args.out.suffix.lower()
    if channels not in (1, 3) and suffix != ".safetensors":
        raise ValueError(
            f"--out {args.out}: this model makes latents of {channels} channels, not pictures; "
            "name a .safetensors file"
        )
    if suffix in (".png", ".safetensors"):
        outputs.check_file(args.out, args.overwrite)
        return _write_grid if suffix == ".png" else _write_tensors
    if suffix in OTHER_FILES:
        raise ValueError(f"--out {args.out}: name a .png file, a .safetensors file or a folder")
    outputs.check_folder(args.out, args.overwrite)
    return _write_folder


def _write_grid(path: Path, model: MSF, batches: Batches) -> None:
    import torch

    from ...images import component_grid, save_image

    components = [torch.cat(parts) for parts in zip(*(parts for _, parts in batches), strict=True)]
    save_image(path, component_grid(model.cpu(), components))


def _write_folder(path: Path, model: MSF, batches: Batches) -> None:
    from ...images import save_image

    with outputs.atomic_folder(path, keeps="images") as folder:
        index = 0
        for images, _ in batches:
            for image in images:
                save_image(folder / f"{index:06d}.png", image)
                index += 1


def _write_tensors(path: Path, model: MSF, batches: Batches) -> None:
    import torch
    from safetensors.torch import save_file

    from ...files import atomic_write

    images = torch.cat([images for images, _ in batches])
    with atomic_write(path) as temporary:
        save_file({"images": images}, temporary)
