"""Hooks that are put on for a block of code, and always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

__all__ = ["removing", "watching_inputs"]


@contextmanager
def removing(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Run a block, and remove these hooks when it ends."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watching_inputs(
    modules: Mapping[str, nn.Module], argument: str, see: Callable[[str, Any], None]
) -> Iterator[None]:
    """Call see(name, input) before every call of a module; `argument` names its input."""

    def hook(name: str) -> Any:
        return lambda _module, args, kwargs: see(name, args[0] if args else kwargs[argument])

    handles = [
        module.register_forward_pre_hook(hook(name), with_kwargs=True)
        for name, module in modules.items()
    ]
    with removing(handles):
        yield
