"""Modules put in the places of a model's linears, and the model marked as quantized."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sq_cpu.errors import SqCpuError
from sq_cpu.quantization.record import QuantizationRecord

__all__ = [
    "mark_quantized",
    "places_of",
    "put",
    "replace_linears",
    "unmark_quantized",
    "when_quantized",
]

_TOLD: list[Callable[[Any], None]] = []


def when_quantized(tell: Callable[[Any], None]) -> None:
    """Have `tell` called with every model that becomes int8 from now on, marked already."""
    _TOLD.append(tell)


def mark_quantized(model: Any, record: QuantizationRecord) -> None:
    """Make a model whose linears are int8 one for inference, and say what was done to it."""
    model.eval().requires_grad_(False)
    model.sq_cpu_config = record
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_save_pretrained
    for tell in _TOLD:
        tell(model)


def unmark_quantized(model: Any) -> None:
    """Take from a model, float again, what `mark_quantized` gave it."""
    for name in ("sq_cpu_config", "sq_cpu_card", "save_pretrained", "push_to_hub"):
        vars(model).pop(name, None)


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    # Its config would not say int8, and whoever loaded it would read the codes as weights.
    raise SqCpuError("save_pretrained cannot write an int8 model: call sq_cpu.save(model, path)")


def replace_linears(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each module of `layers` (by full name) in the place of the model's module there.

    A module that the model holds under several names is replaced under all of them.
    """
    places = places_of(model, {name: model.get_submodule(name) for name in layers})
    for name, module in layers.items():
        put(module, places[name])


Place = tuple[nn.Module, str]


def places_of(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[Place]]:
    """Return where the model holds each module, without a hold on the modules."""
    names = {module: name for name, module in modules.items()}
    places: dict[str, list[Place]] = {name: [] for name in modules}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in names:
                places[names[child]].append((parent, key))
    return places


def put(module: nn.Module, places: Iterable[Place]) -> None:
    """Set a module in all of these places."""
    for parent, key in places:
        setattr(parent, key, module)
