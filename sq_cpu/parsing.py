"""JSON from files, held against the types that it is to have: the one door for what others wrote.

What passes is of the types that the annotations say; which values a field can have is for the
dataclass itself to check. Arguments of a caller's are checked here, too.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import types
from collections.abc import Mapping
from functools import cache
from numbers import Integral
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from sq_cpu.errors import SqCpuError, first_line

__all__ = [
    "check_fields",
    "check_kind",
    "check_whole",
    "parsed_json",
    "read_json",
    "record",
    "typed",
]

T = TypeVar("T")
_LONGEST = 64 << 20  # characters: the recipe of 10^5 linears has a third of them
# ValueError: no UTF-8, no JSON, or an integer of thousands of digits; RecursionError: brackets
# without end.
_NOT_JSON = (ValueError, RecursionError)
_WORDS = {bool: "true or false", int: "an integer", float: "a finite number", str: "a text"}


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return a file's JSON; `SqCpuError` for what is missing, huge or anything else."""
    try:
        if os.path.exists(path) and not os.path.isfile(path):  # opening a FIFO would wait
            raise OSError("not a file")
        with open(path, encoding="utf-8") as file:
            text = file.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise OSError(f"larger than {_LONGEST >> 20} MB")
        return json.loads(text)
    except (OSError, *_NOT_JSON) as error:
        raise SqCpuError(
            f"{path} cannot be read as JSON ({first_line(error)}); copy or make it again"
        ) from error


def parsed_json(text: str, where: str) -> Any:
    """Return the value of JSON text; `SqCpuError` names `where` it is from."""
    try:
        return json.loads(text)
    except _NOT_JSON as error:
        raise SqCpuError(f"{where} is not JSON: {first_line(error)}") from error


def check_fields(made: Any, where: str) -> None:
    """Hold a dataclass's values against its annotations, in `__post_init__`.

    Lists become the tuples that are annotated, and JSON objects the dataclasses.
    """
    kind: Any = type(made)
    for name, hint in _hints(kind).items():
        object.__setattr__(made, name, typed(hint, getattr(made, name), f"{where}: {name}"))


def check_whole(least: int, **numbers: object) -> None:
    """Raise `SqCpuError` for arguments, by their names, that are no whole numbers >= `least`."""
    for name, number in numbers.items():
        # What numpy's integers are, too.
        is_whole = isinstance(number, Integral) and not isinstance(number, bool)
        if not is_whole or int(number) < least:  # type: ignore[call-overload]
            raise SqCpuError(f"{name} is {_shown(number)}, not a whole number >= {least}")


def check_kind(kind: Any, meant: str, **values: object) -> None:
    """Raise `SqCpuError` for arguments, by their names, of another type; `meant` says of which."""
    for name, value in values.items():
        if not isinstance(value, kind):
            raise SqCpuError(f"{name} is {_shown(value)}, not {meant}")


def record(kind: type[T], values: Any, where: str) -> T:
    """Make a dataclass, which checks its fields, of the JSON object that has them."""
    if not isinstance(values, Mapping):
        raise SqCpuError(f"{where} is {_shown(values)}, not a table")
    fields = dataclasses.fields(kind)  # type: ignore[arg-type]
    if unknown := sorted(map(str, values.keys() - {field.name for field in fields})):
        raise SqCpuError(f"{where} has an unknown field {unknown[0]!r}")
    for field in fields:
        is_needed = field.default is field.default_factory is dataclasses.MISSING
        if is_needed and field.name not in values:
            raise SqCpuError(f"{where} lacks {field.name}")
    return kind(**values)


def typed(kind: Any, value: Any, where: str) -> Any:
    """Return JSON as the Python type that an annotation names, or raise `SqCpuError`."""
    origin, parts = get_origin(kind), get_args(kind)
    if kind is Any:
        return value
    if origin in (Union, types.UnionType):
        return _first_of(parts, value, where)
    if origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in parts):
            return value
        raise SqCpuError(f"{where} is {_shown(value)}, not one of {', '.join(map(repr, parts))}")
    if origin in (list, tuple):
        return _sequence(origin, parts, value, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, dict):
            raise SqCpuError(f"{where} is {_shown(value)}, not a table")
        return {key: typed(parts[1], item, f"{where}: {key}") for key, item in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if isinstance(value, kind):
            return value
        own = getattr(kind, "from_dict", None)
        if own is not None and isinstance(value, Mapping):
            return own(value)
        return record(kind, value, where)
    if not _is_plain(kind, value):
        raise SqCpuError(f"{where} is {_shown(value)}, not {_WORDS.get(kind, 'null')}")
    return value


def _first_of(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    refused = ""
    for kind in kinds:
        try:
            return typed(kind, value, where)
        except SqCpuError as error:
            # Its text alone: an error that this frame kept would keep the frame, and with it what
            # every caller holds (a block's weights), until the collector of cycles comes by.
            refused = refused or str(error)
    raise SqCpuError(refused)


def _sequence(origin: Any, parts: tuple[Any, ...], value: Any, where: str) -> Any:
    if not isinstance(value, list | tuple):
        raise SqCpuError(f"{where} is {_shown(value)}, not a list")
    if origin is list or parts[-1] is ...:
        parts = parts[:1] * len(value)
    elif len(value) != len(parts):
        raise SqCpuError(f"{where} has {len(value)} items, not {len(parts)}")
    items = (typed(part, item, where) for part, item in zip(parts, value, strict=True))
    return origin(items)


def _is_plain(kind: Any, value: Any) -> bool:
    if kind is float:
        # A huge integer is a number that no float holds.
        return type(value) in (int, float) and abs(value) < 1e308 and math.isfinite(value)
    if kind is int:
        return type(value) is int and abs(value) < 1 << 63
    return type(value) is (type(None) if kind is None else kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
