"""Gathers ranges and samples of the linears' inputs while a model runs, batch by batch."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import FOLDS, TENSORS, Calibration, fingerprint
from sq_cpu.calibration.sampling import InputRows, Reservoir
from sq_cpu.calibration.weight_uses import WeightUses
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.hadamard import BLOCK, whole_blocks
from sq_cpu.models.calls import Example
from sq_cpu.models.hooks import watching_inputs
from sq_cpu.models.padding import Padding

__all__ = ["InputRanges"]


class _LinearObserver:
    """Gathers the range of one linear's input channels, and samples of its rows."""

    def __init__(self, name: str, linear: nn.Linear, rows: int, gradient_rows: int) -> None:
        self.name = name
        self.linear = linear
        self.rows = 0
        self.sample = Reservoir(rows)
        self.peaks = [Reservoir(-(-rows // FOLDS)) for _ in range(FOLDS)]
        self.costly = Reservoir(gradient_rows)
        self.differentiated = False
        # One seed for all: linears that share an input keep the same rows.
        self.generator = torch.Generator().manual_seed(0)
        # A seed of its own: chance errors of the linears' losses then even out over all.
        self.gradient_generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        # fp32 on the CPU, whatever the defaults are.
        shape = (FOLDS, linear.in_features)
        self.low = torch.full(shape, torch.inf, dtype=torch.float32, device="cpu")
        self.high = torch.full_like(self.low, -torch.inf)

    def add(self, x: Tensor, recent: InputRows, fold: int) -> None:
        recent.observe(x)
        first, self.rows = self.rows, self.rows + len(recent.rows)
        if not len(recent.rows):  # an expert that no token was routed to, or all padding
            return
        if not (recent.low.isfinite().all() and recent.high.isfinite().all()):
            raise SqCpuError(
                f"calibration batch {recent.batch}: NaN or Inf in the input of {self.name}; "
                "check the batch and the model's weights"
            )
        torch.minimum(self.low[fold], recent.low, out=self.low[fold])
        torch.maximum(self.high[fold], recent.high, out=self.high[fold])
        chance = _uniform(len(recent.rows), self.generator)
        self.sample.add(
            chance,
            rows=recent.rows,
            fold=_all_of(fold, recent.rows),
            place=torch.arange(first, self.rows, device="cpu"),
        )
        if self.sample.size:
            reach = _reach(recent.rows, self._ends())
            self.peaks[fold].add(reach, rows=recent.rows, fold=_all_of(fold, recent.rows))

    def _ends(self) -> Tensor:
        """Return max|X_j| so far, fp32."""
        ends = torch.maximum(-self.low.amin(dim=0), self.high.amax(dim=0))
        return ends.clamp_min(1e-30)

    def gradient_taker(self, recent: InputRows) -> Callable[[Tensor], None]:
        """Return the function that takes the gradient of the output for the input added last.

        Rows are drawn by priority sampling (Duffield, Lund, Thorup 2007), which needs one pass: a
        row of size w has priority w / u, u uniform in (0, 1], and if kept counts
        max(1, threshold / w) times. Sums over rows are unbiased. Their variance is small where w
        grows with a row's share of the sum. So w is |gradient| times how near the row comes to the
        ends of the channels' ranges: the few rows there are clipped, or set a coarse scale.
        """
        self.differentiated = True
        rows, kept = recent.copy(), recent.kept
        batch, fold = recent.batch, recent.batch % FOLDS
        places = torch.arange(self.rows - len(rows), self.rows, device="cpu")
        near = (rows.abs() / self._ends()).amax(dim=1).float()

        def take(gradient: Tensor) -> None:
            of_rows = gradient.detach().reshape(-1, gradient.shape[-1])
            of_rows = of_rows if kept is None else of_rows[kept]
            size = of_rows.float().norm(dim=1) * near
            if not size.isfinite().all():
                raise SqCpuError(
                    f"calibration batch {batch}: NaN or Inf in the gradient of {self.name}; "
                    "calibrate in fp32 or bf16"
                )
            chance = 1 - _uniform(len(size), self.gradient_generator)
            self.costly.add(
                size / chance,
                rows=rows,
                gradient=of_rows,
                size=size,
                fold=_all_of(fold, rows),
                place=places,
            )

        return take

    # These return tensors by the names of the fields of a `Calibration`.

    def ranges(self) -> dict[str, Tensor]:
        """Return the range of every channel, over all and in each fold."""
        return {
            "channel_min": self.low.amin(dim=0),
            "channel_max": self.high.amax(dim=0),
            "fold_min": self.low,
            "fold_max": self.high,
        }

    def sampled(self) -> dict[str, Tensor]:
        """Return the uniform sample; nothing if its size is 0."""
        if not self.sample.size:
            return {}
        column = self.sample.columns
        peaks = [of_fold.columns for of_fold in self.peaks if of_fold.columns]
        return {
            "rows": column["rows"],
            "row_folds": column["fold"],
            "row_places": column["place"],
            "peaks": torch.cat([each["rows"] for each in peaks]),
            "peak_folds": torch.cat([each["fold"] for each in peaks]),
        }

    def gradients(self) -> dict[str, Tensor]:
        """Return rows with gradients; nothing where the model ran without them."""
        if not self.differentiated:
            return {}
        column = self.costly.columns
        if not column:  # nothing that the model gives depends on this linear
            none = self.linear.weight.detach()[:0]
            column = {
                "rows": none,
                "gradient": none.new_empty(0, self.linear.out_features),
                "size": none.new_empty(0, dtype=torch.float32),
                "fold": _all_of(0, none),
                "place": none.new_empty(0, dtype=torch.int64),
            }
        # 0 / 0: a row that costs nothing, while every row that does is kept.
        weights = (self.costly.threshold / column["size"]).nan_to_num(1.0).clamp_min(1.0)
        return {
            "gradient_rows": column["rows"],
            "gradients": column["gradient"],
            "gradient_weights": weights,
            "gradient_folds": column["fold"],
            "gradient_places": column["place"],
        }


def _reach(rows: Tensor, ends: Tensor) -> Tensor:
    """Return the greatest norm of a block of 64 channels of each row, fp32 [rows].

    Rotated, a block reaches 1 / 8 of it or a few times that. Channels are divided by the root of
    their absmax, as SmoothQuant's alpha of 0.5 does for equal weights.
    """
    squares = (rows.float() * ends.rsqrt()).square()
    columns = squares.shape[1]
    squares = torch.nn.functional.pad(squares, (0, whole_blocks(columns) - columns))
    return squares.view(len(rows), -1, BLOCK).sum(dim=2).amax(dim=1).sqrt()


def _all_of(fold: int, rows: Tensor) -> Tensor:
    return torch.full((len(rows),), fold, dtype=torch.uint8, device="cpu")


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    return torch.rand(count, generator=generator, dtype=torch.float32, device="cpu")


class _Part:
    """Observers of all linears, and the batches that they saw."""

    def __init__(self, linears: Mapping[str, nn.Linear], rows: int, gradient_rows: int = 0) -> None:
        self.observers = {
            name: _LinearObserver(name, linear, rows, gradient_rows)
            for name, linear in linears.items()
        }
        self.batches = 0

    def add(self, name: str, x: Tensor, recent: InputRows) -> None:
        self.observers[name].add(x, recent, self.batches % FOLDS)


class InputRanges:
    """Gathers a `Calibration` of linears, batch by batch, from whatever runs them."""

    def __init__(
        self,
        model: nn.Module,
        linears: Mapping[str, nn.Linear],
        rows: int,
        gradient_rows: int = 0,
    ) -> None:
        self._linears = linears
        self._uses = WeightUses(model, linears)
        self._rows = rows
        self._whole = _Part(linears, rows, gradient_rows)
        self._by_length: dict[int, _Part] = {}
        self._running = [self._whole]
        self._recent = InputRows()

    @property
    def batches(self) -> int:
        """Those that ran."""
        return self._whole.batches

    def _observe(self, name: str, x: Tensor) -> None:
        for part in self._running:
            part.add(name, x, self._recent)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Run a block in which the inputs of the linears are observed."""
        observing = watching_inputs(self._linears, "input", self._observe)
        with self._uses.knowing_owners(), observing:
            yield

    def observe_gradients(self, name: str) -> Callable[[Tensor], None]:
        """Return the function that takes the gradient of the output of a linear that just ran."""
        return self._whole.observers[name].gradient_taker(self._recent)

    @contextmanager
    def batch(self, padding: Padding, length: int | None = None) -> Iterator[None]:
        """Run one batch, of which the rows that are padding do not count.

        `length` names what is gathered of it beside the whole, see `by_length`; None: nothing.
        """
        self._running = [self._whole]
        if length is not None:
            if length not in self._by_length:
                self._by_length[length] = _Part(self._linears, self._rows)
            self._running.append(self._by_length[length])
        with self._recent.of_batch(self.batches, padding), self._uses:
            yield
        for part in self._running:
            part.batches += 1

    def by_length(self, examples: Mapping[int, Example]) -> dict[int, Calibration]:
        """Return what the batches of each length gave, as if they were all; without gradients."""
        return {
            length: self._calibration(part, examples.get(length))
            for length, part in sorted(self._by_length.items())
        }

    def calibration(self, example: Example | None = None) -> Calibration:
        """Return what was gathered so far."""
        return self._calibration(self._whole, example)

    def _calibration(self, part: _Part, example: Example | None) -> Calibration:
        in_float = self._uses.found()
        observers = {n: each for n, each in part.observers.items() if n not in in_float}
        reached = {name: observer for name, observer in observers.items() if observer.rows}
        tensors: dict[str, Any] = {kind: {} for kind in TENSORS}
        for name, observer in reached.items():
            found = observer.ranges() | observer.sampled() | observer.gradients()
            for kind, tensor in found.items():
                tensors[kind][name] = tensor
        return Calibration(
            **tensors,
            fingerprints={name: fingerprint(self._linears[name]) for name in reached},
            rows_seen={name: observer.rows for name, observer in reached.items()},
            tokens=max((observer.rows for observer in part.observers.values()), default=0),
            batches=part.batches,
            unreached=tuple(name for name in observers if name not in reached),
            in_float=in_float,
            example=example,
        )
