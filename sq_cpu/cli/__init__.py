"""The command line `sq-cpu`: thin, it turns arguments into calls and results into text or JSON.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
What a command has to say goes to stdout, `--json` makes that one JSON object; progress goes to
stderr.
"""

from __future__ import annotations

import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Any

from sq_cpu.errors import Terminated
from sq_cpu.interrupts import raise_ignored_interrupts_again

if TYPE_CHECKING:
    from sq_cpu.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line (the console script `sq-cpu`)."""
    stopped: list[type[KeyboardInterrupt]] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        kind = Terminated if signum == signal.SIGTERM else KeyboardInterrupt
        if kind is Terminated:  # a second one must not stop the cleaning up
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        stopped.append(kind)
        raise kind

    signal.signal(signal.SIGTERM, stop)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, stop)
    raise_ignored_interrupts_again()
    try:
        # What takes seconds to import is imported when signals have their handlers.
        from sq_cpu.cli.commands import app

        app(prog_name="sq-cpu")
    except (KeyboardInterrupt, SystemExit) as ended:
        # Typer knows one exit code for an interrupt that arrives while it reads the arguments.
        if not stopped or (isinstance(ended, SystemExit) and ended.code != 1):
            raise
        if not isinstance(ended, SystemExit):
            print(f"error: {_WORDS[stopped[-1]][0]}", file=sys.stderr)
        sys.exit(_WORDS[stopped[-1]][1])


_WORDS = {KeyboardInterrupt: ("interrupted", 130), Terminated: ("terminated", 143)}


def __getattr__(name: str) -> Any:
    if name == "app":
        from sq_cpu.cli.commands import app

        return app
    raise AttributeError(f"module {__name__} has no attribute {name}")
