"""Tensors in safetensors files, read without holding the files.

Nothing is mapped: a page that a mapped file was read through counts as resident until it is
unmapped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from sq_cpu.checkpoint.config import CONFIG, INDEX
from sq_cpu.checkpoint.skeleton import check_counts
from sq_cpu.checkpoint.stored import DTYPES, SINGLE, StoredTensors, weight_files
from sq_cpu.errors import SqCpuError
from sq_cpu.parsing import read_json

__all__ = [
    "WHOLE",
    "LazyTensor",
    "copy_tensors",
    "folder_dtype",
    "folder_tensors",
    "has_safetensors",
]

WHOLE = "quantize it without streaming"
# Elements that are read, converted and written at a time: few, for the allocator keeps such pieces.
_PIECE = 1 << 18
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a safetensors file, read to memory of its own: no file pages stay resident."""

    path: Path
    begin: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    wanted: torch.dtype | None = None
    """What `[...]` reads it as; None: as stored."""

    def pieces(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """Yield the elements in order, [at most _PIECE] of `dtype` each; one buffer for all."""
        count, size = prod(self.shape), self.dtype.itemsize
        buffer = bytearray(min(count, _PIECE) * size)
        with self.path.open("rb", buffering=0) as file:
            file.seek(self.begin)
            for start in range(0, count, _PIECE):
                view = memoryview(buffer)[: min(_PIECE, count - start) * size]
                filled = 0
                while filled < len(view):
                    read = file.readinto(view[filled:])
                    if not read:
                        raise SqCpuError(f"{self.path} ends early; copy the checkpoint again")
                    filled += read
                yield torch.frombuffer(view, dtype=self.dtype).to(dtype)

    def __getitem__(self, _everything: Any) -> Tensor:
        """Read it whole, as transformers asks for a tensor that it loads."""
        dtype = self.wanted or self.dtype
        result = torch.empty(self.shape, dtype=dtype)
        start = 0
        for piece in self.pieces(dtype):
            result.view(-1)[start : start + len(piece)] = piece
            start += len(piece)
        return result


def has_safetensors(folder: Path) -> bool:
    """Say whether a folder has the safetensors files of a model, by the names that count."""
    return any((folder / name).is_file() for name in (INDEX, SINGLE))


def folder_tensors(folder: Path) -> dict[str, LazyTensor]:
    """Return every tensor of a folder's safetensors files by its name there."""
    if not folder.is_dir():
        raise SqCpuError(
            f"{folder} is not a folder; streaming reads a folder of safetensors files, {WHOLE}"
        )
    with StoredTensors(folder, weight_files(folder, WHOLE)) as stored:
        return {name: _lazy(stored, name) for name in stored.headers}


def _lazy(stored: StoredTensors, name: str) -> LazyTensor:
    header = stored.headers[name]
    assert header.dtype is not None
    return LazyTensor(stored.path(name), stored.begins[name], header.shape, header.dtype)


def folder_dtype(folder: Path, weights: Mapping[str, LazyTensor]) -> torch.dtype:
    """Return the dtype that from_pretrained takes for "auto"."""
    path = folder / CONFIG
    check_counts(
        read_json(path), len(weights), path
    )  # transformers follows them, whatever they are
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((t.dtype for t in weights.values() if t.dtype.is_floating_point), torch.float32)


def copy_tensors(path: Path, tensors: Mapping[str, tuple[LazyTensor, torch.dtype]]) -> None:
    """Write a safetensors file piece by piece."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    # The widest first: all are aligned then, and can be mapped.
    ordered = sorted(tensors.items(), key=lambda item: -item[1][1].itemsize)
    for name, (tensor, dtype) in ordered:
        begin, end = end, end + prod(tensor.shape) * dtype.itemsize
        header[name] = {
            "dtype": _DTYPE_NAMES[dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, (tensor, dtype) in ordered:
            for piece in tensor.pieces(dtype):
                file.write(piece.view(torch.uint8).numpy().data)
