"""The dtype that a model computes in around each int8 linear: what the weight of that says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

__all__ = ["dtypes_of", "set_dtypes"]


def dtypes_of(model: nn.Module, layers: Iterable[str]) -> dict[str, str]:
    """Return the dtypes of those int8 modules whose dtype is not the model's, by full name."""
    usual = _usual(model)
    found = {name: model.get_submodule(name).weight.dtype for name in layers}
    return {n: str(dtype).removeprefix("torch.") for n, dtype in found.items() if dtype != usual}


def set_dtypes(model: nn.Module, layers: Iterable[str], dtypes: Mapping[str, str]) -> None:
    """Undo `dtypes_of`: give each int8 layer its dtype, or the model's."""
    usual = _usual(model)
    for name in layers:
        layer: Any = model.get_submodule(name)
        # Of a DecomposedLinear, the part that has the weight.
        getattr(layer, "regular", layer).dtype = (
            getattr(torch, dtypes[name]) if name in dtypes else usual
        )


def _usual(model: nn.Module) -> torch.dtype:
    # As transformers has it: that of the first float parameter.
    floats = (p.dtype for p in model.parameters() if p.is_floating_point())
    return next(floats, torch.float32)
