"""How many threads a step takes, by what its first repetitions took."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

__all__ = ["TeamSize"]

_FEW_ROWS = 16  # more keep all threads busy
_ROUNDS = 6  # of each size; the first, which brings weights to the caches, does not count
_GAIN = 0.97  # of the time of a larger team: what is less may be noise
_HOPELESS = 1.25  # times the least time: that size is tried no more


class TeamSize:
    """Runs steps of few rows on several numbers of threads in turns, then on the fastest.

    Such a step reads the weights. Threads beyond those that take all that memory gives only make
    barriers longer, and how many that are depends on the model and the machine. A step's result
    does not depend on it.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._chosen: dict[tuple[int, int], int] = {}
        self._times: dict[tuple[int, int], dict[int, list[float]]] = {}

    def run(self, rows: int, step: Callable[[int], object]) -> None:
        """Call a step of so many rows with the number of its threads; 0 is all of torch's."""
        if rows > _FEW_ROWS:
            step(0)
            return
        most = torch.get_num_threads()
        kind = (max(0, rows - 1).bit_length(), most)  # 1 row, 2, up to 4, 8, 16
        if (size := self._chosen.get(kind)) is not None:
            step(size)
            return
        sizes = [most, most * 3 // 4, most // 2, most // 4]
        times = self._times.setdefault(kind, {size: [] for size in sizes if size > 0})
        size = min(times, key=lambda each: len(times[each]))
        start = self._clock()
        step(size)
        times[size].append(self._clock() - start)
        least = {size: min(taken[1:]) for size, taken in times.items() if len(taken) > 2}
        if least and least.get(size, 0.0) > _HOPELESS * min(least.values()):
            del times[size]
        if len(times) == 1 or all(len(each) >= _ROUNDS for each in times.values()):
            self._chosen[kind] = _fastest(self._times.pop(kind))


def _fastest(times: dict[int, list[float]]) -> int:
    """Return the size of the least median; of those that are as good, the largest."""
    medians = {size: statistics.median(taken[1:] or taken) for size, taken in times.items()}
    best = max(medians)
    for size in sorted(medians, reverse=True):
        if medians[size] < _GAIN * medians[best]:
            best = size
    return best
