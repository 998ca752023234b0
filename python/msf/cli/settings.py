"""The model to build and its training, as ``--preset`` or ``--config`` names them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from ..config import MSFConfig
from ..files import behind_links, hinted
from ..parsing import parse_dataclass, parse_object
from ..presets import PRESETS, preset
from ..pretrained import CONFIG_FILE, missing, read_config
from ..training.config import REBUILDS_CONFIG, RUN_FILE, TrainingConfig, has_states, read_run


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--preset", metavar="NAME", help="a named model; 'msf flops' lists them")
    source.add_argument(
        "--config", metavar="FILE", type=Path, help="a JSON file, see 'msf train --help'"
    )


def read(args: argparse.Namespace) -> tuple[MSFConfig, TrainingConfig | None]:
    """Return the model and, unless ``--config`` leaves it out, its training; without either they
    are those of ``--from``. Raise ValueError in one line."""
    if args.preset:
        chosen = preset(args.preset)
        return chosen.model, chosen.training
    if not args.config:
        return of_run(args.start)
    values = parse_object(args.config.read_bytes(), args.config)
    if "model" not in values or set(values) - {"model", "training"}:
        raise ValueError(f'{args.config}: must be {{"model": {{...}}, "training": {{...}}}}')
    try:
        model = parse_dataclass(MSFConfig, values["model"], "model")
        if "training" not in values:
            return model, None
        return model, parse_dataclass(TrainingConfig, values["training"], "training")
    except ValueError as error:
        raise ValueError(f"{args.config}: {error}") from None


def of_run(directory: Path) -> tuple[MSFConfig, TrainingConfig]:
    """Return what the model in ``directory`` is and how it was trained."""
    config, run = of_model(directory), read_run(directory)
    if run is None:
        raise ValueError(
            f"{directory}: has no {RUN_FILE} to train by; give --preset or --config too"
        )
    return config, run.training


def of_model(directory: Path) -> MSFConfig:
    """Return what the model in ``directory`` is. Raise ValueError where there is none."""
    if not (directory / CONFIG_FILE).exists():
        remedy = "give a trained model's folder"
        if str(directory) in PRESETS:
            remedy = f"a preset is named by --preset {directory}"
        raise ValueError(f"{directory}: {missing(directory)}; {remedy}")
    with hinted(has_states(directory), REBUILDS_CONFIG):
        return read_config(directory)


def data_source(data: str) -> str:
    """Return a folder by its full path, so that resuming and evaluating find it from anywhere."""
    if not data:  # which would be the folder that the command runs in
        raise ValueError("--data is empty; give digits, textures or a folder")
    return data if data in ("digits", "textures") else str(behind_links(Path(data)))


def one_a_stage(steps: Sequence[int], config: MSFConfig) -> list[int]:
    """Return ``--steps`` a stage: a single number stands for every one."""
    return list(steps) * len(config.stages) if len(steps) == 1 else list(steps)
