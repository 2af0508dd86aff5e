"""The search of a group's alpha and static clip: a grid, then a golden section."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from sq_cpu.numerics.fake_quant import FakeQuantizedLinear
from sq_cpu.numerics.golden_section import argmin
from sq_cpu.smoothing.plan import GroupPlan, joined
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.statistics import GroupStatistics
from sq_cpu.tuning.losses import loss_of, of_parts

__all__ = ["CLIPS", "CRITERIA", "AlphaSearch", "Criterion", "Curve", "FoundPlans", "ScoredGroup"]

Criterion = Literal["mean", "min", "max"]
Curve = Mapping[float, Mapping[str, float]]
"""The loss of every linear at each alpha that was tried."""

# Of the range that is found: below 1 rare large values clip and all others are rounded more finely;
# above 1 there is room for values that calibration did not see.
CLIPS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
_GOLDEN_STEPS = 4  # a bracket of two grid steps, 0.1, shrinks to 0.015


class ScoredGroup:
    """A group, with what each fold knows of it."""

    def __init__(self, planned: GroupPlan, folds: Sequence[GroupStatistics]) -> None:
        self.planned = planned
        self._folds = [replace(of_fold, hadamard=planned.rotation) for of_fold in folds]
        # Of the alpha asked for last: many clips are tried with one, and weights take most time.
        self._alpha = math.nan
        self._linears: list[FakeQuantizedLinear] = []

    @torch.no_grad()
    def losses(self, loss: str, tokens: int, alpha: float, clip: float) -> dict[str, float]:
        """Return each linear's loss over all folds."""
        if alpha != self._alpha:
            self._alpha = alpha
            self._linears = []  # freed before the next are made
            self._linears = [
                linear
                for of_fold in self._folds
                for linear in of_fold.fake_quantized(smoothing_scale("smoothquant", of_fold, alpha))
            ]
        found: dict[str, list[float]] = {}
        for linear in self._linears:
            value = loss_of(loss, linear.with_clip(clip), tokens)
            found.setdefault(linear.sample.name, []).append(value)
        return {name: of_parts(loss, values) for name, values in found.items()}


@dataclass(frozen=True)
class FoundPlans:
    """The plans of groups that share a choice, and the loss of each by its name."""

    plans: list[GroupPlan]
    losses: Mapping[str, float]


@dataclass(frozen=True)
class AlphaSearch:
    """How the choice that groups share is found."""

    loss: str
    tokens: int
    criterion: Criterion
    grid: tuple[float, ...]
    clips: tuple[float, ...]

    def best(self, groups: Sequence[ScoredGroup]) -> FoundPlans:
        """Return these groups planned with the alpha and clip that suit them best together."""
        tried: dict[tuple[float, float], list[dict[str, float]]] = {}

        def losses(alpha: float, clip: float) -> list[dict[str, float]]:
            if (alpha, clip) not in tried:
                tried[alpha, clip] = [
                    group.losses(self.loss, self.tokens, alpha, clip) for group in groups
                ]
            return tried[alpha, clip]

        def total(alpha: float, clip: float) -> float:
            return _sum(losses(alpha, clip))

        def best_alpha(clip: float, grid: Sequence[float], steps: int) -> float:
            return argmin(lambda alpha: total(alpha, clip), grid, steps)

        def best_clip(alpha: float, first: float) -> float:
            grid = (first, *self.clips)
            return argmin(lambda clip: total(alpha, clip), grid, _GOLDEN_STEPS)

        # Of equals, such as the losses of a linear that the model ignores, the middle is taken.
        grid = sorted(self.grid, key=lambda alpha: abs(alpha - 0.5))
        clip, alpha = 1.0, best_alpha(1.0, grid, _GOLDEN_STEPS)
        if len(self.clips) > 1:
            # Each moves the other, in a wide valley: twice is enough.
            for _ in range(2):
                clip = best_clip(alpha, clip)
                near = [a for a in self.grid if abs(a - alpha) <= _width(self.grid)]
                alpha = best_alpha(clip, (alpha, *near), 0)
        if self.criterion != "mean":
            curve = {a: _merged(losses(a, clip)) for a in (alpha, *self.grid)}
            alpha = CRITERIA[self.criterion](curve)
        plans = [
            replace(
                group.planned,
                alpha=round(alpha, 4),
                clip=round(clip, 4),
                note=joined(group.planned.note, f"{self.loss} {_sum([of_group]):.3g}"),
                curve=tuple(
                    (a, _sum([values[index]])) for (a, c), values in tried.items() if c == 1.0
                ),
            )
            for index, (group, of_group) in enumerate(zip(groups, losses(alpha, clip), strict=True))
        ]
        pairs = zip(plans, losses(alpha, clip), strict=True)
        return FoundPlans(plans, {planned.name: _sum([of_group]) for planned, of_group in pairs})


def _least_sum(curve: Curve) -> float:
    return min(curve, key=lambda alpha: sum(curve[alpha].values()))


def _best_of_each(curve: Curve) -> list[float]:
    names = {name for losses in curve.values() for name in losses}
    return [min(curve, key=lambda a: curve[a].get(name, math.inf)) for name in names]


CRITERIA: Mapping[Criterion, Callable[[Curve], float]] = {
    "mean": _least_sum,
    "min": lambda curve: min(_best_of_each(curve)),
    "max": lambda curve: max(_best_of_each(curve)),
}
"""How linears that share an input agree on an alpha."""


def _merged(losses: Iterable[dict[str, float]]) -> dict[str, float]:
    return {name: value for of_group in losses for name, value in of_group.items()}


def _width(grid: Sequence[float]) -> float:
    """Return a step and a half of the grid: within it are the neighbours on both sides."""
    return 1.5 * (grid[1] - grid[0]) if len(grid) > 1 else 0.0


def _sum(losses: Iterable[dict[str, float]]) -> float:
    return sum(value for of_group in losses for value in of_group.values())
