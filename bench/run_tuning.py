"""What an alpha per layer gains: `tune` beside every uniform alpha and Neural Compressor's way.

And `autotune`: which layers have to be quantized otherwise, or not at all, for a goal. Perplexity
has a standard error, as tokens differ; much of it is common to two variants of a model, so what is
compared is the difference in each window.
"""

from __future__ import annotations

import copy
import gc
import statistics
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import machine
import psutil
import torch
import typer
import zoo
from results import Out, ResultFile, Resume, Row
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers.utils import logging

import sq_cpu
from sq_cpu import Calibration, Scheme, SmoothPlan, texts
from sq_cpu.calibration.calibrate import TUNING_ROWS
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import TextPerplexity, token_windows
from sq_cpu.progress import track

FLOAT, TUNE, SEQUENTIAL, INC, AUTOTUNE = "fp32", "tune", "sequential", "inc", "autotune"
VARIANTS = FLOAT, TUNE, SEQUENTIAL, INC, AUTOTUNE


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


@torch.no_grad()
def window_losses(model: Any, windows: Sequence[Tensor]) -> list[float]:
    """Return each window's mean negative log-likelihood of its tokens but the first, in nats."""
    losses = []
    for ids in windows:
        logits = model(ids).logits[0, :-1].float()
        losses.append(round(float(cross_entropy(logits, ids[0, 1:])), 6))
    return losses


@dataclass
class Bench:
    """One model; what several variants need is made once."""

    subject: zoo.Subject
    scheme: Scheme
    goal: str
    windows: Sequence[Tensor]
    """Scored, beside the few of the subject's own score."""
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
            # autotune's plan has a scheme of its own.
            scheme = self.scheme if plan is None or plan.scheme is None else None
            sq_cpu.quantize(model, self.calibration(), plan, scheme=scheme)
        row["metrics"] = self.subject.score(model)
        row["losses"] = window_losses(model, self.windows)
        return row | {"threads": torch.get_num_threads()}

    def _plan(self, variant: str) -> tuple[SmoothPlan, Row]:
        calibration, model = self.calibration(), self.subject.model
        makers: dict[str, Callable[[], SmoothPlan]] = {
            TUNE: lambda: sq_cpu.tune(model, calibration, scheme=self.scheme),
            SEQUENTIAL: lambda: sq_cpu.tune(
                model,
                calibration,
                scheme=self.scheme,
                sequential=True,
                batches=self.subject.batches,
            ),
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
        facts["outliers"] = {
            layer.name: list(layer.outliers) for layer in plan.layers if layer.outliers
        }
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


def _known(variants: str) -> list[str]:
    names = [name for name in variants.split(",") if name]
    for name in names:
        if name not in VARIANTS:
            raise SqCpuError(f"no variant {name}; known: {', '.join(VARIANTS)}")
    return names


def _grid(alphas: str) -> list[str]:
    try:
        least, greatest, step = map(float, alphas.split(":"))
        return [f"{least + k * step:.4g}" for k in range(int((greatest - least) / step + 1.001))]
    except (ValueError, ZeroDivisionError):
        raise SqCpuError(f"--alphas {alphas} is not LEAST:GREATEST:STEP, as 0:1:0.05") from None


def _is_alpha(variant: str) -> bool:
    return variant[0].isdigit()


def tuning_table(rows: Sequence[Row]) -> Table:
    """Make a line for every variant of every model, uniform alphas but the best left out."""
    windows = max((len(row["losses"]) for row in rows), default=0)
    table = Table(title=f"loss in nats: over {windows} windows, with standard errors")
    for heading in (
        "model",
        "variant",
        "perplexity",
        "loss above fp32",
        "above the best uniform",
        "seconds, MB",
        "calibration",
        "",
    ):
        left = heading in ("model", "variant", "")
        table.add_column(heading, justify="left" if left else "right")
    for name in dict.fromkeys(row["model"] for row in rows):
        mine = {row["variant"]: row for row in rows if row["model"] == name}
        uniform = [row for variant, row in mine.items() if _is_alpha(variant)]
        best = min(uniform, key=lambda row: statistics.mean(row["losses"]), default=None)
        base = mine.get(FLOAT)
        shown = [row for variant, row in mine.items() if not _is_alpha(variant) or row is best]
        for row in shown:
            perplexity = row["metrics"]["perplexity"]
            text = f"{perplexity:.2f}"
            if base is not None and row is not base:
                text += f" ({(perplexity / base['metrics']['perplexity'] - 1) * 100:+.1f} %)"
            variant = f"uniform {row['variant']}" if row is best else row["variant"]
            above_best = "" if row is base else _above(row, best)
            table.add_row(name, variant, text, _above(row, base), above_best, *_facts(row))
    return table


def _above(row: Row, other: Row | None) -> str:
    if other is None or row is other:
        return ""
    off = [a - b for a, b in zip(row["losses"], other["losses"], strict=True)]
    return f"{statistics.mean(off):+.4f} +- {statistics.stdev(off) / len(off) ** 0.5:.4f}"


def _facts(row: Row) -> tuple[str, str, str]:
    cost, before = "", ""
    if "seconds" in row:
        cost = f"{row['seconds']:.0f}, {row['peak_mb']:.0f}"
    if "calibration_seconds" in row:
        before = f"{row['calibration_seconds']:.0f}, {row['calibration_peak_mb']:.0f}"
    if "in_float" not in row:
        channels = sum(map(len, row.get("outliers", {}).values()))
        return cost, before, f"{channels} channels in float" if channels else ""
    return (
        cost,
        before,
        (
            f"{len(row['in_float'])} in float, {len(row['dynamic'])} dynamic, "
            f"{row['evaluations']} evaluations, {'met' if row['goal_met'] else 'not met'}"
        ),
    )


def main(
    models: Annotated[str, typer.Option(help="Language models of the zoo.")] = (
        "smollm2-llama,gemma3-270m,opt-6m"
    ),
    variants: Annotated[
        str, typer.Option(help="Any of fp32, tune, sequential, inc, autotune.")
    ] = f"{FLOAT},{TUNE},{INC}",
    alphas: Annotated[str, typer.Option(help="Uniform alphas: LEAST:GREATEST:STEP.")] = "0:1:0.05",
    scheme: Annotated[str, typer.Option(help="Preset.")] = "O3",
    goal: Annotated[str, typer.Option(help="Of autotune.")] = "1%",
    text: Annotated[
        Path | None, typer.Option(help="Text of the comparisons; default: the shipped one.")
    ] = None,
    windows: Annotated[int, typer.Option(help="Windows of 512 tokens of it.")] = 60,
    trained: zoo.Trained = None,
    cache: zoo.Cache = zoo.CACHE,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Print a table and write a JSON file, which is whole after every measurement."""
    logging.disable_progress_bar()
    command = f"python bench/run_tuning.py --models {models} --variants {variants}"
    command += f" --alphas {alphas} --scheme {scheme} --goal {goal} --windows {windows}"
    command += " --text FILE" * (text is not None)
    compared = " ".join(texts.evaluation()) if text is None else text.read_text(encoding="utf-8")
    settings = {
        "scheme": scheme,
        "goal": goal,
        "windows": windows,
        "text": zlib.crc32(compared.encode()),
    }
    try:
        wanted = [*_known(variants), *_grid(alphas)]
        if windows < 2:
            raise SqCpuError("a standard error takes two --windows or more")
        sections = {"settings": settings, "commands": []}
        results = ResultFile("tuning", out, resume=resume, sections=sections)
        if results.content["settings"] != settings:
            raise SqCpuError(f"{results.path} was measured with {results.content['settings']}")
        results.content["commands"] += [command]
        done = {(row["model"], row["variant"]) for row in results.rows}
        for name in models.split(","):
            todo = [variant for variant in wanted if (name, variant) not in done]
            if not todo:
                continue
            subject = zoo.load(name, zoo.Places(cache, trained))
            if subject.tokenizer is None:
                raise SqCpuError(f"{name} is no language model; choose one with a perplexity")
            scored = token_windows(subject.tokenizer, compared, window=zoo.WINDOW, windows=windows)
            bench = Bench(subject, Scheme.of(scheme, ignore=subject.ignore), goal, scored)
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
