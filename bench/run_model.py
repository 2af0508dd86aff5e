"""Tokens a second of whole models, int8 beside torch's fp32 and bf16; before and after a change.

A model alternates shapes, and our linears with torch's own operators, which the time of one linear
alone does not show. Every thread count has a process of its own, as an OpenMP pool that once had
another size is no fresh one.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import machine
import transformers
import typer
from rich.table import Table
from whole_model import BF16, FLOATS, LEAST_COSINE, SHAPES, Row, Settings, measure, say

import sq_cpu


def measure_apart(name: str, threads: int, settings: Settings, seconds: float) -> list[Row]:
    """Measure in a process of its own, not a forked one: that would lack the pool's threads."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(measure, name, threads, settings, seconds).result()
    except BrokenProcessPool:
        raise sq_cpu.SqCpuError(
            f"the process of {name} with {threads} threads died; is there memory for it?"
        ) from None


def commit() -> str | None:
    """Return what git says of the sq_cpu in use; None where it is in no repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(sq_cpu.__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("describe", "--always", "--dirty", "--abbrev=12", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def openmp_runtimes() -> list[str]:
    """Return the OpenMP libraries that this process has loaded; its children load the same."""
    paths = Path("/proc/self/maps").read_text(encoding="utf-8").split()
    names = {Path(path).name for path in paths if path.startswith("/")}
    return sorted(name for name in names if name.startswith(("libgomp", "libiomp", "libomp")))


def describe_run(label: str | None, settings: Settings) -> Row:
    prefixes = ("OMP_", "GOMP_", "KMP_", "SQ_CPU_", "LD_PRELOAD")
    return {
        "benchmark": "model",
        "label": label,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
        "machine": machine.facts() | {"transformers": transformers.__version__},
        "openmp": openmp_runtimes(),
        "environment": {k: v for k, v in os.environ.items() if k.startswith(prefixes)},
        "settings": asdict(settings),
        "rows": [],
    }


def _table(headings: Iterable[str], title: str) -> Table:
    table = Table("model", "layers", "threads", "work", "rows", "variant", title=title)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def _names(row: Row) -> tuple[str, ...]:
    """Return the cells that say what was measured."""
    work = f"prefill {row['prompt']}" if row["work"] == "prefill" else "decode"
    numbers = (row["layers"], row["threads"], work, row["rows"])
    return (Path(row["model"]).name, *map(str, numbers))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_rows(rows: Iterable[Row]) -> None:
    headings = ("tokens/s (p10-p90)", "rounds", "/ bf16", "/ fp32", "weights GB/s", "cosine")
    table = _table(headings, "medians; / bf16, / fp32: the speed of int8 over that of torch")
    for row in rows:
        for name, found in row["variants"].items():
            speed, ratio = found["tokens_per_second"], row["ratio"].get(name, {})
            table.add_row(
                *_names(row),
                name,
                f"{speed['median']:.1f} ({speed['p10']:.1f}-{speed['p90']:.1f})",
                str(found["seconds"]["rounds"]),
                *(_cell(ratio.get(peer), ".2f") for peer in reversed(FLOATS)),
                _cell(found["weight_gb_per_second"], ".1f"),
                f"{found['cosine']:.4f}",
            )
        table.add_section()
    machine.make_console().print(table)


def read(path: Path) -> Row:
    """Read what --out wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise sq_cpu.SqCpuError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or content.get("benchmark") != "model":
        raise sq_cpu.SqCpuError(f"{path} is no file of bench/run_model.py --out")
    return content


def print_comparison(before: Row, after: Row) -> None:
    """Print the speeds that both runs have; how alike the machines were is told by the floats'."""
    for name, run in (("before", before), ("after", after)):
        known = run["machine"]
        versions = ", ".join(f"{key} {known[key]}" for key in ("isa", "torch", "transformers"))
        label = "" if run["label"] is None else f"{run['label']}, "
        print(f"{name}: {label}commit {run['commit']}, {known['cpu']}, {versions}")

    def key(row: Row) -> tuple[object, ...]:
        return (*_names(row), row.get("context"), row.get("steps"))

    headings = ("before tokens/s", "after tokens/s", "after / before", "/ bf16 before", "after")
    table = _table(headings, "medians; / bf16: the speed of int8 over that of bf16 in the same run")
    old_rows = {key(row): row for row in before["rows"]}
    for row in after["rows"]:
        old = old_rows.get(key(row), {"variants": {}})
        for name in row["variants"]:
            if name not in old["variants"]:
                continue
            was, now = (
                each["variants"][name]["tokens_per_second"]["median"] for each in (old, row)
            )
            ratios = [each["ratio"].get(name, {}).get(BF16) for each in (old, row)]
            cells = (f"{was:.1f}", f"{now:.1f}", f"{now / was:.2f}")
            table.add_row(*_names(row), name, *cells, *(_cell(ratio, ".2f") for ratio in ratios))
        table.add_section()
    if not table.rows:
        raise sq_cpu.SqCpuError("the two files have nothing in common: measure the same models")
    machine.make_console().print(table)


def check(names: Sequence[str], threads: Sequence[int], settings: Settings) -> None:
    """Refuse what would fail after minutes."""
    cores = len(os.sched_getaffinity(0))
    if min(threads) < 1 or max(threads) > cores:
        raise sq_cpu.SqCpuError(f"--threads must be 1 to {cores}, the cores of this process")
    if min(settings.rows) < 1:
        raise sq_cpu.SqCpuError("--rows must be at least 1")
    for scheme in settings.schemes:
        sq_cpu.Scheme.of(scheme)
    for name in names:
        if name in SHAPES:
            continue
        if not (Path(name) / "config.json").is_file():
            raise sq_cpu.SqCpuError(
                f"{name}: no model's folder, and no shape of {', '.join(SHAPES)}"
            )
        if settings.layers is not None:
            raise sq_cpu.SqCpuError("--layers is for shapes; a model in a folder has its own")


def main(
    shapes: Annotated[str, typer.Option(help="Of random models.")] = ",".join(SHAPES),
    model: Annotated[
        Path | None, typer.Option(help="Folder of a causal LM, in place of the shapes.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder blocks of the shapes; default: their own.")
    ] = None,
    schemes: Annotated[str, typer.Option(help="Of the int8 models, such as O1,O3.")] = "O3",
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "all",
    rows: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,16",
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prefill.")] = 512,
    context: Annotated[int, typer.Option(min=1, help="Tokens before the decoded ones.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Decoding steps of a timed call.")] = 8,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for all.")] = 300,
    least_cosine: Annotated[
        float, typer.Option(help="Of a variant's logits with fp32's; one below is not reported.")
    ] = LEAST_COSINE,
    fused: Annotated[
        bool, typer.Option("--fused", help="Measure int8 as one native call, too.")
    ] = False,
    label: Annotated[str | None, typer.Option(help="Of the build, for --compare.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two files of --out; measure nothing."),
    ] = None,
) -> None:
    """Print tokens/s of whole models, int8 beside torch; --out is written after every process."""
    try:
        if compare is not None:
            print_comparison(*map(read, compare))
            return
        settings = Settings(
            layers=layers,
            schemes=tuple(schemes.split(",")),
            prompt=prompt,
            context=context,
            tokens=tokens,
            rows=tuple(machine.numbers(rows)),
            least_cosine=least_cosine,
            fused=fused,
        )
        names = shapes.split(",") if model is None else [str(model)]
        counts = machine.numbers(threads)
        check(names, counts, settings)
        run = describe_run(label, settings)
        todo = [(name, count) for name in names for count in counts]
        end = time.monotonic() + budget
        for done, (name, count) in enumerate(todo):
            say(f"{name}, {count} threads ({done + 1} of {len(todo)})")
            share = max(0.0, end - time.monotonic()) / (len(todo) - done)
            run["rows"] += measure_apart(name, count, settings, share)
            if out is not None:
                out.write_text(json.dumps(run, indent=1) + "\n", encoding="utf-8")
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    print(machine.headline() + ("" if label is None else f", {label}"))
    print_rows(run["rows"])
    refused = [
        f"{', '.join(_names(row))} rows, {name}: {reason}"
        for row in run["rows"]
        for name, reason in row["refused"].items()
    ]
    for line in refused:
        typer.echo(f"error: {line}", err=True)
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
