"""The commands' parameters as data, of which `sq_cpu_help` sets their help without importing them.

After a change of a command's parameters or of its help: `python -m sq_cpu.cli.described`.
"""

from __future__ import annotations

import inspect
import json
import types
from enum import Enum
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import typer
from sq_cpu_help import TYPES

from sq_cpu.cli.commands import app
from sq_cpu.files import write_file

__all__ = ["FILE", "described"]

FILE = Path(__file__).parents[1] / "data" / "help.json"


def described() -> str:
    """Return the text of `help.json`: an object by command, a parameter a line."""
    commands = []
    for command in app.registered_commands:
        callback = command.callback
        assert callback is not None
        signature = inspect.signature(callback, eval_str=True)
        rows = [
            json.dumps(_described(parameter), ensure_ascii=False)
            for parameter in signature.parameters.values()
            if parameter.annotation is not typer.Context
        ]
        text = json.dumps(inspect.getdoc(callback), ensure_ascii=False)
        lines = ",\n    ".join(rows)
        commands.append(
            f' "{command.name}": {{\n  "help": {text},\n  "parameters": [\n    {lines}]}}'
        )
    return "{\n" + ",\n".join(commands) + "\n}\n"


def _described(parameter: inspect.Parameter) -> dict[str, Any]:
    kind, (made,) = parameter.annotation.__origin__, parameter.annotation.__metadata__
    argument = not isinstance(made, type(typer.Option()))
    blank = vars(typer.Argument() if argument else typer.Option())
    row: dict[str, Any] = {"name": parameter.name, "argument": argument}
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (each for each in get_args(kind) if each is not type(None))
        row["optional"] = True
    if get_origin(kind) is list:
        (kind,) = get_args(kind)
        row["list"] = True
    if get_origin(kind) is Literal:
        row |= {"type": parameter.name, "choices": list(get_args(kind))}
    elif issubclass(kind, Enum):
        row |= {"type": kind.__name__, "choices": [each.value for each in kind]}
    else:
        assert TYPES[kind.__name__] is kind
        row["type"] = kind.__name__
    if parameter.default is not parameter.empty:
        default = parameter.default
        row["default"] = default.value if isinstance(default, Enum) else default
    row["given"] = {name: value for name, value in vars(made).items() if value != blank[name]}
    return row


if __name__ == "__main__":
    write_file(FILE, described())
