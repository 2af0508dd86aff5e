"""Which worker is gone: the one place that decides it, for trials, parents and children alike.

A process is looked up in /proc, which tells at once. What runs on another machine shows there only
by its heartbeat in the storage, which Optuna keeps: see `HEARTBEAT` and `GRACE`.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sq_cpu.parsing import check_fields

__all__ = ["GRACE", "HEARTBEAT", "WorkerProcess", "is_gone"]

HEARTBEAT = 10
GRACE = 60
"""Seconds between two signs of life, and after the last one until a worker counts as gone."""


@dataclass(frozen=True)
class WorkerProcess:
    """What tells a process from all others, those that reuse its number included."""

    machine: str
    pid: int
    started: str | None
    """Clock ticks since boot; None if it had ended already."""

    def __post_init__(self) -> None:
        check_fields(self, "a worker")

    @classmethod
    def of(cls, pid: int) -> WorkerProcess:
        """Return the process of that number on this machine."""
        return cls(_machine(), pid, _started(pid))

    @classmethod
    def this(cls) -> WorkerProcess:
        """Return the process that asks."""
        return cls.of(os.getpid())


def is_gone(worker: WorkerProcess | None, silence: float = 0.0) -> bool:
    """Return whether a worker is known to have ended.

    One of another machine is not. One that has not said which process it is, None, counts as gone
    after `GRACE` seconds of silence.
    """
    if worker is None:
        return silence > GRACE
    here = worker.machine == _machine()
    return here and (worker.started is None or _started(worker.pid) != worker.started)


@cache
def _machine() -> str:
    # A host's name alone may be that of several containers, and survives a restart.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()}/{boot}/{os.readlink('/proc/self/ns/pid')}"


def _started(pid: int) -> str | None:
    """Return when a process started, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = stat.rpartition(")")[2].split()
    return None if state in "ZX" else fields[18]
