"""How many threads a step takes: the fastest, whatever a clock says of others now and then."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sq_cpu.inference.team_size import TeamSize


class Clock:
    """A clock that steps move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.sizes: list[int] = []

    def __call__(self) -> float:
        return self.now

    def step(self, cost: Callable[[int], float]) -> Callable[[int], None]:
        def run(size: int) -> None:
            self.sizes.append(size)
            # The first of each size, and every fifth step, are disturbed.
            is_slow = self.sizes.count(size) == 1 or len(self.sizes) % 5 == 0
            self.now += cost(size) * (20 if is_slow else 1)

        return run


@pytest.fixture
def sixteen(threads: Callable[[int], None]) -> None:
    threads(16)


COSTS: dict[int, Callable[[int], float]] = {
    16: lambda size: 1 / size,
    12: lambda size: 1 / min(size, 12) + 0.01 * size,  # memory feeds twelve
    4: lambda size: size,
}


@pytest.mark.usefixtures("sixteen")
@pytest.mark.parametrize("best", COSTS)
def test_the_fastest_is_kept(best: int) -> None:
    clock = Clock()
    team = TeamSize(clock)
    for _ in range(40):
        team.run(1, clock.step(COSTS[best]))
    assert {*clock.sizes[:24]} == {16, 12, 8, 4}
    assert clock.sizes[24:] == [best] * 16
    # Those far behind are tried no more.
    assert clock.sizes.count(16 if best == 4 else 4) <= 4


@pytest.mark.usefixtures("sixteen")
def test_as_good_is_not_better() -> None:
    clock = Clock()
    team = TeamSize(clock)
    for _ in range(25):
        team.run(1, clock.step(lambda size: 1 + 0.001 * size))
    assert clock.sizes[-1] == 16


def test_rows_and_threads_have_choices_of_their_own(threads: Callable[[int], None]) -> None:
    clock = Clock()
    team = TeamSize(clock)
    threads(4)
    for _ in range(24):
        team.run(1, clock.step(COSTS[4]))
    team.run(1, clock.step(COSTS[4]))
    assert clock.sizes[-1] == 1
    team.run(5, clock.step(COSTS[4]))
    assert clock.sizes[-1] == 4
    team.run(17, clock.step(COSTS[4]))
    assert clock.sizes[-1] == 0
    threads(8)
    team.run(1, clock.step(COSTS[4]))
    assert clock.sizes[-1] == 8
    threads(1)
    assert torch.get_num_threads() == 1
    for _ in range(8):
        team.run(1, clock.step(COSTS[4]))
    assert clock.sizes[-8:] == [1] * 8


def test_a_step_that_fails_is_not_counted(threads: Callable[[int], None]) -> None:
    clock = Clock()
    team = TeamSize(clock)
    threads(2)

    def fail(_: int) -> None:
        raise ValueError("of the step")

    for _ in range(20):
        with pytest.raises(ValueError, match="of the step"):
            team.run(1, fail)
    team.run(1, clock.step(COSTS[4]))
    assert clock.sizes == [2]
