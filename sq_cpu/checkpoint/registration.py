"""Registers what transformers looks up by name, when it first does.

That is the quantization method "sq_cpu", and the attention "sq_cpu". transformers takes a second to
import, which `import sq_cpu` must not cost those who do without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from sq_cpu.models.hf_private import ATTENTION_MODULE

__all__ = ["register_with_transformers"]

_OURS = {
    "transformers.quantizers": "sq_cpu.checkpoint.hf_quantizer",
    ATTENTION_MODULE: "sq_cpu.inference.attention",
}
"""Modules with a registry, and ours that put something into it."""


def register_with_transformers() -> None:
    """Import what registers; where transformers has not read a registry yet, then."""
    waiting = {finder.registry for finder in sys.meta_path if isinstance(finder, _RegistryFinder)}
    for registry, ours in _OURS.items():
        if registry in sys.modules:
            import_module(ours)
        elif registry not in waiting:
            sys.meta_path.insert(0, _RegistryFinder(registry))


class _RegistryFinder:
    """Has a registry's module followed by ours, whoever imports it (PEP 302)."""

    def __init__(self, registry: str) -> None:
        self.registry = registry

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != self.registry:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_OURS[name])

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
