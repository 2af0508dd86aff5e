"""What a scheme's prefills and decoding steps take beside another's, in one process.

python bench/run_schemes.py --schemes O3-plain,O3 --budget 60

`run_model.py` gives every variant a process of its own: where that one's weights and threads happen
to lie moves its speed by 5 % and more. Here schemes run on the same threads, in turns, and are
loaded anew for every few groups of turns. A ratio is of a group's medians; its standard error is
over the groups.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated

import machine
import torch
import typer
from model_files import SHAPES, load_model, recipe_of, to_int8
from results import Out, ResultFile
from torch_runtimes import Generate
from turns import random_prompts

import sq_cpu

ROWS = {1: 384, 16: 128}
"""Sequences at once, and the tokens of their prompts."""
STEPS, TURNS, PREFILLS, GROUPS = 8, 12, 3, 3
"""Decoding steps of a turn; turns of decoding, and of prefills, of a group; groups a load."""

Work = Callable[[Generate], object]
Ratios = dict[tuple[str, int, str], list[float]]
"""(work, rows, scheme) -> time over that of the first scheme, a group each."""


def measure(folders: dict[str, str], vocabulary: int, budget: float, ratios: Ratios) -> None:
    """Add groups for `budget` seconds, and one load of them at least."""
    seeds = iter(range(10**9))  # a prompt that began as an earlier one would not be computed

    def prompts(rows: int) -> list[list[int]]:
        return random_prompts(vocabulary, rows, ROWS[rows], next(seeds))

    end = time.monotonic() + budget
    while True:
        order = random.sample(list(folders), len(folders))
        room = max(ROWS.values()) + STEPS * (TURNS + 1) + 1
        made = {
            name: Generate(folders[name], torch.get_num_threads(), max(ROWS), room)
            for name in order
        }
        for rows in ROWS:
            for _ in range(GROUPS):
                works: dict[str, tuple[int, Work]] = {
                    "prefill": (PREFILLS, lambda model, rows=rows: model.prefill(prompts(rows))),
                    "decode": (TURNS, lambda model: model.decode(STEPS)),
                }
                for work, (turns, call) in works.items():
                    medians = _group(made, turns, call)
                    base, *others = folders
                    for name in others:
                        ratio = medians[name] / medians[base]
                        ratios.setdefault((work, rows, name), []).append(ratio)
        if time.monotonic() > end:
            return


def _group(made: dict[str, Generate], turns: int, call: Work) -> dict[str, float]:
    """Return the median seconds of each model's work, in turns; the first turn is not timed."""
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(1 + turns):
        for name, model in made.items():
            start = time.perf_counter()
            call(model)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in seconds.items()}


def main(
    shape: Annotated[str, typer.Option(help="Of a random model.")] = "smollm2-135m",
    layers: Annotated[int | None, typer.Option(min=1, help="Default: the shape's.")] = None,
    schemes: Annotated[str, typer.Option(help="The first is the base.")] = "O3-plain,O3",
    budget: Annotated[float, typer.Option(min=0, help="Seconds to time in.")] = 60,
    out: Out = None,
) -> None:
    """Print each scheme's time over the first one's, with its standard error."""
    print(machine.headline())
    try:
        names = schemes.split(",")
        if shape not in SHAPES or len({*names}) < 2:
            raise sq_cpu.SqCpuError(
                f"shape {shape!r}, schemes {schemes!r}: give one of {', '.join(SHAPES)}, and two "
                "schemes or more"
            )
        for name in names:
            recipe_of(name)
        command = f"python bench/run_schemes.py --shape {shape} --schemes {schemes}"
        command += f" --layers {layers}" * (layers is not None) + f" --budget {budget:g}"
        sections = {"command": command, "threads": torch.get_num_threads()}
        results = ResultFile("schemes", out, resume=False, sections=sections)
        ratios: Ratios = {}
        with tempfile.TemporaryDirectory() as scratch, torch.no_grad():
            measure(*_saved(shape, layers, names, Path(scratch)), budget, ratios)
        for (work, rows, name), found in ratios.items():
            error = statistics.stdev(found) / len(found) ** 0.5
            ratio = statistics.median(found)
            facts = {"work": work, "rows": rows, "tokens": ROWS[rows], "scheme": name}
            row = facts | {"base": names[0], "ratio": ratio, "error": error, "groups": len(found)}
            results.add(row)
            print(
                f"{work:8}{rows:3} rows  {name} takes {ratio:.3f} +- {error:.3f} of {names[0]}'s "
                f"time, {len(found)} groups"
            )
    except sq_cpu.SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def _saved(
    shape: str, layers: int | None, names: Sequence[str], scratch: Path
) -> tuple[dict[str, str], int]:
    """Return the folders of int8 models with an int8 head, and the vocabulary's size."""
    model = load_model(shape, layers, torch.bfloat16)
    vocabulary = model.config.get_text_config().vocab_size
    return {
        name: str(sq_cpu.save(to_int8(model, name, head="int8"), scratch / name)) for name in names
    }, vocabulary


if __name__ == "__main__":
    typer.run(main)
