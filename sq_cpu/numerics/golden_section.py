"""A minimum of a noisy function of one number: a grid, then a golden section."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

__all__ = ["argmin"]

_RATIO = (math.sqrt(5) - 1) / 2


def argmin(f: Callable[[float], float], grid: Sequence[float], steps: int) -> float:
    """Return where f is least of all that was tried; of equals, what comes first in `grid`.

    It tries the grid, then takes `steps` steps of a golden-section search between the neighbours
    of the grid's best; each step shrinks the bracket by 0.62. A step function with noise may lead
    that search to a worse place than where it began, so the best of all is returned.
    """
    tried = {x: f(x) for x in grid}

    def best() -> float:
        return min(tried, key=tried.__getitem__)

    def loss(x: float) -> float:
        if x not in tried:
            tried[x] = f(x)
        return tried[x]

    places = sorted(tried)
    at = places.index(best())
    low, high = places[max(0, at - 1)], places[min(len(places) - 1, at + 1)]
    left, right = high - _RATIO * (high - low), low + _RATIO * (high - low)
    for _ in range(steps):
        if loss(left) <= loss(right):
            high, right = right, left
            left = high - _RATIO * (high - low)
        else:
            low, left = left, right
            right = low + _RATIO * (high - low)
    return best()
