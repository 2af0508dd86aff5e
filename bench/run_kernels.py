"""Time every microkernel that runs here, each in the linear op of one shape.

The rows are those of cpp/kernels.inc: a new one is measured as soon as it can be chosen.
"""

from __future__ import annotations

import json
from typing import Annotated

import peak
import torch
import typer
from harness import Candidate, interleave
from machine import facts, headline, make_console, numbers
from rich.table import Table
from torch import nn

from sq_cpu.kernels import _core
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme


def main(
    shape: Annotated[str, typer.Option(help="N x K of the weight.")] = "4096x4096",
    rows: Annotated[str, typer.Option(help="Values of M.")] = "1,4,16,256",
    budget: Annotated[float, typer.Option(help="Seconds a kernel and M.")] = 1.0,
    json_: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print GOPS of one thread with warm weights, and the share of each instruction set's peak."""
    n, k = (int(size) for size in shape.split("x"))
    torch.set_num_threads(1)
    peaks = peak.measure(1)
    before = _core.isa()["in_use"]
    cases = [
        (isa, reduce_range, m)
        for isa, status in _core.isa()["isas"].items()
        for reduce_range in (False, True)
        for m in numbers(rows)
        if status["usable"] and isa != "reference"
    ]
    layers = {
        reduce_range: QuantLinear.from_float(
            nn.Linear(k, n).requires_grad_(False), Scheme(reduce_range=reduce_range)
        )
        for reduce_range in (False, True)
    }
    results = []
    seen = set()
    try:
        for isa, reduce_range, m in track(cases, "measuring"):
            _core.use_isa(isa, False)
            name = _core.microkernel_name(127 if reduce_range else 255, m)
            if (name, m) in seen:
                continue  # the same kernel serves both grids, or both instruction sets
            seen.add((name, m))
            layer, x = layers[reduce_range], torch.randn(m, k).bfloat16()
            candidate = Candidate(lambda _, layer=layer, x=x: layer(x))
            with torch.inference_mode():
                seconds = interleave({name: candidate}, warm=True, budget=budget)[name].median
            gops = 2 * m * n * k / seconds / 1e9
            top = next(peaks[isa] for isa in peak.ISAS if name.endswith(isa))
            results.append({"kernel": name, "m": m, "gops": gops, "peak_percent": 100 * gops / top})
    finally:
        _core.use_isa(before, False)
    if json_:
        print(json.dumps({"machine": facts(), "peaks": peaks, "shape": shape, "rows": results}))
        return
    console = make_console()
    console.print(headline())
    table = Table("microkernel", "M", "GOPS", "% of peak", title=f"{shape}, one thread, warm")
    for row in results:
        figures = (f"{row['gops']:.0f}", f"{row['peak_percent']:.0f}")
        table.add_row(row["kernel"], str(row["m"]), *figures)
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
