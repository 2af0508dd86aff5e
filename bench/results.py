"""The results of a run: rows, peaks, tables, and a JSON file that is whole after every row."""

from __future__ import annotations

import datetime
import json
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import machine
import peak
import typer
from harness import Stats
from rich.table import Table

from sq_cpu.errors import SqCpuError
from sq_cpu.files import write_file

FOLDER = Path(__file__).parent / "results"
Row = dict[str, Any]

# Options of the commands that write a `ResultFile`.
Out = Annotated[
    Path | None, typer.Option(help="The JSON file; default: results/<cpu>-<date>.json.")
]
Resume = Annotated[bool, typer.Option(help="Keep what the JSON file holds.")]


def record(stats: Mapping[str, Stats], operations: float, facts: Mapping[str, Any]) -> Row:
    """Make one row: the facts, figures of every candidate, and the ratio peer / subject."""
    subject, *peers = stats
    return {
        **facts,
        "candidates": {
            name: asdict(stat) | {"gops": operations / stat.median / 1e9}
            for name, stat in stats.items()
        },
        "ratio": {name: stats[name].median / stats[subject].median for name in peers},
    }


class ResultFile:
    """Rows, and facts about the run, in a file that is written whole after every row.

    `sections` are the file's other parts, as they are at first. Raises `SqCpuError` when `path`
    exists and is not to be resumed, or is of another machine.
    """

    def __init__(
        self, benchmark: str, path: Path | None, *, resume: bool, sections: Mapping[str, Any]
    ) -> None:
        now = datetime.datetime.now().astimezone()
        facts = machine.facts()
        slug = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
        self.path = path or FOLDER / f"{slug}-{now:%Y-%m-%d-%H%M%S}.json"
        self.content: dict[str, Any] = {
            "benchmark": benchmark,
            "date": now.isoformat(),
            "machine": facts,
            **sections,
            "rows": [],
        }
        if self.path.exists():
            if not resume:
                raise SqCpuError(f"{self.path} exists: resume it, or choose another name")
            self._load()
        self.path.parent.mkdir(parents=True, exist_ok=True)

    def _load(self) -> None:
        found = json.loads(self.path.read_text())
        if found.keys() != self.content.keys() or found["benchmark"] != self.content["benchmark"]:
            raise SqCpuError(f"{self.path} holds no results of the benchmark to resume")
        for name in ("cpu", "isa", "torch_isa", "cores", "torch", "sq_cpu"):
            was, now = found["machine"][name], self.content["machine"][name]
            if was != now:
                raise SqCpuError(f"{self.path} was measured with {name} {was}, here it is {now}")
        self.content = found

    @property
    def rows(self) -> list[Row]:
        """What was measured so far."""
        rows: list[Row] = self.content["rows"]
        return rows

    def add(self, row: Row) -> None:
        """Take in a row and write the file."""
        self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_file(self.path, json.dumps(self.content, indent=1) + "\n")


class Results(ResultFile):
    """Rows of `record` and this machine's peaks."""

    def __init__(self, benchmark: str, path: Path | None = None, *, resume: bool = False) -> None:
        # peaks: threads -> what peak.measure gives
        super().__init__(benchmark, path, resume=resume, sections={"peaks": {}, "summary": []})

    def measure_peaks(self, threads: Iterable[int]) -> None:
        """Measure the peaks, at the start of a run and at its end; the best of both counts."""
        peaks = self.content["peaks"]
        for count in threads:
            peaks[str(count)] = peak.best(peaks.get(str(count), {}), peak.measure(count))

    def write(self) -> None:
        """Write the file, its percentages and its summary by the peaks known so far."""
        for row in self.rows:
            _compare_with_peaks(row, self.content["peaks"][str(row["threads"])])
        self.content["summary"] = summarize(self.rows)
        super().write()

    def print_tables(self) -> None:
        """Print the peaks, the shapes, a line for every row, and the summary."""
        console = machine.make_console()
        console.print(machine.headline())
        for threads, peaks in self.content["peaks"].items():
            figures = (f"{isa} {peaks[isa]:.0f} GOPS" for isa in peak.ISAS if isa in peaks)
            console.print(
                f"{threads} threads: {', '.join(figures)}, read {peaks[peak.READ]:.1f} GB/s"
            )
        console.print(_shape_table(self.rows))
        console.print(_row_table(self.rows))
        console.print(_summary_table(self.content["summary"]))
        print(f"wrote {self.path}")


def _compare_with_peaks(row: Row, peaks: Mapping[str, float]) -> None:
    """Set the subject's share of the read bandwidth (weights alone) and of its kernel's peak."""
    subject = next(iter(row["candidates"].values()))
    row["bandwidth_percent"] = 100 * row["weight_gb_per_s"] / peaks[peak.READ]
    gops = next((peaks[isa] for isa in peak.ISAS if row["microkernel"].endswith(isa)), None)
    row["peak_percent"] = gops and 100 * subject["gops"] / gops  # None for the reference kernel


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.geometric_mean(known) if known else None


def _peers(rows: Iterable[Row]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["ratio"]))


def summarize(rows: Sequence[Row]) -> list[Row]:
    """Take geometric means over shapes, of all shapes and of each model's.

    A ratio is over the shapes that its peer ran on; `ratio_shapes` counts them.
    """
    groups: dict[tuple[str, str, int, int], list[Row]] = {}
    for model in dict.fromkeys(["all", *(model for row in rows for model in row["layers"])]):
        for row in rows:
            if model == "all" or model in row["layers"]:
                key = (model, row["weights"], row["threads"], row["m"])
                groups.setdefault(key, []).append(row)
    groups = dict(sorted(groups.items(), key=lambda item: item[0]))
    return [
        {
            "models": model,
            "m": m,
            "threads": threads,
            "weights": weights,
            "shapes": len(group),
            "ratio": {
                name: _mean(row["ratio"].get(name) for row in group) for name in _peers(group)
            },
            "ratio_shapes": {
                name: sum(name in row["ratio"] for row in group) for name in _peers(group)
            },
            "bandwidth_percent": _mean(row["bandwidth_percent"] for row in group),
            "peak_percent": _mean(row["peak_percent"] for row in group),
        }
        for (model, weights, threads, m), group in groups.items()
    ]


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _shape_table(rows: Sequence[Row]) -> Table:
    table = Table("N x K", "of", title="shapes")
    for shape, layers in {f"{row['n']}x{row['k']}": row["layers"] for row in rows}.items():
        table.add_row(shape, "; ".join(f"{model} {names}" for model, names in layers.items()))
    return table


def _row_table(rows: Sequence[Row]) -> Table:
    names = list(dict.fromkeys(name for row in rows for name in row["candidates"]))
    subject, *peers = names
    table = Table(title=f"median us (p10-p90), GOPS; ratio: time of peer / {subject}")
    for heading in ("N x K", "M", "threads", "weights"):
        table.add_column(heading, no_wrap=True)
    for heading in (*names, *(f"/ {name}" for name in peers), "% of read", "% of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [f"{row['n']}x{row['k']}", str(row["m"]), str(row["threads"]), row["weights"]]
        for name in names:
            if figures := row["candidates"].get(name):
                median, low, high = (figures[key] * 1e6 for key in ("median", "p10", "p90"))
                cells.append(f"{median:.0f} ({low:.0f}-{high:.0f}) {figures['gops']:4.0f}")
            else:
                cells.append("-")
        cells += [_cell(row["ratio"].get(name), ".2f") for name in peers]
        cells += [_cell(row["bandwidth_percent"], ".0f"), _cell(row["peak_percent"], ".0f")]
        table.add_row(*cells)
    return table


def _summary_table(summary: Sequence[Row]) -> Table:
    peers = _peers(summary)
    table = Table(title="geometric means over the shapes")
    for heading in ("M", "threads", "weights", "shapes"):
        table.add_column(heading, no_wrap=True)
    for heading in (*(f"/ {name}" for name in peers), "% of read", "% of peak"):
        table.add_column(heading, justify="right", no_wrap=True)
    for line in summary:
        if line["models"] != "all":
            continue
        cells = [str(line[key]) for key in ("m", "threads", "weights", "shapes")]
        for name in peers:
            count = line["ratio_shapes"].get(name, 0)
            over = "" if count == line["shapes"] else f" (of {count})"
            cells.append(_cell(line["ratio"].get(name), ".2f") + over)
        cells += [_cell(line["bandwidth_percent"], ".0f"), _cell(line["peak_percent"], ".0f")]
        table.add_row(*cells)
    return table
