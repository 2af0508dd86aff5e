"""Output files that are whole or absent, and JSON to read."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError

__all__ = ["atomic_write", "json_text"]


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary name beside `path`; move it into place on success, else remove it.

    Raises `SqCpuError` where the file cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise SqCpuError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def json_text(value: Any, indent: int = 0) -> str:
    """Return JSON indented by two spaces, with a list of numbers, nested or not, on one line."""
    if isinstance(value, dict) and value:
        items = [f"{json.dumps(key)}: {json_text(item, indent + 2)}" for key, item in value.items()]
        first, last = "{}"
    elif isinstance(value, list | tuple) and not _is_numeric(value):
        items = [json_text(item, indent + 2) for item in value]
        first, last = "[]"
    else:
        return json.dumps(value)
    margin = "\n" + " " * indent
    return f"{first}{margin}  " + f",{margin}  ".join(items) + f"{margin}{last}"


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return isinstance(value, int | float)
