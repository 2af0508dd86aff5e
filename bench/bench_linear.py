"""pytest-benchmark suite of the linear op: a benchmark of ours, its peers timed between its rounds.

What pytest-benchmark stores and compares is our time, for tracking regressions; the peers' medians
and the ratios of the same rounds are in its ``extra_info``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import pytest
from linear_op import SUBJECT, LinearOp, measure
from pytest_benchmark.fixture import BenchmarkFixture
from results import Results
from shapes import Shape

_linear_op = functools.lru_cache(maxsize=1)(LinearOp)  # configurations come sorted by shape


def test_linear(
    benchmark: BenchmarkFixture,
    configuration: tuple[Shape, int, int, bool],
    rotation: int,
    request: pytest.FixtureRequest,
) -> None:
    shape, m, threads, warm = configuration
    op = _linear_op(shape, rotation)
    op.prepare(m)
    if benchmark.disabled:  # verified and run once: a smoke test
        benchmark(op.candidates[SUBJECT].run)
        return

    def time_rounds(
        call: Callable[[], object], setup: Callable[[], None], rounds: int
    ) -> Sequence[float]:
        benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1)
        seconds: list[float] = benchmark.stats.stats.data
        return seconds

    results: Results = request.getfixturevalue("results")
    benchmark.group = f"{shape.n}x{shape.k} M={m} threads={threads}"
    budget = request.config.getoption("--budget")
    row = measure(op, threads=threads, warm=warm, budget=budget, time_rounds=time_rounds)
    benchmark.extra_info.update(row)
    results.add(row)
