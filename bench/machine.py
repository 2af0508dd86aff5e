"""The machine that a benchmark runs on: its facts, kept beside the figures."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

import sq_cpu

_LOAD_AT_START = os.getloadavg()[0]


def numbers(text: str) -> list[int]:
    """Parse "1,4,all", where all is the number of cores; doubles are dropped."""
    cores = len(os.sched_getaffinity(0))
    return list(dict.fromkeys(cores if word == "all" else int(word) for word in text.split(",")))


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 0 if the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [size.read_text().strip() for size in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=0)


def beyond_cache() -> int:
    """Bytes that leave the last-level cache when gone through: twice its size."""
    return 2 * (last_level_cache() or 256 << 20)


def facts() -> dict[str, Any]:
    isa = sq_cpu.isa()
    return {
        "cpu": isa["cpu"],
        "isa": isa["in_use"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "llc_mb": last_level_cache() >> 20,
        "load_at_start": _LOAD_AT_START,
        "memory_gb": psutil.virtual_memory().total >> 30,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sq_cpu": sq_cpu.__version__,
    }


def make_console() -> Console:
    """Return a console for tables: without a terminal to fit in, a line stays a line."""
    return Console(width=None if sys.stdout.isatty() else 400)


def headline() -> str:
    known = facts()
    return (
        f"{known['cpu']}, {known['cores']} cores, isa {known['isa']}, torch {known['torch']} "
        f"({known['torch_isa']}), load at the start {known['load_at_start']:.1f}"
    )
