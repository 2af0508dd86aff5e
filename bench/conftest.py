"""Options of the benchmark suites, and one table and one JSON file at the end of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from harness import numbers, print_table, rotation_bytes, write_results
from shapes import ROWS, SHAPES

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sq_cpu benchmarks")
    rows = ",".join(map(str, ROWS))
    group.addoption("--models", default=",".join(SHAPES), help="models to take shapes from")
    group.addoption("--rows", default=rows, help=f"values of M (default {rows})")
    group.addoption("--threads", default="1,all", help="thread counts (default 1,all)")
    group.addoption("--weights", default="cold,warm", help="cold, warm or cold,warm (default)")
    group.addoption("--budget", type=float, default=2.0, help="seconds a configuration")
    group.addoption(
        "--rotate-mb", type=int, help="weights to rotate through (default: 4 times the cache)"
    )


class Rows(list[dict[str, Any]]):
    """The rows of this run."""


_ROWS = pytest.StashKey[Rows]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = Rows()


@pytest.fixture
def rows(request: pytest.FixtureRequest) -> Rows:
    return request.config.stash[_ROWS]


@pytest.fixture(scope="session")
def rotation(request: pytest.FixtureRequest) -> int:
    return rotation_bytes(request.config.getoption("--rotate-mb"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "configuration" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    configurations = [
        (model, shape, m, threads, weights == "warm")
        for model in option("--models").split(",")
        for shape in SHAPES[model]
        for m in numbers(option("--rows"))
        for threads in numbers(option("--threads"))
        for weights in option("--weights").split(",")
    ]
    ids = [
        f"{model}-{shape.linear}-m{m}-t{threads}-{'warm' if warm else 'cold'}"
        for model, shape, m, threads, warm in configurations
    ]
    metafunc.parametrize("configuration", configurations, ids=ids)


def pytest_terminal_summary(config: pytest.Config) -> None:
    if rows := config.stash[_ROWS]:
        print_table("linear op", rows, "sq_cpu")
        print(f"wrote {write_results('linear', rows, RESULTS)}")
