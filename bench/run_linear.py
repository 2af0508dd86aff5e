"""Time the linear op against its peers without pytest; an interrupted run can be resumed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Annotated

import typer
from linear_op import LinearOp, measure, rotation_bytes
from machine import numbers
from results import Results
from shapes import MODELS, QUICK, QUICK_ROWS, ROWS, shapes_of

from sq_cpu.errors import SqCpuError
from sq_cpu.progress import track


def main(
    quick: Annotated[
        bool, typer.Option(help="Two shapes, fewer rows, cold weights: under 90 seconds.")
    ] = False,
    models: Annotated[str, typer.Option(help="Models to take shapes from.")] = ",".join(MODELS),
    rows: Annotated[str | None, typer.Option(help="Values of M.")] = None,
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "1,all",
    weights: Annotated[
        str | None, typer.Option(help="cold, warm or cold,warm (default; quick: cold).")
    ] = None,
    budget: Annotated[float | None, typer.Option(help="Seconds a configuration.")] = None,
    rotate_mb: Annotated[
        int | None,
        typer.Option(help="Weights each candidate rotates through; default: twice the cache."),
    ] = None,
    json: Annotated[
        Path | None, typer.Option(help="The JSON file; default: results/<cpu>-<date>.json.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep what the JSON file holds.")] = False,
) -> None:
    """Print tables and write a JSON file, which is whole after every row."""
    counts = numbers(rows) if rows else (QUICK_ROWS if quick else ROWS)
    thread_counts = numbers(threads)
    states = [
        state == "warm" for state in (weights or ("cold" if quick else "cold,warm")).split(",")
    ]
    try:
        shapes = QUICK if quick else shapes_of(models.split(","))
        results = Results("linear", json, resume=resume)
    except SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    done = {
        (row["n"], row["k"], row["m"], row["threads"], row["weights"] == "warm")
        for row in results.rows
    }
    todo = [
        (shape, m, count, warm)
        for shape, m, count, warm in itertools.product(shapes, counts, thread_counts, states)
        if (*shape, m, count, warm) not in done
    ]
    try:
        if todo:
            results.measure_peaks(thread_counts)
        op: LinearOp | None = None
        for shape, m, count, warm in track(todo, "measuring"):
            if op is None or op.shape != shape:
                op = None  # frees its copies before the next ones are made
                op = LinearOp(shape, rotation_bytes(rotate_mb))
            op.prepare(m)
            results.add(
                measure(op, threads=count, warm=warm, budget=budget or (0.3 if quick else 2.0))
            )
        if todo:
            results.measure_peaks(thread_counts)
            results.write()
    except KeyboardInterrupt:
        if results.rows:
            results.print_tables()
            typer.echo(f"interrupted: --json {results.path} --resume goes on", err=True)
        raise typer.Exit(130) from None
    results.print_tables()


if __name__ == "__main__":
    typer.run(main)
