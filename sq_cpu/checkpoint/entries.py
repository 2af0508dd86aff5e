"""What a checkpoint stores of a model, under which name, and how that is put in place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.models.hf_private import is_transformers, tied_weights
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear

__all__ = [
    "float_entries",
    "int8_layers",
    "layer_entries",
    "layer_tensors",
    "own_entries",
    "put_tensor",
    "tie",
    "ties_of",
    "unsaved_buffers",
]


def ties_of(model: nn.Module) -> dict[str, str]:
    """Return which parameter of a float model, by full name, is tied to which.

    transformers says so of its models; of others, it is seen.
    """
    if is_transformers(model):
        return tied_weights(model)
    first: dict[nn.Parameter, str] = {}
    ties = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (source := first.setdefault(parameter, name)) != name:
            ties[name] = source
    return ties


def float_entries(model: nn.Module, part: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Give what ``part``, called ``prefix`` in ``model``, stores beside its quantized linears.

    Tied weights are under one name only.
    """
    ties = ties_of(model)
    parameters = dict(model.named_parameters(remove_duplicate=False)) if ties else {}
    stored: dict[str, Tensor] = {}
    for path, module in part.named_modules(prefix=prefix):
        if isinstance(module, QuantLinear):
            continue
        for name, tensor in own_entries(module, path).items():
            source = parameters.get(ties.get(name, ""))
            if source is not None and source is parameters.get(name):
                continue
            stored[name] = tensor
    return stored


def own_entries(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Give the state_dict entries of this module alone, children left out; all are tensors."""
    entries: dict[str, Any] = {}
    module._save_to_state_dict(entries, f"{prefix}." if prefix else "", keep_vars=False)
    for name, value in entries.items():
        if not isinstance(value, Tensor):
            raise SqCpuError(
                f"{name} is a {type(value).__name__}, which only pickle could store: make it a "
                "tensor, or keep it out of the state_dict"
            )
        kind = type(value)
        if kind not in (Tensor, nn.Parameter):
            raise SqCpuError(
                f"{name} is a {kind.__module__}.{kind.__name__}, which checkpoints do not hold: "
                "save the model before what made it one"
            )
    return entries


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Give the buffers that no state_dict has, by full name, those of int8 linears left out."""
    return {
        f"{path}.{key}".removeprefix("."): buffer
        for path, module in model.named_modules()
        if not isinstance(module, QuantLinear)
        for key, buffer in module._buffers.items()
        if buffer is not None and key in module._non_persistent_buffers_set
    }


def int8_layers(part: nn.Module, prefix: str = "") -> Iterator[tuple[str, QuantLinear]]:
    """Yield each int8 linear and its name, which for that of a `DecomposedLinear` is the latter's.

    So every quantized linear has an entry ``weight`` that no plain loader takes.
    """
    inner = set()
    for path, module in part.named_modules(prefix=prefix):
        if isinstance(module, DecomposedLinear):
            inner.add(module.regular)
            yield path, module.regular
        elif isinstance(module, QuantLinear) and module not in inner:
            yield path, module


def layer_entries(layer: QuantLinear, name: str) -> dict[str, Tensor]:
    """Give name -> meta tensor of what `layer_tensors` gives."""
    entries = {
        f"{name}.{key}": torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in layer.entries().items()
    }
    entries[f"{name}.weight"] = entries[f"{name}.weight"].unsqueeze(-1)
    return entries


def layer_tensors(layer: QuantLinear, name: str) -> dict[str, Tensor]:
    """Give what an int8 linear stores: the entries of its state_dict, the weight as [N, K, 1].

    As [N, K], a plain loader would take the codes for a float weight.
    """
    tensors = own_entries(layer, name)
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"].unsqueeze(-1)
    return tensors


def put_tensor(model: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter, then without a gradient, a buffer or extra state, by its full name."""
    parent, _, key = name.rpartition(".")
    module = model.get_submodule(parent)
    if key == "_extra_state":
        module.set_extra_state(value)
        return
    is_parameter = key in module._parameters
    setattr(module, key, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def tie(model: nn.Module, ties: Mapping[str, str]) -> None:
    """Make each parameter the one that it is tied to, both by full name."""
    for target, source in ties.items():
        parent, _, key = target.rpartition(".")
        setattr(model.get_submodule(parent), key, model.get_parameter(source))
