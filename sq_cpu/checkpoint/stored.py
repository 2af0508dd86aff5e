"""The tensors of safetensors files: what their headers say, before any is read.

No other module reads a header.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sq_cpu.checkpoint.config import INDEX, check_names
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.parsing import parsed_json, read_json, typed

__all__ = ["DTYPES", "SINGLE", "Header", "Stored", "StoredTensors", "weight_files"]

SINGLE = "model.safetensors"

DTYPES = {
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
"""By the names that safetensors has for them."""


class Header(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """None: any of fp32, bf16 and fp16, for models mix them."""

    @classmethod
    def of(cls, tensor: Tensor) -> Header:
        """Return a tensor's own."""
        return cls(tuple(tensor.shape), tensor.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor, whose dtype is known."""
        assert self.dtype is not None
        return prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        dtype = "a float dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)}"


class Stored(Protocol):
    """Tensors that are stored, by name."""

    @property
    def headers(self) -> Mapping[str, Header]:
        """What is known of each."""

    @property
    def nbytes(self) -> int:
        """Bytes of the files."""

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""

    def read(self, name: str) -> Tensor:
        """Return a tensor."""


def weight_files(folder: Path, otherwise: str) -> list[str]:
    """Return the names of the safetensors files of a model, as transformers finds them.

    `SqCpuError` for a folder that has none says what to do `otherwise`.
    """
    if (index := folder / INDEX).exists():
        content = typed(dict[str, Any], read_json(index), str(index))
        file_of = typed(dict[str, str], content.get("weight_map"), f"{index}: weight_map")
        names = sorted(set(file_of.values()))
        check_names(folder, names, index)
        return names
    if not (folder / SINGLE).is_file():
        raise SqCpuError(f"{folder} has no {SINGLE} and no {INDEX}; {otherwise}")
    return [SINGLE]


class StoredTensors:
    """Safetensors files of a folder, open to read tensors from. A context manager.

    A file that is damaged and a tensor that is in two of them raise `SqCpuError`.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.headers: dict[str, Header] = {}
        self.begins: dict[str, int] = {}
        """Where in its file a tensor's bytes begin."""
        self.nbytes = 0
        self._handles: dict[str, tuple[Path, Any, str]] = {}
        with ExitStack() as stack:
            for file in files:
                self._open(folder / file, stack)
            self._stack = stack.pop_all()

    def _open(self, path: Path, stack: ExitStack) -> None:
        try:
            # Checks that the header is one, and that the file holds what it says.
            handle = stack.enter_context(safe_open(path, framework="pt"))
            self.nbytes += path.stat().st_size
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = parsed_json(file.read(length).decode(), str(path))
        except (OSError, SafetensorError) as error:
            raise SqCpuError(
                f"{path} is damaged ({first_line(error)}); copy the checkpoint again"
            ) from error
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            if name in self._handles:
                other = self._handles[name][0].name
                raise SqCpuError(f"tensor {name} is in both {other} and {path.name}; save again")
            if entry["dtype"] not in DTYPES:
                raise SqCpuError(
                    f"{path}: tensor {name} is {entry['dtype']}, which sq_cpu does not read; give "
                    "the model in fp32, bf16 or fp16"
                )
            self.headers[name] = Header(tuple(entry["shape"]), DTYPES[entry["dtype"]])
            self.begins[name] = 8 + length + entry["data_offsets"][0]
            self._handles[name] = path, handle, name

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._handles[name][0]

    def read(self, name: str) -> Tensor:
        """Return a tensor: a view of the file's pages."""
        _, handle, stored = self._handles[name]
        tensor: Tensor = handle.get_tensor(stored)
        return tensor

    def renamed(self, names: Mapping[str, str]) -> StoredTensors:
        """Return these tensors by other names, new -> stored; those that are not named are not."""
        other = copy.copy(self)
        other.headers = {new: self.headers[name] for new, name in names.items()}
        other.begins = {new: self.begins[name] for new, name in names.items()}
        other._handles = {new: self._handles[name] for new, name in names.items()}
        return other

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
