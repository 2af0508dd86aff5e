"""Trials in an Optuna storage that many workers share: each configuration is evaluated once.

Optuna alone lets two workers try the same configuration, and suggests again what was tried. Here a
trial claims its configuration by the key, as in Lamport's bakery. It writes the key down and waits
until every trial with a lower number has done so or is finished. Then it gives way to a trial with
the same key that has a lower number or a result. Trial numbers are unique and rise, so of two
trials with one key exactly one goes on.

A worker that was killed leaves a running trial. That is marked failed, and tried again, once the
worker is gone: see `processes.is_gone`. A worker on another machine is gone once its heartbeat in
the storage has stopped; relational storages alone have heartbeats.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from traceback import clear_frames
from typing import Any

import optuna
from optuna.exceptions import (
    DuplicatedStudyError,
    ExperimentalWarning,
    TrialPruned,
    UpdateFinishedTrialError,
)
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, Trial, TrialState

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.processes import WorkerProcess, is_gone
from sq_cpu.autotuning.storage import has_study
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.parsing import check_fields, record

__all__ = ["Trials", "join_study"]

_POLL = 0.05
_LOSSES = 3

_CLAIM, _RESULT, _JOB, _PROPOSED = "claim", "result", "job", "proposed"


def join_study(
    storage: BaseStorage,
    name: str,
    identity: Mapping[str, Any],
    prepare: Callable[[], Mapping[str, Any]],
) -> dict[str, Any]:
    """Create the study, or join the one that is there; return the facts that it was begun with.

    Parameters
    ----------
    identity : what a job must have in common with the study, JSON types
    prepare : makes the facts, JSON types; called only where there is no study yet

    Raises
    ------
    SqCpuError
        When the study belongs to a job of another identity.
    """
    identity = dict(identity)
    if not has_study(storage, name):
        # Made before the study exists, so that whoever finds a study finds its facts.
        facts = dict(prepare())
        try:
            study = optuna.create_study(storage=storage, study_name=name, direction="minimize")
            study.set_user_attr(_JOB, {"identity": identity, "facts": facts})
        except DuplicatedStudyError:
            pass  # another worker was faster: its facts hold
    study = optuna.load_study(storage=storage, study_name=name)
    start = time.monotonic()
    while _JOB not in _kept(study):
        if is_gone(None, time.monotonic() - start):  # whoever began it was killed at once
            facts = dict(prepare())
            if _JOB not in _kept(study):
                study.set_user_attr(_JOB, {"identity": identity, "facts": facts})
        time.sleep(_POLL)
    job = record(_Job, _kept(study)[_JOB], f"what the study {name} keeps")
    for key in sorted(identity.keys() | job.identity.keys()):
        there, here = job.identity.get(key), identity.get(key)
        if there != here:
            raise SqCpuError(
                f"the study {name} of the storage belongs to another job ({key} is {there} there, "
                f"{here} here): use another storage or study name, or repeat that job"
            )
    return job.facts


@dataclass(frozen=True)
class _Job:
    """What a study was begun for, and with."""

    identity: dict[str, Any]
    facts: dict[str, Any]

    def __post_init__(self) -> None:
        check_fields(self, "the study")


@dataclass(frozen=True)
class _Claim:
    """What a trial evaluates, and who does."""

    key: str
    worker: WorkerProcess

    def __post_init__(self) -> None:
        check_fields(self, "a trial")

    @classmethod
    def of(cls, trial: FrozenTrial) -> _Claim | None:
        found = trial.user_attrs.get(_CLAIM)
        return None if found is None else record(cls, found, f"trial {trial.number}")


class Trials:
    """The trials of one study, for one worker of perhaps many.

    The study minimizes `EvaluatedConfiguration.value`, and marks each one with its `phase`.
    """

    def __init__(
        self,
        storage: BaseStorage,
        name: str,
        sampler: BaseSampler | None = None,
        pruner: BasePruner | None = None,
        *,
        phase: str = "",
    ) -> None:
        self._phase = phase
        self._losses = 0  # trials in a row that others took for those of a dead worker
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            direction="minimize",
            sampler=sampler,
            pruner=pruner or optuna.pruners.NopPruner(),
            load_if_exists=True,
        )
        try:
            self._all()
        except Exception as error:  # whatever a damaged database makes Optuna raise
            raise SqCpuError(
                f"the trials of {name} are damaged ({first_line(error)}); use another storage"
            ) from error

    def use(self, sampler: BaseSampler) -> None:
        """Let `sampler` suggest the settings of the next trials."""
        self._study.sampler = sampler

    def _all(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False)

    def _state(self, number: int) -> TrialState | None:
        return next((trial.state for trial in self._all() if trial.number == number), None)

    def __len__(self) -> int:
        """Return how many trials there are, whatever became of them."""
        return len(self._all())

    def evaluated(self) -> dict[str, EvaluatedConfiguration]:
        """Return what has been evaluated, by key, in the order of the trials."""
        found = {}
        for trial in self._all():
            key = _key(trial)
            if trial.state == TrialState.COMPLETE and key is not None:
                found[key] = EvaluatedConfiguration.from_dict(
                    trial.user_attrs.get(_RESULT),
                    Configuration.from_key(key),
                    phase=self._phase,
                    number=trial.number,
                )
        return found

    def running(self) -> set[str | None]:
        """Return the keys that are being evaluated; None stands for a key not yet written."""
        self.recover()
        return {_key(trial) for trial in self._all() if trial.state == TrialState.RUNNING}

    def count(self) -> int:
        """Return how many trials count towards a limit: evaluated, pruned or running."""
        self.recover()
        states = (TrialState.COMPLETE, TrialState.RUNNING)
        return sum(trial.state in states or _is_pruned(trial) for trial in self._all())

    def kept(self, name: str, make: Callable[[], Any]) -> Any:
        """Return what the study keeps under a name, JSON types; make it where there is none yet."""
        attributes = _kept(self._study)
        if name not in attributes:
            self._study.set_user_attr(name, make())
        return _kept(self._study)[name]

    def propose(self, settings: Iterable[Mapping[str, Any]]) -> None:
        """Try these settings first, if no trial exists yet."""
        if not self._all():
            for values in settings:
                self._enqueue(values)

    def _enqueue(self, settings: Mapping[str, Any], **attributes: Any) -> None:
        attributes[_PROPOSED] = dict(settings)
        self._study.enqueue_trial(dict(settings), user_attrs=attributes)

    def proposed(self) -> Mapping[str, Any] | None:
        """Return what the next trial is to try; None where the sampler chooses."""
        self.recover()
        waiting = (t for t in self._all() if t.state == TrialState.WAITING)
        return next((trial.user_attrs.get(_PROPOSED, {}) for trial in waiting), None)

    def run(
        self,
        choose: Callable[[Trial], Configuration],
        evaluate: Callable[[Trial, Configuration], EvaluatedConfiguration],
    ) -> bool:
        """Run one trial; return False when it gave way to one with the same configuration.

        Parameters
        ----------
        choose : asks the trial for its settings and returns the configuration
        evaluate : what the configuration is worth

        It raises what `evaluate` raises. After `KeyboardInterrupt` the configuration is tried
        again.
        """
        raised: type[BaseException] | None = None
        number = -1
        gave_way = False

        def objective(trial: Trial) -> float:
            nonlocal raised, number, gave_way
            number = trial.number
            try:
                configuration = choose(trial)
                gave_way = not self._claim(trial, configuration.key)
                if gave_way:
                    raise TrialPruned
                found = self._evaluate(trial, configuration, evaluate)
                trial.set_user_attr(_RESULT, found.to_dict())
                return found.value
            except BaseException as error:
                # Optuna keeps the error in a cycle: its frames would keep the model till that is
                # collected.
                clear_frames(error.__traceback__)
                raised = type(error)
                raise

        self.recover()
        try:
            self._study.optimize(objective, n_trials=1)
        except Exception:
            # Another worker took this one for gone and marked the trial failed, or was handed it,
            # too, and was done first: no error of ours.
            lost = (UpdateFinishedTrialError, TrialPruned)
            expected = raised is None or issubclass(raised, lost)
            state = self._state(number)
            if not expected or state not in (TrialState.FAIL, TrialState.COMPLETE):
                raise
            return False if state == TrialState.COMPLETE else self._lost()
        if self._state(number) == TrialState.FAIL:  # marked so after its result was in
            return self._lost()
        self._losses = 0
        return not gave_way

    def _lost(self) -> bool:
        """Return False; `SqCpuError` where it goes on like that, or work would have no end."""
        self._losses += 1
        if self._losses > _LOSSES:
            raise SqCpuError(
                f"the storage does not keep the results of {self._losses} trials in a row: use "
                "another storage"
            )
        return False

    def _evaluate(
        self,
        trial: Trial,
        configuration: Configuration,
        evaluate: Callable[[Trial, Configuration], EvaluatedConfiguration],
    ) -> EvaluatedConfiguration:
        try:
            return evaluate(trial, configuration)
        except (TrialPruned, UpdateFinishedTrialError):
            raise
        except Exception as error:
            trial.set_user_attr("error", f"{type(error).__name__}: {error}")  # not tried again
            raise

    def _claim(self, trial: Trial, key: str) -> bool:
        """Write the key down; return whether no other trial has it already."""
        trial.set_user_attr(_CLAIM, {"key": key, "worker": asdict(WorkerProcess.this())})
        start = recovered = time.monotonic()
        while True:
            silent = []
            for other in self._all():
                if other.number == trial.number or other.state == TrialState.WAITING:
                    continue
                is_running = other.state == TrialState.RUNNING and other.number < trial.number
                taken = other.state == TrialState.COMPLETE or _is_pruned(other) or is_running
                if taken and _key(other) == key:
                    trial.set_user_attr("duplicate_of", other.number)
                    return False
                if is_running and _key(other) is None:
                    silent.append(other)
            if not silent:
                return True
            if is_gone(None, time.monotonic() - start):  # killed before they wrote their keys down
                for other in silent:
                    self._fail(other)
            elif time.monotonic() - recovered > 1:
                self.recover()
                recovered = time.monotonic()
            time.sleep(_POLL)

    def recover(self) -> None:
        """Mark the trials of workers that are gone failed, and try again what was interrupted."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ExperimentalWarning)
            optuna.storages.fail_stale_trials(self._study)
        for trial in self._all():
            claim = _Claim.of(trial)
            if trial.state != TrialState.RUNNING or claim is None:
                continue
            if is_gone(claim.worker):
                self._fail(trial)
        trials = self._all()
        retried = {trial.user_attrs.get("retry_of") for trial in trials}
        for trial in trials:
            interrupted = trial.state == TrialState.FAIL and "error" not in trial.user_attrs
            # Trials without settings are the refinement's, which itself asks for them again.
            is_whole = bool(trial.params) and _CLAIM in trial.user_attrs
            if interrupted and is_whole and trial.number not in retried:
                self._enqueue(trial.params, retry_of=trial.number)

    def _fail(self, trial: FrozenTrial) -> None:
        with suppress(UpdateFinishedTrialError, ValueError):  # finished, or failed by another
            self._study.tell(trial.number, state=TrialState.FAIL)


def _kept(study: optuna.Study) -> dict[str, Any]:
    """Return what a study keeps beside its trials; `SqCpuError` where that is no JSON."""
    try:
        return study.user_attrs
    except ValueError as error:
        raise SqCpuError(
            f"what the study {study.study_name} keeps is damaged ({first_line(error)}); use "
            "another storage"
        ) from error


def _key(trial: FrozenTrial) -> str | None:
    claim = _Claim.of(trial)
    return None if claim is None else claim.key


def _is_pruned(trial: FrozenTrial) -> bool:
    """Return whether the pruner stopped a trial, and not another with the same configuration."""
    return trial.state == TrialState.PRUNED and "duplicate_of" not in trial.user_attrs
