"""A model that is called and yet stays as it was, whatever its forward changes."""

from __future__ import annotations

import random
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["checksum", "unchanged"]

_CONTAINERS = (dict, OrderedDict, defaultdict, list, deque, set)


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Run a block that calls a model; afterwards its state, and the random generators, are back.

    That is all that its modules refer to: attributes and what these hold (a config, a cache),
    buffers and other tensors, submodules, hooks. Parameters are not copied. A module below which
    one was written to (weights that a first forward rescales) stays as its forward left it, so that
    what it remembers of that stays true.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    seen: set[int] = set()
    before = {module: _State(module, seen) for module in model.modules()}
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        written = {module for module, state in before.items() if state.is_written()}
        for module, state in before.items():
            if written.isdisjoint(module.modules()):
                state.restore()


def checksum(weight: Tensor) -> int:
    """Return the CRC-32 of the bytes of at most 8 evenly spaced rows of a parameter."""
    weight = weight.detach()
    count = len(weight) if weight.dim() else 0
    last = max(count - 1, 0)
    rows = torch.linspace(0, last, min(8, count), dtype=torch.float32, device="cpu").long()
    picked = weight[rows] if weight.dim() else weight.reshape(1)
    return zlib.crc32(picked.contiguous().view(torch.uint8).numpy().tobytes())


class _State:
    """What a module refers to, and what that holds; not that of the modules below."""

    def __init__(self, module: nn.Module, seen: set[int]) -> None:
        self._module = module
        self._own = dict(module._parameters)
        self._parameters: list[tuple[Tensor, object]] = []
        self._tensors: list[tuple[Tensor, Tensor]] = []
        self._objects: list[tuple[Any, Any]] = []
        self._seen = seen
        self._hold(vars(module))

    def _hold(self, value: Any) -> None:
        if id(value) in self._seen or isinstance(value, nn.Module | ModuleType):
            return
        self._seen.add(id(value))
        if isinstance(value, nn.Parameter):
            self._parameters.append((value, _identity(value)))
        elif isinstance(value, Tensor):
            if not value.is_meta:
                self._tensors.append((value, value.detach().clone()))
        elif type(value) in _CONTAINERS:
            self._objects.append((value, value.copy()))
            for held in list(value.values() if isinstance(value, dict) else value):
                self._hold(held)
        elif isinstance(value, tuple):
            for held in value:
                self._hold(held)
        elif hasattr(value, "__dict__") and not callable(value):
            self._hold(vars(value))

    def is_written(self) -> bool:
        """Whether one of the module's own parameters was written to, or replaced."""
        replaced = not _holds_the_same(self._module._parameters, self._own)
        return replaced or any(_identity(held) != before for held, before in self._parameters)

    def restore(self) -> None:
        for tensor, values in self._tensors:
            if tensor.shape == values.shape and torch.equal(tensor, values):
                continue
            if tensor.shape == values.shape and 0 not in tensor.stride():
                tensor.data.copy_(values)  # in place: others may be views of it
            else:
                tensor.data = values
        for value, copy in self._objects:
            if not _holds_the_same(value, copy):
                value.clear()
                value.extend(copy) if isinstance(value, list | deque) else value.update(copy)


def _identity(parameter: Tensor) -> object:
    # What is written through `.data` does not count up the version.
    version = None if parameter.is_inference() else parameter._version
    if parameter.is_meta:
        return version
    return version, parameter.data_ptr(), checksum(parameter)


def _holds_the_same(value: Any, copy: Any) -> bool:
    if isinstance(value, set):
        return bool(value == copy)
    if isinstance(value, dict):
        return list(map(id, value)) == list(map(id, copy)) and all(
            value[key] is held for key, held in copy.items()
        )
    return list(map(id, value)) == list(map(id, copy))
