"""What torch.compile makes of an int8 linear and of a decoder's step, beside the eager calls.

A layer's columns are its module call, the call of the torch operator as inductor writes it, and the
compiled module. The last holds what entering any compiled function costs, which `empty` is: the
same for a function that only adds 1. A decoder's step enters once.

All candidates of a row take turns, each in a short loop; the figures are medians of many rounds,
and the ratios those of the rounds' ratios. Every result is checked against the eager one first.
"""

from __future__ import annotations

import json
import statistics
import timeit
from collections.abc import Callable
from typing import Annotated, Any

import machine
import torch
import typer
from harness import in_turns
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from sq_cpu.models.linears import quantizable_linears
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme

SIZES = (576, 1536, 4096)


def turns(
    calls: dict[str, Callable[[], Tensor]], loop: int, rounds: int, tolerance: float
) -> dict[str, Any]:
    """Return microseconds a call of each, and its ratio to the first, which defines the result."""
    first, *others = calls
    expected = calls[first]()
    for name in others:
        if name != "empty":
            torch.testing.assert_close(calls[name](), expected, rtol=tolerance, atol=tolerance)
    us = in_turns({name: timeit.Timer(call) for name, call in calls.items()}, loop, rounds)
    ratios = {
        name: statistics.median(a / b for a, b in zip(us[name], us[first], strict=True))
        for name in others
    }
    medians = {name: statistics.median(times) for name, times in us.items()}
    return {"us": medians, "least_us": {name: min(us[name]) for name in us}, "ratio": ratios}


def of_layer(size: int, smoothed: bool, scheme: str, rounds: int) -> dict[str, Any]:
    """Measure a layer of `size` x `size` at M = 1."""
    torch._dynamo.reset()
    smoothing = torch.rand(size) + 0.5 if smoothed else None
    input_range = (-4.0, 4.0) if scheme == "O3" else None
    layer = QuantLinear.from_float(
        nn.Linear(size, size), Scheme.of(scheme), input_range, smoothing=smoothing
    )
    x = torch.randn(1, size)
    arguments = (layer.packed, size, layer.inverse_smoothing, *layer._settings, 0, None, None)
    compiled = torch.compile(layer, fullgraph=True)
    empty: Any = torch.compile(nn.ReLU(), fullgraph=True)
    calls: dict[str, Callable[[], Tensor]] = {
        "module": lambda: layer(x),
        "operator": lambda: torch.ops.sq_cpu.linear.default(x, *arguments),
        "compiled": lambda: compiled(x),
        "empty": lambda: empty(x),
    }
    found = turns(calls, loop=50, rounds=rounds, tolerance=0.0)
    return {"subject": f"{size}x{size}", "scheme": scheme, "smoothing": smoothed, **found}


def of_decoder(layers: int, scheme: str, rounds: int) -> dict[str, Any]:
    """Measure the step of a decoder of SmolLM2's width: one token, no history."""
    torch._dynamo.reset()
    config = LlamaConfig(
        vocab_size=1024,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, linear in quantizable_linears(model, ("lm_head",)).items():
        smoothing = torch.rand(linear.weight.shape[1]) + 0.5
        input_range = (-4.0, 4.0) if scheme == "O3" else None
        layer = QuantLinear.from_float(linear, Scheme.of(scheme), input_range, smoothing=smoothing)
        model.set_submodule(name, layer)
    ids = torch.tensor([[7]])

    def step(ids: Tensor) -> Tensor:
        logits: Tensor = model(ids, use_cache=False).logits
        return logits

    compiled: Any = torch.compile(step, fullgraph=True)
    calls = {"module": lambda: step(ids), "compiled": lambda: compiled(ids)}
    # inductor's float steps round otherwise, and a code may then be the next one.
    found = turns(calls, loop=2, rounds=rounds, tolerance=2e-2)
    return {"subject": f"decoder, {layers} blocks", "scheme": scheme, "smoothing": True, **found}


def main(
    rounds: Annotated[int, typer.Option(min=2, help="Rounds to take the medians of.")] = 60,
    threads: Annotated[int, typer.Option(min=1, help="Threads.")] = 1,
    blocks: Annotated[int, typer.Option(min=1, help="Blocks of the decoder.")] = 6,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print microseconds a call, M = 1: module call, operator, and compiled by inductor."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    cases = [
        (size, smoothed, scheme)
        for size in SIZES
        for smoothed, scheme in ((False, "O1"), (True, "O1"), (True, "O3"))
    ]
    with torch.no_grad():
        rows = [of_layer(*each, rounds) for each in track(cases, "measuring")]
        rows += [of_decoder(blocks, scheme, rounds) for scheme in ("O1", "O3")]
    if as_json:
        facts = machine.facts() | {"threads": threads}
        typer.echo(json.dumps({"machine": facts, "rows": rows}, indent=1))
        return
    print(machine.headline())
    table = Table("subject", "scheme", "s", title="us a call, M = 1; in brackets: of the module's")
    names = ("module", "operator", "compiled", "empty")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        cells = [
            f"{row['us'][name]:.1f}"
            + (f" ({row['ratio'][name]:.2f})" if name in row["ratio"] else "")
            if name in row["us"]
            else ""
            for name in names
        ]
        smoothing = "yes" if row["smoothing"] else ""
        table.add_row(row["subject"], row["scheme"], smoothing, *cells)
    machine.make_console().print(table)


if __name__ == "__main__":
    typer.run(main)
