"""Tokens a second of whole models as a user runs them, ours beside its peers, in one run.

Every variant has a process of its own (`worker.py`), for each thread count a fresh one; they take
turns. Two files of --out are compared by --compare: before and after a change.
"""

from __future__ import annotations

import datetime
import json
import multiprocessing
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import machine
import model_tables
import transformers
import typer
from model_files import SHAPES, Files, prepare, recipe_of
from whole_model import (
    KINDS,
    LEAST_COSINE,
    LEAST_LIKELIHOOD,
    Row,
    Settings,
    measure,
    say,
)

import sq_cpu
from sq_cpu.files import write_file


def prepare_apart(name: str, settings: Settings, folder: Path) -> Files:
    """Write a model's files in a process of its own, whose memory ends with it."""
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            arguments = (name, settings.layers, settings.schemes, settings.kinds, folder)
            return pool.submit(prepare, *arguments).result()
    except BrokenProcessPool:
        raise sq_cpu.SqCpuError(
            f"the process that makes {name} died; is there memory for it?"
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


def unplaced(word: str) -> str:
    """Return the name of what an absolute path leads to; another word as it is."""
    return Path(word).name if os.path.isabs(word) else word


def describe_run(label: str | None, settings: Settings) -> Row:
    prefixes = ("OMP_", "GOMP_", "KMP_", "SQ_CPU_", "LD_PRELOAD")
    return {
        "benchmark": "model",
        "label": label,
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["python", *map(unplaced, sys.argv)]),
        "commit": commit(),
        "machine": machine.facts() | {"transformers": transformers.__version__},
        "openmp": openmp_runtimes(),
        "environment": {k: unplaced(v) for k, v in os.environ.items() if k.startswith(prefixes)},
        "settings": asdict(settings),
        "processes": [],
        "rows": [],
    }


def read(path: Path) -> Row:
    """Read what --out wrote."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise sq_cpu.SqCpuError(f"cannot read {path}: {error}") from None
    if not isinstance(content, dict) or content.get("benchmark") != "model":
        raise sq_cpu.SqCpuError(f"{path} is no file of bench/run_model.py --out")
    return content


def check(names: Sequence[str], threads: Sequence[int], settings: Settings) -> None:
    """Refuse what would fail after minutes."""
    cores = len(os.sched_getaffinity(0))
    if min(threads) < 1 or max(threads) > cores:
        raise sq_cpu.SqCpuError(f"--threads must be 1 to {cores}, the cores of this process")
    for option in ("rows", "prompts", "contexts"):
        if min(getattr(settings, option)) < 1:
            raise sq_cpu.SqCpuError(f"--{option} must be at least 1")
    for kind in settings.kinds:
        if kind not in KINDS:
            raise sq_cpu.SqCpuError(f"--variants has {kind}; they are {', '.join(KINDS)}")
    for scheme in settings.schemes:
        recipe_of(scheme)
    for name in names:
        if name in SHAPES:
            continue
        if not (Path(name) / "config.json").is_file():
            raise sq_cpu.SqCpuError(
                f"{name}: no model's folder, and no shape of {', '.join(SHAPES)}"
            )
        if settings.layers is not None:
            raise sq_cpu.SqCpuError("--layers is for shapes; a model in a folder has its own")


def measure_all(
    names: Sequence[str],
    threads: Sequence[int],
    settings: Settings,
    budget: float,
    run: Row,
    out: Path | None,
) -> None:
    """Measure every model with every thread count into `run`, and write that after each row."""

    def keep(section: str, row: Row) -> None:
        run[section].append(row)
        if out is not None:
            write_file(out, json.dumps(run, indent=1) + "\n")

    todo = len(names) * len(threads)
    end = time.monotonic() + budget
    for name in names:
        with tempfile.TemporaryDirectory(prefix="sq_cpu-bench-") as scratch:
            say(f"{name}: making its files")
            files = prepare_apart(name, settings, Path(scratch))
            for count in threads:
                say(f"{name}, {count} threads ({todo} to go)")
                share = max(0.0, end - time.monotonic()) / todo
                arguments = (unplaced(name), files, count, settings, share, Path(scratch))
                keep("processes", measure(*arguments, partial(keep, "rows")))
                todo -= 1


def main(
    shapes: Annotated[str, typer.Option(help="Of random models.")] = "smollm2-135m,llama-1b",
    model: Annotated[
        Path | None, typer.Option(help="Folder of a causal LM, in place of the shapes.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="Decoder blocks of the shapes; default: their own.")
    ] = None,
    variants: Annotated[str, typer.Option(help="What to measure.")] = ",".join(KINDS),
    schemes: Annotated[str, typer.Option(help="Such as O1,O3, or O3,O3-plain.")] = "O3",
    threads: Annotated[str, typer.Option(help='Thread counts; "all" for every core.')] = "all",
    rows: Annotated[str, typer.Option(help="Sequences decoded at once.")] = "1,16",
    prompts: Annotated[str, typer.Option(help="Tokens of a prefill.")] = "512",
    contexts: Annotated[str, typer.Option(help="Tokens before the decoded ones.")] = "128",
    tokens: Annotated[int, typer.Option(min=1, help="Decoding steps of a timed call.")] = 16,
    budget: Annotated[float, typer.Option(min=0, help="Seconds for all.")] = 300,
    limit: Annotated[
        float, typer.Option(min=1, help="Seconds until a variant's process must have answered.")
    ] = 300,
    least_cosine: Annotated[
        float, typer.Option(help="Of a variant's logits with fp32's; one below is not reported.")
    ] = LEAST_COSINE,
    least_likelihood: Annotated[
        float, typer.Option(help="Of its text to fp32: 0 is a random text, 1 fp32's own.")
    ] = LEAST_LIKELIHOOD,
    label: Annotated[str | None, typer.Option(help="Of the build, for --compare.")] = None,
    out: Annotated[Path | None, typer.Option(help="The JSON file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="A picture of it, .png or .svg.")] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="BEFORE AFTER", help="Compare two files of --out; measure nothing."),
    ] = None,
) -> None:
    """Print tokens/s of whole models beside their peers; --out is written after every row."""
    try:
        if compare is not None:
            model_tables.print_comparison(*map(read, compare))
            return
        settings = Settings(
            layers=layers,
            kinds=tuple(variants.split(",")),
            schemes=tuple(schemes.split(",")),
            prompts=tuple(machine.numbers(prompts)),
            contexts=tuple(machine.numbers(contexts)),
            tokens=tokens,
            rows=tuple(machine.numbers(rows)),
            least_cosine=least_cosine,
            least_likelihood=least_likelihood,
            limit=limit,
        )
        names = shapes.split(",") if model is None else [str(model)]
        counts = machine.numbers(threads)
        check(names, counts, settings)
        if plot is not None:
            model_tables.check_plot(plot)
        run = describe_run(label, settings)
        measure_all(names, counts, settings, budget, run, out)
        print(machine.headline() + ("" if label is None else f", {label}"))
        model_tables.print_processes(run["processes"])
        model_tables.print_rows(run["rows"])
        if plot is not None:
            model_tables.plot(run["rows"], plot)
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    refused = [
        f"{', '.join(model_tables.names_of(row))} rows, {name}: {reason}"
        for row in run["rows"]
        for name, reason in row["refused"].items()
    ]
    for line in refused:
        typer.echo(f"error: {line}", err=True)
    if refused:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(main)
