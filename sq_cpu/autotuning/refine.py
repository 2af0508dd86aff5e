"""From a configuration that misses the goal, or wastes time, to one from which nothing can go.

Pure search over `Configuration`s; whoever calls says what one is worth. First, while the goal is
missed, linears go over to per-token activations and then to float, those first that gain most per
millisecond. Then they are given back, those first that gain least, until no single one can be.
Each step is a question about one configuration; which others may be asked next goes with it, so
that workers can share the work and still walk the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.latency import Choice

__all__ = ["Rank", "Refinement", "ranked"]

Rank = Literal["estimated", "measured"]

# What a linear goes over to, the first that will do.
_STAGES: tuple[Choice, ...] = ("per_token", "float")

Loss = Callable[[Sequence[Configuration]], float]
Gains = Callable[[Configuration, Choice], Mapping[str, float]]
Prices = Callable[[str, Choice], float]


def ranked(gains: Mapping[str, float], prices: Mapping[str, float]) -> list[str]:
    """Return names by gain per price, the greatest first; what costs nothing comes before all.

    Ties keep the order of `gains`.
    """

    def worth(name: str) -> tuple[bool, float]:
        gain, price = gains[name], prices[name]
        free = price <= 0 and gain > 0
        return (free, gain if price <= 0 else gain / price)

    return sorted(gains, key=worth, reverse=True)


@dataclass(frozen=True)
class Refinement:
    """The local search. What it asks about is all it does: the answers are kept by who gives them.

    Attributes
    ----------
    names : the linears
    loss : of the first of some configurations, evaluated; the others may be asked about next
    goal : the greatest loss that is accepted
    gains : estimates how much less the loss is with a linear's choice changed, in any unit
    prices : milliseconds of a linear by choice
    rank : "measured" replaces the estimates by the evaluated loss of every single change
    """

    names: Sequence[str]
    loss: Loss
    goal: float
    gains: Gains
    prices: Prices
    rank: Rank = "estimated"

    def run(self, start: Configuration, *, in_float: bool = True) -> Configuration:
        """Return the best configuration of this search.

        It misses the goal only if all do; or, without `in_float`, if that takes more linears in
        float than `start` has.
        """
        if not in_float:
            return self._give_back(self._repaired(start, ("per_token",), per_millisecond=True))
        best = self._give_back(self._repaired(start, _STAGES, per_millisecond=True))
        if len(best.chosen("float")) > 1:
            # Few slow linears may do what many quick ones do.
            other = self._repaired(start.settings(), _STAGES, per_millisecond=False)
            other = self._give_back(other)
            best = min(best, other, key=self._size)
        return best

    def _size(self, configuration: Configuration) -> tuple[bool, int, float]:
        """Return what makes one configuration better than another: less of it, in this order."""
        milliseconds = sum(self.prices(name, configuration.choice(name)) for name in self.names)
        return (
            not self._meets([configuration]),
            len(configuration.chosen("float")),
            milliseconds,
        )

    def _meets(self, frontier: Sequence[Configuration]) -> bool:
        return self.loss(frontier) <= self.goal

    def _order(
        self, configuration: Configuration, names: Sequence[str], choice: Choice, per_ms: bool
    ) -> list[str]:
        """Return names by what changing each to `choice` gains, the greatest first."""
        gains: Mapping[str, float]
        if self.rank == "measured":
            singles = [configuration.changed([name], choice) for name in names]
            before = self.loss([configuration, *singles])
            after = [self.loss(singles[i:]) for i in range(len(singles))]
            gains = {n: _difference(before, loss) for n, loss in zip(names, after, strict=True)}
        else:
            estimated = self.gains(configuration, choice)
            gains = {name: estimated[name] for name in names}
        prices = {
            name: self.prices(name, choice) - self.prices(name, configuration.choice(name))
            for name in names
        }
        return ranked(gains, prices if per_ms else dict.fromkeys(names, 1.0))

    def _repaired(
        self, start: Configuration, stages: Sequence[Choice], *, per_millisecond: bool
    ) -> Configuration:
        """Return a configuration that meets the goal: `start` with as few changes as it takes."""
        if self._meets([start]):
            return start
        for choice in stages:
            names = [n for n in self.names if start.choice(n) not in (choice, "float")]
            if not names:
                continue
            everything = start.changed(names, choice)
            # With all in float it is the float model.
            if choice == "float" or self._meets([everything]):
                order = self._order(start, names, choice, per_millisecond)
                return self._prefix(start, order, choice)
            start = everything
        return start

    def _prefix(self, start: Configuration, order: Sequence[str], choice: Choice) -> Configuration:
        """Return `start` with the shortest beginning of `order` changed that meets the goal.

        The shortest if a longer one is never worse; by doubling, then bisection.
        """

        def changed(count: int) -> Configuration:
            return start.changed(order[:count], choice)

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
        """Return the configuration after every linear that can go back to less has gone."""
        if not self._meets([configuration]):
            return configuration
        # First those that even per-token activations serve; then the fewest are in float.
        steps: list[tuple[Choice, Choice]] = [("float", "per_token")]
        if configuration.activations != "per_token":
            steps.append(("per_token", configuration.activations))
        for choice, less in steps:
            names = list(configuration.chosen(choice))
            if names:
                order = self._least_first(configuration, names, choice, less)
                configuration = self._halving(configuration, order, less)
                configuration = self._singly(configuration, choice, less)
        return configuration

    def _least_first(
        self, configuration: Configuration, names: Sequence[str], choice: Choice, less: Choice
    ) -> list[str]:
        without = configuration.changed(names, less)
        estimated = self.gains(without, choice)
        prices = {name: self.prices(name, choice) - self.prices(name, less) for name in names}
        return ranked({name: estimated[name] for name in names}, prices)[::-1]

    def _halving(
        self, configuration: Configuration, names: Sequence[str], less: Choice
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

    def _singly(self, configuration: Configuration, choice: Choice, less: Choice) -> Configuration:
        """Give linears back one by one until the goal needs each that is left."""
        while True:
            singles = [configuration.changed([name], less) for name in configuration.chosen(choice)]
            for index, single in enumerate(singles):
                if self._meets(singles[index:]):
                    configuration = single
                    break
            else:
                return configuration


def _difference(before: float, after: float) -> float:
    """Return before - after, where both may be infinite."""
    return 0.0 if before == after else before - after
