"""Which model to build and how to train it: ``--preset`` or ``--config``."""

from __future__ import annotations

import argparse
import json
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from ..config import MSFConfig
from ..presets import preset
from ..training.config import TrainingConfig

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser, *, required: bool) -> None:
    source = parser.add_mutually_exclusive_group(required=required)
    source.add_argument("--preset", metavar="NAME", help="a named model; 'msf flops' lists them")
    source.add_argument(
        "--config", metavar="FILE", type=Path, help="a JSON file, see 'msf train --help'"
    )


def read(args: argparse.Namespace) -> tuple[MSFConfig, TrainingConfig | None]:
    """The model and, unless ``--config`` leaves it out, its training. ValueError in one line."""
    if args.preset:
        chosen = preset(args.preset)
        return chosen.model, chosen.training
    try:
        values = json.loads(args.config.read_text())
    except ValueError as error:
        raise ValueError(f"{args.config}: not valid JSON: {error}") from None
    if not isinstance(values, dict) or "model" not in values or set(values) - {"model", "training"}:
        raise ValueError(f'{args.config}: must be {{"model": {{...}}, "training": {{...}}}}')
    try:
        model = _build(MSFConfig, values["model"], "model")
        training = (
            _build(TrainingConfig, values["training"], "training") if "training" in values else None
        )
    except ValueError as error:
        raise ValueError(f"{args.config}: {error}") from None
    return model, training


def _build(cls: type[T], values: Any, where: str) -> T:
    """A dataclass from a JSON object, every value checked against its annotation."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {values!r}")
    hints = get_type_hints(cls)
    required = {field.name for field in fields(cls) if field.default is MISSING}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(hints)):
        raise ValueError(
            f"{where}: unknown keys {', '.join(unknown)}; known are {', '.join(hints)}"
        )
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: keys {', '.join(missing)} are missing")
    return cls(
        **{key: _value(value, hints[key], f"{where}.{key}") for key, value in values.items()}
    )


def _value(value: Any, hint: Any, where: str) -> Any:
    if is_dataclass(hint):
        return _build(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        items = get_args(hint)
        length = len(value) if isinstance(value, list) and items[-1] is ... else len(items)
        if not isinstance(value, list) or len(value) != length:
            count = "" if items[-1] is ... else f" of {length}"
            raise ValueError(f"{where} must be a list{count}, got {value!r}")
        kinds = [items[0]] * length if items[-1] is ... else items
        return tuple(
            _value(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds))
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        kind = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}[
            hint
        ]
        raise ValueError(f"{where} must be {kind}, got {value!r}")
    return value
