"""The checkpoint's folder: built in a work folder, moved into place as a whole.

The work folder, `.OUT.partial`, is beside OUT. Where OUT is a mount point or the current folder,
which cannot be replaced, it is in OUT, and what is finished is moved out of it, config.json last.

.OUT.partial/lock          held by the process that is at work
.OUT.partial/whole/        what `save` builds
.OUT.partial/checkpoint/   what streaming builds; it has more here, see `streaming.work_folder`
.OUT.partial/old/          what is replaced, where a file system cannot exchange folders
.OUT.partial.moving        beside it: from before anything is moved to where nothing was, to the end

At every moment OUT is as it was or complete. (Without an exchange there is a moment in which it is
absent; where a process is killed then, the next one puts the old OUT back.) The next call clears
what a killed process left. Where OUT also holds files of others, which stay (`keep`), its
config.json goes first, and the new one comes last: between the two there is no checkpoint.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from sq_cpu.checkpoint.config import CONFIG, INDEX, read_written
from sq_cpu.checkpoint.curves import CURVES
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import as_path, exchange, keep_mode, locked

__all__ = ["STATE", "Staging", "contents", "staged", "work_folder", "writing"]

_LOCK, _OLD, _WHOLE, _STREAMED = "lock", "old", "whole", "checkpoint"
STATE = "state.json"
_OURS = (_LOCK, _OLD, _WHOLE, _STREAMED, STATE, f".{STATE}.*", "*.safetensors")
_OF_MODEL = (CONFIG, "model.safetensors", "model-*-of-*.safetensors", INDEX, CURVES)
_CHANGED = "{} was changed during the work, and is left as it is now; choose another folder"


@dataclass
class Staging:
    """A folder in the making, which this process alone works on."""

    path: Path
    """As it was given."""
    target: Path
    """The real path."""
    work: Path
    folder: Path
    """What `commit` makes the target."""
    replaced: os.stat_result | None
    """The checkpoint that was there at the start; None: nothing, or an empty folder."""
    keep: bool = False
    """Whether files of others may be there, and stay."""
    done: bool = False

    def clear(self) -> None:
        """Begin anew."""
        _clear(self.work, keep_stream=False)
        self.folder.mkdir()

    def companions(self, files: Collection[str]) -> list[str]:
        """Return what is beside the `files` of tensors.

        Where files stay, what an earlier `save` wrote, as a tokenizer, is among them.
        """
        found = contents(self.folder)
        if self.keep and self.replaced is not None:
            with suppress(SqCpuError):  # what is there is of others
                earlier = read_written(self.target) & contents(self.target)
                found |= {n for n in earlier if not any(fnmatch(n, own) for own in _OF_MODEL)}
        return sorted(found - {CONFIG, *files})

    def commit(self) -> None:
        """Make the folder the target, if that is still what it was at the start."""
        with writing(self.target):
            if self.keep and self.replaced is not None:
                self._add()
                self.done = True
                return
            if self.replaced is None:
                _marker(self.work).touch()
            if self.work.parent == self.target:
                self._fill()
            elif self.replaced is None:
                _keep_modes(self.folder, self.target)
                try:
                    self.folder.rename(self.target)  # over nothing but an empty folder
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                        raise
                    raise SqCpuError(_CHANGED.format(self.target)) from error
            else:
                self._replace(self.replaced)
        self.done = True

    def _replace(self, before: os.stat_result) -> None:
        self._check_unchanged(self.target, before)
        _keep_modes(self.folder, self.target)
        if self.folder.name == _STREAMED:
            # What comes out of the exchange is not to be taken for streamed work.
            self.folder = self.folder.rename(self.work / _WHOLE)
        exchanged = exchange(self.folder, self.target)
        old = self.folder if exchanged else self.work / _OLD
        if not exchanged:
            self.target.rename(old)
        try:
            self._check_unchanged(old, before)  # what came out is what was looked at
            if not exchanged:
                self.folder.rename(self.target)
        except BaseException:
            if exchanged:
                exchange(self.folder, self.target)
            else:
                old.rename(self.target)
            raise

    def _add(self) -> None:
        """Move what is finished to the files that are there, in the place of a model's, or nothing.

        What it replaces waits in the work folder; `_settle` puts it back after a kill.
        """
        entries = sorted(self.folder.iterdir(), key=_is_config)
        # config.json first, and the new one last: between the two there is no checkpoint.
        olds = dict.fromkeys(path for name in _OF_MODEL for path in self.target.glob(name))
        olds |= dict.fromkeys(self.target / entry.name for entry in entries)
        there = [path for path in olds if path.exists() or path.is_symlink()]
        for path in there:
            if path.is_dir() and not path.is_symlink():
                raise SqCpuError(f"{path} is a folder, where a file is to be: move it away")
        old = self.work / _OLD
        old.mkdir()
        moved: list[tuple[Path, Path]] = []
        try:
            for path in there:
                moved.append((path, old / path.name))
                path.rename(old / path.name)
            for entry in entries:
                moved.append((entry, self.target / entry.name))
                entry.rename(self.target / entry.name)
        except BaseException:
            for source, destination in reversed(moved):
                if destination.exists() or destination.is_symlink():
                    destination.rename(source)
            raise

    def _check_unchanged(self, folder: Path, before: os.stat_result) -> None:
        if not folder.is_dir() or not os.path.samestat(folder.stat(), before):
            raise SqCpuError(_CHANGED.format(self.target))
        _check_ours(folder, self.target)

    def _fill(self) -> None:
        """Move what is finished into the target, or nothing."""
        if _is_occupied(self.target, self.work):
            raise SqCpuError(_CHANGED.format(self.target))
        try:
            # config.json last: without it the folder is no checkpoint.
            for entry in sorted(self.folder.iterdir(), key=_is_config):
                entry.rename(self.target / entry.name)
        except BaseException:
            _take_back(self.target, self.folder)
            raise


@contextmanager
def staged(
    path: str | os.PathLike[str],
    *,
    replace: bool = True,
    streamed: bool = False,
    keep: bool = False,
) -> Iterator[Staging]:
    """Yield the folder in which a checkpoint is made; without `commit` nothing of it stays.

    With `keep` the target may hold other files, which stay, and a float model, which is replaced.
    Streamed work stays while the work folder has a `STATE`, and the folder holds what it held.

    Raises `SqCpuError` for a target that cannot be replaced, or is not to be (`replace`), while
    another process is at work on it, and where it cannot be written.
    """
    path = as_path(path)
    with ExitStack() as stack:
        with writing(path):
            target = Path(os.path.realpath(path))
            work = work_folder(target)
            new = [work, *(parent for parent in target.parents if not parent.exists())]
            stack.callback(_remove_empty, new[1:])
            # The marker goes last: without it, what is left does not tell whose the target is.
            stack.callback(_remove_marker, work)
            stack.callback(_remove_empty, new[:1])
            _claim(work, target, stack)
            try:
                _settle(target, work, replace, keep)
                staging = _begin(path, target, work, streamed, keep)
            except BaseException:
                _clear(work, keep_stream=True)
                raise
        try:
            yield staging
        finally:
            _clear(work, keep_stream=not staging.done)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Say of a failure to write which checkpoint could not be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise SqCpuError(
            f"cannot write checkpoint {target}: {first_line(error)}; "
            "choose a writable folder with enough free space"
        ) from error


def work_folder(target: Path) -> Path:
    """Return where the work on a target, a real path, is kept."""
    name = f".{target.name}.partial"
    inside = target / name
    return inside if inside.exists() or _stays(target) else target.parent / name


def _marker(work: Path) -> Path:
    return work.with_name(f"{work.name}.moving")


def contents(folder: Path) -> set[str]:
    """Give the paths within a folder of all files, at any depth, and of empty folders."""
    return {
        entry.relative_to(folder).as_posix()
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or not any(entry.iterdir())
    }


def _stays(target: Path) -> bool:
    """Return whether a folder cannot be replaced by another."""
    if not target.is_dir():
        return False
    return os.path.ismount(target) or os.path.samefile(target, os.curdir)


def _claim(work: Path, target: Path, stack: ExitStack) -> None:
    """Keep every other process out of the work folder."""
    if target.exists() and not target.is_dir():
        raise SqCpuError(f"{target} is a file; choose another folder to save to")
    while True:
        if work.exists():
            _check_work(work)
        work.mkdir(parents=True, exist_ok=True)
        try:
            stack.enter_context(locked(work / _LOCK))
        except BlockingIOError as error:
            raise SqCpuError(f"another process is at work in {work}; wait for it") from error
        except FileNotFoundError:  # the one that ends removed the folder
            continue
        return


def _check_work(work: Path) -> None:
    with suppress(FileNotFoundError):
        for entry in work.iterdir():
            if not any(fnmatch(entry.name, name) for name in _OURS):
                raise SqCpuError(f"{entry} is not of sq_cpu's making; move it away")


def _settle(target: Path, work: Path, replace: bool, keep: bool) -> None:
    """Set right what a killed process left, and refuse a target that is not to be replaced."""
    old = work / _OLD
    if old.exists() and not target.exists():
        old.rename(target)
    elif (old / CONFIG).exists() and not (target / CONFIG).exists():
        for entry in old.iterdir():
            entry.replace(target / entry.name)
    inside = work.parent == target
    moving = _marker(work).exists()
    if inside and moving:
        in_memory = (work / _WHOLE).exists() or not (work / _STREAMED).exists()
        _take_back(target, work / (_WHOLE if in_memory else _STREAMED))
    # A process that was killed when all was in place: what is there is its own.
    is_done = moving and not any((work / name).exists() for name in (_WHOLE, _STREAMED))
    _clear(work, keep_stream=not is_done)
    if keep or not _is_occupied(target, work):
        return
    _check_ours(target, target)
    if inside:
        raise SqCpuError(
            f"{target} is a mount point or the current folder, which cannot be replaced; "
            "empty it or choose another folder"
        )
    if not replace and not is_done:
        raise SqCpuError(f"{target} holds a checkpoint; use --overwrite or another folder")


def _begin(path: Path, target: Path, work: Path, streamed: bool, keep: bool) -> Staging:
    folder = work / (_STREAMED if streamed else _WHOLE)
    folder.mkdir(exist_ok=True)
    replaced = target.stat() if _is_occupied(target, work) else None
    return Staging(path, target, work, folder, replaced, keep)


def _is_occupied(target: Path, work: Path) -> bool:
    ours = (work, _marker(work))
    return target.exists() and any(entry not in ours for entry in target.iterdir())


def _check_ours(folder: Path, named: Path) -> None:
    """Refuse to replace anything that ``save`` did not write."""
    try:
        ours = read_written(folder)
    except SqCpuError as error:
        raise SqCpuError(
            f"{named} is not empty and is not an sq_cpu checkpoint; choose another folder"
        ) from error
    work = work_folder(folder)
    own = (work.name, _marker(work).name)
    foreign = sorted(name for name in contents(folder) - ours if name.split("/")[0] not in own)
    if foreign:
        raise SqCpuError(
            f"{named} holds {foreign[0]}, which save did not write and will not delete; "
            "move it away or choose another folder"
        )


def _take_back(target: Path, folder: Path) -> None:
    """Move what a call moved out of the staging folder back into it, config.json first."""
    folder.mkdir(exist_ok=True)
    try:
        ours = read_written(folder if (folder / CONFIG).exists() else target)
    except SqCpuError:
        return  # it had not begun to move
    moved = [entry for entry in target.iterdir() if entry.name in {n.split("/")[0] for n in ours}]
    for entry in sorted(moved, key=_is_config, reverse=True):
        entry.rename(folder / entry.name)


def _is_config(entry: Path) -> bool:
    return entry.name == CONFIG


def _clear(work: Path, *, keep_stream: bool) -> None:
    """Remove what is in the work folder, but for the lock, and streamed work that can go on."""
    kept = [_LOCK]
    if keep_stream and (work / STATE).exists() and (work / _STREAMED).exists():
        kept += [STATE, _STREAMED, "*.safetensors"]
    for entry in list(work.iterdir()):
        if any(fnmatch(entry.name, name) for name in kept):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _remove_empty(folders: list[Path]) -> None:
    with suppress(OSError):
        for folder in folders:  # nearest first; stops at one that is in use
            folder.rmdir()


def _remove_marker(work: Path) -> None:
    with suppress(OSError):
        _marker(work).unlink()


def _keep_modes(new: Path, old: Path) -> None:
    """Give the new folder, and its files, the modes of those that they replace."""
    for entry in (new, *new.rglob("*")):
        keep_mode(entry, old / entry.relative_to(new))
