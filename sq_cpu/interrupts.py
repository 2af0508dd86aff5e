"""Interrupts that are not lost where Python has to ignore an exception."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["raise_ignored_interrupts_again"]

_SOON = 0.01


def raise_ignored_interrupts_again() -> None:
    """Have a `KeyboardInterrupt` that Python ignored raised again, a moment later.

    A signal may arrive within a finalizer or the callback of a weak reference (SQLAlchemy has
    many), and what its handler raises there ends in `sys.unraisablehook`. For the main thread of a
    process that is ours: it takes SIGALRM.
    """
    before = sys.unraisablehook

    def hook(ignored: sys.UnraisableHookArgs) -> None:
        kind = ignored.exc_type
        if not issubclass(kind, KeyboardInterrupt):
            before(ignored)
            return

        def again(signum: int, frame: FrameType | None) -> None:
            raise kind

        signal.signal(signal.SIGALRM, again)
        signal.setitimer(signal.ITIMER_REAL, _SOON)

    sys.unraisablehook = hook
