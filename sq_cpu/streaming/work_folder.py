"""What streaming keeps in the work folder of its output, to go on from when interrupted.

.OUT.partial/state.json             settings, and a record of every finished part
.OUT.partial/carried-K.safetensors  the activations that block K takes
.OUT.partial/outer.safetensors      in float, what is quantized at last
.OUT.partial/checkpoint/            the finished files

`checkpoint.folder` makes and clears it. A file counts once state.json has its SHA-256.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sq_cpu.checkpoint.config import CONFIG, check_names, sha256
from sq_cpu.checkpoint.folder import STATE, Staging
from sq_cpu.errors import SqCpuError
from sq_cpu.files import write_file
from sq_cpu.models.calls import Example
from sq_cpu.parsing import check_fields, read_json, record
from sq_cpu.streaming.tensors import LazyTensor

__all__ = [
    "OUTER",
    "Part",
    "State",
    "batches_digest",
    "source_digest",
]

OUTER = "outer.safetensors"


@dataclass(frozen=True)
class Part:
    """A finished file and what was done to its linears."""

    file: str
    sha256: str
    plan: dict[str, Any] | None = None
    layers: tuple[str, ...] = ()
    smoothed: tuple[str, ...] = ()
    decomposed: dict[str, int] = field(default_factory=dict)
    hadamard: dict[str, int] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    dtypes: dict[str, str] = field(default_factory=dict)
    embeddings: dict[str, str] = field(default_factory=dict)
    misfits: dict[str, float] = field(default_factory=dict)
    tokens: int = 0
    float_bytes: int = 0
    int8_bytes: int = 0

    def __post_init__(self) -> None:
        check_fields(self, f"part {self.file}")


@dataclass(frozen=True)
class _Stored:
    """The fields of state.json."""

    settings: dict[str, Any]
    outputs: int
    parts: list[Part]
    digests: dict[str, str]
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_fields(self, "the state")
        if not 0 <= self.outputs < 100:
            raise SqCpuError(f"no block returns {self.outputs} values")
        if self.digests.keys() != {OUTER, _carried(len(self.parts))}:
            raise SqCpuError("it names other files than it needs")


@dataclass
class State:
    """What state.json holds."""

    work: Path
    settings: dict[str, Any]
    parts: list[Part] = field(default_factory=list)
    """What is outside of the blocks, then the blocks."""
    outputs: int = 0
    """Length of the tuple that a block returns; 0: a tensor."""
    prefix: tuple[int, ...] = ()
    """The first tokens whose keys and values are in float; empty also where the model can have
    none."""
    digests: dict[str, str] = field(default_factory=dict)
    """SHA-256 of the files to go on from, by their names in the work folder."""

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
            stored = record(_Stored, read_json(path), "it")
            finished = {part.file: part.sha256 for part in stored.parts}
            check_names(staging.folder, finished, path)
            check_names(work, stored.digests, path)
        except SqCpuError as error:
            raise SqCpuError(
                f"{path} is damaged ({error}); remove {work} and start anew"
            ) from error
        state = cls(
            work, stored.settings, stored.parts, stored.outputs, stored.prefix, stored.digests
        )
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
        for folder, digests in ((staging.folder, finished), (work, state.digests)):
            for name, digest in digests.items():
                if sha256(folder / name) != digest:
                    raise SqCpuError(f"{folder / name} is damaged; remove {work} and start anew")
        return state

    def finish(self, part: Part, hidden: Sequence[Tensor]) -> None:
        """Note a finished part and the activations that the next block takes."""
        before = self.work / _carried(len(self.parts))
        self.parts.append(part)
        path = self.work / _carried(len(self.parts))
        save_file({str(n): tensor.contiguous() for n, tensor in enumerate(hidden)}, path)
        outer = self.digests.get(OUTER) or sha256(self.work / OUTER)
        self.digests = {OUTER: outer, path.name: sha256(path)}
        stored = _Stored(self.settings, self.outputs, self.parts, self.digests, self.prefix)
        write_file(self.work / STATE, json.dumps(asdict(stored)))
        before.unlink(missing_ok=True)

    def carried(self) -> list[Tensor]:
        """Return the activations that the first unfinished block takes."""
        tensors = load_file(self.work / _carried(len(self.parts)))
        return [tensors[str(index)] for index in range(len(tensors))]


def _carried(parts: int) -> str:
    return f"carried-{parts - 1}.safetensors"


def source_digest(folder: Path, weights: Mapping[str, LazyTensor]) -> str:
    """Digest config.json, the size and time of each file of weights, and what their headers say."""
    digest = hashlib.sha256((folder / CONFIG).read_bytes())
    for path in sorted({tensor.path for tensor in weights.values()}):
        status = path.stat()
        digest.update(repr((path.name, status.st_size, status.st_mtime_ns)).encode())
    for name, tensor in sorted(weights.items()):
        place = tensor.path.name, tensor.begin, tensor.shape, tensor.dtype
        digest.update(repr((name, place)).encode())
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
