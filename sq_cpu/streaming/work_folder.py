"""What streaming keeps in the work folder of its output, to go on from when interrupted.

.OUT.partial/state.json             settings, and a record of every finished part
.OUT.partial/carried-K.safetensors  the activations that block K takes
.OUT.partial/outer.safetensors      in float, what is quantized at last
.OUT.partial/checkpoint/            the finished files

`checkpoint.folder` makes and clears it. A file counts once state.json has it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sq_cpu.checkpoint.config import sha256
from sq_cpu.checkpoint.folder import STATE, Staging
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import write_file
from sq_cpu.models.calls import Example

__all__ = [
    "Part",
    "State",
    "batches_digest",
    "source_digest",
]


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
    dtypes: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
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
    def open(cls, staging: Staging, settings: dict[str, Any], overwrite: bool) -> State:
        """Read the state of an interrupted call, or begin."""
        settings = json.loads(json.dumps(settings))
        work = staging.work
        path = work / STATE
        if not path.exists():
            return cls(work, settings)
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
            staging.clear()
            return cls(work, settings)
        for part in state.parts:
            file = staging.folder / part.file
            if not file.exists() or sha256(file) != part.sha256:
                raise SqCpuError(f"{file} is missing or damaged; remove {work} and start anew")
        return state

    def finish(self, part: Part, hidden: Sequence[Tensor]) -> None:
        """Note a finished part and the activations that the next block takes."""
        done = len(self.parts)
        carried = self.work / f"carried-{done}.safetensors"
        tensors = {str(index): tensor.contiguous() for index, tensor in enumerate(hidden)}
        save_file(tensors, carried)
        self.parts.append(part)
        content = {
            "settings": self.settings,
            "outputs": self.outputs,
            "parts": [asdict(part) for part in self.parts],
        }
        write_file(self.work / STATE, json.dumps(content))
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
