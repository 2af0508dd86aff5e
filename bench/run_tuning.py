"""What an alpha per layer gains: `tune` beside every uniform alpha and Neural Compressor's way.

And `autotune`: which layers have to be quantized otherwise, or not at all, for a goal.
"""

from __future__ import annotations

import copy
import gc
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import machine
import psutil
import torch
import typer
import zoo
from results import ResultFile, Row
from rich.table import Table
from transformers.utils import logging

import sq_cpu
from sq_cpu import Calibration, Scheme, SmoothPlan, texts
from sq_cpu.calibrate import TUNING_ROWS
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluate import TextPerplexity
from sq_cpu.progress import track

FLOAT, TUNE, INC, AUTOTUNE = "fp32", "tune", "inc", "autotune"


class Cost:
    """Seconds of a block, and the most memory that it held beyond what there was, in MB."""

    seconds = 0.0
    peak_mb = 0.0


@contextmanager
def measured() -> Iterator[Cost]:
    """Run a block and fill in its cost; a thread looks at the memory fifty times a second."""
    cost, done = Cost(), threading.Event()
    resident = psutil.Process().memory_info
    gc.collect()
    before = resident().rss

    def watch() -> None:
        while not done.wait(0.02):
            cost.peak_mb = max(cost.peak_mb, (resident().rss - before) / 1e6)

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        cost.seconds = round(time.perf_counter() - start, 1)
        done.set()
        thread.join()
        cost.peak_mb = round(cost.peak_mb)


@dataclass
class Bench:
    """One model; what several variants need is made once."""

    subject: zoo.Subject
    scheme: Scheme
    goal: str
    _calibration: Calibration | None = None
    _calibrated: Cost | None = None

    def calibration(self) -> Calibration:
        """Return the one calibration of all variants."""
        if self._calibration is None:
            with measured() as self._calibrated:
                self._calibration = sq_cpu.calibrate(
                    self.subject.model,
                    self.subject.batches,
                    ignore=self.subject.ignore,
                    gradient_rows=TUNING_ROWS,
                )
        return self._calibration

    def run(self, variant: str) -> Row:
        """Measure a variant: a name, or a uniform alpha in digits."""
        row: Row = {"model": self.subject.name, "variant": variant}
        model = self.subject.model
        if variant != FLOAT:
            plan, facts = self._plan(variant)
            row |= facts
            model = copy.deepcopy(model)
            scheme = None if variant == AUTOTUNE else self.scheme
            sq_cpu.quantize(model, self.calibration(), plan, scheme=scheme)
        row["metrics"] = self.subject.score(model)
        return row | {"threads": torch.get_num_threads()}

    def _plan(self, variant: str) -> tuple[SmoothPlan, Row]:
        calibration, model = self.calibration(), self.subject.model
        makers: dict[str, Callable[[], SmoothPlan]] = {
            TUNE: lambda: sq_cpu.tune(model, calibration, scheme=self.scheme),
            INC: lambda: sq_cpu.tune(
                model, calibration, scheme=self.scheme, method="inc", batches=self.subject.batches
            ),
        }
        if variant == AUTOTUNE:
            return self._autotuned()
        if variant not in makers:
            return SmoothPlan.uniform(
                model, calibration, float(variant), ignore=self.scheme.ignore
            ), {}
        with measured() as cost:
            plan = makers[variant]()
        facts: Row = {"seconds": cost.seconds, "peak_mb": cost.peak_mb}
        if variant == TUNE and self._calibrated is not None:
            facts["calibration_seconds"] = self._calibrated.seconds
            facts["calibration_peak_mb"] = self._calibrated.peak_mb
        facts["alphas"] = {group.name: group.alpha for group in plan.groups}
        return plan, facts

    def _autotuned(self) -> tuple[SmoothPlan, Row]:
        """Autotune on a text that is neither calibrated on nor scored."""
        tokenizer = self.subject.tokenizer
        with tempfile.TemporaryDirectory() as folder, measured() as cost:
            found = sq_cpu.autotune(
                self.subject.model,
                self.calibration(),
                TextPerplexity(tokenizer, texts.selection(), zoo.WINDOW, zoo.SCORED),
                goal=self.goal,
                ignore=self.subject.ignore,
                storage=Path(folder) / "trials.db",
            )
        return found.plan, {
            "seconds": cost.seconds,
            "peak_mb": cost.peak_mb,
            "goal": self.goal,
            "goal_met": found.goal_met,
            "loss": found.loss,
            "milliseconds": [found.milliseconds, found.float_milliseconds],
            "evaluations": len(found.trials),
            "in_float": sorted(found.plan.in_float),
            "dynamic": sorted(
                layer.name for layer in found.plan.layers if layer.activations is not None
            ),
            "scheme": found.plan.scheme and found.plan.scheme.to_dict(),
        }


def _is_alpha(variant: str) -> bool:
    return variant[0].isdigit()


def tuning_table(rows: Sequence[Row]) -> Table:
    """Make a line for every model: float, the best uniform alpha, and what was tuned."""
    table = Table(title="perplexity (against fp32); s, MB: without and with the calibration")
    for heading in ("model", FLOAT, "best uniform alpha", TUNE, INC, AUTOTUNE):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {row["variant"]: row for row in rows if row["model"] == name}
        base = _perplexity(mine[FLOAT]) if FLOAT in mine else None
        uniform = [row for variant, row in mine.items() if _is_alpha(variant)]
        best = min(uniform, key=_perplexity, default=None)
        table.add_row(
            name,
            *(_cell(row, base) for row in (mine.get(FLOAT), best)),
            *(_cell(mine.get(variant), base) for variant in (TUNE, INC, AUTOTUNE)),
        )
    return table


def _perplexity(row: Row) -> float:
    return float(row["metrics"]["perplexity"])


def _cell(row: Row | None, base: float | None) -> str:
    if row is None:
        return "-"
    value, variant = _perplexity(row), row["variant"]
    text = f"{value:.2f}"
    if base is not None and variant != FLOAT:
        text += f" ({(value / base - 1) * 100:+.1f} %)"
    if _is_alpha(variant):
        text += f" at {variant}"
    if "seconds" in row:
        text += f", {row['seconds']:.0f} s, {row['peak_mb']:.0f} MB"
    if "calibration_seconds" in row:
        text += f" + {row['calibration_seconds']:.0f} s, {row['calibration_peak_mb']:.0f} MB"
    if "in_float" in row:
        text += f", {len(row['in_float'])} in float, {len(row['dynamic'])} dynamic"
    return text


def main(
    models: Annotated[str, typer.Option(help="Language models of the zoo.")] = (
        "smollm2-llama,gemma3-270m,opt-6m"
    ),
    variants: Annotated[
        str, typer.Option(help="Any of fp32, tune, inc and autotune.")
    ] = f"{FLOAT},{TUNE},{INC}",
    alphas: Annotated[str, typer.Option(help="Uniform alphas: LEAST:GREATEST:STEP.")] = "0:1:0.05",
    scheme: Annotated[str, typer.Option(help="Preset.")] = "O3",
    goal: Annotated[str, typer.Option(help="Of autotune.")] = "1%",
    trained: Annotated[
        Path | None, typer.Option(help="Folder of opt-6m, bloom-6m and gpt2-6m.")
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="Folder for converted models, and with packages/.")
    ] = zoo.CACHE,
    out: Annotated[
        Path | None, typer.Option(help="The JSON file; default: results/<cpu>-<date>.json.")
    ] = None,
    resume: Annotated[bool, typer.Option(help="Keep what the JSON file holds.")] = False,
) -> None:
    """Print a table and write a JSON file, which is whole after every measurement."""
    logging.disable_progress_bar()
    command = f"python bench/run_tuning.py --models {models} --variants {variants}"
    command += f" --alphas {alphas} --scheme {scheme}"
    least, greatest, step = map(float, alphas.split(":"))
    grid = [f"{least + k * step:.4g}" for k in range(int((greatest - least) / step + 1.001))]
    wanted = [*variants.split(","), *grid]
    try:
        results = ResultFile("tuning", out, resume=resume, sections={"commands": []})
        results.content["commands"] += [command]
        done = {(row["model"], row["variant"]) for row in results.rows}
        for name in models.split(","):
            todo = [variant for variant in wanted if (name, variant) not in done]
            if not todo:
                continue
            subject = zoo.load(name, zoo.Places(cache, trained))
            bench = Bench(subject, Scheme.of(scheme, ignore=subject.ignore), goal)
            for variant in track(todo, name):
                results.add(bench.run(variant))
                gc.collect()  # the copy, whose modules refer to one another
    except SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        typer.echo(f"interrupted: --out {results.path} --resume goes on", err=True)
        raise typer.Exit(130) from None
    console = machine.make_console()
    console.print(machine.headline())
    console.print(tuning_table(results.rows))
    print(f"wrote {results.path}")


if __name__ == "__main__":
    typer.run(main)
