"""Trials in a shared storage: each configuration once, whoever dies."""

import gc
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
import torch
import trial_worker
from optuna.storages import InMemoryStorage
from optuna.trial import Trial, TrialState
from processes import kill_at, start, wait_for
from trial_worker import worth

from sq_cpu import SqCpuError
from sq_cpu.autotuning import processes, trials
from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.storage import has_study, opened_storage, quiet_optuna
from sq_cpu.autotuning.trials import Trials, join_study


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with quiet_optuna():
        yield


@pytest.fixture(scope="module")
def postgres_server() -> Iterator[str]:
    if postgres.server_programs() is None:
        pytest.skip("no PostgreSQL server here; Debian: apt-get install postgresql")
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where to keep trials: a new file, or a new database."""
    if request.param == "sqlite":
        return str(tmp_path / "study.db")
    url: str = request.getfixturevalue("postgres_server")
    name = f"db{uuid.uuid4().hex}"
    import psycopg

    host = url.partition("?host=")[2]
    with psycopg.connect(f"host={host} user=tester dbname=postgres", autocommit=True) as connection:
        connection.execute(f"create database {name}")  # type: ignore[arg-type]
    return url.replace("/postgres?", f"/{name}?")


def states(where: str) -> list[TrialState]:
    with opened_storage(where) as storage:
        study = optuna.load_study(storage=storage, study_name="test")
        return [trial.state for trial in study.get_trials()]


def evaluated_in(where: str) -> dict[str, EvaluatedConfiguration]:
    with opened_storage(where) as storage:
        return Trials(storage, "test").evaluated()


def test_workers_never_evaluate_a_configuration_twice(storage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Nearly all of 36 configurations: most suggestions have been made before.
    workers = [start(trial_worker.work, storage, log, 32) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    evaluated = log.read_text().splitlines()
    assert len(evaluated) == len(set(evaluated))
    found = evaluated_in(storage)
    assert found.keys() == set(evaluated)
    assert 32 <= len(found) <= 34  # each may have begun one when the last was
    assert TrialState.PRUNED in states(storage)
    assert TrialState.FAIL not in states(storage)


def test_a_killed_worker_loses_no_trial_and_its_own_is_tried_again(
    storage: str, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    worker = start(trial_worker.work, storage, log, 20, 3)
    *finished, interrupted = kill_at(worker, log, 4)

    assert states(storage)[-1] == TrialState.RUNNING
    trial_worker.work(storage, log, 10)
    evaluated = log.read_text().splitlines()
    assert evaluated[0] == interrupted
    assert not set(evaluated) & set(finished)
    assert states(storage).count(TrialState.FAIL) == 1
    found = evaluated_in(storage)
    assert found.keys() == {*finished, *evaluated}
    x, y = Configuration.from_key(interrupted).alpha
    assert found[interrupted].value == x * y


def test_a_worker_of_another_machine_is_gone_when_its_heart_stops(
    storage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "HEARTBEAT", 1)
    monkeypatch.setattr(processes, "GRACE", 2)
    monkeypatch.setattr(processes, "_machine", lambda: "another")
    log = tmp_path / "log"
    (interrupted,) = kill_at(start(trial_worker.work, storage, log, 20, 0), log, 1)
    with opened_storage(storage) as shared:
        other = Trials(shared, "test")
        for _ in range(600):
            if not other.running():
                break
            time.sleep(0.1)
        evaluated: list[str] = []

        def evaluate(_: Trial, configuration: Configuration) -> EvaluatedConfiguration:
            evaluated.append(configuration.key)
            return worth(configuration)

        other.run(trial_worker.choose, evaluate)
    assert evaluated == [interrupted]
    assert states(storage) == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_living_worker_keeps_its_trial(storage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    worker = start(trial_worker.work, storage, log, 20, 0)
    try:
        wait_for(worker, log, 1)
        (key,) = log.read_text().splitlines()
        with opened_storage(storage) as shared:
            other = Trials(shared, "test")
            assert other.running() == {key}
            assert not other.run(lambda _: Configuration.from_key(key), refuse)
            assert other.run(lambda _: named("another"), one(1.0))
        assert states(storage) == [TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE]
    finally:
        worker.kill()
        worker.join()


def refuse(*_: Any) -> Any:
    raise AssertionError("evaluated twice")


def named(name: str) -> Configuration:
    return Configuration(smoothing=name)


A = named("a")


def one(value: float = 0.0) -> Callable[[Trial, Configuration], EvaluatedConfiguration]:
    return lambda _, configuration: worth(configuration, value)


def test_what_was_evaluated_is_not_evaluated_again() -> None:
    shared = InMemoryStorage()
    first, second = Trials(shared, "test"), Trials(shared, "test")
    assert first.run(lambda _: A, one(3.0))
    assert not second.run(lambda _: A, refuse)
    assert second.evaluated() == {A.key: replace(worth(A, 3.0), number=0)}
    assert second.count() == 1
    assert len(second) == 2


def test_a_trial_waits_for_the_key_of_one_before_it(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")
    silent = study.ask()
    slept = []

    def sleep(_: float) -> None:
        slept.append(1)
        if len(slept) == 3:
            study.tell(silent, 1.0)

    monkeypatch.setattr(trials.time, "sleep", sleep)
    assert mine.run(lambda _: A, one())
    assert len(slept) == 3


def test_one_that_never_says_its_key_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")
    study.ask()
    assert mine.run(lambda _: A, one())
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_later_trial_gives_way_and_an_earlier_one_does_not() -> None:
    shared = InMemoryStorage()
    first, second = Trials(shared, "test"), Trials(shared, "test")

    def evaluate(_: Trial, configuration: Configuration) -> EvaluatedConfiguration:
        assert not second.run(lambda _: A, refuse)
        return worth(configuration)

    assert first.run(lambda _: A, evaluate)


@pytest.mark.parametrize("late", [False, True])
def test_a_trial_that_two_workers_were_handed_is_the_first_ones(
    late: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")
    result = worth(A)

    def finish(number: int) -> None:
        shared.set_trial_user_attr(number, trials._RESULT, result.to_dict())
        study.tell(number, result.value)

    def evaluate(trial: Trial, configuration: Configuration) -> EvaluatedConfiguration:
        if late:  # between our result and our word that the trial is done
            write = Trial.set_user_attr

            def write_and_finish(self: Trial, key: str, value: Any) -> None:
                write(self, key, value)
                if key == trials._RESULT:
                    finish(trial.number)

            monkeypatch.setattr(Trial, "set_user_attr", write_and_finish)
        else:
            finish(trial.number)
        return worth(configuration)

    assert not mine.run(lambda _: A, evaluate)
    assert [t.state for t in study.trials] == [TrialState.COMPLETE]
    assert [found.value for found in mine.evaluated().values()] == [result.value]


def test_a_pruned_trial_keeps_no_model_alive() -> None:
    mine = Trials(InMemoryStorage(), "test")
    made = []

    def evaluate(_: Trial, configuration: Configuration) -> EvaluatedConfiguration:
        model = torch.nn.Linear(1, 1)
        made.append(weakref.ref(model))
        raise optuna.TrialPruned

    gc.disable()
    try:
        mine.run(lambda _: A, evaluate)
        assert [one() for one in made] == [None]
    finally:
        gc.enable()


def test_a_trial_that_others_took_for_dead_is_not_told() -> None:
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")

    def evaluate(trial: Trial, configuration: Configuration) -> EvaluatedConfiguration:
        study.tell(trial.number, state=TrialState.FAIL)
        return worth(configuration)

    assert not mine.run(lambda _: A, evaluate)
    assert mine.evaluated() == {}
    assert mine.run(lambda _: A, one())


def test_errors_are_passed_on_and_not_tried_again() -> None:
    mine = Trials(InMemoryStorage(), "test")

    def choose(trial: Trial) -> Configuration:
        return named(str(trial.suggest_int("x", 0, 9)))

    def fail(*_: Any) -> Any:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        mine.run(choose, fail)
    mine.recover()
    assert len(mine) == 1


def test_an_interrupted_trial_is_tried_again_with_its_settings() -> None:
    mine = Trials(InMemoryStorage(), "test")
    chosen = []

    def choose(trial: Trial) -> Configuration:
        chosen.append(named(str(trial.suggest_int("x", 0, 10**9))))
        return chosen[-1]

    def interrupt(*_: Any) -> Any:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine.run(choose, interrupt)
    assert mine.running() == set()
    assert mine.run(choose, one())
    assert chosen[0] == chosen[1]
    mine.recover()
    assert len(mine) == 2


def test_the_facts_of_a_study_are_made_once_and_other_jobs_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    job = {"goal": [0.01, "relative"], "model": "abc"}
    with opened_storage(path) as storage:
        assert not has_study(storage, "test")
        assert join_study(storage, "test", job, lambda: {"metric": 3.5}) == {"metric": 3.5}
        assert has_study(storage, "test")
    with opened_storage(path) as storage:
        assert join_study(storage, "test", job, refuse) == {"metric": 3.5}
        with pytest.raises(SqCpuError, match=r"another job \(model is abc there, xyz here\): use"):
            join_study(storage, "test", job | {"model": "xyz"}, refuse)


def test_two_that_begin_at_once_share_the_facts_of_one() -> None:
    shared = InMemoryStorage()

    def slower() -> Mapping[str, Any]:
        assert join_study(shared, "test", {}, lambda: {"by": "other"}) == {"by": "other"}
        return {"by": "me"}

    assert join_study(shared, "test", {}, slower) == {"by": "other"}
