"""Has transformers know the int8 models of sq_cpu in programs that do not import sq_cpu.

torch calls `watch` when it is imported (its entry points `torch.backends`). That costs
microseconds, imports nothing, and never raises: sq_cpu is imported behind transformers' models, and
where that fails a line is logged, and transformers refuses int8 folders as it does without.
TORCH_DEVICE_BACKEND_AUTOLOAD=0 turns it off.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import logging
import sys
from collections.abc import Sequence
from types import ModuleType

__all__ = ["watch"]

_AFTER = "transformers.modeling_utils"  # which has loaded what sq_cpu puts its names into


def watch() -> None:
    """Have sq_cpu imported after transformers' models, now if they are there."""
    if _AFTER in sys.modules:
        _load()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Has one module's import followed by ours; every other is left to those behind."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_load(module: ModuleType) -> None:
                execute(module)
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                _load()

            spec.loader.exec_module = execute_and_load  # type: ignore[method-assign]
        return spec


def _load() -> None:
    try:
        importlib.import_module("sq_cpu")
    except Exception as error:  # whatever it is, transformers works without
        logging.getLogger(__name__).warning("int8 models of sq_cpu cannot be loaded: %s", error)
