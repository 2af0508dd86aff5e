"""The tensors of a prefix (`sq_cpu.inference.prefix`) in a checkpoint: written, checked, read."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sq_cpu.checkpoint.stored import Header, Stored
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import Prefix
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.models.bases import decoder_of
from sq_cpu.models.checks import input_embeddings
from sq_cpu.quantization.record import QuantizationRecord

__all__ = [
    "check_prefix",
    "hidden_entry",
    "kv_entries",
    "prefix_entries",
    "read_prefix",
    "without_prefix",
]

_HIDDEN = "sq_cpu_prefix.hidden"
_LAYER = re.compile(r"sq_cpu_prefix\.(\d+)\.(key|value)")
_ROOT = "sq_cpu_prefix."


def prefix_entries(prefix: Prefix | None) -> dict[str, Tensor]:
    """Return the tensors of a prefix by the names that they are stored under."""
    if prefix is None:
        return {}
    entries = hidden_entry(prefix.hidden)
    for i, (k, v) in enumerate(zip(prefix.keys, prefix.values, strict=True)):
        entries |= kv_entries(i, k, v)
    return entries


def kv_entries(layer: int, k: Tensor, v: Tensor) -> dict[str, Tensor]:
    """Return a prefix's keys and values of a layer by the names that they are stored under."""
    return {_name(layer, "key"): k, _name(layer, "value"): v}


def hidden_entry(hidden: Tensor) -> dict[str, Tensor]:
    """Return a prefix's last hidden state by the name that it is stored under."""
    return {_HIDDEN: hidden}


def without_prefix(headers: Mapping[str, Header]) -> dict[str, Header]:
    """Return the headers of a checkpoint's tensors without those of a prefix."""
    return {name: header for name, header in headers.items() if not name.startswith(_ROOT)}


def check_prefix(
    model: nn.Module,
    record: QuantizationRecord,
    headers: Mapping[str, Header],
    where: object,
    fix: str,
) -> None:
    """Raise `SqCpuError` unless the stored tensors of a prefix are those that a record names.

    Parameters
    ----------
    model : on the meta device or in memory
    headers : of all tensors of the checkpoint
    where, fix : the checkpoint, and what to do, for errors
    """
    given = {name: header for name, header in headers.items() if name.startswith(_ROOT)}
    if not record.prefix:
        if given:
            raise SqCpuError(f"{where}: tensor {min(given)} of a prefix that it has not; {fix}")
        return
    base: Any = decoder_of(model)
    if not hasattr(base, "config"):
        raise SqCpuError(f"{where}: a prefix, which {type(model).__name__} cannot have; {fix}")
    layers = len(DynamicCache(config=base.config).layers)
    tokens = len(record.prefix)
    table: Any = input_embeddings(model)
    size = table.weight.shape[0] if table is not None else 0
    if not all(0 <= token < size for token in record.prefix):
        raise SqCpuError(f"{where}: the prefix {[*record.prefix]} is not of its vocabulary; {fix}")
    width = given[_HIDDEN].shape[-1] if _HIDDEN in given and given[_HIDDEN].shape else 0
    expected: dict[str, tuple[int, ...]] = {_HIDDEN: (tokens, width)}
    for i in range(layers):
        for kind in ("key", "value"):
            name = _name(i, kind)
            shape = given[name].shape if name in given else ()
            heads, channels = (shape[0], shape[2]) if len(shape) == 3 else (1, 1)
            expected[name] = (heads, tokens, channels)
    if unlike := sorted(expected.keys() ^ given.keys()):
        what = "missing" if unlike[0] in expected else "not expected"
        raise SqCpuError(f"{where}: tensor {unlike[0]} of the prefix {what}; {fix}")
    for name, shape in expected.items():
        if given[name].shape != shape or given[name].dtype not in FLOATS or 0 in shape:
            raise SqCpuError(
                f"{where}: tensor {name} is {given[name]}, not that of a prefix of {tokens} "
                f"tokens; {fix}"
            )


def read_prefix(
    record: QuantizationRecord, stored: Stored, dtype: torch.dtype | None
) -> Prefix | None:
    """Read the prefix of a checkpoint that `check_prefix` has passed; `SqCpuError` for NaN or Inf.

    `dtype` is what it is converted to; None: as stored.
    """
    if not record.prefix:
        return None

    def read(name: str) -> Tensor:
        tensor = stored.read(name).to(dtype, copy=True)
        if not tensor.isfinite().all():
            raise SqCpuError(
                f"{stored.path(name)}: tensor {name} has NaN or Inf; save the model again"
            )
        return tensor

    layers = range(sum(_LAYER.fullmatch(name) is not None for name in stored.headers) // 2)
    keys = tuple(read(_name(i, "key")) for i in layers)
    values = tuple(read(_name(i, "value")) for i in layers)
    return Prefix(record.prefix, keys, values, read(_HIDDEN))


def _name(layer: int, kind: str) -> str:
    return f"{_ROOT}{layer}.{kind}"
