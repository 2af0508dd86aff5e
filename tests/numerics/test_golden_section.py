"""The one-dimensional search: between the points of its grid, and never worse than them."""

from sq_cpu.numerics.golden_section import argmin

GRID = tuple(step / 20 for step in range(21))


def test_a_minimum_between_the_points_and_at_the_ends() -> None:
    # Golden section leaves .618^8 of an interval of .1.
    assert abs(argmin(lambda x: (x - 0.337) ** 2, GRID, 8) - 0.337) < 0.1 * 0.618**8
    assert argmin(lambda x: x, GRID, 8) == 0.0
    assert argmin(lambda x: -x, GRID, 8) == 1.0


def test_a_dip_that_only_the_grid_sees_is_kept() -> None:
    assert argmin(lambda x: 0.0 if x == 0.5 else 1.0 + x, GRID, 8) == 0.5


def test_of_equals_the_first_of_the_grid() -> None:
    assert argmin(lambda x: 0.0, GRID, 3) == 0.0
    assert argmin(lambda x: 0.0, GRID[::-1], 3) == 1.0


def test_no_point_is_asked_for_twice() -> None:
    asked: list[float] = []
    argmin(lambda x: asked.append(x) or abs(x - 0.3), GRID, 8)  # type: ignore[func-returns-value]
    assert len(asked) == len(set(asked))
