"""The checkpoint's folder: moved into place as a whole, replaced only if `save` wrote it."""

from __future__ import annotations

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

from sq_cpu.checkpoint.config import CONFIG, read_settings
from sq_cpu.errors import SqCpuError

__all__ = ["check_replaceable", "contents", "hidden", "is_empty", "move_into_place"]


def check_replaceable(target: Path) -> None:
    """Refuse to replace anything that ``save`` did not write."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SqCpuError(f"{target} is a file; choose another folder to save to")
    if is_empty(target):
        return
    try:
        settings = read_settings(target)
        ours = {CONFIG, *settings.get("files", ()), *settings.get("companions", ())}
    except (SqCpuError, TypeError) as error:
        raise SqCpuError(
            f"{target} is not empty and is not an sq_cpu checkpoint; choose another folder"
        ) from error
    if foreign := sorted(contents(target) - ours):
        raise SqCpuError(
            f"{target} holds {foreign[0]}, which save did not write and will not delete; "
            "move it away or choose another folder"
        )
    if os.path.ismount(target) or os.path.samefile(target, os.curdir):
        raise SqCpuError(
            f"{target} is a mount point or the current folder, which cannot be replaced; "
            "empty it or choose another folder"
        )


def is_empty(folder: Path) -> bool:
    """Tell whether a folder holds nothing."""
    return not any(folder.iterdir())


def contents(folder: Path) -> set[str]:
    """Give the paths within a folder of all files, at any depth, and of empty folders."""
    return {
        entry.relative_to(folder).as_posix()
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or is_empty(entry)
    }


def hidden(target: Path, *, inside: bool = False) -> Path:
    """Give a new name for a folder beside ``target``, or in it."""
    return (target if inside else target.parent) / f".{target.name}.{secrets.token_hex(6)}"


def move_into_place(staging: Path, target: Path) -> None:
    """Make ``staging`` the folder ``target``, which ``check_replaceable`` let through."""
    if staging.parent == target:
        _move_out(staging, target)
        return
    if not target.exists():
        staging.rename(target)
        return
    old = hidden(target)
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_out(staging: Path, target: Path) -> None:
    """Move what ``staging`` holds to ``target``, or nothing."""
    # config.json last: without it the folder is no checkpoint.
    entries = sorted(staging.iterdir(), key=lambda entry: entry.name == CONFIG)
    try:
        for entry in entries:
            entry.rename(target / entry.name)
        staging.rmdir()
    except BaseException:
        for entry in entries:
            with suppress(OSError):  # not moved yet
                (target / entry.name).rename(entry)
        raise
