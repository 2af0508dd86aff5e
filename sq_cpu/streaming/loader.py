"""Stored tensors into a model of bare parameters.

`Loader` names and lays out a folder's tensors as the model's modules do, by the rules that
transformers has for from_pretrained.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
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

from sq_cpu.errors import SqCpuError
from sq_cpu.streaming.tensors import WHOLE, Stored

__all__ = ["Loader"]

_ONE_THREAD = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers reads it at each load


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
