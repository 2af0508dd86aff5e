"""Hooks that are put on for a block of code, and always removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["before_every_call", "hooked", "watching_inputs"]

Hooks = Iterable[tuple[nn.Module, Callable[..., Any]]]


@contextmanager
def hooked(*, before: Hooks = (), after: Hooks = ()) -> Iterator[None]:
    """Run a block in which modules have hooks.

    One of `before` is called as hook(module, args, kwargs) and may return others, (args, kwargs);
    one of `after` as hook(module, args, kwargs, output) and may return another output.
    """
    with ExitStack() as handles:
        for module, hook in before:
            handles.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        for module, hook in after:
            handles.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        yield


@contextmanager
def watching_inputs(
    modules: Mapping[str, nn.Module], argument: str, observe: Callable[[str, Any], None]
) -> Iterator[None]:
    """Call observe(name, input) before every call of a module; `argument` names its input."""

    def hook(name: str) -> Any:
        return lambda _module, args, kwargs: observe(name, args[0] if args else kwargs[argument])

    with hooked(before=[(module, hook(name)) for name, module in modules.items()]):
        yield


def before_every_call(module: nn.Module, hook: Callable[..., Any]) -> None:
    """Call hook(module, args, kwargs), which may return others, until it is taken away."""
    module.register_forward_pre_hook(hook, with_kwargs=True)
