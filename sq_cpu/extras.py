"""Optional dependencies, asked for where they are used."""

from __future__ import annotations

from importlib.util import find_spec

from sq_cpu.errors import SqCpuError

__all__ = ["require"]


def require(module: str, extra: str) -> None:
    """Raise `SqCpuError`, which names the extra that brings it, unless `module` is installed."""
    try:
        found = find_spec(module) is not None
    except ValueError:  # sys.modules has None in its place
        found = False
    if not found:
        raise SqCpuError(f"{module} is not installed: pip install 'sq_cpu[{extra}]'")
