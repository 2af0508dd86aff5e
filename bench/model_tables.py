"""What bench/run_model.py prints and draws."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import machine
from rich.table import Table

from sq_cpu.analysis.figures import THEME, new_figure
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require

Row = dict[str, Any]

_BF16 = "bf16"


def _table(headings: Iterable[str], title: str) -> Table:
    table = Table("model", "layers", "threads", "work", "rows", "variant", title=title)
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def work_of(row: Row) -> str:
    """Return the name of what was measured, without its rows."""
    if row["work"] == "prefill":
        return f"prefill {row['prompt']}"
    return f"decode at {row['context']}"


def names_of(row: Row) -> tuple[str, ...]:
    """Return the cells that say what was measured."""
    numbers = (row["layers"], row["threads"], work_of(row), row["rows"])
    return (Path(row["model"]).name, *map(str, numbers))


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def print_rows(rows: Iterable[Row]) -> None:
    """Print the speeds, and ours over those of the fastest peer and of bf16."""
    headings = (
        *("tokens/s (p10-p90)", "rounds", "/ best peer", "/ bf16"),
        *("of floor", "weights GB/s", "cosine", "text"),
    )
    title = (
        "medians; / best peer, / bf16: the speed of int8 over theirs; of floor: the time to read "
        "all int8 weights once, over the time of a step"
    )
    table = _table(headings, title)
    for row in rows:
        for name, found in row["variants"].items():
            speed, ratio = found["tokens_per_second"], row["ratio"].get(name, {})
            best = row["best_peer"]
            over_best = f"{ratio[best]:.2f} {best}" if best in ratio else "-"
            table.add_row(
                *names_of(row),
                name,
                f"{speed['median']:.1f} ({speed['p10']:.1f}-{speed['p90']:.1f})",
                str(found["seconds"]["rounds"]),
                over_best,
                _cell(ratio.get(_BF16), ".2f"),
                _cell(found.get("share_of_floor"), ".0%"),
                _cell(found["weight_gb_per_second"], ".1f"),
                _cell(found["cosine"], ".4f"),
                _cell(found["likelihood"], ".2f"),
            )
        if "floor" in row:
            floor = row["floor"]
            read = f"{floor['tokens_per_second']['median']:.1f}"
            dashes = ["-"] * 3
            rate = f"{floor['weight_gb_per_second']:.1f}"
            rounds = str(floor["seconds"]["rounds"])
            table.add_row(*names_of(row), "floor", read, rounds, *dashes, rate, "-", "-")
        table.add_section()
    machine.make_console().print(table)


def print_processes(processes: Iterable[Row]) -> None:
    """Print what each variant's process took, and which variants there are not."""
    table = Table("model", "threads", "variant", title="each variant's process")
    for heading in ("first token after s", "peak MB", "weights MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("runtime")
    missing: dict[str, str] = {}
    for row in processes:
        missing |= row["not_measured"]
        for name, found in row["variants"].items():
            megabytes = (
                _cell(None if size is None else size / 1e6, ".0f")
                for size in (found["peak_bytes"], found["weight_bytes"])
            )
            seconds = f"{found['start_seconds']:.1f}"
            names = (Path(row["model"]).name, str(row["threads"]), name)
            table.add_row(*names, seconds, *megabytes, found["runtime"])
        table.add_section()
    machine.make_console().print(table)
    for name, reason in missing.items():
        print(f"{name}: not measured: {reason}")


def print_comparison(before: Row, after: Row) -> None:
    """Print the speeds that both runs have; how alike the machines were is told by the floats'."""
    for name, run in (("before", before), ("after", after)):
        known = run["machine"]
        versions = ", ".join(f"{key} {known[key]}" for key in ("isa", "torch", "transformers"))
        label = "" if run["label"] is None else f"{run['label']}, "
        print(f"{name}: {label}commit {run['commit']}, {known['cpu']}, {versions}")

    def key(row: Row) -> tuple[object, ...]:
        return (*names_of(row), row.get("steps"))

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
            ratios = [each["ratio"].get(name, {}).get(_BF16) for each in (old, row)]
            cells = (f"{was:.1f}", f"{now:.1f}", f"{now / was:.2f}")
            table.add_row(*names_of(row), name, *cells, *(_cell(ratio, ".2f") for ratio in ratios))
        table.add_section()
    if not table.rows:
        raise SqCpuError("the two files have nothing in common: measure the same models")
    machine.make_console().print(table)


def check_plot(path: Path) -> None:
    """Refuse what `plot` cannot draw."""
    require("matplotlib", "report")
    if path.suffix not in (".png", ".svg"):
        raise SqCpuError(f"{path}: a plot's name ends in .png or .svg")


def plot(rows: Iterable[Row], path: Path) -> None:
    """Draw tokens a second by variant, a panel for each piece of work."""
    drawn = [row for row in rows if row["variants"]]
    if not drawn:
        raise SqCpuError("there is nothing to draw: no variant was measured")
    bars = sum(len(row["variants"]) for row in drawn)
    with new_figure(0.25 * bars + 0.55 * len(drawn)) as figure:
        heights = [len(row["variants"]) + 1 for row in drawn]
        panels = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
        for row, ax in zip(drawn, panels, strict=True):
            names = list(row["variants"])
            speeds = [row["variants"][name]["tokens_per_second"]["median"] for name in names]
            theme = ["after" if name in row["ratio"] else "before" for name in names]
            ax.barh(names, speeds, color=[THEME[each][0] for each in theme], height=0.7)
            for place, speed in enumerate(speeds):
                ax.annotate(
                    f"{speed:.3g}" if speed < 1000 else f"{speed:.0f}",
                    (speed, place),
                    (2, 0),
                    textcoords="offset points",
                    va="center",
                )
            if "floor" in row:
                floor = row["floor"]["tokens_per_second"]["median"]
                ax.axvline(floor, color=THEME["muted"][0], linestyle=":")
                ax.annotate(
                    "weights read once",
                    (floor, len(names) - 1),
                    (-4, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                )
            ax.invert_yaxis()
            ax.margins(x=0.12)
            model = Path(row["model"]).name
            ax.set_title(f"{model}, threads: {row['threads']}; {work_of(row)}, rows: {row['rows']}")
        panels[-1].set_xlabel("tokens/s")
        figure.savefig(path, dpi=200)
