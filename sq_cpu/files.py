"""Output files that are whole or absent, claims on what is written, and JSON to read."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from sq_cpu.errors import SqCpuError

__all__ = [
    "absolute",
    "as_path",
    "check_file",
    "claimed_file",
    "exchange",
    "json_text",
    "keep_mode",
    "locked",
    "write_file",
]


def absolute(path: str | os.PathLike[str]) -> Path:
    """Return an absolute path, "~" expanded; `SqCpuError` where the current folder is gone."""
    try:
        return Path(os.path.abspath(os.path.expanduser(path)))
    except OSError as error:
        raise SqCpuError(f"{path}: the current folder was removed; change to another") from error


def as_path(path: object) -> Path:
    """Return what a caller names a file or folder by; `SqCpuError` for what names none."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    if not isinstance(text, str) or "\0" in text:
        raise SqCpuError(f"path is {path!r}; give a text or a pathlib.Path")
    return Path(text)


def write_file(path: str | os.PathLike[str], content: str | bytes) -> None:
    """Write a file, text as UTF-8; at every moment it is whole, as it was or as it becomes.

    Links are followed. A file that is there keeps its mode and owner. A device or FIFO (also
    /dev/stdout) is written to, and never replaced.

    Raises `SqCpuError` where the file cannot be written.
    """
    data = content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content
    try:
        place = _replaced(as_path(path))
        if place is None:
            _write_through(path, data)
            return
        # A fixed name beside the file: what a killed process left is found, and taken away.
        temporary = place.with_name(f".{place.name}.sq_cpu.tmp")
        with locked(temporary, wait=True) as (descriptor, _):
            keep_mode(descriptor, place)
            with os.fdopen(os.dup(descriptor), "wb") as file:
                file.write(data)
            os.replace(temporary, place)
    except OSError as error:
        raise SqCpuError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def claimed_file(path: str | os.PathLike[str]) -> Iterator[bool]:
    """Hold a file that long work is to write, so that what cannot be is refused at the start.

    Yields whether a process that held it was killed. Raises `SqCpuError` as `check_file`, and while
    another process holds it.
    """
    place = check_file(path)
    if place is None:
        yield False
        return
    with ExitStack() as held:
        try:
            lock = locked(place.with_name(f".{place.name}.sq_cpu.lock"))
            _, left = held.enter_context(lock)
        except BlockingIOError as error:
            raise SqCpuError(f"another process is to write {path}; wait for it") from error
        except OSError as error:
            raise SqCpuError(f"cannot write {path}: {error.strerror or error}") from error
        yield left


def check_file(path: str | os.PathLike[str]) -> Path | None:
    """Return the regular file, links followed, that is made or replaced; None: written through.

    Raises `SqCpuError` for a folder, and for what cannot be written.
    """
    try:
        place = _replaced(Path(path))
        if place is not None:
            for needed in (place.parent, place) if place.exists() else (place.parent,):
                if not os.access(needed, os.W_OK):
                    number = errno.EACCES if needed.exists() else errno.ENOENT
                    raise OSError(number, os.strerror(number))
    except OSError as error:
        raise SqCpuError(
            f"cannot write {path}: {error.strerror or error}; give another file, in an existing "
            "folder"
        ) from error
    return place


def _replaced(path: Path) -> Path | None:
    try:
        status = os.stat(path)
    except FileNotFoundError:
        return Path(os.path.realpath(path))
    if stat.S_ISDIR(status.st_mode):
        raise SqCpuError(f"{path} is a folder; give the name of a file in it")
    if stat.S_ISREG(status.st_mode) and _stream_of(status) is None:
        return Path(os.path.realpath(path))
    if stat.S_ISBLK(status.st_mode) or stat.S_ISSOCK(status.st_mode):
        raise SqCpuError(f"{path} is a disk or a socket; give the name of a file")
    return None


def _stream_of(status: os.stat_result) -> int | None:
    """Return which of stdout and stderr a file is, if any: others hold it open, by its inode."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if os.path.samestat(status, os.fstat(descriptor)):
                return descriptor
    return None


def _write_through(path: str | os.PathLike[str], data: bytes) -> None:
    stream = _stream_of(os.stat(path))
    if stream is not None:
        for buffered in (sys.stdout, sys.stderr):  # what was said before comes before
            buffered.flush()
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC) if stream is None else os.dup(stream)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)


_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[tuple[int, bool]]:
    """Make a file, and hold it alone until the end of the block, which removes it.

    Yields its descriptor, and whether one was there that a killed process had held. What a process
    holds ends with the process (flock), so a file that can be locked belongs to nobody.

    Raises `BlockingIOError` while another process holds it, unless told to wait, and `SqCpuError`
    where the file system has no locks. Overlays and NFS have them, but for an NFS 3 without its
    lock daemon and a Lustre mounted without them. To go on without would let two runs mix what they
    write, or leave files that nobody can tell from those in use.
    """
    left = False
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            left |= _removed(path, wait)
            continue
        try:
            _lock(path, descriptor, wait=False)
        except BlockingIOError:  # another took the new file for one that was left
            os.close(descriptor)
            continue
        except BaseException:
            _remove(path, descriptor)
            raise
        if _is_at(path, descriptor):
            break
        os.close(descriptor)
    try:
        yield descriptor, left
    finally:
        _remove(path, descriptor)


def _lock(path: Path, descriptor: int, wait: bool) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        raise SqCpuError(
            f"{path.parent} is on a file system without locks (flock: {error.strerror}); mount it "
            "with them, or choose a folder on another"
        ) from error


def _remove(path: Path, descriptor: int) -> None:
    with suppress(OSError):
        if _is_at(path, descriptor):  # it may have been moved away
            path.unlink()
    os.close(descriptor)


def _removed(path: Path, wait: bool) -> bool:
    """Remove a file that nobody holds; return whether there was one."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return False
    try:
        _lock(path, descriptor, wait)
        if not _is_at(path, descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    finally:
        os.close(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.lstat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def keep_mode(new: int | Path, old: Path) -> None:
    """Give a new file or folder the mode and the owner of the one that it replaces, if any."""
    try:
        status = os.stat(old)
    except (FileNotFoundError, NotADirectoryError):
        return
    with suppress(PermissionError):  # only root gives files away
        os.chown(new, status.st_uid, status.st_gid)
    os.chmod(new, stat.S_IMODE(status.st_mode))


_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def exchange(one: Path, other: Path) -> bool:
    """Exchange two entries of a file system in one step; False where it cannot do that."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2  # glibc 2.28
    except AttributeError:
        return False
    names = os.fsencode(one), os.fsencode(other)
    if rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), str(one), None, str(other))


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
