"""The command line, run in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from typer.testing import CliRunner, Result

from sq_cpu import cli
from sq_cpu.streaming import streaming

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


def run(*arguments: object, code: int = 0, stdin: str | bytes | None = None) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], input=stdin)
    assert result.exit_code == code, result.output
    return result


def json_of(*arguments: object) -> Any:
    return json.loads(run(*arguments, "--json").stdout)


def error_of(*arguments: object) -> str:
    """Return the one line that a failing command says last on stderr; stdout stays empty."""
    result = run(*arguments, code=1)
    assert result.stdout == ""
    *_, line = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert "Traceback" not in result.stderr
    return line


def small(*more: object) -> list[object]:
    """Return options for one quick calibration."""
    return ["--windows", 4, "--window", 64, *more]


@contextmanager
def interrupted_after_a_block() -> Iterator[None]:
    """Interrupt streamed work when its first block is finished."""
    finish = streaming.State.finish

    def interrupted(self: Any, *given: Any) -> None:
        finish(self, *given)
        if self.blocks == 1:
            raise KeyboardInterrupt

    with mock.patch.object(streaming.State, "finish", interrupted):
        yield
