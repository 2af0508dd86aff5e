"""An autotuning as a job: limited, interrupted, killed, shared, resumed."""

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import autotune_worker
import optuna
import postgres
import pytest
from processes import kill_at, start
from tiny import batches
from torch import nn
from tuning_cases import GOAL, PER_TOKEN, QUICK, Divergence, costs, llama, tuned

import sq_cpu
from sq_cpu import Calibration, SearchSpace, SqCpuError
from sq_cpu.autotuning import autotune as autotuning
from sq_cpu.autotuning import workers
from sq_cpu.autotuning.latency import Costs
from sq_cpu.kernels.runtime import Machine


def evaluations(found: sq_cpu.Autotuned) -> int:
    """Return how many configurations took an evaluation; the float model is known."""
    return sum(trial.in_float < 7 for trial in found.trials)


class Clock:
    """A clock that moves when something is evaluated."""

    def __init__(self) -> None:
        self.now = 0.0

    def ticking(self, evaluate: Callable[[nn.Module], float]) -> Callable[[nn.Module], float]:
        def one(model: nn.Module) -> float:
            self.now += 1.0
            return evaluate(model)

        return one

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_time_limit_gives_the_best_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    clock = Clock()
    monkeypatch.setattr(workers, "time", clock)
    found = tuned(model, 1e-6, evaluate=clock.ticking(Divergence(model)), time_limit=4.0)
    assert found.stopped == "time"
    assert evaluations(found) == 4
    assert [trial.phase for trial in found.trials].count("search") == 2  # half of it
    assert found.loss == min(trial.loss for trial in found.trials) > 1e-6
    assert not found.goal_met


def test_no_time_at_all_is_an_error() -> None:
    with pytest.raises(SqCpuError, match="no configuration could be evaluated; give it more time"):
        tuned(llama(), GOAL, time_limit=0)


def test_a_trial_limit_gives_the_best_so_far_and_a_greater_one_goes_on() -> None:
    storage = optuna.storages.InMemoryStorage()
    options: dict[str, Any] = {"storage": storage, "space": PER_TOKEN, "rank": "measured"}
    model = llama()
    few = tuned(model, 1e-6, refine_trials=3, **options)
    assert few.stopped == "trials"
    assert not few.goal_met
    assert len(few.trials) == 4  # the only settings there are, and three
    more = tuned(model, 1e-6, **options)
    assert more.stopped == "done"
    assert more.goal_met
    assert more.trials[:4] == few.trials
    assert len({trial.configuration.key for trial in more.trials}) == len(more.trials)


def test_ctrl_c_gives_the_best_so_far_and_what_was_interrupted_is_tried_again() -> None:
    storage = optuna.storages.InMemoryStorage()
    model = llama()
    divergence = Divergence(model)

    def interrupted(candidate: nn.Module) -> float:
        if divergence.calls == 3:
            raise KeyboardInterrupt
        return divergence(candidate)

    first = tuned(model, GOAL, evaluate=interrupted, storage=storage)
    assert first.stopped == "interrupted"
    assert len(first.trials) == 2  # after the float model
    again = tuned(model, GOAL, storage=storage)
    assert again.trials[:2] == first.trials
    study = optuna.load_study(storage=storage, study_name="autotune")
    failed = [t for t in study.trials if t.state == optuna.trial.TrialState.FAIL]
    (key,) = [t.user_attrs["claim"]["key"] for t in failed]
    assert key in {trial.configuration.key for trial in again.trials}


def test_ctrl_c_before_the_first_result_is_passed_on() -> None:
    model = llama()
    divergence = Divergence(model)

    def interrupted(candidate: nn.Module) -> float:
        if divergence.calls:
            raise KeyboardInterrupt
        return divergence(candidate)

    with pytest.raises(KeyboardInterrupt):
        tuned(model, GOAL, evaluate=interrupted)


def test_killed_in_mid_trial_it_goes_on_without_losing_one(tmp_path: Path) -> None:
    storage, log = tmp_path / "study.db", tmp_path / "log"
    # The float model, three trials and the one that hangs.
    kill_at(start(autotune_worker.job, storage, log, 4), log, 5)

    url = f"sqlite:///{storage}"
    backend = optuna.storages.RDBStorage(url)
    before = optuna.load_study(storage=backend, study_name="autotune").trials
    assert [t.state.name for t in before] == ["COMPLETE"] * 3 + ["RUNNING"]
    found = autotune_worker.job(storage, log)
    after = optuna.load_study(storage=backend, study_name="autotune").trials
    backend.engine.dispose()

    assert found.stopped == "done"
    assert [t.value for t in after[:3]] == [t.value for t in before[:3]]
    assert after[3].state.name == "FAIL"
    assert after[4].state.name == "COMPLETE"
    assert after[4].user_attrs["claim"]["key"] == before[3].user_attrs["claim"]["key"]
    # The float model and the three were not evaluated again.
    assert len(log.read_text().splitlines()) == evaluations(found) - 3
    assert len({trial.configuration.key for trial in found.trials}) == len(found.trials)


def test_two_workers_on_postgresql_share_one_job(tmp_path: Path) -> None:
    if postgres.server_programs() is None:
        pytest.skip("no PostgreSQL server here; Debian: apt-get install postgresql")
    log = tmp_path / "log"
    with postgres.server() as url:
        found = autotune_worker.job(url, log, workers=2)
        assert found.goal_met
        assert found.stopped == "done"
        assert len({trial.configuration.key for trial in found.trials}) == len(found.trials)
        # The float model, in this process, and every configuration once.
        assert len(log.read_text().splitlines()) == 1 + evaluations(found)
        # This process, alone, finds nothing left to do.
        again = autotune_worker.job(url, log)
        assert again.trials == found.trials
        assert again.plan == found.plan
        assert len(log.read_text().splitlines()) == 1 + evaluations(found)


def test_workers_say_what_they_need(tmp_path: Path) -> None:
    model = llama()
    for storage in (
        None,
        optuna.storages.InMemoryStorage(),
        optuna.storages.RDBStorage("sqlite://"),
        "sqlite:///:memory:",
        "sqlite:///file:study?mode=memory&uri=true",
    ):
        divergence = Divergence(model)
        with pytest.raises(SqCpuError, match=r"workers share a storage.*pass storage='study.db'"):
            tuned(model, GOAL, evaluate=divergence, workers=2, storage=storage)
        assert not divergence.calls
    divergence = Divergence(model)
    with pytest.raises(SqCpuError, match=r"can be pickled: .*workers=1"):
        tuned(
            model,
            GOAL,
            evaluate=lambda candidate: divergence(candidate),
            workers=2,
            storage=tmp_path / "study.db",
        )


@pytest.mark.parametrize("found", [True, False])
def test_workers_need_a_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: bool
) -> None:
    if found:  # it was there when Python looked
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "gone"))
    else:
        monkeypatch.setattr(tempfile, "tempdir", None)
        monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: [str(tmp_path / "gone")])
    with pytest.raises(SqCpuError, match=r"cannot write the job for its workers \(.*set TMPDIR"):
        tuned(llama(), GOAL, workers=2, storage=tmp_path / "study.db")


def test_a_storage_of_another_job_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    model = llama()
    options: dict[str, Any] = {"storage": storage, "space": PER_TOKEN, "refine_trials": 0}
    tuned(model, GOAL, **options)
    with pytest.raises(SqCpuError, match=r"goal is .* use another storage or study name"):
        tuned(model, 1e-4, **options)
    with pytest.raises(SqCpuError, match="another job \\(model is"):
        tuned(llama(seed=1), GOAL, **options)
    with pytest.raises(SqCpuError, match="another job \\(space is"):
        tuned(model, GOAL, **(options | {"space": SearchSpace()}))
    with pytest.raises(SqCpuError, match="another job \\(job is"):
        tuned(model, GOAL, job="another text", **options)
    other: Calibration = sq_cpu.calibrate(model, batches(2))
    with pytest.raises(SqCpuError, match="another job \\(calibration is"):
        sq_cpu.autotune(model, other, Divergence(model), GOAL, costs=costs(model), **options)
    assert tuned(model, GOAL, study="another", **options).trials


def test_a_calibration_on_other_data_is_refused() -> None:
    storage = optuna.storages.InMemoryStorage()
    model = llama()
    options: dict[str, Any] = {"storage": storage, "refine_trials": 0, "trials": 1}

    def go_on(calibration: Calibration) -> sq_cpu.Autotuned:
        evaluate, given = Divergence(model), costs(model)
        return sq_cpu.autotune(
            model, calibration, evaluate, GOAL, space=QUICK, costs=given, **options
        )

    first, *others = batches(3)
    begun = sq_cpu.calibrate(model, [first, *others])
    found = go_on(begun)
    # As many tokens and batches, and the same first one, which is the example.
    other = sq_cpu.calibrate(model, [first, *(ids.flip(1) for ids in others)])
    assert other.tokens == begun.tokens
    with pytest.raises(SqCpuError, match="begun with a calibration on other data"):
        go_on(other)
    with pytest.raises(SqCpuError, match="another job \\(rows is"):
        go_on(sq_cpu.calibrate(model, [first, *others], rows=8))
    with pytest.raises(SqCpuError, match="another job \\(gradient_rows is"):
        go_on(sq_cpu.calibrate(model, [first, *others], gradient_rows=64))
    # Another processor rounds otherwise.
    near = {name: high * (1 + 1e-6) for name, high in begun.channel_max.items()}
    assert go_on(replace(begun, channel_max=near)).trials == found.trials


def test_milliseconds_are_those_that_the_study_was_begun_with(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    storage = optuna.storages.InMemoryStorage()
    model = llama()
    options: dict[str, Any] = {"storage": storage, "refine_trials": 0, "trials": 1, "tokens": 32}
    table = costs(model)
    doubled = {
        shape: {name: 2 * ms for name, ms in row.items()} for shape, row in table.entries.items()
    }
    monkeypatch.setattr(autotuning, "measured_costs", lambda *_, **__: table)
    begun = tuned(model, GOAL, costs=None, **options)
    with pytest.raises(SqCpuError, match="begun with other costs"):
        tuned(model, GOAL, costs=Costs(32, "float32", doubled), **options)

    # Not measured again, on another machine neither.
    elsewhere = Machine(cpu="another", isa="avx2", threads=3)
    monkeypatch.setattr(autotuning, "measured_costs", None)
    said: list[str] = []
    assert tuned(model, GOAL, costs=None, say=said.append, **options) == begun
    assert not said
    monkeypatch.setattr(Machine, "here", lambda: elsewhere)
    assert tuned(model, GOAL, costs=None, say=said.append, **options) == begun
    assert len(said) == 1
    assert said[0].startswith("milliseconds are those of where the study was begun: ")
