"""The folder beside the output where streaming keeps its work, to go on from when interrupted.

.OUT.partial/state.json             settings, and a record of every finished part
.OUT.partial/carried-K.safetensors  the activations that block K takes
.OUT.partial/checkpoint/            the finished files
.OUT.partial/lock                   held by the process that is at work
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sq_cpu.checkpoint.config import sha256
from sq_cpu.checkpoint.folder import check_replaceable
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import atomic_write
from sq_cpu.models.calls import Example

__all__ = [
    "Part",
    "State",
    "batches_digest",
    "check_target",
    "claimed",
    "source_digest",
    "work_folder",
]


def check_target(target: Path) -> None:
    """Refuse an output that could not be replaced in the end, before the long work."""
    check_replaceable(target)
    parent = next(parent for parent in target.parents if parent.exists())
    if not target.exists():
        return
    if target.stat().st_dev != parent.stat().st_dev or os.path.samefile(target, os.curdir):
        raise SqCpuError(
            f"{target} is a mount point or the current folder, which cannot be replaced; "
            "choose another folder"
        )


def work_folder(target: Path) -> Path:
    """Return where the work on an output is kept."""
    return target.with_name(f".{target.name}.partial")


@contextmanager
def claimed(work: Path) -> Iterator[None]:
    """Keep every other process out of the work folder; a killed one leaves no claim behind."""
    (work / "checkpoint").mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SqCpuError(f"another process is at work in {work}; wait for it") from error
        yield


@dataclass(frozen=True)
class Part:
    """A finished file and what was done to its linears."""

    file: str
    sha256: str
    plan: dict[str, Any] | None = None
    layers: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    decomposed: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    float_bytes: int = 0
    int8_bytes: int = 0


@dataclass
class State:
    """What state.json holds."""

    work: Path
    settings: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    """What is outside of the blocks, then the blocks."""
    outputs: int = 0
    """Length of the tuple that a block returns; 0: a tensor."""

    @property
    def blocks(self) -> int:
        """Finished blocks."""
        return max(len(self.parts) - 1, 0)

    @property
    def tokens(self) -> int:
        """Rows that the busiest linear saw."""
        return max((part.tokens for part in self.parts), default=0)

    @classmethod
    def open(cls, work: Path, settings: dict[str, Any], overwrite: bool) -> State:
        """Read the state of an interrupted call, or begin."""
        settings = json.loads(json.dumps(settings))
        path = work / "state.json"
        if not path.exists():
            return cls.anew(work, settings)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            state = cls(work, content["settings"], outputs=content["outputs"])
            state.parts = [Part(**part) for part in content["parts"]]
        except (ValueError, LookupError, TypeError) as error:
            raise SqCpuError(f"{path} is damaged ({first_line(error)}); remove {work}") from error
        changed = [key for key in settings if state.settings.get(key) != settings[key]]
        if changed and not overwrite:
            raise SqCpuError(
                f"{work} holds {state.blocks} finished blocks made with another "
                f"{' and '.join(changed)}; repeat that call to resume it, or discard them with "
                "--overwrite (overwrite=True)"
            )
        if changed:
            return cls.anew(work, settings)
        for part in state.parts:
            file = work / "checkpoint" / part.file
            if not file.exists() or sha256(file) != part.sha256:
                raise SqCpuError(f"{file} is missing or damaged; remove {work} and start anew")
        return state

    @classmethod
    def anew(cls, work: Path, settings: dict[str, Any]) -> State:
        """Begin, in an emptied folder."""
        for entry in work.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "lock":
                entry.unlink()
        (work / "checkpoint").mkdir()
        return cls(work, settings)

    def finish(self, part: Part, hidden: Sequence[Tensor]) -> None:
        """Note a finished part and the activations that the next block takes."""
        done = len(self.parts)
        carried = self.work / f"carried-{done}.safetensors"
        tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(hidden)}
        with atomic_write(carried) as temporary:
            save_file(tensors, temporary)
        self.parts.append(part)
        content = {
            "settings": self.settings,
            "outputs": self.outputs,
            "parts": [asdict(part) for part in self.parts],
        }
        with atomic_write(self.work / "state.json") as temporary:
            temporary.write_text(json.dumps(content), encoding="utf-8")
        (self.work / f"carried-{done - 1}.safetensors").unlink(missing_ok=True)

    def carried(self) -> list[Tensor]:
        """Return the activations that the first unfinished block takes."""
        path = self.work / f"carried-{self.blocks}.safetensors"
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise SqCpuError(
                f"{path} is missing or damaged; remove {self.work} and start anew"
            ) from error
        return [tensors[str(index)] for index in range(len(tensors))]


def source_digest(folder: Path) -> str:
    """Digest config.json, and of each safetensors file its name, size, time and header."""
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in sorted(folder.glob("*.safetensors")):
        status = path.stat()
        with path.open("rb") as file:
            header = file.read(int.from_bytes(file.read(8), "little"))
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
        digest.update(hashlib.sha256(header).digest())
    return digest.hexdigest()


def batches_digest(batches: Sequence[Example]) -> str:
    """Digest the calibration batches."""
    digest = hashlib.sha256()
    for args, kwargs in batches:
        for key, value in (*enumerate(args), *kwargs.items()):
            digest.update(repr(key).encode())
            if isinstance(value, Tensor):
                digest.update(repr((value.dtype, value.shape)).encode())
                digest.update(value.detach().contiguous().view(-1).view(torch.uint8).numpy().data)
            else:
                digest.update(repr(value).encode())
    return digest.hexdigest()
