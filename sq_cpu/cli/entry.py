"""The application `sq-cpu`: how its commands fail."""

from __future__ import annotations

import errno
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from sq_cpu_help import APP, options
from typer.core import TyperCommand, TyperGroup

from sq_cpu.errors import SqCpuError, Terminated, printable

__all__ = ["Command", "app"]

_MOST = 1 << 63


class _Commands(TyperGroup):
    """Commands whose expected failures are one line on stderr and an exit code."""

    def make_context(self, *arguments: Any, **more: Any) -> Any:
        with _told():
            return super().make_context(*arguments, **more)

    def invoke(self, ctx: Any) -> Any:
        with _told():
            return super().invoke(ctx)


class Command(TyperCommand):
    """A command that refuses numbers and texts that no later step could take."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse, as Typer does, and look at what came out."""
        rest = super().parse_args(ctx, args)
        for name, value in ctx.params.items():
            option = name.replace("_", "-")
            if isinstance(value, int) and not -_MOST <= value < _MOST:
                raise typer.BadParameter(f"{option} is {value}, which is beyond 64 bits", ctx)
            if isinstance(value, float) and not math.isfinite(value):
                raise typer.BadParameter(f"{option} is {value}, not a finite number", ctx)
            # Of an argument that is not UTF-8; the name of a file may be anything.
            for text in value if isinstance(value, list | tuple) else [value]:
                if isinstance(text, str) and not text.isascii() and _has_surrogates(text):
                    raise typer.BadParameter(f"{option} is not UTF-8 text", ctx)
        return rest


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= letter <= "\udfff" for letter in text)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
    except SqCpuError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno == errno.EPIPE:  # the reader went away: typer ends quietly
            raise
        _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
    except (MemoryError, RuntimeError) as error:
        # torch's allocator raises a plain RuntimeError, in either of two wordings.
        wordings = ("not enough memory", "can't allocate memory", "size calculation overflowed")
        if not isinstance(error, MemoryError) and not any(w in str(error) for w in wordings):
            raise
        _fail("not enough memory; use a smaller model, --dtype bf16 or a smaller --window")
    except Terminated:
        _fail("terminated", code=143)
    except KeyboardInterrupt:
        _fail("interrupted", code=130)


app = typer.Typer(cls=_Commands, **APP)
app.callback()(options)


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"error: {printable(' '.join(message.split()))}", err=True)
    raise typer.Exit(code)
