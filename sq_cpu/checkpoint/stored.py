"""The tensors of safetensors files: what their headers say, before any is read."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sq_cpu.errors import SqCpuError, first_line

__all__ = ["DTYPES", "Header", "StoredTensors"]

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

    def __str__(self) -> str:
        dtype = "a float dtype" if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return f"{dtype} {list(self.shape)}"


class StoredTensors:
    """Safetensors files of a folder, open to read tensors from. A context manager.

    A file that is damaged and a tensor that is in two of them raise `SqCpuError`.
    """

    def __init__(self, folder: Path, files: Iterable[str]) -> None:
        self.headers: dict[str, Header] = {}
        self.nbytes = 0
        self._handles: dict[str, tuple[Path, Any]] = {}
        with ExitStack() as stack:
            for file in files:
                self._open(folder / file, stack)
            self._stack = stack.pop_all()

    def _open(self, path: Path, stack: ExitStack) -> None:
        try:
            handle = stack.enter_context(safe_open(path, framework="pt"))
            self.nbytes += path.stat().st_size
        except (OSError, SafetensorError) as error:
            raise SqCpuError(
                f"{path} is damaged ({first_line(error)}); copy the checkpoint again"
            ) from error
        names = handle.keys()  # a method of safe_open, which is no mapping
        for name in names:
            if name in self._handles:
                other = self._handles[name][0].name
                raise SqCpuError(f"tensor {name} is in both {other} and {path.name}; save again")
            stored = handle.get_slice(name)
            kind = stored.get_dtype()
            if kind not in DTYPES:
                raise SqCpuError(f"{path}: tensor {name} is {kind}, which sq_cpu does not store")
            self.headers[name] = Header(tuple(stored.get_shape()), DTYPES[kind])
            self._handles[name] = path, handle

    def path(self, name: str) -> Path:
        """Return the file that holds a tensor."""
        return self._handles[name][0]

    def read(self, name: str) -> Tensor:
        """Return a tensor: a view of the file's pages."""
        tensor: Tensor = self._handles[name][1].get_tensor(name)
        return tensor

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
