"""The files that a user names, and those in a folder."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

from sq_cpu.errors import SqCpuError

__all__ = ["files_of"]


def files_of(paths: Sequence[Path], suffixes: Collection[str], what: str) -> list[Path]:
    """Return files as they are named, and of folders those that end so, at any depth, sorted.

    `SqCpuError` for a path that is not there, and a folder without such files, which are `what`.
    """
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes)
            inside = [file for file in inside if file.is_file() and not file.name.startswith(".")]
            if not inside:
                raise SqCpuError(f"{path} holds no {what} ({', '.join(suffixes)}): give some")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise SqCpuError(f"{path}: no such file or folder; give {what}")
    return found
