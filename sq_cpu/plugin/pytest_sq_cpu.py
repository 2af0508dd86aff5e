"""The pytest fixture `sq_cpu_regression`: fails where a saved model got slower or less accurate.

pytest imports this at the start of every run of every suite, so it is installed beside sq_cpu, not
inside: to import anything of sq_cpu is to import torch. It does so where the fixture is used.

    def test_model(sq_cpu_regression):
        sq_cpu_regression("model-int8")

is three tests, of accuracy, prefill and decode, each a row of pytest-benchmark; the arguments of
the call are those of `sq_cpu.evaluation.regression.Gate.check`.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    from sq_cpu.evaluation.regression import Gate

_GATE = pytest.StashKey["Gate"]()


def _percentage(text: str) -> float:
    number, sign, rest = text.partition("%")
    try:
        value = float(number) / 100
    except ValueError:
        value = -1.0
    if not sign or rest or not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a percentage, such as 10%")
    return value


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the fixture."""
    group = parser.getgroup("sq_cpu regression")
    group.addoption(
        "--sq-cpu-baseline",
        metavar="FOLDER",
        type=Path,
        help="Folder of the baselines. [default: sq-cpu-baselines in the root directory]",
    )
    group.addoption(
        "--sq-cpu-baseline-update",
        action="store_true",
        help="Write the baselines of this machine class anew instead of comparing with them.",
    )
    group.addoption(
        "--sq-cpu-baseline-create",
        action="store_true",
        help="Write baselines where there are none; compare with the others.",
    )
    group.addoption(
        "--sq-cpu-slower",
        metavar="PERCENT",
        type=_percentage,
        default="10%",
        help="By how much a model may be slower than its baseline. [default: 10%%]",
    )
    group.addoption(
        "--sq-cpu-less-accurate",
        metavar="PERCENT",
        type=_percentage,
        default="1%",
        help="By how much it may be less accurate. [default: 1%%]",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Give the fixture, or one that says what is missing."""
    there = config.getoption("benchmark_max_time", None) is not None
    config.pluginmanager.register(_Fixture() if there else _NoBenchmark(), "sq_cpu regression")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Tell what the checks that passed found."""
    gate = config.stash.get(_GATE, None)
    if gate is not None and gate.lines:
        terminalreporter.section("sq_cpu regression")
        for line in gate.lines:
            terminalreporter.line(line)


def _gate_of(config: pytest.Config) -> Gate:
    from sq_cpu.evaluation.regression import Gate, Settings

    if _GATE not in config.stash:
        option = config.getoption
        write: Literal["no", "missing", "all"] = "no"
        if option("sq_cpu_baseline_create"):
            write = "missing"
        if option("sq_cpu_baseline_update"):
            write = "all"
        config.stash[_GATE] = Gate(
            Settings(
                folder=option("sq_cpu_baseline") or config.rootpath / "sq-cpu-baselines",
                write=write,
                slower=option("sq_cpu_slower"),
                less_accurate=option("sq_cpu_less_accurate"),
                max_seconds=float(option("benchmark_max_time")),
                min_rounds=option("benchmark_min_rounds"),
            )
        )
    return config.stash[_GATE]


class _Fixture:
    @pytest.fixture(params=["accuracy", "prefill", "decode"])
    def sq_cpu_regression(
        self, request: pytest.FixtureRequest, benchmark: Any
    ) -> Callable[..., None]:
        """Compare a saved model with the stored baseline of this machine class.

        Call it once a test, with the model's folder; see `sq_cpu.evaluation.regression.Gate.check`.
        """
        from sq_cpu.errors import SqCpuError

        gate = _gate_of(request.config)
        used = False

        def time_rounds(
            call: Callable[[], object], setup: Callable[[], None], rounds: int
        ) -> Sequence[float]:
            nonlocal used
            if used:
                raise SqCpuError("sq_cpu_regression was called before in this test; use two tests")
            used = True
            benchmark.pedantic(call, setup=setup, rounds=rounds, iterations=1)
            return [] if benchmark.disabled else benchmark.stats.stats.data

        def check(folder: str | os.PathLike[str], **options: Any) -> None:
            __tracebackhide__ = True
            if benchmark.disabled and request.param != "accuracy":
                pytest.skip("pytest-benchmark is disabled: nothing is timed")
            try:
                gate.check(
                    request.node.nodeid,
                    request.param,
                    Path(folder),
                    time_rounds=time_rounds,
                    extra_info=benchmark.extra_info,
                    **options,
                )
            except SqCpuError as error:
                failure = str(error)
            else:
                return
            if not used:  # what was refused beforehand has no row, and is no unused benchmark
                benchmark.disabled = True
                benchmark(lambda: None)
            pytest.fail(failure, pytrace=False)

        return check


class _NoBenchmark:
    @pytest.fixture
    def sq_cpu_regression(self) -> None:
        """Compare a saved model with a stored baseline; needs pytest-benchmark."""
        pytest.fail(
            "sq_cpu_regression needs pytest-benchmark; run: pip install pytest-benchmark",
            pytrace=False,
        )
