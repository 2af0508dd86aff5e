"""The one progress bar: on stderr, shown in a terminal unless told otherwise."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["status", "track"]

T = TypeVar("T")


def track(
    items: Iterable[T], description: str, show: bool | None = None, total: int | None = None
) -> Iterator[T]:
    """Yield `items` under a progress bar; `show=None` means only when stderr is a terminal.

    `total` is how many they are, of items that have no length.
    """
    if not (sys.stderr.isatty() if show is None else show):
        yield from items
        return
    if isinstance(items, Sized):
        total = len(items)
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        yield from bar.track(items, total=total, description=description)


@contextmanager
def status(description: str, show: bool | None = None) -> Iterator[Callable[[str], None] | None]:
    """Yield what sets the line of work without a known end; None where nothing is shown."""
    if not (sys.stderr.isatty() if show is None else show):
        yield None
        return
    with Progress(
        SpinnerColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(description)
        yield lambda text: bar.update(task, description=f"{description}: {text}")
