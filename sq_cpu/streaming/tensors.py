"""Tensors in safetensors files, read without holding the files, into a model of bare parameters.

Nothing is mapped: a page that a mapped file was read through counts as resident until it is
unmapped. `Loader` names and lays out a folder's tensors as the model's modules do, by the rules
that transformers has for from_pretrained.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from sq_cpu.errors import SqCpuError, first_line

__all__ = [
    "WHOLE",
    "Loader",
    "Stored",
    "copy_tensors",
    "file_tensors",
    "is_stored",
    "stored_dtype",
    "stored_tensors",
]

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers reads it at each load
WHOLE = "quantize it without streaming"
# Elements that are read, converted and written at a time: few, for the allocator keeps such pieces.
_PIECE = 1 << 18
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True)
class Stored:
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


def is_stored(folder: Path) -> bool:
    """Say whether a folder has the safetensors files of a model, by the names that count."""
    return any((folder / name).is_file() for name in (_INDEX, _SINGLE))


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """Return every tensor of a folder's safetensors files by its name there."""
    if not folder.is_dir():
        raise SqCpuError(
            f"{folder} is not a folder; streaming reads a folder of safetensors files, {WHOLE}"
        )
    names = [_SINGLE]
    if (index := folder / _INDEX).exists():
        try:
            file_of = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted({str(name) for name in file_of.values()})
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise SqCpuError(
                f"{index} cannot be read ({first_line(error)}); copy the checkpoint again"
            ) from error
    elif not (folder / _SINGLE).exists():
        raise SqCpuError(f"{folder} has no {_SINGLE} and no {_INDEX}; {WHOLE}")
    stored: dict[str, Stored] = {}
    for name in names:
        for key, tensor in file_tensors(folder / name).items():
            if key in stored:
                raise SqCpuError(
                    f"tensor {key} is in both {stored[key].path.name} and {name}; save again"
                )
            stored[key] = tensor
    return stored


def file_tensors(path: Path) -> dict[str, Stored]:
    """Return every tensor of one safetensors file by its name there."""
    if not path.is_file():
        raise SqCpuError(f"{path} does not exist; copy the checkpoint again")
    try:
        with safe_open(path, framework="pt"):
            pass  # checks header and size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (OSError, SafetensorError) as error:
        raise SqCpuError(
            f"{path} is damaged ({first_line(error)}); copy the checkpoint again"
        ) from error
    tensors = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] not in _DTYPES:
            raise SqCpuError(
                f"{path}: tensor {name} is {entry['dtype']}; give the model in fp32, bf16 or fp16"
            )
        begin = 8 + length + entry["data_offsets"][0]
        tensors[name] = Stored(path, begin, tuple(entry["shape"]), _DTYPES[entry["dtype"]])
    return tensors


def stored_dtype(folder: Path, weights: Mapping[str, Stored]) -> torch.dtype:
    """Return the dtype that from_pretrained takes for "auto"."""
    config = transformers.AutoConfig.from_pretrained(folder)
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    return next((t.dtype for t in weights.values() if t.dtype.is_floating_point), torch.float32)


class Loader:
    """Fills a skeleton from stored tensors, under the names and in the layout of its modules."""

    def __init__(self, model: Any, weights: Mapping[str, Stored], folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.conversions = get_model_conversion_mapping(model)
        self.entries: dict[str, Tensor] = model.state_dict()
        self.dtype_plan: dict[str, torch.dtype] = model._get_dtype_plan(model.dtype)
        renamings = [c for c in self.conversions if isinstance(c, WeightRenaming)]
        converters = [c for c in self.conversions if isinstance(c, WeightConverter)]
        self.stored: dict[str, Stored] = {}
        self.name_of: dict[str, str] = {}
        self.converted: set[str] = set()
        """Names, of the model's, that are made of stored tensors in another layout."""
        for key, tensor in weights.items():
            prefix = model.base_model_prefix
            name, pattern = rename_source_key(key, renamings, converters, prefix, self.entries)
            if name not in self.entries and key in self.entries:
                name, pattern = rename_source_key(key, [], [], prefix, self.entries)
            if name in self.entries:  # all else from_pretrained ignores, too
                self.name_of[key] = name
                self.stored[key] = tensor
                if pattern is not None:
                    self.converted.add(name)

    def dtype_of(self, name: str) -> torch.dtype:
        """Return what from_pretrained makes of an entry's dtype."""
        if self.dtype_plan:
            pattern, groups, _ = build_glob_alternation(list(self.dtype_plan))
            if match := pattern.search(name):
                return self.dtype_plan[groups[match.lastgroup]]
        return self.entries[name].dtype

    def load(self, prefix: str) -> None:
        """Load everything below a module."""
        wanted = {
            key: replace(
                tensor,
                wanted=None if self.dtype_plan else self.entries[self.name_of[key]].dtype,
            )
            for key, tensor in self.stored.items()
            if self.name_of[key].startswith(f"{prefix}.")
        }
        config = LoadStateDictConfig(
            dtype=self.model.dtype, dtype_plan=self.dtype_plan, weight_mapping=self.conversions
        )
        bar = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        # Four new threads a block would each leave pieces in a heap of its own.
        threaded = os.environ.get(_ONE_THREAD)
        os.environ[_ONE_THREAD] = "1"
        try:
            info, _ = convert_and_load_state_dict_in_model(self.model, wanted, config)
        finally:
            del os.environ[_ONE_THREAD]
            if threaded is not None:
                os.environ[_ONE_THREAD] = threaded
            if bar:
                transformers_logging.enable_progress_bar()
        if info.mismatched_keys:
            name, found, expected = min(info.mismatched_keys)
            raise SqCpuError(
                f"{self.folder}: tensor {name} is {list(found)}, expected {list(expected)}; "
                "get the whole model"
            )
        if info.conversion_errors:
            name = min(info.conversion_errors)
            raise SqCpuError(f"{self.folder}: transformers cannot convert tensor {name}; {WHOLE}")
        part = self.model.get_submodule(prefix)
        missing = [key for key, tensor in part.state_dict().items() if tensor.is_meta]
        if missing:
            raise self.lacking([f"{prefix}.{key}" for key in missing])

    def lacking(self, names: Sequence[str]) -> SqCpuError:
        """Return the error for entries that are stored nowhere."""
        return SqCpuError(
            f"{self.folder}: the weights lack {names[0]} (and {len(names) - 1} more); "
            "get the whole model"
        )

    def outside(self, blocks: Sequence[str]) -> tuple[dict[str, Stored], dict[str, str]]:
        """Return what is outside of the blocks by the model's names, and what is tied to what.

        A tensor that is stored under both names of a tie counts once, as for from_pretrained.
        """
        stacks = tuple(f"{block}." for block in blocks)
        names = dict.fromkeys(name for name in self.entries if not name.startswith(stacks))
        if converted := sorted(self.converted.intersection(names)):
            raise SqCpuError(
                f"{self.folder}: tensor {converted[0]} is stored in another layout; {WHOLE}"
            )
        found = {name: self.stored[key] for key, name in self.name_of.items() if name in names}
        ties = {}
        for target, source in dict(self.model.all_tied_weights_keys).items():
            if target.startswith(stacks) or source.startswith(stacks):
                raise SqCpuError(f"{target} in a block is tied to {source}; {WHOLE}")
            if target in found and source in found:
                if not _same(found[target], found[source], self.dtype_of(target)):
                    del self.model.all_tied_weights_keys[target]
                    continue
                del found[target]
            elif target in found:
                found[source] = found.pop(target)
            ties[target] = source
        if missing := [name for name in names if name not in found and name not in ties]:
            raise self.lacking(missing)
        for name, tensor in found.items():
            expected = self.entries[name].shape
            if tensor.shape != tuple(expected):
                raise SqCpuError(
                    f"{self.folder}: tensor {name} is {list(tensor.shape)}, "
                    f"expected {list(expected)}; get the whole model"
                )
        return found, ties


def _same(a: Stored, b: Stored, dtype: torch.dtype) -> bool:
    pairs = zip(a.pieces(dtype), b.pieces(dtype), strict=True)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)


def copy_tensors(path: Path, tensors: Mapping[str, tuple[Stored, torch.dtype]]) -> None:
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
