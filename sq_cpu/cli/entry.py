"""The application `sq-cpu`: how its commands fail, and how it ends on a signal."""

from __future__ import annotations

import errno
import signal
from typing import Any

import typer
from typer.core import TyperGroup

from sq_cpu.errors import SqCpuError, Terminated
from sq_cpu.interrupts import raise_ignored_interrupts_again

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Commands whose expected failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SqCpuError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader went away: typer ends quietly
                raise
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except (MemoryError, RuntimeError) as error:
            # torch's allocator raises a plain RuntimeError, in either of two wordings.
            wordings = ("not enough memory", "can't allocate memory")
            if not isinstance(error, MemoryError) and not any(w in str(error) for w in wordings):
                raise
            _fail("not enough memory; use a smaller model, --dtype bf16 or a smaller --window")
        except Terminated:
            _fail("terminated", code=143)
        except KeyboardInterrupt:
            _fail("interrupted", code=130)


app = typer.Typer(
    cls=_Commands,
    help="SmoothQuant for Xeon: quantize language models to int8 and run them.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line (the console script `sq-cpu`)."""
    signal.signal(signal.SIGTERM, _terminate)
    raise_ignored_interrupts_again()
    app(prog_name="sq-cpu")


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise Terminated


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)
