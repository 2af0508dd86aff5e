"""What int8 costs real models: float beside naive and smoothed int8; a run can be resumed."""

from __future__ import annotations

import copy
import gc
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import machine
import torch
import typer
import zoo
from results import Out, ResultFile, Resume, Row
from rich.table import Table
from transformers.utils import logging

import sq_cpu
from sq_cpu import Calibration, Scheme, SmoothPlan
from sq_cpu.errors import SqCpuError
from sq_cpu.progress import track

FLOAT = "fp32"


@dataclass(frozen=True)
class Variant:
    """A way to quantize; `scheme` None: the float model, `alpha` None: not smoothed."""

    name: str
    scheme: Scheme | None = None
    alpha: float | None = None


def variants(schemes: Iterable[str], alpha: float, baselines: bool) -> list[Variant]:
    """List what every model is measured as, the float model first."""
    names = list(schemes)
    found = [Variant(FLOAT)]
    found += [Variant(f"naive {name}", Scheme.of(name)) for name in names]
    found += [Variant(f"smoothed {name}", Scheme.of(name), alpha) for name in names]
    if baselines:
        found += [
            Variant("LLM.int8()", Scheme.of("O1", outlier_threshold=6.0)),
            Variant("ZeroQuant", Scheme.of("O1", weights="per_rows")),
        ]
    return found


def key(row: Row) -> tuple[Any, ...]:
    """Tell measurements apart: a row with the same key need not be measured again."""
    return row["model"], row["variant"], row["alpha"]


def measure(subject: zoo.Subject, variant: Variant, calibration: Calibration | None) -> Row:
    """Quantize a copy of the model, score it, and tell what became of its linears."""
    start = time.perf_counter()
    row: Row = {"model": subject.name, "variant": variant.name, "alpha": variant.alpha}
    model = subject.model
    if variant.scheme is not None:
        assert calibration is not None
        scheme = Scheme.of(variant.scheme, ignore=subject.ignore)
        row["scheme"] = scheme.to_dict()
        try:
            model = _quantize(subject.model, scheme, variant.alpha, calibration)
        except SqCpuError as error:
            return row | {"error": str(error)}
        row |= _account(model)
    row["metrics"] = subject.score(model)
    return row | {"threads": torch.get_num_threads(), "seconds": time.perf_counter() - start}


def _quantize(
    model: torch.nn.Module, scheme: Scheme, alpha: float | None, calibration: Calibration
) -> torch.nn.Module:
    model = copy.deepcopy(model)
    plan = None
    if alpha is not None:
        plan = SmoothPlan.uniform(model, calibration, alpha, ignore=scheme.ignore)
    return sq_cpu.quantize(model, calibration, plan, scheme=scheme, smooth=plan is not None)


def _account(model: Any) -> Row:
    """Count the linears by what was done to them; `unfolded` tells why groups are not folded."""
    record = model.sq_cpu_config
    groups = record.plan.groups if record.plan else ()
    return {
        "linears": len(record.layers),
        "kept": dict(Counter(record.kept.values())),
        "folded": sum(group.fold for group in groups),
        "rotated": {
            "at_run_time": len(record.hadamard),
            "in_weights": sum(group.hadamard_fold != 0 for group in groups),
        },
        "unfolded": dict(Counter(group.note for group in groups if not group.fold)),
    }


def accuracy_table(rows: Sequence[Row]) -> Table:
    """Make a line for every model and metric, a column for every variant.

    A measurement with another alpha than the first one of its kind has a column of its own.
    """
    columns = {(row["variant"], row["alpha"]): None for row in rows}
    table = Table(title="accuracy; in brackets: perplexity against fp32")
    table.add_column("")
    table.add_column("metric")
    for variant, alpha in columns:
        heading = variant if alpha is None else f"{variant}, alpha {alpha:g}"
        table.add_column(heading, justify="right")
    by_key = {key(row): row for row in rows}
    for name in dict.fromkeys(row["model"] for row in rows):
        base = by_key.get((name, FLOAT, None), {}).get("metrics", {})
        metrics = dict.fromkeys(
            metric for row in rows if row["model"] == name for metric in row.get("metrics", {})
        )
        for metric in metrics:
            cells = [_cell(by_key.get((name, *column)), metric, base) for column in columns]
            table.add_row(name, metric, *cells)
    return table


def _cell(row: Row | None, metric: str, base: dict[str, float]) -> str:
    if row is None:
        return "-"
    if "error" in row:
        return "error"
    value = row["metrics"][metric]
    if metric == "perplexity" and row["variant"] != FLOAT and metric in base:
        return f"{value:.2f} ({(value / base[metric] - 1) * 100:+.1f} %)"
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.4f}"


def main(
    models: Annotated[str, typer.Option(help="Models of the zoo.")] = ",".join(zoo.SUBJECTS),
    schemes: Annotated[str, typer.Option(help="Presets.")] = "O1,O2,O3",
    alpha: Annotated[float, typer.Option(help="Migration strength of the smoothed ones.")] = 0.8,
    baselines: Annotated[bool, typer.Option(help="LLM.int8() and ZeroQuant, too.")] = False,
    trained: zoo.Trained = None,
    cache: zoo.Cache = zoo.CACHE,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Print a table and write a JSON file, which is whole after every measurement."""
    logging.disable_progress_bar()
    # Without folders and files, which are this machine's own.
    command = (
        f"python bench/run_accuracy.py --models {models} --schemes {schemes} --alpha {alpha:g}"
    )
    command += " --baselines" * baselines
    names = models.split(",")
    try:
        wanted = variants(schemes.split(","), alpha, baselines)
        results = ResultFile("accuracy", out, resume=resume, sections={"commands": []})
        results.content["commands"] += [command]
        # What failed is tried again.
        results.content["rows"] = [row for row in results.rows if "error" not in row]
        done = {key(row) for row in results.rows}
        for name in names:
            todo = [v for v in wanted if (name, v.name, v.alpha) not in done]
            if todo:
                _measure_all(zoo.load(name, zoo.Places(cache, trained)), todo, results)
    except SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted: --out {results.path} --resume goes on", err=True)
        raise typer.Exit(130) from None
    console = machine.make_console()
    console.print(machine.headline())
    console.print(accuracy_table(results.rows))
    failed = [row for row in results.rows if "error" in row]
    for row in failed:
        console.print(f"{row['model']}, {row['variant']}: {row['error']}")
    print(f"wrote {results.path}")
    if failed:
        raise typer.Exit(1)


def _measure_all(subject: zoo.Subject, todo: Sequence[Variant], results: ResultFile) -> None:
    calibration = None
    if any(variant.scheme is not None for variant in todo):
        calibration = sq_cpu.calibrate(subject.model, subject.batches, ignore=subject.ignore)
    for variant in track(todo, subject.name):
        results.add(measure(subject, variant, calibration))
        gc.collect()  # the copy, whose modules refer to one another


if __name__ == "__main__":
    typer.run(main)
