"""Settings, from JSON or Python: every value of a dataclass is checked against its annotation."""

from __future__ import annotations

import json
import math
import operator
import reprlib
from collections import Counter
from collections.abc import Mapping, Set
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, SupportsFloat, TypeVar, get_args, get_origin, get_type_hints

from .files import printable

T = TypeVar("T")

MAX_FLOAT32 = (2 - 2**-23) * 2.0**127
KINDS = {str: "a string", bool: "true or false"}


def parse_object(text: str | bytes, where: object) -> dict[str, Any]:
    """Return the JSON object in ``text``. Raise ValueError in one line, ``where`` first."""
    try:
        values = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:  # bytes that are no UTF-8 too
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{where}: must be a JSON object, got {type(values).__name__}")
    return values


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise ValueError(f"key {key!r} is there more than once")
    return values


def parse_dataclass(cls: type[T], values: Any, where: str) -> T:
    """Build ``cls`` from a JSON object; its tuples from lists. A ValueError names the key that is
    wrong."""
    if not isinstance(values, dict):
        raise ValueError(f"{where} must be an object, got {reprlib.repr(values)}")
    hints = get_type_hints(cls)
    required = {field.name for field in fields(cls) if field.default is MISSING}  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(hints)):
        names = ", ".join(map(printable, unknown))
        raise ValueError(f"{where}: unknown keys {names}; known are {', '.join(hints)}")
    if missing := sorted(required - set(values)):
        raise ValueError(f"{where}: keys {', '.join(missing)} are missing")
    return cls(**{key: parse(value, hints[key], f"{where}.{key}") for key, value in values.items()})


def check_fields(settings: Any) -> None:
    """Make the fields of a frozen dataclass what they would be if read from JSON, so that what is
    built can be written and read back; ``__post_init__`` begins with it."""
    cls = type(settings)
    for name, hint in get_type_hints(cls).items():
        value = parse(getattr(settings, name), hint, f"{cls.__name__}.{name}")
        object.__setattr__(settings, name, value)


def parse(value: Any, hint: Any, where: str) -> Any:
    """Return ``value`` as what ``hint`` annotates. Raise ValueError in one line that begins with
    ``where``."""
    if is_dataclass(hint):
        return value if isinstance(value, hint) else parse_dataclass(hint, value, where)  # type: ignore[arg-type]
    if isinstance(hint, UnionType):  # of one kind, and None or a string
        kind, other = get_args(hint)
        return value if isinstance(value, other) else parse(value, kind, where)
    if get_origin(hint) is tuple:
        return _parse_tuple(value, get_args(hint), where)
    if hint is int:
        return parse_whole(value, where)
    if hint is float:
        return parse_number(value, where)
    if not isinstance(value, hint):
        raise ValueError(f"{where} must be {KINDS[hint]}, got {reprlib.repr(value)}")
    return value


def _parse_tuple(value: Any, kinds: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    items = items_of(value)
    if items is None:
        raise ValueError(f"{where} must be a list or tuple, got {reprlib.repr(value)}")
    if kinds[-1] is ...:
        kinds = kinds[:1] * len(items)
    if len(items) != len(kinds):
        count, got = len(kinds), reprlib.repr(value)
        raise ValueError(f"{where} must be a list or tuple of {count}, got {got}")
    return tuple(parse(v, kind, f"{where}[{i}]") for i, (v, kind) in enumerate(zip(items, kinds)))


def items_of(value: Any) -> list[Any] | None:
    """Return the items of a sequence, an array or a tensor; None for a single value, as a string
    is, and for what has no order."""
    try:
        return None if isinstance(value, (str, bytes, bytearray, Mapping, Set)) else list(value)
    except TypeError:
        return None


def any_whole(value: Any, where: str) -> int:
    """Return a whole number of any kind, NumPy's and torch's too, but no float and no bool."""
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise ValueError(f"{where} must be a whole number, got {reprlib.repr(value)}")


def parse_whole(value: Any, where: str, minimum: int | None = None) -> int:
    """Return ``any_whole``, at least ``minimum``, that 64 bits can hold: the digits of others would
    fill a screen."""
    number = any_whole(value, where)
    if (bits := number.bit_length()) > 64:
        raise ValueError(f"{where} must be below 2**64 in size, got a number of {bits} bits")
    if minimum is not None and number < minimum:
        raise ValueError(f"{where} must be at least {minimum}, got {number}")
    return number


def parse_number(value: Any, where: str) -> float:
    """Return a number of any kind, NumPy's and torch's too, that float32 can hold, but no bool."""
    if (
        isinstance(value, bool)
        or not isinstance(value, SupportsFloat)
        or items_of(value) is not None
    ):
        raise ValueError(f"{where} must be a number, got {reprlib.repr(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} must be finite, got {reprlib.repr(value)}")
    if abs(number) > MAX_FLOAT32:
        raise ValueError(
            f"{where} must be at most {MAX_FLOAT32:.1e} in size, as in float32, got {number}"
        )
    return number
