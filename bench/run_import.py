"""What `import sq_cpu` costs beyond `import torch`, what else it loads, and what `--help` costs."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from harness import Stats
from rich.console import Console
from rich.progress import track
from rich.table import Table

WATCHED = ("optuna", "matplotlib", "jinja2", "transformers")
"""Packages that are needed later, or never."""

# What each process runs: the two imports take turns, and the second one finds torch loaded.
_CHILD = """
import json, sys, time
start = time.perf_counter()
import torch
between = time.perf_counter()
before = set(sys.modules)
middle = time.perf_counter()
import sq_cpu
end = time.perf_counter()
print(json.dumps({"torch": between - start, "sq_cpu": end - middle,
                  "loaded": [name for name in sys.argv[1:] if name in sys.modules.keys() - before],
                  "modules": len(sys.modules) - len(before)}))
"""


COMMANDS = ("--version", "--help", "quantize --help", "serve --help")
"""Of `sq-cpu`, which take no torch."""

_COMMAND = "from sq_cpu_command import main; main()"


def _seconds_of(command: str) -> float:
    start = time.perf_counter()
    arguments = [sys.executable, "-c", _COMMAND, *command.split()]
    subprocess.run(arguments, stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _import_once() -> dict[str, Any]:
    child = subprocess.run(
        [sys.executable, "-c", _CHILD, *WATCHED], stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def measure(rounds: int) -> dict[str, Any]:
    """Return the seconds of both imports and of commands, each over `rounds` fresh processes."""
    _import_once()  # writes the bytecode, reads the files into memory
    for command in COMMANDS:
        _seconds_of(command)
    console = Console(stderr=True)
    turns = track(range(rounds), "importing", console=console, disable=not console.is_terminal)
    found: list[dict[str, Any]] = []
    for _ in turns:
        found.append(_import_once())
        found[-1].update({command: _seconds_of(command) for command in COMMANDS})
    return {
        "seconds": {
            name: asdict(Stats.of([each[name] for each in found]))
            for name in ("torch", "sq_cpu", *COMMANDS)
        },
        "loaded": found[-1]["loaded"],
        "modules": found[-1]["modules"],
    }


def main(
    rounds: Annotated[int, typer.Option(min=11, help="Processes to take the medians of.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    out: Annotated[Path | None, typer.Option(help="JSON file to write.")] = None,
) -> None:
    """Print the seconds of `import torch`, of `import sq_cpu` after it, and of `sq-cpu --help`."""
    result = {"benchmark": "import", "machine": machine.facts(), **measure(rounds)}
    text = json.dumps(result, indent=1)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")
    if as_json:
        typer.echo(text)
        return
    print(machine.headline())
    table = Table("what", "median s", "p10", "p90", title=f"{rounds} fresh processes")
    labels = {"torch": "import torch", "sq_cpu": "import sq_cpu, beyond torch"}
    labels |= {command: f"sq-cpu {command}" for command in COMMANDS}
    for name, label in labels.items():
        seconds = result["seconds"][name]
        table.add_row(label, *(f"{seconds[key]:.3f}" for key in ("median", "p10", "p90")))
    machine.make_console().print(table)
    print(
        f"sq_cpu loads {result['modules']} modules; of {', '.join(WATCHED)}: "
        f"{', '.join(result['loaded']) or 'none'}"
    )


if __name__ == "__main__":
    typer.run(main)
