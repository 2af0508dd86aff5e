"""Which linears' weights a model's own code reads or changes, seen while the model runs.

An int8 linear has no such weight. `TorchFunctionMode` sees every torch function and its arguments,
so also those that torch's own fused layers take their weights to.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sq_cpu.calibration.calibration import fingerprint
from sq_cpu.models.hooks import hooked

__all__ = ["CHANGED", "WeightUses"]

CHANGED = "the model's own code changes its weight"
"""Why a linear stays in float whose weight was another after the calibration."""

# What an int8 layer's `weight` answers, too: all that can be asked of a tensor but its values.
_VALUES = {"data", "T", "H", "mT", "mH", "real", "imag", "grad"}
_HARMLESS = {
    "__hash__",
    "__len__",
    "dim",
    "element_size",
    "get_device",
    "is_complex",
    "is_contiguous",
    "is_floating_point",
    "ndimension",
    "nelement",
    "numel",
    "requires_grad_",
    "size",
    "storage_offset",
    "stride",
}
_LIKE_ANOTHER = {"to", "type_as"}  # x.to(weight) is of the weight's dtype


class WeightUses(TorchFunctionMode):
    """While it is on, notes the uses of linears' parameters outside of their owners' forwards.

    A view of a parameter counts as it, also one that the model made when it was built. An owner is
    a module that holds the parameter: the linear, and an embedding that is tied to it.
    """

    def __init__(self, model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self._linears = linears
        # By storage: where in it each parameter is, for experts are views of one.
        self._places: dict[int, list[tuple[range, str]]] = {}
        for name, linear in linears.items():
            for parameter in linear.parameters():
                storage, place = _place(parameter)
                self._places.setdefault(storage, []).append((place, name))
        self._before = {name: _state(linear) for name, linear in linears.items()}
        self._owners = {
            module: owned
            for module in model.modules()
            if (owned := [n for p in module._parameters.values() for n in self._named(p)])
        }
        self._running: Counter[str] = Counter()
        self._used: dict[str, str] = {}

    @contextmanager
    def knowing_owners(self) -> Iterator[None]:
        """Run a block in which the owners' own forwards are told from other code."""

        def begin(module: nn.Module, *_: Any) -> None:
            self._running.update(self._owners[module])

        def end(module: nn.Module, *_: Any) -> None:
            self._running.subtract(self._owners[module])

        owners = list(self._owners)
        with hooked(before=((m, begin) for m in owners), after=((m, end) for m in owners)):
            yield

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call a torch function, and note which parameters it is given."""
        kwargs = kwargs or {}
        for position, value in enumerate((*args, *kwargs.values())):
            for each in value if isinstance(value, tuple | list) else (value,):
                for name in self._named(each):
                    if not self._running[name] and _is_use(func, position):
                        self._used.setdefault(name, _name(func))
        return func(*args, **kwargs)

    def _named(self, value: object) -> list[str]:
        """Return the linears of whose parameters a value is some, or a view."""
        if not isinstance(value, Tensor) or value.layout is not torch.strided:
            return []
        try:
            storage, place = _place(value)
        except NotImplementedError:  # what vmap maps over has no storage
            return []
        return [
            name
            for other, name in self._places.get(storage, ())
            if place.start < other.stop and other.start < place.stop
        ]

    def found(self) -> dict[str, str]:
        """Return the linears whose parameters were used or changed, and how."""
        found = {}
        for name, linear in self._linears.items():
            (before, checksum), (now, new_checksum) = self._before[name], _state(linear)
            if list(map(id, now)) != list(map(id, before)) or checksum != new_checksum:
                found[name] = CHANGED
            elif name in self._used:
                found[name] = f"the model's own code uses its weight ({self._used[name]})"
        return found


def _place(tensor: Tensor) -> tuple[int, range]:
    """Return a tensor's storage, and the bytes of it from the first to the last element."""
    first = tensor.storage_offset()
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    last = first + sum((size - 1) * stride for size, stride in steps)
    size = tensor.element_size()
    end = (last + 1) * size if tensor.numel() else first * size
    return tensor.untyped_storage()._cdata, range(first * size, end)


def _state(linear: nn.Linear) -> tuple[list[nn.Parameter], int]:
    """Return a linear's parameters, and the checksum of those that have values.

    Whoever holds them keeps others from getting their place in memory.
    """
    return list(linear.parameters()), 0 if linear.weight.is_meta else fingerprint(linear)


def _name(func: Any) -> str:
    name = getattr(func, "__name__", str(func))
    # A property of Tensor: the function is the descriptor's __get__ or __set__.
    return getattr(func.__self__, "__name__", name) if _is_property(name) else name


def _is_property(name: str) -> bool:
    return name in ("__get__", "__set__")


def _is_use(func: Any, position: int) -> bool:
    name = _name(func)
    if getattr(func, "__name__", "") == "__get__":
        return name in _VALUES
    if name in _LIKE_ANOTHER:
        return position == 0
    return name not in _HARMLESS
