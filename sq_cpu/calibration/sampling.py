"""The inputs of linears as rows without padding, and samples of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.models.padding import Padding

__all__ = ["InputRows", "Reservoir", "SampledRows"]


class InputRows:
    """The rows of the input observed last, and their range.

    q, k and v get the same tensor one after another; its rows are made once.
    """

    batch = 0
    padding = Padding()
    key: tuple[int, int] | None = None
    held: Tensor | None = None  # keeps the address from being reused while the key stands
    rows: Tensor
    kept: Tensor | None = None
    """Which rows of x are not padding, bool; None: all."""
    copied: Tensor | None = None
    low: Tensor
    high: Tensor

    @contextmanager
    def of_batch(self, batch: int, padding: Padding) -> Iterator[None]:
        """Run one batch, and release its tensors."""
        self.batch, self.padding = batch, padding
        try:
            with padding.tracing():
                yield
        finally:
            self.key = self.held = self.copied = self.kept = None
            self.rows = torch.empty(0)

    def observe(self, x: Tensor) -> None:
        """Set `rows` to x without padding, [rows, in_features], and `low` and `high` to theirs."""
        # Inference tensors have no version that would show an in-place change: never cached.
        key = None if x.is_inference() else (id(x), x._version)
        if key is not None and key == self.key:
            return
        self.rows = x.detach().reshape(-1, x.shape[-1])
        self.kept = self.padding.kept(x)
        if self.kept is not None:
            self.rows = self.rows[self.kept]
        if len(self.rows):
            self.low, self.high = self.rows.amin(dim=0).float(), self.rows.amax(dim=0).float()
        self.key, self.held, self.copied = key, x, None

    def copy(self) -> Tensor:
        """Return the rows as they are now: x may later be changed in place."""
        if self.copied is None:
            self.copied = self.rows.clone() if self.kept is None else self.rows
        return self.copied


class Reservoir:
    """The `size` rows of greatest priority among all that were added, in any columns."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.threshold = 0.0
        """The greatest priority of a row that is not kept."""
        self._priority = torch.empty(0, dtype=torch.float32, device="cpu")
        self.columns: dict[str, Tensor] = {}
        """Of the rows that are kept; empty before any was added."""

    def add(self, priority: Tensor, **columns: Tensor) -> None:
        """Add rows; a column is [rows] or [rows, features]."""
        count = len(self._priority)
        ordered, order = torch.cat([self._priority, priority]).sort(descending=True)
        if len(order) > self.size:
            self.threshold = max(self.threshold, float(ordered[self.size]))
        kept = order[: self.size]
        is_old = kept < count
        old, new = kept[is_old], kept[~is_old] - count
        before = self.columns or {name: column[:0] for name, column in columns.items()}
        self.columns = {
            name: torch.cat([before[name][old], column[new]]) for name, column in columns.items()
        }
        self._priority = torch.cat([self._priority[old], priority[new]])


class SampledRows:
    """Takes the rows that a calibration sampled again, from another run on the same batches.

    It takes none of a linear that some of the `tokens` do not reach: another run may route others.
    """

    def __init__(self, calibration: Calibration, tokens: int) -> None:
        self._calibration = calibration
        self._tokens = tokens
        self._input = InputRows()
        self._batches = 0
        self._seen: dict[str, int] = {}
        self._rows: dict[str, Tensor] = {}
        self._gradient_rows: dict[str, Tensor] = {}

    @contextmanager
    def batch(self, padding: Padding) -> Iterator[None]:
        """Run one batch, as `InputRanges.batch`."""
        with self._input.of_batch(self._batches, padding):
            yield
        self._batches += 1

    def observe(self, name: str, x: Tensor) -> None:
        """Take the sampled rows from the input of a linear."""
        self._input.observe(x)
        rows, first = self._input.rows, self._seen.get(name, 0)
        self._seen[name] = first + len(rows)
        before = self._calibration
        for places, old, new in (
            (before.row_places, before.rows, self._rows),
            (before.gradient_places, before.gradient_rows, self._gradient_rows),
        ):
            if name in places:
                here = (places[name] >= first) & (places[name] < first + len(rows))
                new.setdefault(name, old[name].clone())[here] = rows[places[name][here] - first]

    def calibration(self) -> Calibration:
        """Return the calibration with the rows as they were in this run."""
        before = self._calibration.rows_seen
        every = {n for n, seen in self._seen.items() if seen == self._tokens == before[n]}
        return replace(
            self._calibration,
            rows=self._calibration.rows | _only(every, self._rows),
            gradient_rows=self._calibration.gradient_rows | _only(every, self._gradient_rows),
        )


def _only(names: set[str], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name in names}
