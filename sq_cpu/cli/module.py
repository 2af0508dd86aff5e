"""`sq-cpu run`: another program, which can then load int8 models."""

from __future__ import annotations

import os
import runpy
import sys
from importlib.metadata import entry_points
from importlib.util import find_spec
from typing import Annotated

import typer

import sq_cpu  # noqa: F401  registers with transformers
from sq_cpu.errors import SqCpuError

__all__ = ["SETTINGS", "run_command"]

SETTINGS = {"allow_interspersed_args": False, "ignore_unknown_options": True}
"""What is behind MODULE is MODULE's, `--help` too."""


def run_command(
    module: Annotated[str, typer.Argument(help="Module, as `python -m` takes it, or command.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Its own arguments.")] = None,
) -> None:
    """Run MODULE as `python -m` does, in a process where transformers knows int8 checkpoints.

    For programs that load models by name and never import sq_cpu, as `sq-cpu run lm_eval --model hf
    --model_args pretrained=OUT --tasks piqa` or `sq-cpu run transformers serve OUT`. A command that
    is no module is found by its name. Processes that it starts are on their own.
    """
    if not getattr(sys.flags, "safe_path", False):  # new in 3.11
        sys.path.insert(0, os.getcwd())
    own = arguments or []
    if _is_runnable(module):
        sys.argv = [module, *own]  # runpy puts the file's path there
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        return
    for command in entry_points(group="console_scripts", name=module):
        sys.argv = [module, *own]
        sys.exit(command.load()())
    raise SqCpuError(
        f"there is no module {module} that can be run, and no command of that name: install it in "
        "this environment"
    )


def _is_runnable(module: str) -> bool:
    """Return whether `python -m` would run it: a module, or a package with a `__main__`."""
    try:
        spec = find_spec(module)
        if spec is None or spec.submodule_search_locations is None:
            return spec is not None and spec.loader is not None
        return find_spec(f"{module}.__main__") is not None
    except (ImportError, ValueError):  # a parent that is none, or a name that cannot be one
        return False
