"""Which worker is alive, told by its process."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["GRACE", "HEARTBEAT", "is_gone", "this_worker"]

HEARTBEAT = 10
GRACE = 60
"""Seconds between two signs of life, and after the last one until a worker counts as gone."""


@cache
def _machine() -> str:
    # A host's name alone may be that of several containers, and survives a restart.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]


def this_worker() -> dict[str, Any]:
    """Return what tells this process from all others, JSON types."""
    return {"machine": _machine(), "pid": os.getpid(), "started": _started(os.getpid())}


def is_gone(worker: Mapping[str, Any]) -> bool:
    """Return whether a worker is known to have ended; one of another machine is not."""
    here = bool(worker["machine"] == _machine())
    return here and _started(worker["pid"]) != worker["started"]
