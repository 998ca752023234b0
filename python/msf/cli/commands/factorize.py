"""Split an image into its base and residuals.

Writes base.png, residual.png (one a level, around grey and two standard deviations wide) and
merged.png, and prints what share of the image's variance each component holds.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...config import UPSAMPLE_MODES, component_names
from ...files import check_is_file
from .. import outputs, tables

if TYPE_CHECKING:
    from torch import Tensor


MAX_LEVELS = 16  # of 65,536 pixels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("image", type=Path, metavar="IMAGE")
    parser.add_argument("--levels", type=int, default=1, metavar="N", help="residuals (default 1)")
    parser.add_argument("--upsample", choices=UPSAMPLE_MODES, default=UPSAMPLE_MODES[0])
    parser.add_argument(
        "--out",
        type=outputs.place,
        metavar="FOLDER",
        help="default: IMAGE's name and -msf, beside it",
    )
    outputs.add_overwrite_argument(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    if args.image.is_dir():
        raise ValueError(f"{args.image}: is a folder; give an image file")
    if not args.image.exists():
        raise ValueError(f"{args.image}: no such file")
    check_is_file(args.image)
    if not 1 <= args.levels <= MAX_LEVELS:
        raise ValueError(f"--levels must be 1 to {MAX_LEVELS}, got {args.levels}")
    out = args.out or args.image.with_name(args.image.stem + "-msf")
    outputs.check_folder(out, args.overwrite, r"(merged|base|residual(_\d+)?)\.png")
    outputs.check_not_read(out, args.image)
    x = _read(args.image)
    _check_sides(args.image, x, args.levels)
    from ...images import save_image
    from ...pyramid import Pyramid

    pyramid = Pyramid(args.levels, x.shape[1], args.upsample)
    components = pyramid.split(x)
    merged = pyramid.merge(components)
    names = component_names(args.levels)
    with outputs.atomic_folder(out) as folder:
        save_image(folder / "merged.png", merged[0])
        for name, component in zip(names, components, strict=True):
            scale = 1.0 if name == "base" else 2 * float(component.std()) or 1.0
            save_image(folder / f"{name}.png", component[0] / scale)
    shares = _variance_shares(components)
    return {
        "image": str(args.image),
        "out": str(out),
        "size": list(x.shape[2:]),
        "channels": x.shape[1],
        "components": [
            {"name": name, "size": list(component.shape[2:]), "variance_share": share}
            for name, component, share in zip(names, components, shares, strict=True)
        ],
        "max_error": float((merged - x).abs().max()),
    }


def text(document: dict[str, Any]) -> str:
    facts = [
        ("image", document["image"]),
        ("size", tables.size(document["size"])),
        ("channels", document["channels"]),
        ("written to", document["out"]),
        ("max |merge(split(x)) - x|", f"{document['max_error']:.1e}"),
    ]
    headers = ("component", "size", "share of variance")
    rows = [
        (part["name"], tables.size(part["size"]), f"{part['variance_share']:.2%}")
        for part in document["components"]
    ]
    return tables.pairs(facts) + "\n\n" + tables.table(headers, rows)


def _read(path: Path) -> Tensor:
    """Read an image (1, C, H, W) in [-1, 1], grey or RGB."""
    import numpy as np
    import torch

    from ...data.decode import loaded, opaque

    try:
        image = loaded(path)
        grey = image.mode in ("1", "L", "LA")
        pixels = np.array(opaque(image).convert("L" if grey else "RGB"))
    except Exception as error:  # Pillow's decoders raise whatever the broken file leads them to
        reason = str(error).replace(f" {str(path)!r}", "")
        raise ValueError(
            f"{path}: not a readable image ({reason}); give an 8-bit PNG or JPEG file"
        ) from None
    x = torch.from_numpy(pixels).reshape(1, *pixels.shape[:2], -1).movedim(-1, 1)
    return x.float() / 127.5 - 1


def _check_sides(path: Path, x: Tensor, levels: int) -> None:
    multiple = 2**levels
    size = tuple(x.shape[2:])
    if any(side % multiple for side in size):
        cropped = tuple(side - side % multiple for side in size)
        right = (
            f"crop it to {tables.size(cropped)}"
            if min(cropped)
            else "give a larger image or fewer --levels"
        )
        raise ValueError(
            f"{path}: {tables.size(size)} (height x width) is not divisible by {multiple} "
            f"as --levels {levels} needs; {right}"
        )


def _variance_shares(components: list[Tensor]) -> list[float]:
    """Return mean squares, the base's about its mean a channel, in parts of their sum.

    With nearest upsampling the components are orthogonal and the sum is the image's variance.
    """
    base, *residuals = components
    energies = [(base - base.mean((2, 3), keepdim=True)).square().mean()]
    energies += [residual.square().mean() for residual in residuals]
    total = float(sum(energies)) or 1.0
    return [float(energy) / total for energy in energies]
