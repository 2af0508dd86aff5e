"""The local search of an autotuning, on losses that are known."""

import random
from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.latency import Precision
from sq_cpu.autotuning.refine import Rank, Refinement, ranked

NAMES = tuple(f"layer{i}" for i in range(8))
COST: dict[Precision, float] = {"static": 1.0, "per_token": 1.125, "per_tensor": 1.25, "float": 4.0}


class Losses:
    """Additive losses of linears of different sizes, and a count of what was asked."""

    def __init__(self, seed: int, goal: float) -> None:
        rng = random.Random(seed)
        self.size = {name: rng.choice([1, 2, 4]) for name in NAMES}
        static = {name: rng.random() ** 4 for name in NAMES}
        self.loss_of: dict[str, dict[Precision, float]] = {
            name: {"static": static[name], "per_token": rng.random() * static[name], "float": 0.0}
            for name in NAMES
        }
        self.goal = goal
        self.known: dict[str, float] = {}

    def of(self, configuration: Configuration) -> float:
        return sum(self.loss_of[name][configuration.precision(name)] for name in NAMES)

    def first(self, frontier: Sequence[Configuration]) -> float:
        return self.known.setdefault(frontier[0].key, self.of(frontier[0]))

    def gains(self, configuration: Configuration, precision: Precision) -> dict[str, float]:
        loss = self.loss_of
        return {n: loss[n][configuration.precision(n)] - loss[n][precision] for n in NAMES}

    def cost(self, name: str, precision: Precision) -> float:
        return self.size[name] * COST[precision]

    def refinement(self, rank: Rank = "estimated", **changes: Any) -> Refinement:
        parts = {"gains": self.gains} | changes
        return Refinement(NAMES, self.first, self.goal, costs=self.cost, rank=rank, **parts)

    def fewest_in_float(self) -> int:
        """Try every assignment; per-token activations never lose more than static ones."""
        precisions: tuple[Precision, ...] = ("per_token", "float")
        return min(
            assignment.count("float")
            for assignment in product(precisions, repeat=len(NAMES))
            if self.of(Configuration(layers=tuple(zip(NAMES, assignment, strict=True))))
            <= self.goal
        )


@pytest.mark.parametrize("rank", ["estimated", "measured"])
@pytest.mark.parametrize("goal", [2.0, 0.5, 0.1, 0.01, 0.0])
@pytest.mark.parametrize("seed", range(6))
def test_as_few_in_float_as_of_all_assignments(seed: int, goal: float, rank: Rank) -> None:
    losses = Losses(seed, goal)
    found = losses.refinement(rank).run(Configuration())
    assert losses.of(found) <= goal
    assert len(found.overrides("float")) == losses.fewest_in_float()


@pytest.mark.parametrize("seed", range(6))
def test_nothing_single_can_be_given_back_whatever_the_estimate(seed: int) -> None:
    losses = Losses(seed, 0.05)
    rng = random.Random(seed)

    def nonsense(configuration: Configuration, precision: Precision) -> dict[str, float]:
        return {name: rng.random() for name in NAMES}

    found = losses.refinement(gains=nonsense).run(Configuration())
    assert losses.of(found) <= losses.goal
    less: dict[Precision, Precision] = {"float": "per_token", "per_token": "static"}
    assert found.layers
    for name, precision in found.layers:
        assert losses.of(found.changed([name], less[precision])) > losses.goal


def test_measured_ranks_make_up_for_wrong_estimates() -> None:
    for seed in range(6):
        losses = Losses(seed, 0.05)
        wrong = {name: -gain for name, gain in losses.gains(Configuration(), "float").items()}
        found = losses.refinement("measured", gains=lambda c, precision, w=wrong: w)
        best = found.run(Configuration())
        assert len(best.overrides("float")) == losses.fewest_in_float()


def test_what_is_not_needed_is_given_back() -> None:
    losses = Losses(0, 100.0)
    start = Configuration().changed(NAMES[:4], "float").changed(NAMES[4:], "per_token")
    assert losses.refinement().run(start) == Configuration()
    # All in float at once, then all per token at once: two questions beside the start.
    assert len(losses.known) <= 4


def test_a_goal_that_is_out_of_reach_ends_with_all_in_float() -> None:
    losses = Losses(0, -1.0)
    assert losses.refinement().run(Configuration()).overrides("float") == NAMES


def test_without_float_it_ends_where_float_would_begin() -> None:
    losses = Losses(0, 0.01)
    found = losses.refinement().run(Configuration(), in_float=False)
    assert not found.overrides("float")
    assert losses.of(found) > losses.goal
    assert len(losses.known) == 2  # as it is, and all per token
    easy = Losses(0, sum(of["per_token"] for of in losses.loss_of.values()))
    assert easy.of(easy.refinement().run(Configuration(), in_float=False)) <= easy.goal


def test_few_questions_for_many_linears() -> None:
    names = tuple(f"l{i:03}" for i in range(200))
    needed = {"l017", "l123", "l188"}
    asked: dict[str, float] = {}

    def loss(frontier: Sequence[Configuration]) -> float:
        first = frontier[0]
        missing = float(len(needed.difference(first.overrides("float"))))
        return asked.setdefault(first.key, missing)

    def gains(configuration: Configuration, precision: Precision) -> dict[str, float]:
        return {name: 2.0 if name in needed else 1 / (1 + int(name[1:])) for name in names}

    search = Refinement(names, loss, 0.0, gains, lambda name, precision: COST[precision])
    found = search.run(Configuration(activations="per_token"))
    assert set(found.overrides("float")) == needed
    assert len(asked) < 20


def test_the_rank_is_by_gain_per_price_and_what_is_free_comes_first() -> None:
    gains = {"dear": 4.0, "cheap": 3.0, "free": 0.1, "useless": 0.0}
    costs = {"dear": 4.0, "cheap": 1.0, "free": -0.5, "useless": -0.5}
    assert ranked(gains, costs) == ["free", "cheap", "dear", "useless"]


def test_the_frontier_begins_with_what_is_asked_and_has_no_other_order_of_events() -> None:
    """Workers that know different answers already must still come to the same end."""
    losses = Losses(3, 0.05)
    alone = losses.refinement("measured").run(Configuration())
    ahead = Losses(3, 0.05)

    def first(frontier: Sequence[Configuration]) -> float:
        for configuration in frontier[1:]:
            ahead.known[configuration.key] = ahead.of(configuration)
        return ahead.first(frontier)

    search = Refinement(NAMES, first, 0.05, ahead.gains, ahead.cost, "measured")
    assert search.run(Configuration()) == alone
    assert ahead.known.keys() >= losses.known.keys()
