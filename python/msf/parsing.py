"""Settings from JSON: dataclasses with every value checked against its annotation."""

from __future__ import annotations

import json
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

T = TypeVar("T")

KINDS = {int: "a whole number", float: "a number", str: "a string", bool: "true or false"}


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """The JSON object in ``text``. ValueError in one line that begins with ``where``."""
    try:
        values = json.loads(text)
    except ValueError as error:  # bytes that are no UTF-8 too
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(values).__name__}")
    return values


def parse_dataclass(cls: type[T], values: Any, where: str) -> T:
    """``cls`` from a JSON object; its tuples from lists. ValueError names the key that is wrong."""
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
        return parse_dataclass(hint, value, where)  # type: ignore[arg-type]
    if get_origin(hint) is tuple:
        kinds = get_args(hint)
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{where} must be a list, got {value!r}")
        if kinds[-1] is ...:
            kinds = kinds[:1] * len(value)
        if len(value) != len(kinds):
            raise ValueError(f"{where} must be a list of {len(kinds)}, got {value!r}")
        return tuple(
            _value(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(value, kinds))
        )
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise ValueError(f"{where} must be {KINDS[hint]}, got {value!r}")
    return value
