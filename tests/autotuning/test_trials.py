"""Trials in a shared storage: each configuration once, whoever dies."""

import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import optuna
import postgres
import pytest
import trial_worker
from optuna.storages import InMemoryStorage
from optuna.trial import Trial, TrialState
from processes import kill_at, start, wait_for

from sq_cpu import SqCpuError
from sq_cpu.autotuning import processes, trials
from sq_cpu.autotuning.storage import has_study, opened_storage, quiet_optuna
from sq_cpu.autotuning.trials import Outcome, Trials, join_study


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


def outcomes(where: str) -> dict[str, Outcome]:
    with opened_storage(where) as storage:
        return Trials(storage, "test").outcomes()


def test_workers_never_evaluate_a_configuration_twice(storage: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    # Nearly all of 36 configurations: most suggestions have been made before.
    workers = [start(trial_worker.work, storage, log, 32) for _ in range(3)]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    evaluated = log.read_text().splitlines()
    assert len(evaluated) == len(set(evaluated))
    found = outcomes(storage)
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
    found = outcomes(storage)
    assert found.keys() == {*finished, *evaluated}
    x, y = map(int, interrupted.split(","))
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

        def evaluate(_: Trial, key: str) -> Mapping[str, Any]:
            evaluated.append(key)
            return {"value": 0.0}

        other.run(trial_worker.key_of, evaluate)
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
            assert not other.run(lambda _: key, refuse)
            assert other.run(lambda _: "another", lambda *_: {"value": 1.0})
        assert states(storage) == [TrialState.RUNNING, TrialState.PRUNED, TrialState.COMPLETE]
    finally:
        worker.kill()
        worker.join()


def refuse(*_: Any) -> Mapping[str, Any]:
    raise AssertionError("evaluated twice")


def one(value: float = 0.0) -> Any:
    return lambda *_: {"value": value, "note": "kept"}


def test_what_was_evaluated_is_not_evaluated_again() -> None:
    shared = InMemoryStorage()
    first, second = Trials(shared, "test"), Trials(shared, "test")
    assert first.run(lambda _: "a", one(3.0))
    assert not second.run(lambda _: "a", refuse)
    assert second.outcomes()["a"].result == {"value": 3.0, "note": "kept"}
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
    assert mine.run(lambda _: "a", one())
    assert len(slept) == 3


def test_one_that_never_says_its_key_is_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "GRACE", 0.2)
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")
    study.ask()
    assert mine.run(lambda _: "a", one())
    assert [t.state for t in study.trials] == [TrialState.FAIL, TrialState.COMPLETE]


def test_a_later_trial_gives_way_and_an_earlier_one_does_not() -> None:
    shared = InMemoryStorage()
    first, second = Trials(shared, "test"), Trials(shared, "test")

    def evaluate(*_: Any) -> Mapping[str, Any]:
        assert not second.run(lambda _: "a", refuse)
        return {"value": 0.0}

    assert first.run(lambda _: "a", evaluate)


def test_a_trial_that_others_took_for_dead_is_not_told() -> None:
    shared = InMemoryStorage()
    mine = Trials(shared, "test")
    study = optuna.load_study(storage=shared, study_name="test")

    def evaluate(trial: Trial, _: str) -> Mapping[str, Any]:
        study.tell(trial.number, state=TrialState.FAIL)
        return {"value": 0.0}

    assert not mine.run(lambda _: "a", evaluate)
    assert mine.outcomes() == {}
    assert mine.run(lambda _: "a", one())


def test_errors_are_passed_on_and_not_tried_again() -> None:
    mine = Trials(InMemoryStorage(), "test")

    def key_of(trial: Trial) -> str:
        return str(trial.suggest_int("x", 0, 9))

    def fail(*_: Any) -> Mapping[str, Any]:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        mine.run(key_of, fail)
    mine.recover()
    assert len(mine) == 1


def test_an_interrupted_trial_is_tried_again_with_its_settings() -> None:
    mine = Trials(InMemoryStorage(), "test")
    keys = []

    def key_of(trial: Trial) -> str:
        keys.append(str(trial.suggest_int("x", 0, 10**9)))
        return keys[-1]

    def interrupt(*_: Any) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mine.run(key_of, interrupt)
    assert mine.running() == set()
    assert mine.run(key_of, one())
    assert keys[0] == keys[1]
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
