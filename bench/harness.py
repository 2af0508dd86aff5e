"""What every benchmark shares: interleaved timing, the machine's facts, table and JSON file."""

from __future__ import annotations

import datetime
import gc
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.table import Table

import sq_cpu

Call = Callable[[int], object]
"""A candidate: does its work once; the argument counts calls and picks the weight copy."""

TimeRounds = Callable[[Callable[[], object], Callable[[], None], int], Sequence[float]]
"""(call, setup, rounds) -> seconds of each call, `setup` having run untimed before each."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200
_LOAD_AT_START = os.getloadavg()[0]


@dataclass(frozen=True)
class Stats:
    """Seconds a call."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats:
        """Summarize the times of single calls."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[0], deciles[-1], len(seconds))


def _time_rounds(
    call: Callable[[], object], setup: Callable[[], None], rounds: int
) -> Sequence[float]:
    seconds = []
    for _ in range(rounds):
        setup()
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return seconds


def interleave(
    candidates: Mapping[str, Call],
    *,
    warm: bool,
    budget: float,
    time_rounds: TimeRounds = _time_rounds,
) -> dict[str, Stats]:
    """Time the candidates in turn, A/B/C A/B/C ..., so that all see the same noise.

    The first candidate is the subject: its calls are timed by `time_rounds`, which a benchmark
    tool can provide; the others are its peers.

    Parameters
    ----------
    candidates : mapping of name to call
    warm : bool
        Each timed call comes right after an untimed one of the same candidate and the same index.
        Otherwise nothing is repeated, and the call's index moves on with every round.
    budget : float
        Seconds to spend; at least MIN_ROUNDS and at most MAX_ROUNDS rounds are run.
    time_rounds : callable
        Runs and times the subject.
    """
    (subject, call), *peers = candidates.items()
    seconds: dict[str, list[float]] = {name: [] for name, _ in peers}
    index = 0

    def turn() -> None:
        nonlocal index
        index += not warm
        for name, peer in peers:
            if warm:
                peer(index)
            start = time.perf_counter()
            peer(index)
            seconds[name].append(time.perf_counter() - start)
        if warm:
            call(index)

    round_time = float("inf")
    for _ in range(3):  # the first call of each plans and allocates; the best of the rest counts
        start = time.perf_counter()
        turn()
        call(index)
        round_time = min(round_time, time.perf_counter() - start)
    rounds = max(MIN_ROUNDS, min(MAX_ROUNDS, int(budget / round_time)))
    for samples in seconds.values():
        samples.clear()

    gc.collect()
    gc.disable()
    try:
        subject_seconds = time_rounds(lambda: call(index), turn, rounds)
    finally:
        gc.enable()
    return {subject: Stats.of(subject_seconds)} | {n: Stats.of(s) for n, s in seconds.items()}


def numbers(text: str) -> list[int]:
    """Parse "1,4,all", where all is the number of cores; doubles are dropped."""
    cores = len(os.sched_getaffinity(0))
    return list(dict.fromkeys(cores if word == "all" else int(word) for word in text.split(",")))


def last_level_cache() -> int:
    """Bytes of the largest cache that the first core sees; 0 if the system does not tell."""
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    texts = [size.read_text().strip() for size in sizes]
    return max((int(text[:-1]) * units[text[-1]] for text in texts), default=0)


def rotation_bytes(limit_mb: int | None = None) -> int:
    """Bytes of weights, of all candidates together, to go through before one is used again.

    Four times the last-level cache, but at most a quarter of the free memory, or `limit_mb`.
    """
    if limit_mb is not None:
        return limit_mb << 20
    return min(4 * (last_level_cache() or 256 << 20), psutil.virtual_memory().available // 4)


def machine() -> dict[str, Any]:
    """Facts to keep beside the figures."""
    isa = sq_cpu.isa()
    return {
        "cpu": isa["cpu"],
        "isa": isa["in_use"],
        "torch_isa": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "llc_mb": last_level_cache() >> 20,
        "load_at_start": _LOAD_AT_START,
        "memory_gb": psutil.virtual_memory().total >> 30,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "sq_cpu": sq_cpu.__version__,
    }


def print_table(title: str, rows: Sequence[Mapping[str, Any]], subject: str) -> None:
    """Print rows of `record`: microseconds (p10 to p90) and GOPS a candidate, then the ratios."""
    facts = machine()
    # Without a terminal to fit in, a line stays a line.
    console = Console(width=None if sys.stdout.isatty() else 240)
    console.print(
        f"{facts['cpu']}, {facts['cores']} cores, isa {facts['isa']}, torch {facts['torch']} "
        f"({facts['torch_isa']}), load at the start {facts['load_at_start']:.1f}"
    )
    names = list(dict.fromkeys(name for row in rows for name in row["candidates"]))
    peers = [name for name in names if name != subject]
    table = Table(title=f"{title}: median us (p10-p90), GOPS; ratio: time of peer / {subject}")
    for heading in ("model", "linear", "N x K", "M", "threads", "weights"):
        table.add_column(heading, no_wrap=True)
    for heading in names + [f"/ {name}" for name in peers]:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        cells = [row["model"], row["linear"], f"{row['n']}x{row['k']}"]
        cells += [str(row["m"]), str(row["threads"]), row["weights"]]
        for name in names:
            figures = row["candidates"][name]
            median, low, high = (figures[key] * 1e6 for key in ("median", "p10", "p90"))
            cells.append(f"{median:.0f} ({low:.0f}-{high:.0f}) {figures['gops']:4.0f}")
        cells += [f"{row['ratio'][name]:.2f}" for name in peers]
        table.add_row(*cells)
    console.print(table)


def record(
    stats: Mapping[str, Stats], operations: float, facts: Mapping[str, Any]
) -> dict[str, Any]:
    """Make one row: the facts, figures of every candidate, and the ratio peer / subject."""
    subject = next(iter(stats))
    return {
        **facts,
        "candidates": {
            name: asdict(stat) | {"gops": operations / stat.median / 1e9}
            for name, stat in stats.items()
        },
        "ratio": {
            name: stat.median / stats[subject].median
            for name, stat in stats.items()
            if name != subject
        },
    }


def write_results(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """Write results/<cpu>-<date>.json, whole or not at all; returns its path."""
    facts = machine()
    now = datetime.datetime.now().astimezone()
    slug = re.sub(r"[^a-z0-9]+", "-", facts["cpu"].lower()).strip("-")
    path = folder / f"{slug}-{now:%Y-%m-%d-%H%M%S}.json"
    folder.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    content = {"benchmark": name, "date": now.isoformat(), "machine": facts, "rows": rows}
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)
    return path
