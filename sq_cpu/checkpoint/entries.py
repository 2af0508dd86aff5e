"""What a checkpoint stores of a model, under which name, and how that is put in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.models.hf_private import tied_weights
from sq_cpu.nn.linear import QuantLinear

__all__ = ["float_entries", "layer_entries", "own_entries", "put_tensor", "tie"]


def float_entries(model: Any, part: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Give what ``part``, called ``prefix`` in ``model``, stores beside its quantized linears.

    Tied weights are under one name only; no two of the tensors share memory.
    """
    ties = tied_weights(model)
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, module in part.named_modules(prefix=prefix):
        if isinstance(module, QuantLinear):
            continue
        for name, tensor in own_entries(module, path).items():
            if not _is_tied(model, name, ties):
                storage = tensor.untyped_storage().data_ptr()
                stored[name] = tensor.clone() if storage in storages else tensor
                storages.add(storage)
    return stored


def own_entries(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Give the state_dict entries of this module alone, children left out."""
    entries: dict[str, Tensor] = {}
    module._save_to_state_dict(entries, f"{prefix}." if prefix else "", keep_vars=False)
    return entries


def layer_entries(layer: QuantLinear, prefix: str) -> dict[str, Tensor]:
    """Give name -> meta tensor of what a quantized linear stores."""
    return {
        f"{prefix}.{key}": torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in layer.entries().items()
    }


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter, then without a gradient, or a buffer of the model, by its full name."""
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    is_parameter = key in module._parameters
    setattr(module, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make each parameter the one that it is tied to, both by full name."""
    for target, source in ties.items():
        parent, _, key = target.rpartition(".")
        setattr(model.get_submodule(parent), key, model.get_parameter(source))


def _is_tied(model: Any, name: str, ties: dict[str, str]) -> bool:
    source = ties.get(name)
    return source is not None and model.get_parameter(source) is model.get_parameter(name)
