"""The work of ``msf sample``: batches of images, each a part of the output."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..encoding.vae import Autoencoder
from ..files import behind_links, checksum
from ..model import MSF
from ..parts import Parts
from ..pipeline import decoder_of
from ..pretrained import CONFIG_FILE, WEIGHTS_FILE
from ..progress import bar
from ..sampling import Sample
from ..sampling_config import SamplingConfig, StageSampling
from ..training.config import class_names_of, read_run
from . import labels, models, outputs, sampling
from .forms import Folder, Form, Grid, Npz, Tensors

MAX_IN_GRID = 10_000
MAX_IMAGES = 1_000_000  # six digits a name
MAX_BYTES = 4 * 2**30  # a grid's or a tensor's images are in memory, twice at the end
FILES = (".npz", ".png", ".safetensors")
ROUNDING = "nearest to 127.5 x + 127.5 in 0..255, where ADM truncates"


@dataclass(frozen=True)
class Job:
    """A Job makes those of the output's batches that are its process's ``own``.

    Batch k has the images k B to (k + 1) B - 1, whichever process makes it, so that its bits are
    the same: a matrix product's rounding depends on its shape.
    """

    args: argparse.Namespace
    model: MSF
    vae: Autoencoder | None
    config: SamplingConfig
    num: int
    image_shape: tuple[int, int, int]
    labels: Tensor | None
    names: Sequence[str]
    form: Form
    parts: Parts
    own: range

    def todo(self) -> list[int]:
        """Return which of its own batches nobody has made before. Raise ValueError (one line) where
        another job was faster, or left what was begun otherwise."""
        _check_place(self.args)
        return self.parts.missing(self.own)

    def make_parts(self, todo: Sequence[int]) -> None:
        images, left = (sum(len(self._rows(k)) for k in part) for part in (self.own, todo))
        row = self.own.start
        progress = bar("sampling", images, done=images - left, units="images", row=row)
        try:
            for number in todo:
                rows = self._rows(number)
                self.parts.add(number, self.form.part(self._sample(rows), rows.start))
                progress.update(len(rows))
        finally:
            progress.close()

    def assemble(self) -> bool:
        """Write the output if no batch is missing; return whether this process did."""
        out = behind_links(self.args.out)
        return self.parts.assemble(lambda parts: self.form.write(out, parts))

    def document(self) -> dict[str, Any]:
        made = None if self.labels is None else self.labels.tolist()
        different = dict.fromkeys(made or ())
        classes = [(*self.names, None)[label] for label in different] if self.names else None
        return {
            "out": str(self.args.out),
            "images": self.num,
            "size": list(self.image_shape[1:]),
            "rounding": None if isinstance(self.form, Tensors) else ROUNDING,
            "labels": made,
            "classes": classes,
            "seeds": [self.args.seed, self.args.seed + self.num - 1],
        }

    def _rows(self, number: int) -> range:
        start = number * self.args.batch_size
        return range(start, min(start + self.args.batch_size, self.num))

    def _sample(self, rows: range) -> Sample:
        chosen = None if self.labels is None else self.labels[rows.start : rows.stop]
        seeds = [self.args.seed + row for row in rows]
        (made,) = sampling.generate(self.model, chosen, seeds, self.config, self.args)
        return Sample(self.vae.decode(made.images), []) if self.vae else made


def prepare(args: argparse.Namespace, device: torch.device, rank: int, processes: int) -> Job:
    """Return what the process of number ``rank`` is to do. Raise ValueError (one line) for what
    does not fit."""
    model, run = models.load(args.model, device), read_run(args.model)
    config = sampling.read(args, args.steps, model.config)
    names = class_names_of(args.model, run, model.config.num_classes)
    chosen, drawn = labels.choose(args.labels, names, model, args.model)
    num = args.num_images if args.num_images is not None else len(chosen or range(labels.NUM))
    shape, vae = (model.config.channels, *model.config.image_size), None
    _check_out(args, shape[0])
    if args.vae:
        data = run.data if run else None
        vae = decoder_of(model.config, data, args.vae, device, quiet=rank > 0)
        shape = (3, *vae.image_size(shape))
    _check_num(args.out, num, shape)
    classes = labels.of_classes(chosen, model)
    made = labels.of_numbers(range(args.seed, args.seed + num), classes, drawn=drawn)
    settings = {
        "model": [checksum(args.model / name) for name in (CONFIG_FILE, WEIGHTS_FILE)],
        "--vae": vae and asdict(vae.vae),
        "--num-images": num,
        "--seed": args.seed,
        "--labels": None if classes is None else [drawn, classes.tolist()],
        "--batch-size": args.batch_size,
        "--precision": sampling.precision(args, device),
        "--device": device.type,
        **_options(config, model),
    }
    parts = Parts(args.out, settings, math.ceil(num / args.batch_size))
    own = range(rank, parts.count, processes)
    form = _form(args.out, num, made, None if vae else model)
    return Job(args, model, vae, config, num, shape, made, names, form, parts, own)


def _options(config: SamplingConfig, model: MSF) -> dict[str, Any]:
    """Return how to sample by the options' names, for each stage what may differ between them."""
    stages = config.stages(model.config)
    values = {
        field.name: [getattr(stage, field.name) for stage in stages]
        for field in fields(StageSampling)
    }
    values |= {name: getattr(config, name) for name in ("prior_noise", "project_residual")}
    return {f"--{name.replace('_', '-')}": value for name, value in values.items()}


def _form(out: Path, num: int, made: Tensor | None, model: MSF | None) -> Form:
    suffix = out.suffix.lower()
    if suffix == ".npz":
        return Npz(num, made)
    if suffix == ".png":
        return Grid(model)
    return Tensors() if suffix == ".safetensors" else Folder()


def _check_out(args: argparse.Namespace, channels: int) -> None:
    """Raise ValueError when --out cannot be written, would overwrite, or is for what --vae is not
    given for."""
    suffix = args.out.suffix.lower()
    # A suffix begins with a letter, so that "guidance-1.5" names a folder.
    if suffix[1:2].isalpha() and suffix not in FILES and not args.out.exists():
        raise ValueError(
            f"--out {args.out}: name a .npz file, a .png file, a .safetensors file or a folder; "
            f"the name of a new folder must not end in {suffix}"
        )
    if args.vae and suffix == ".safetensors":
        raise ValueError(f"--out {args.out}: takes latents as they are; leave --vae out")
    if not args.vae and channels not in (1, 3) and suffix != ".safetensors":
        raise ValueError(
            f"--out {args.out}: this model makes latents of {channels} channels, not pictures; "
            "decode them with --vae, or name a .safetensors file"
        )
    _check_place(args)


def _check_place(args: argparse.Namespace) -> None:
    if args.out.suffix.lower() in FILES:
        outputs.check_file(args.out, args.overwrite)
        outputs.check_not_read(args.out, *models.files(args.model))
    else:
        outputs.check_folder(args.out, args.overwrite, Folder.names)


def _check_num(out: Path, num: int, shape: tuple[int, int, int]) -> None:
    """Raise ValueError unless ``out`` may hold so many images (C, H, W)."""
    if num < 1:
        raise ValueError(f"--num-images must be at least 1, got {num}")
    suffix, maximum = out.suffix.lower(), MAX_IMAGES
    if suffix in (".png", ".safetensors"):
        maximum = MAX_BYTES // (4 * math.prod(shape))
    if suffix == ".png":
        maximum = min(maximum, MAX_IN_GRID)
    if num > maximum:
        raise ValueError(
            f"--num-images must be at most {maximum} for --out {out}, got {num}; "
            "sample in parts, each with its --seed and --out"
        )
