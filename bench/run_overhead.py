"""What Python adds to one eager call of a linear: the call beyond its kernel.

The kernel's own time is that of `_core.linear` less that of the same call with no rows, which goes
through the same binding, conversions and checks and returns before any work:

    kernel   = _core.linear(m rows) - _core.linear(0 rows)
    overhead = layer(x) - kernel

so the overhead holds all of the module call, the checks, the output's allocation and the binding.
Each is the median of many rounds; a round times a loop of each candidate, in turn.
"""

from __future__ import annotations

import json
import statistics
import timeit
from typing import Annotated, Any

import machine
import torch
import torch.nn.functional as F  # noqa: N812
import typer
from harness import in_turns
from rich.table import Table
from torch import nn

from sq_cpu.kernels import _core
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme

# (N, K): next to no work; SmolLM2's k and v, the smallest of any model here.
SHAPES = ((64, 64), (192, 576))
_LOOP = 200  # calls in a timed loop


def _timers(n: int, k: int, m: int) -> dict[str, timeit.Timer]:
    """Give a timer for each call of a round, once the layer is checked against its reference."""
    linear = nn.Linear(k, n).requires_grad_(False)
    layer = QuantLinear.from_float(linear, Scheme.of("O1"))
    x = torch.randn(m, k, dtype=torch.bfloat16)
    y = torch.empty(m, n, dtype=torch.bfloat16)

    def arguments(rows: int) -> tuple[Any, ...]:
        weight = (layer.packed, n, k)
        steps = (_core.Activation.none, None, None)
        return (x[:rows], *weight, layer._quantizer, y[:rows], *steps)

    _core.linear(*arguments(m))
    if not torch.equal(layer(x), layer.reference(x)) or not torch.equal(y, layer(x)):
        raise AssertionError(f"N={n} K={k} M={m}: the kernel and its reference differ")
    names: dict[str, Any] = {
        "layer": layer,
        "linear": _core.linear,
        "F": F,
        "x": x,
        "rows": arguments(m),
        "no_rows": arguments(0),
        "linear16": (x, linear.weight.bfloat16(), linear.bias.bfloat16()),
        "linear32": (x.float(), linear.weight, linear.bias),
    }
    calls = {
        "layer": "layer(x)",
        "rows": "linear(*rows)",
        "no rows": "linear(*no_rows)",
        "torch bf16": "F.linear(*linear16)",
        "torch fp32": "F.linear(*linear32)",
    }
    return {name: timeit.Timer(call, globals=names) for name, call in calls.items()}


def measure(n: int, k: int, m: int, threads: int, rounds: int) -> dict[str, Any]:
    """Return microseconds a call, medians of `rounds`, with the overhead's deciles."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            us = in_turns(_timers(n, k, m), _LOOP, rounds)
    finally:
        torch.set_num_threads(before)
    kernel = [rows - none for rows, none in zip(us["rows"], us["no rows"], strict=True)]
    overhead = [call - own for call, own in zip(us["layer"], kernel, strict=True)]
    deciles = statistics.quantiles(overhead, n=10, method="inclusive")
    medians = {name: statistics.median(us[name]) for name in ("layer", "torch bf16", "torch fp32")}
    return {
        "n": n,
        "k": k,
        "m": m,
        "threads": threads,
        **medians,
        "kernel": statistics.median(kernel),
        "binding": statistics.median(us["no rows"]),
        "overhead": statistics.median(overhead),
        "overhead_p10": deciles[0],
        "overhead_p90": deciles[-1],
    }


def main(
    rows: Annotated[str, typer.Option(help="Values of M.")] = "1",
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "1,all",
    rounds: Annotated[int, typer.Option(min=2, help="Rounds to take the medians of.")] = 100,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print the microseconds that one eager call of a small layer takes beyond its kernel."""
    configurations = [
        (n, k, m, count)
        for n, k in SHAPES
        for m in machine.numbers(rows)
        for count in machine.numbers(threads)
    ]
    lines = [measure(*each, rounds) for each in track(configurations, "measuring")]
    if as_json:
        typer.echo(json.dumps({"machine": machine.facts(), "rows": lines}, indent=1))
        return
    print(machine.headline())
    names = ("layer", "kernel", "overhead", "binding", "torch bf16", "torch fp32")
    table = Table("N x K", "M", "threads", title="us a call; overhead (p10-p90) = layer - kernel")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for line in lines:
        cells = {name: f"{line[name]:.2f}" for name in names}
        cells["overhead"] += f" ({line['overhead_p10']:.2f}-{line['overhead_p90']:.2f})"
        shape = (f"{line['n']}x{line['k']}", str(line["m"]), str(line["threads"]))
        table.add_row(*shape, *cells.values())
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
