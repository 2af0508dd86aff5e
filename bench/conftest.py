"""Options of the benchmark suites, and the tables and the JSON file of a run."""

from __future__ import annotations

from pathlib import Path

import pytest
from linear_op import rotation_bytes
from machine import numbers
from results import Results
from shapes import MODELS, ROWS, shapes_of


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("sq_cpu benchmarks")
    rows = ",".join(map(str, ROWS))
    group.addoption("--models", default=",".join(MODELS), help="models to take shapes from")
    group.addoption("--rows", default=rows, help=f"values of M (default {rows})")
    group.addoption("--threads", default="1,all", help="thread counts (default 1,all)")
    group.addoption("--weights", default="cold,warm", help="cold, warm or cold,warm (default)")
    group.addoption("--budget", type=float, default=2.0, help="seconds a configuration")
    group.addoption(
        "--rotate-mb", type=int, help="weights each candidate rotates through (twice the cache)"
    )
    group.addoption(
        "--sq-cpu-model", type=Path, help="saved model to hold against its baseline (SmolLM2)"
    )
    group.addoption("--json", type=Path, help="the JSON file (results/<cpu>-<date>.json)")


_RESULTS = pytest.StashKey[Results]()


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    option = request.config.getoption
    results = Results("linear", option("--json"))
    results.measure_peaks(numbers(option("--threads")))
    request.config.stash[_RESULTS] = results
    return results


@pytest.fixture(scope="session")
def rotation(request: pytest.FixtureRequest) -> int:
    return rotation_bytes(request.config.getoption("--rotate-mb"))


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "configuration" not in metafunc.fixturenames:
        return
    option = metafunc.config.getoption
    configurations = [
        (shape, m, threads, weights == "warm")
        for shape in shapes_of(option("--models").split(","))
        for m in numbers(option("--rows"))
        for threads in numbers(option("--threads"))
        for weights in option("--weights").split(",")
    ]
    ids = [
        f"{shape.n}x{shape.k}-m{m}-t{threads}-{'warm' if warm else 'cold'}"
        for shape, m, threads, warm in configurations
    ]
    metafunc.parametrize("configuration", configurations, ids=ids)


def pytest_terminal_summary(config: pytest.Config) -> None:
    results = config.stash.get(_RESULTS, None)
    if results and results.rows:
        results.measure_peaks(numbers(config.getoption("--threads")))
        results.write()
        results.print_tables()
