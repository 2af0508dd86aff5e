"""Time the linear op against its peers without pytest, for machines with little time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from harness import numbers, print_table, rotation_bytes, write_results
from linear_op import SUBJECT, sweep
from rich.progress import track
from shapes import QUICK, ROWS, SHAPES


def main(
    quick: Annotated[
        bool, typer.Option(help="Two shapes, cold weights only: under 90 seconds.")
    ] = False,
    models: Annotated[str, typer.Option(help="Models to take shapes from.")] = ",".join(SHAPES),
    rows: Annotated[str, typer.Option(help="Values of M.")] = ",".join(map(str, ROWS)),
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "1,all",
    weights: Annotated[
        str | None, typer.Option(help="cold, warm or cold,warm (default; quick: cold).")
    ] = None,
    budget: Annotated[float, typer.Option(help="Seconds a configuration.")] = 2.0,
    rotate_mb: Annotated[
        int | None, typer.Option(help="Weights to rotate through; default: 4 times the cache.")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder of the JSON file.")] = Path(__file__).parent
    / "results",
) -> None:
    """Print a table and write results/<cpu>-<date>.json."""
    shapes = QUICK if quick else SHAPES
    weights = weights or ("cold" if quick else "cold,warm")
    states = [state == "warm" for state in weights.split(",")]
    selected = {model: shapes[model] for model in models.split(",")}
    counts, thread_counts = numbers(rows), numbers(threads)
    total = len(counts) * len(thread_counts) * len(states) * sum(map(len, selected.values()))
    results = list(
        track(
            sweep(
                selected,
                counts,
                thread_counts,
                rotation=rotation_bytes(rotate_mb),
                budget=0.3 if quick else budget,
                warm=states,
            ),
            "measuring",
            total=total,
        )
    )
    print_table("linear op", results, SUBJECT)
    print(f"wrote {write_results('linear', results, output)}")


if __name__ == "__main__":
    typer.run(main)
