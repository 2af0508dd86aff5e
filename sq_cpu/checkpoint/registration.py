"""Registers the quantization method "sq_cpu" when transformers first looks for methods.

transformers takes a second to import, which `import sq_cpu` must not cost those who do without.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

__all__ = ["register_with_transformers"]

_REGISTRY = "transformers.quantizers"
_METHOD = "sq_cpu.checkpoint.hf_quantizer"


def register_with_transformers() -> None:
    """Import what registers the method; where transformers has not read its registry yet, then."""
    if _REGISTRY in sys.modules:
        import_module(_METHOD)
    elif not any(isinstance(finder, _RegistryFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegistryFinder())


class _RegistryFinder:
    """Has the registry's module followed by ours, whoever imports it (PEP 302)."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            execute(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            import_module(_METHOD)

        spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
