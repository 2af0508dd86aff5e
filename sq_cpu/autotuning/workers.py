"""The workers of one autotuning: each does the whole search, and all share what was evaluated."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cache
from multiprocessing.connection import Connection
from typing import Literal

import optuna
import torch
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.storages import BaseStorage
from optuna.trial import Trial

from sq_cpu.autotuning.configurations import Configuration, SearchSpace
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.evaluator import TuningJob
from sq_cpu.autotuning.latency import Precision
from sq_cpu.autotuning.processes import WorkerProcess, is_gone
from sq_cpu.autotuning.refine import Rank, Refinement, ranked
from sq_cpu.autotuning.storage import opened_storage, quiet_optuna
from sq_cpu.autotuning.trials import Trials
from sq_cpu.errors import SqCpuError, Terminated, first_line
from sq_cpu.interrupts import raise_ignored_interrupts_again
from sq_cpu.parsing import check_kind, typed
from sq_cpu.scheme import Activations
from sq_cpu.smoothing.rules import DEFAULT_ALPHA

__all__ = ["SearchSettings", "Stopped", "Worker", "run_workers"]

Stopped = Literal["done", "trials", "time", "interrupted", "terminated"]

_POLL = 0.2
# After so many known suggestions in a row the sampler has nothing new.
_REPEATS = 20
# Milliseconds within this factor of the fastest possible ones count as fastest.
_FAST_ENOUGH = 1.02
# The part of the time limit that the search may take; the refinement has the rest.
_SEARCH_SHARE = 0.5


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """How to search; the same for all workers."""

    study: str
    space: SearchSpace
    trials: int
    refine_trials: int
    time_limit: float
    """Seconds; may be infinite."""
    rank: Rank
    sampler: BaseSampler | None
    pruner: BasePruner | None
    seed: int

    def __post_init__(self) -> None:
        """Raise `SqCpuError` for what is not of its type."""
        check_kind(BaseSampler | None, "a sampler of Optuna's", sampler=self.sampler)
        check_kind(BasePruner | None, "a pruner of Optuna's", pruner=self.pruner)
        typed(Rank, self.rank, "rank")


class _Stop(Exception):  # noqa: N818  it is no error
    def __init__(self, why: Stopped) -> None:
        super().__init__(why)
        self.why: Stopped = why


class Worker:
    """One process at work on a study."""

    def __init__(
        self, job: TuningJob, storage: BaseStorage, settings: SearchSettings, index: int = 0
    ) -> None:
        self.job = job
        self.settings = settings
        start = time.monotonic()
        self._deadline = start + settings.time_limit
        self._search_deadline = start + _SEARCH_SHARE * settings.time_limit
        self.search = Trials(storage, settings.study, pruner=settings.pruner, phase="search")
        # A resumed run must not repeat the suggestions that its sampler began with.
        seed = settings.seed + 7919 * len(self.search) + 104729 * index
        own = optuna.samplers.TPESampler(seed=seed % 2**32)
        self.search.use(settings.sampler or own)
        none = optuna.samplers.RandomSampler(seed=0)
        self.refined = Trials(storage, f"{settings.study}: refine", none, phase="refine")
        job.kept = self.search.kept
        self._report: Callable[[], object] = lambda: None

    def remaining(self) -> float:
        """Return the seconds that are left."""
        return max(0.0, self._deadline - time.monotonic())

    def evaluated(self) -> dict[str, EvaluatedConfiguration]:
        """Return all that was evaluated, by key."""
        return self.refined.evaluated() | self.search.evaluated()

    def best(self) -> EvaluatedConfiguration | None:
        """Return the best of them; None before the first."""
        return min(self.evaluated().values(), key=_rank, default=None)

    def work(self, report: Callable[[], object]) -> Stopped:
        """Search and refine until done or stopped; call `report` after every trial."""
        self._report = report
        try:
            self._search()
            for start in self._starts():
                # When the goal is met without linears in float, any with some is worse.
                best = self.best()
                without = best is not None and best.value < 1 and not best.in_float
                self._refinement().run(start, in_float=not without)
        except _Stop as stop:
            return stop.why
        except KeyboardInterrupt as stop:
            if self.best() is None:
                raise
            return _signalled(stop)
        return "done"

    def _search(self) -> None:
        @cache
        def ranked_by(precision: Precision) -> list[str]:
            plain = Configuration(smoothing="smoothquant", alpha=(DEFAULT_ALPHA,))
            gains = self.job.gains(plain, precision)
            return ranked(gains, self._cost_changes(gains, plain, precision))

        def choose(trial: Trial) -> Configuration:
            return self.settings.space.suggest(trial, ranked_by)

        def evaluate(trial: Trial, configuration: Configuration) -> EvaluatedConfiguration:
            def report(metric: float, step: int) -> None:
                trial.report(-metric if self.job.higher_is_better else metric, step)
                if trial.should_prune():
                    raise optuna.TrialPruned

            # An earlier refinement may have evaluated it.
            known = self.refined.evaluated().get(configuration.key)
            return known or self.job.result(configuration, report)

        if self._has_search_to_do():
            self.search.propose(self.settings.space.defaults())
        repeats = 0
        while self._has_search_to_do() and repeats < _REPEATS:
            if self.settings.space.may_override(self.search.proposed()):
                # Ranked before the trial begins: others wait until it has written its key.
                ranked_by("per_token")
                ranked_by("float")
            repeats = 0 if self.search.run(choose, evaluate) else repeats + 1
            self._report()
        # What others still evaluate decides where the refinement starts.
        while self.search.running() and time.monotonic() < self._deadline:
            time.sleep(_POLL)
            self._report()
        if time.monotonic() >= self._deadline:
            raise _Stop("time")

    def _has_search_to_do(self) -> bool:
        if time.monotonic() >= self._search_deadline and self.best() is not None:
            return False
        if time.monotonic() >= self._deadline:
            raise _Stop("time")
        return self.search.count() < self.settings.trials and not self._cannot_be_faster()

    def _starts(self) -> list[Configuration]:
        """Return where to refine from: the best, and the most accurate of the fastest settings."""
        found = self.search.evaluated().values()
        if not found:
            return []
        starts = [min(found, key=_rank).configuration]
        fastest = self._fastest()[1]
        plain = [
            (one.loss, one.configuration.key, one.configuration)
            for one in found
            if one.configuration.activations == fastest and not one.configuration.layers
            if one.scored
        ]
        if starts[0].activations != fastest and plain:
            starts.append(min(plain)[2])
        return starts

    def _fastest(self) -> tuple[float, Activations]:
        """Return the least milliseconds that all linears can take, and with which activations."""
        linears = self.job.linears.values()
        return min(
            (sum(self.job.milliseconds(linear, activations) for linear in linears), activations)
            for activations in self.settings.space.activations
        )

    def _cannot_be_faster(self) -> bool:
        best = self.best()
        if best is None or best.value >= 1 or best.in_float:
            return False
        fastest, _ = self._fastest()
        return best.milliseconds <= _FAST_ENOUGH * fastest

    def _cost_changes(
        self, names: Iterable[str], configuration: Configuration, precision: Precision
    ) -> dict[str, float]:
        linears = self.job.linears
        return {
            name: self.job.milliseconds(linears[name], precision)
            - self.job.milliseconds(linears[name], configuration.precision(name))
            for name in names
        }

    def _refinement(self) -> Refinement:
        linears = self.job.linears
        return Refinement(
            names=tuple(linears),
            loss=self._loss,
            goal=self.job.goal.limit,
            gains=self._gains,
            costs=lambda name, precision: self.job.milliseconds(linears[name], precision),
            rank=self.settings.rank,
        )

    def _gains(self, configuration: Configuration, precision: Precision) -> dict[str, float]:
        def check() -> None:
            if self._refined_enough():  # an order is for evaluations to come
                raise _Stop("trials")

        return self.job.gains(configuration, precision, check)

    def _loss(self, frontier: Sequence[Configuration]) -> float:
        """Return the loss of the first; while another worker evaluates it, evaluate the others."""
        while True:
            known = self.evaluated()
            if frontier[0].key in known:
                return known[frontier[0].key].loss
            if time.monotonic() >= self._deadline:
                raise _Stop("time")
            running = self.refined.running() | self.search.running()
            if frontier[0].key not in running and self._refined_enough():
                raise _Stop("trials")
            open_ = [c for c in frontier if c.key not in known and c.key not in running]
            if open_ and not self._refined_enough():
                self._refine(open_[0])
            else:
                time.sleep(_POLL)
            self._report()

    def _refined_enough(self) -> bool:
        return self.refined.count() >= self.settings.refine_trials

    def _refine(self, configuration: Configuration) -> None:
        self.refined.run(lambda _: configuration, lambda _, __: self.job.result(configuration))


def _rank(one: EvaluatedConfiguration) -> tuple[float, str]:
    return one.value, one.configuration.key


def run_workers(
    worker: Worker,
    where: str | os.PathLike[str] | BaseStorage,
    count: int,
    report: Callable[[], object],
) -> Stopped:
    """Have `count` processes do the work of `worker`, and call `report` now and then.

    They share torch's threads. One that dies leaves its work to the others.

    Raises
    ------
    SqCpuError
        When the model, the evaluation or the sampler cannot be pickled, when a worker fails, and
        when all of them die.
    """
    job, settings = worker.job, worker.settings
    assert job.costs is not None
    parts = {
        "where": where,
        "settings": replace(settings, time_limit=worker.remaining()),
        "job": {
            "model": job.model,
            "calibration": job.calibration,
            "evaluate": job.evaluate,
            "goal": job.goal,
            "higher_is_better": job.higher_is_better,
            "ignore": job.ignore,
            "costs": job.costs,
            "float_metric": job.float_metric,
        },
    }
    threads = max(1, torch.get_num_threads() // count)
    context = multiprocessing.get_context("spawn")  # a fork would lose OpenMP's threads
    with ExitStack() as opened:
        try:
            # A file without a name: it ends with the processes that have it open, however they end.
            file = opened.enter_context(tempfile.TemporaryFile())
            torch.save(parts, file)
            file.flush()
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise SqCpuError(
                f"workers need a model and an evaluation that can be pickled: {error}; define "
                "them in a module, or use workers=1 and start more processes on the same storage"
            ) from error
        except (OSError, RuntimeError) as error:
            raise SqCpuError(
                f"cannot write the job for its workers ({first_line(error)}): free space in "
                f"{tempfile.tempdir or 'the temporary folder'}, or set TMPDIR to another folder"
            ) from error
        # All workers map one file, so the weights are in memory once.
        path = f"/proc/{os.getpid()}/fd/{file.fileno()}"
        pipes = []
        processes = []
        children = []
        for index in range(count):
            receiver, sender = context.Pipe(duplex=False)
            arguments = (path, index, threads, sender, WorkerProcess.this())
            process = context.Process(target=_main, args=arguments)
            process.start()
            sender.close()
            assert process.pid is not None
            processes.append(process)
            children.append(WorkerProcess.of(process.pid))
            pipes.append(receiver)
        try:
            while not all(map(is_gone, children)):
                time.sleep(_POLL)
                report()
        except KeyboardInterrupt as stop:
            if worker.best() is None:
                raise
            return _signalled(stop)
        finally:
            for process in processes:
                process.terminate()  # as Ctrl-C does
            for process in processes:
                process.join()
        return _together([_last_message(pipe) for pipe in pipes])


def _signalled(stop: KeyboardInterrupt) -> Stopped:
    return "terminated" if isinstance(stop, Terminated) else "interrupted"


def _last_message(pipe: Connection) -> tuple[str, str] | None:
    """Return how a worker that is gone said it ended; None for one that was killed."""
    try:
        message: tuple[str, str] = pipe.recv()
    except EOFError:
        return None
    return message


def _together(messages: Sequence[tuple[str, str] | None]) -> Stopped:
    errors = [text for kind, text in filter(None, messages) if kind == "error"]
    if errors:
        raise SqCpuError(f"a worker failed: {errors[0]}")
    reasons = {text for _, text in filter(None, messages)}
    order: tuple[Stopped, ...] = ("done", "trials", "time", "interrupted")
    for why in order:
        if why in reasons:
            return why
    raise SqCpuError(
        "all workers died, perhaps for lack of memory: use fewer; finished trials are kept, run "
        "again to go on"
    )


def _main(path: str, index: int, threads: int, pipe: Connection, parent: WorkerProcess) -> None:
    signal.signal(signal.SIGTERM, _interrupt)
    signal.signal(signal.SIGINT, _interrupt)
    raise_ignored_interrupts_again()
    torch.set_num_threads(threads)

    def check_parent() -> None:
        if is_gone(parent):
            raise KeyboardInterrupt

    message = ("stopped", "interrupted")
    try:
        parts = torch.load(path, mmap=True, weights_only=False)
        with quiet_optuna(), opened_storage(parts["where"]) as storage:
            worker = Worker(TuningJob(**parts["job"]), storage, parts["settings"], index)
            message = ("stopped", worker.work(check_parent))
    except KeyboardInterrupt:
        pass
    except Exception as error:
        text = str(error) if isinstance(error, SqCpuError) else f"{type(error).__name__}: {error}"
        message = ("error", text)
    with suppress(BrokenPipeError):  # the parent is gone: nobody reads it
        pipe.send(message)


def _interrupt(*_: object) -> None:
    # What marks the trial as failed must not be interrupted.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
