"""The local search: from a configuration that misses the goal, or wastes time, to a minimal one.

It searches over `Configuration`s alone, and its caller evaluates them. While the goal is missed,
linears change to per-token activations and then to float; those that gain most per millisecond come
first. Then they are given back, those that gain least first, until the goal needs each that is
left. Each step asks for the loss of one configuration, and names those that it may ask for next: so
workers can share the evaluations and still take the same steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.latency import Precision

__all__ = ["Rank", "Refinement", "ranked"]

Rank = Literal["estimated", "measured"]

# What a linear changes to: the first that suffices.
_STAGES: tuple[Precision, ...] = ("per_token", "float")

Loss = Callable[[Sequence[Configuration]], float]
Gains = Callable[[Configuration, Precision], Mapping[str, float]]
LinearCosts = Callable[[str, Precision], float]


def ranked(gains: Mapping[str, float], costs: Mapping[str, float]) -> list[str]:
    """Return names by gain per cost, the greatest first; gains without a cost come before all.

    Ties keep the order of `gains`.
    """

    def worth(name: str) -> tuple[bool, float]:
        gain, cost = gains[name], costs[name]
        free = cost <= 0 and gain > 0
        return (free, gain if cost <= 0 else gain / cost)

    return sorted(gains, key=worth, reverse=True)


@dataclass(frozen=True)
class Refinement:
    """The local search. It keeps no answers: `loss` does.

    Attributes
    ----------
    names : the linears
    loss : evaluates the first of some configurations; the others may be asked about next
    goal : the greatest loss that is accepted
    gains : estimates how much less the loss is with a linear's precision changed, in any unit
    costs : milliseconds of a linear by precision
    rank : "measured" replaces the estimates by the evaluated loss of every single change
    """

    names: Sequence[str]
    loss: Loss
    goal: float
    gains: Gains
    costs: LinearCosts
    rank: Rank = "estimated"

    def run(self, start: Configuration, *, in_float: bool = True) -> Configuration:
        """Return the best configuration of this search.

        It misses the goal only if all configurations do; or, without `in_float`, if the goal takes
        more linears in float than `start` has.
        """
        if not in_float:
            return self._give_back(self._repaired(start, ("per_token",), per_millisecond=True))
        best = self._give_back(self._repaired(start, _STAGES, per_millisecond=True))
        if len(best.overrides("float")) > 1:
            # A few slow linears may be worth many quick ones.
            other = self._repaired(start.settings(), _STAGES, per_millisecond=False)
            other = self._give_back(other)
            best = min(best, other, key=self._size)
        return best

    def _size(self, configuration: Configuration) -> tuple[bool, int, float]:
        """Return what is to be as small as possible, the most important first."""
        milliseconds = sum(self.costs(name, configuration.precision(name)) for name in self.names)
        return (
            not self._meets([configuration]),
            len(configuration.overrides("float")),
            milliseconds,
        )

    def _meets(self, frontier: Sequence[Configuration]) -> bool:
        return self.loss(frontier) <= self.goal

    def _order(
        self, configuration: Configuration, names: Sequence[str], precision: Precision, per_ms: bool
    ) -> list[str]:
        """Return names by what changing each to `precision` gains, the greatest first."""
        gains: Mapping[str, float]
        if self.rank == "measured":
            singles = [configuration.changed([name], precision) for name in names]
            before = self.loss([configuration, *singles])
            after = [self.loss(singles[i:]) for i in range(len(singles))]
            gains = {n: _difference(before, loss) for n, loss in zip(names, after, strict=True)}
        else:
            estimated = self.gains(configuration, precision)
            gains = {name: estimated[name] for name in names}
        costs = {
            name: self.costs(name, precision) - self.costs(name, configuration.precision(name))
            for name in names
        }
        return ranked(gains, costs if per_ms else dict.fromkeys(names, 1.0))

    def _repaired(
        self, start: Configuration, stages: Sequence[Precision], *, per_millisecond: bool
    ) -> Configuration:
        """Return a configuration that meets the goal: `start` with as few changes as it takes."""
        if self._meets([start]):
            return start
        for precision in stages:
            names = [n for n in self.names if start.precision(n) not in (precision, "float")]
            if not names:
                continue
            everything = start.changed(names, precision)
            # With all in float it is the float model.
            if precision == "float" or self._meets([everything]):
                order = self._order(start, names, precision, per_millisecond)
                return self._prefix(start, order, precision)
            start = everything
        return start

    def _prefix(
        self, start: Configuration, order: Sequence[str], precision: Precision
    ) -> Configuration:
        """Return `start` with the shortest beginning of `order` changed that meets the goal.

        The shortest if a longer one is never worse; by doubling, then bisection.
        """

        def changed(count: int) -> Configuration:
            return start.changed(order[:count], precision)

        missed, count = 0, 1
        doubles = [min(2**i, len(order)) for i in range(len(order).bit_length() + 1)]
        while not self._meets([changed(k) for k in doubles if k >= count]):
            if count == len(order):
                return changed(count)
            missed, count = count, min(2 * count, len(order))
        met = count
        while met - missed > 1:
            middle = (missed + met) // 2
            after = [(missed + middle) // 2, (middle + met) // 2]
            if self._meets([changed(middle), *(changed(k) for k in after)]):
                met = middle
            else:
                missed = middle
        return changed(met)

    def _give_back(self, configuration: Configuration) -> Configuration:
        """Return the configuration with every linear given back that the goal does not need."""
        if not self._meets([configuration]):
            return configuration
        # Linears in float first: the fewest are to remain.
        steps: list[tuple[Precision, Precision]] = [("float", "per_token")]
        if configuration.activations != "per_token":
            steps.append(("per_token", configuration.activations))
        for precision, less in steps:
            names = list(configuration.overrides(precision))
            if names:
                order = self._least_first(configuration, names, precision, less)
                configuration = self._halving(configuration, order, less)
                configuration = self._singly(configuration, precision, less)
        return configuration

    def _least_first(
        self,
        configuration: Configuration,
        names: Sequence[str],
        precision: Precision,
        less: Precision,
    ) -> list[str]:
        without = configuration.changed(names, less)
        estimated = self.gains(without, precision)
        costs = {name: self.costs(name, precision) - self.costs(name, less) for name in names}
        return ranked({name: estimated[name] for name in names}, costs)[::-1]

    def _halving(
        self, configuration: Configuration, names: Sequence[str], less: Precision
    ) -> Configuration:
        """Give back as many of `names` at once as the goal allows, down to single ones."""
        if not names:
            return configuration
        half = math.ceil(len(names) / 2)
        parts = [names[:half], names[half:]] if len(names) > 1 else [names]
        asked = [configuration.changed(names, less)]
        asked += [configuration.changed(part, less) for part in parts]
        if self._meets(asked):
            return asked[0]
        if len(names) == 1:
            return configuration
        for part in parts:
            configuration = self._halving(configuration, part, less)
        return configuration

    def _singly(
        self, configuration: Configuration, precision: Precision, less: Precision
    ) -> Configuration:
        """Give linears back one by one until the goal needs each that is left."""
        while True:
            singles = [
                configuration.changed([name], less) for name in configuration.overrides(precision)
            ]
            for index, single in enumerate(singles):
                if self._meets(singles[index:]):
                    configuration = single
                    break
            else:
                return configuration


def _difference(before: float, after: float) -> float:
    """Return before - after, where both may be infinite."""
    return 0.0 if before == after else before - after
