"""What runs here: the instruction set in use, the reasons, and the processor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sq_cpu.kernels import _core

__all__ = ["Machine", "available_memory", "has_vnni", "isa"]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A class of machines whose times are comparable."""

    cpu: str
    isa: str
    """The instruction set that sq_cpu uses."""
    threads: int

    @classmethod
    def here(cls) -> Machine:
        """Return the class of this machine, as this process uses it."""
        known = isa()
        return cls(cpu=known["cpu"], isa=known["in_use"], threads=known["threads"])

    def __str__(self) -> str:
        return f"{self.cpu}, {self.isa}, {self.threads} threads"


def isa() -> dict[str, Any]:
    """Return which instruction sets are built, detected and granted here, and which one is in use.

    Returns
    -------
    `in_use` (name), `vnni` (bool), `isas` (name -> built, detected, granted, usable, reason),
    `threads`, `cpu` (model name), `forced` (by SQ_CPU_ISA; bool)

    Raises
    ------
    SqCpuError
        When SQ_CPU_ISA names an unknown or unusable instruction set.
    """
    return _core.isa() | {"cpu": _cpu_name()}


def has_vnni() -> bool:
    """Return whether the kernels in use multiply u8 by s8 without int16 saturation (VNNI, AMX)."""
    return bool(_core.isa()["vnni"])


def available_memory() -> int:
    """Return the bytes that a process can get without swapping."""
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def _cpu_name() -> str:
    fields: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if ":" not in line:
            break  # the first processor speaks for all
        key, _, value = line.partition(":")
        fields[key.strip()] = value.strip()
    name = fields.get("model name", "unknown")
    return f"{name} (family {fields.get('cpu family')} model {fields.get('model')})"
