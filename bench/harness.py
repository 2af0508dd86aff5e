"""Interleaved timing of a subject and its peers."""

from __future__ import annotations

import gc
import statistics
import time
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

TimeRounds = Callable[[Callable[[], object], Callable[[], None], int], Sequence[float]]
"""(call, setup, rounds) -> seconds of each call, `setup` having run untimed before each."""

MIN_ROUNDS, MAX_ROUNDS = 5, 200
SLOW_ROUNDS = 3  # where a single call takes longer than the whole budget
PLANNING_ROUNDS = 3  # at most, untimed


@dataclass
class Candidate:
    """A call that does its work once, with the weight copy that its argument names."""

    call: Callable[[int], object]
    copies: int = 1
    copy_bytes: int = 0
    index: int = 0  # of the copy in use; a next measurement goes on where this one stopped

    def run(self) -> None:
        """Call it with the weight copy in use."""
        self.call(self.index)

    def rotate(self) -> None:
        """Go on to the next weight copy."""
        self.index = (self.index + 1) % self.copies

    def time(self) -> float:
        """Call it; return the seconds that it took."""
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


@dataclass(frozen=True)
class Stats:
    """Seconds a call."""

    median: float
    p10: float
    p90: float
    rounds: int

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Stats:
        """Summarize the times of single calls."""
        if len(seconds) == 1:
            return cls(seconds[0], seconds[0], seconds[0], 1)
        deciles = statistics.quantiles(seconds, n=10, method="inclusive")
        return cls(statistics.median(seconds), deciles[0], deciles[-1], len(seconds))


def _plan_rounds(candidate: Candidate, warm: bool, share: float, budget: float) -> int:
    """Choose how often to time a candidate, by the quickest of a few calls."""
    quickest, spent = float("inf"), 0.0
    for _ in range(PLANNING_ROUNDS):  # the first one plans and allocates
        if not warm:
            candidate.rotate()
        seconds = candidate.time()
        quickest, spent = min(quickest, seconds), spent + seconds
        if spent > share:
            break
    least = MIN_ROUNDS if quickest <= budget else SLOW_ROUNDS
    return max(least, min(MAX_ROUNDS, int(share / (quickest * (1 + warm)))))


def interleave(
    candidates: Mapping[str, Candidate],
    *,
    warm: bool,
    budget: float,
    time_rounds: TimeRounds | None = None,
) -> dict[str, Stats]:
    """Time the candidates in turn, A/B/C A/B/C ..., so that all see the same noise.

    Each candidate gets an equal share of the budget. The first one is the subject: it is in every
    round; a slower peer sits out some rounds, evenly spread.

    Parameters
    ----------
    candidates : mapping of name to candidate
    warm : bool
        Each timed call comes right after an untimed one with the same weight copy.
        Otherwise every call takes the next copy.
    budget : float
        Seconds to spend; a candidate is timed at least MIN_ROUNDS times (SLOW_ROUNDS if one call
        exceeds the budget) and at most MAX_ROUNDS times.
    time_rounds : callable
        Runs and times the subject, as a benchmark tool does it; None: as the peers are timed.
    """
    (subject, ours), *peers = candidates.items()
    share = budget / len(candidates)
    planned = {name: _plan_rounds(c, warm, share, budget) for name, c in candidates.items()}
    rounds = max(planned.values())
    seconds: dict[str, list[float]] = {name: [] for name, _ in peers}
    current = 0

    def get_ready(candidate: Candidate) -> None:
        if warm:
            candidate.run()
        else:
            candidate.rotate()

    def turn() -> None:
        nonlocal current
        for name, peer in peers:
            if (current + 1) * planned[name] // rounds == current * planned[name] // rounds:
                continue
            get_ready(peer)
            seconds[name].append(peer.time())
        current += 1
        get_ready(ours)

    def time_subject() -> float:
        turn()
        return ours.time()

    gc.collect()
    gc.disable()
    try:
        if time_rounds is None:
            subject_seconds: Sequence[float] = [time_subject() for _ in range(rounds)]
        else:
            subject_seconds = time_rounds(ours.run, turn, rounds)
    finally:
        gc.enable()
    return {subject: Stats.of(subject_seconds)} | {n: Stats.of(s) for n, s in seconds.items()}


def in_turns(timers: Mapping[str, timeit.Timer], loop: int, rounds: int) -> dict[str, list[float]]:
    """Return each call's microseconds, `rounds` means of `loop` calls in a row, taken in turns."""
    us: dict[str, list[float]] = {name: [] for name in timers}
    for turn in range(rounds + 1):
        for name, timer in timers.items():
            seconds = timer.timeit(loop)
            if turn > 0:  # the first one warms up
                us[name].append(seconds / loop * 1e6)
    return us
