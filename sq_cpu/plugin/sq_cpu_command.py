"""The console script `sq-cpu`, beside the package: it can be stopped while that is imported."""

from __future__ import annotations

import signal
import sys
from types import FrameType

__all__ = ["main"]


def main() -> None:
    """Run the command line; Ctrl-C and SIGTERM end it with one line from the start."""
    words = {signal.SIGINT: ("interrupted", 130), signal.SIGTERM: ("terminated", 143)}
    stopped: list[int] = []

    def stop(signum: int, frame: FrameType | None) -> None:
        stopped.append(signum)
        raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not under nohup
        signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    try:
        from sq_cpu_help import answer

        answer(sys.argv[1:])
        from sq_cpu.cli import main as command  # seconds: torch, transformers

        if signal.getsignal(signal.SIGINT) is stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    except KeyboardInterrupt:
        word, code = words[signal.Signals(stopped[-1])]
        print(f"error: {word}", file=sys.stderr)
        sys.exit(code)
    command()
