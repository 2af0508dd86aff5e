"""How a model is compared with its baseline; the times are faked."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from byte_models import save_float

import sq_cpu
from sq_cpu.evaluation import regression
from sq_cpu.evaluation.baselines import Baseline, Baselines
from sq_cpu.evaluation.regression import ATTEMPTS, Gate, Settings
from sq_cpu.kernels.runtime import Machine


class Fake:
    """Gives the seconds of the model and of the reference; counts the measurements."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        self.seconds = [3.0]
        self.reference = 1.0
        self.measured = 0
        self.folder = save_float(tmp_path / "float")
        self.settings = Settings(folder=tmp_path / "baselines", max_seconds=0.0, min_rounds=3)
        monkeypatch.setattr(regression, "_time_rounds", self.time_rounds)
        monkeypatch.setattr(regression._Bench, "_reference_seconds", lambda _: self.reference)

    def time_rounds(
        self, _: Callable[[], object], setup: Callable[[], None], rounds: int
    ) -> Sequence[float]:
        for _round in range(rounds):
            setup()
        if rounds == 1:  # it warms up
            return [0.0]
        self.measured += 1
        return [self.seconds.pop(0) if len(self.seconds) > 1 else self.seconds[0]] * rounds

    def check(self, **settings: Any) -> Any:
        self.measured = 0
        info: dict[str, Any] = {}
        Gate(replace(self.settings, **settings)).check(
            "test",
            "prefill",
            self.folder,
            time_rounds=self.time_rounds,
            extra_info=info,
            prompt=8,
            tokens=1,
        )
        return info


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fake:
    return Fake(monkeypatch, tmp_path)


def test_the_baseline_is_the_median_of_the_measurements(fake: Fake) -> None:
    fake.seconds = [9.0, 1.0, 4.0]
    fake.check(write="all")
    baselines = Baselines(fake.settings.folder, Machine.here())
    assert baselines.read()["test"].value == 4.0
    assert fake.measured == ATTEMPTS


def test_a_slower_machine_fails_nothing(fake: Fake) -> None:
    fake.check(write="all")
    fake.reference = 2.0
    fake.seconds = [6.0]
    info = fake.check(slower=0.0)
    assert (info["found"]["value"], info["found"]["seconds"]) == (3.0, 6.0)
    assert fake.measured == 1


def test_a_faster_machine_hides_nothing(fake: Fake) -> None:
    fake.check(write="all")
    fake.reference = 0.5
    with pytest.raises(sq_cpu.SqCpuError, match=r"100\.0% slower than the baseline"):
        fake.check()


def test_what_seems_slow_is_measured_again(fake: Fake) -> None:
    fake.check(write="all")
    fake.seconds = [30.0, 5.0, 3.2]
    assert fake.check()["found"]["seconds"] == 3.2
    assert fake.measured == 3
    fake.seconds = [30.0, 3.2, 2.0]
    assert fake.check()["found"]["seconds"] == 3.2
    assert fake.measured == 2
    fake.seconds = [3.4, 3.5, 3.31]
    with pytest.raises(sq_cpu.SqCpuError, match=r"10\.3% slower than the baseline, more than 10"):
        fake.check()
    assert fake.measured == ATTEMPTS


def test_other_work_is_not_compared(fake: Fake, tmp_path: Path) -> None:
    fake.check(write="all")
    baselines = Baselines(fake.settings.folder, Machine.here())
    baselines.write("test", replace(baselines.read()["test"], work="prefill of 16 tokens"))
    with pytest.raises(sq_cpu.SqCpuError, match=r"of other work \(prefill of 16 tokens\) than"):
        fake.check()
    assert fake.measured == 0


def test_folder_of_baselines_that_cannot_be_made(fake: Fake, tmp_path: Path) -> None:
    (tmp_path / "baselines").write_text("a file")
    with pytest.raises(sq_cpu.SqCpuError, match="baselines"):
        fake.check(write="all")


@pytest.mark.parametrize(
    ("found", "stored", "higher", "worse"),
    [
        (1.1, 1.0, False, 0.1),
        (0.9, 1.0, False, -0.1),
        (0.9, 1.0, True, 0.1),
        (-2.2, -2.0, True, 0.1),
        (-1.8, -2.0, False, 0.1),
        (0.0, 0.0, True, 0.0),
        (0.1, 0.0, False, math.inf),
        (0.1, 0.0, True, -math.inf),
    ],
)
def test_worse(found: float, stored: float, higher: bool, worse: float) -> None:
    assert regression._worse(found, stored, higher=higher) == pytest.approx(worse)


@pytest.mark.parametrize(
    "entries",
    [{"value": math.nan}, {"value": True}, {"seconds": "1"}, {"work": 1}, {"versions": []}],
)
def test_entries_are_checked(fake: Fake, entries: dict[str, Any]) -> None:
    fake.check(write="all")
    entry = asdict(Baselines(fake.settings.folder, Machine.here()).read()["test"])
    assert asdict(Baseline(**entry)) == entry
    (name,) = entries
    with pytest.raises(sq_cpu.SqCpuError, match=rf"{name}.* is "):
        Baseline(**entry | entries)
