"""pytest-benchmark suite of the linear op: a benchmark of ours, its peers timed between its rounds.

What pytest-benchmark stores and compares is our time, for tracking regressions; the peers' medians
and the ratios of the same rounds are in its ``extra_info``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import Rows
from linear_op import LinearOp, measure
from pytest_benchmark.fixture import BenchmarkFixture
from shapes import Shape

_linear_op = functools.lru_cache(maxsize=1)(LinearOp)  # configurations come sorted by shape


def test_linear(
    benchmark: BenchmarkFixture,
    configuration: tuple[str, Shape, int, int, bool],
    rotation: int,
    rows: Rows,
    pytestconfig: pytest.Config,
) -> None:
    model, shape, m, threads, warm = configuration
    op = _linear_op(shape, rotation)
    calls = op.candidates(m)
    if benchmark.disabled:  # verified and run once: a smoke test
        benchmark(calls["sq_cpu"], 0)
        return

    def time_rounds(
        call: Callable[[], object], setup: Callable[[], None], rounds: int
    ) -> Sequence[float]:
        benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1)
        seconds: list[float] = benchmark.stats.stats.data
        return seconds

    benchmark.group = f"{model} {shape.linear} M={m} threads={threads}"
    row: dict[str, Any] = measure(
        op,
        m,
        calls,
        model=model,
        threads=threads,
        warm=warm,
        budget=pytestconfig.getoption("--budget"),
        time_rounds=time_rounds,
    )
    benchmark.extra_info.update(row)
    rows.append(row)
