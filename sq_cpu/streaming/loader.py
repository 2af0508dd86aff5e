"""Stored tensors into a model of bare parameters.

`Loader` names and lays out a folder's tensors as the model's modules do, by the rules that
transformers has for from_pretrained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.models.hf_private import CheckpointLayout, set_ties, tied_weights
from sq_cpu.streaming.tensors import WHOLE, LazyTensor

__all__ = ["Loader"]


class Loader:
    """Fills a skeleton from stored tensors, under the names and in the layout of its modules."""

    def __init__(self, model: Any, weights: Mapping[str, LazyTensor], folder: Path) -> None:
        self.model = model
        self.folder = folder
        self.layout = CheckpointLayout(model)
        self.entries: dict[str, Tensor] = model.state_dict()
        self.tensors: dict[str, LazyTensor] = {}
        self.name_of: dict[str, str] = {}
        self.converted: set[str] = set()
        """Names, of the model's, that are made of stored tensors in another layout."""
        for key, tensor in weights.items():
            name, is_converted = self.layout.name_of(key)
            if name in self.entries:  # all else from_pretrained ignores, too
                self.name_of[key] = name
                self.tensors[key] = tensor
                if is_converted:
                    self.converted.add(name)

    def load(self, prefix: str) -> None:
        """Load everything below a module."""
        wanted = {}
        for key, tensor in self.tensors.items():
            name = self.name_of[key]
            if name.startswith(f"{prefix}."):
                dtype = None if self.layout.mixes_dtypes else self.entries[name].dtype
                wanted[key] = replace(tensor, wanted=dtype)
        info = self.layout.load(wanted)
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

    def outside(self, blocks: Sequence[str]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
        """Return what is outside of the blocks by the model's names, and what is tied to what.

        A tensor that is stored under both names of a tie counts once, as for from_pretrained.
        """
        stacks = tuple(f"{block}." for block in blocks)
        names = dict.fromkeys(name for name in self.entries if not name.startswith(stacks))
        if converted := sorted(self.converted.intersection(names)):
            raise SqCpuError(
                f"{self.folder}: tensor {converted[0]} is stored in another layout; {WHOLE}"
            )
        found = {name: self.tensors[key] for key, name in self.name_of.items() if name in names}
        ties = {}
        for target, source in tied_weights(self.model).items():
            if target.startswith(stacks) or source.startswith(stacks):
                raise SqCpuError(f"{target} in a block is tied to {source}; {WHOLE}")
            if target in found and source in found:
                if not _same(found[target], found[source], self.layout.dtype_of(target)):
                    continue
                del found[target]
            elif target in found:
                found[source] = found.pop(target)
            ties[target] = source
        set_ties(self.model, ties)
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


def _same(a: LazyTensor, b: LazyTensor, dtype: torch.dtype) -> bool:
    pairs = zip(a.pieces(dtype), b.pieces(dtype), strict=True)
    return a.shape == b.shape and all(torch.equal(x, y) for x, y in pairs)
