"""What `sq-cpu --help`, `sq-cpu COMMAND --help` and `--version` print, at once: without torch.

`sq_cpu/data/help.json` has the commands' parameters, as `sq_cpu.cli.described` wrote them; Typer
makes of these what it makes of the commands themselves.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from enum import Enum
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import GenericAlias
from typing import Annotated, Any

import typer

__all__ = ["APP", "TYPES", "answer", "help_app", "options"]

APP: dict[str, Any] = {
    "help": "SmoothQuant for Xeon: quantize language models to int8 and run them.",
    "no_args_is_help": True,
    "rich_markup_mode": "markdown",
    "add_completion": False,
    "pretty_exceptions_enable": False,
}
"""Settings of `typer.Typer`, of the application and of its likeness here."""

TYPES: dict[str, type] = {kind.__name__: kind for kind in (bool, float, int, str, Path)}
"""The types of parameters by name; others have choices."""


def answer(arguments: Sequence[str]) -> None:
    """Print what is asked and exit, or return where that takes the commands themselves."""
    if arguments in ([], ["--help"], ["--version"]) or arguments[1:] == ["--help"]:
        rows = _rows()
        if not arguments or arguments[0].startswith("-") or arguments[0] in rows:
            help_app(rows)(list(arguments), prog_name="sq-cpu")


def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=lambda asked: _print_version(asked),
            help="Print the version and exit.",
        ),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def help_app(rows: dict[str, Any]) -> typer.Typer:
    """Return an application whose help is that of the commands that `rows` describe."""
    app = typer.Typer(**APP)
    app.callback()(options)
    for name, row in rows.items():
        app.command(name)(_command(row))
    return app


def _rows() -> dict[str, Any]:
    package = find_spec("sq_cpu")
    assert package is not None
    assert package.origin is not None
    text = Path(package.origin).with_name("data").joinpath("help.json").read_text(encoding="utf-8")
    rows: dict[str, Any] = json.loads(text)
    return rows


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"sq-cpu {version('sq_cpu')}")
        raise typer.Exit


def _command(row: dict[str, Any]) -> Callable[..., None]:
    def command(**given: Any) -> None:
        raise AssertionError("only its help is asked for")

    parameters = [_parameter(parameter) for parameter in row["parameters"]]
    command.__doc__ = row["help"]
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {each.name: each.annotation for each in parameters}
    return command


def _parameter(row: dict[str, Any]) -> inspect.Parameter:
    annotated: Any = Annotated  # mypy takes neither with what is known here alone
    enum: Any = Enum
    kind: Any = TYPES.get(row["type"])
    default = row.get("default", inspect.Parameter.empty)
    if "choices" in row:
        kind = enum(row["type"], {choice: choice for choice in row["choices"]}, type=str)
        default = kind(default) if isinstance(default, str) else default
    if row.get("list"):
        kind = GenericAlias(list, kind)
    if row.get("optional"):
        kind = kind | None
    given = dict(row["given"])
    positional = [given.pop("default", ...), *given.pop("param_decls", ())]
    made = (typer.Argument if row["argument"] else typer.Option)(*positional, **given)
    return inspect.Parameter(
        row["name"],
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=annotated[kind, made],
    )
