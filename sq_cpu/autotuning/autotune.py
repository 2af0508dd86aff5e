"""Accuracy-aware tuning: the fastest mix of int8 and float that keeps an accuracy goal.

It has two phases, each a study of one Optuna storage. In the search a sampler chooses settings for
all linears, and how many linears override them. The refinement (`refine`) then changes single
linears. Both ask about whole configurations. Each is evaluated once, whoever asks: see `trials`.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from sq_cpu.autotuning.configurations import Configuration, SearchSpace
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.evaluator import Evaluate, Goal, TuningJob
from sq_cpu.autotuning.latency import Costs, Precision, measured_costs
from sq_cpu.calibration.calibrate import TUNING_ROWS, calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.kernels.runtime import Machine
from sq_cpu.models.calls import Batch
from sq_cpu.models.checks import check_model
from sq_cpu.parsing import check_fields, check_kind, check_whole, record
from sq_cpu.progress import status
from sq_cpu.smoothing.plan import SmoothPlan

if TYPE_CHECKING:
    from optuna.pruners import BasePruner
    from optuna.samplers import BaseSampler
    from optuna.storages import BaseStorage

    from sq_cpu.autotuning.refine import Rank
    from sq_cpu.autotuning.workers import Stopped, Worker

__all__ = ["Autotuned", "autotune"]


@dataclass(frozen=True)
class Autotuned:
    """The result of an autotuning."""

    plan: SmoothPlan
    """The best configuration's, for `quantize(model, calibration, plan)`."""
    metric: float
    loss: float
    """As `EvaluatedConfiguration.loss`."""
    goal_met: bool
    milliseconds: float
    """Of all linears that can be int8, by the cost table."""
    float_metric: float
    float_milliseconds: float
    configuration: Configuration
    trials: tuple[EvaluatedConfiguration, ...]
    """All evaluated configurations, also those of earlier runs and of other workers."""
    stopped: Stopped
    """Why it ended: "done" (nothing was left to try), "trials" or "time" (a limit), "interrupted"
    (Ctrl-C) or "terminated" (`Terminated`)."""


def autotune(
    model: nn.Module,
    batches: Calibration | Iterable[Batch],
    evaluate: Evaluate,
    goal: str | float = "1%",
    *,
    higher_is_better: bool = False,
    space: SearchSpace | None = None,
    ignore: tuple[str, ...] = ("lm_head",),
    storage: str | os.PathLike[str] | BaseStorage | None = None,
    study: str = "autotune",
    job: str = "",
    trials: int = 30,
    refine_trials: int = 100,
    time_limit: float | None = None,
    rank: Rank = "estimated",
    sampler: BaseSampler | None = None,
    pruner: BasePruner | None = None,
    seed: int = 0,
    workers: int = 1,
    tokens: int = 512,
    costs: Costs | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> Autotuned:
    """Find the plan that meets an accuracy goal with the fewest linears in float, then fastest.

    Linears are ranked by the accuracy that they gain per measured millisecond. The model is not
    changed: each trial quantizes a copy, which takes the model's memory once more for every worker.

    Parameters
    ----------
    batches : a calibration of the model, or the batches for one (with gradients; a model whose
        forward cannot be differentiated needs a calibration made without)
    evaluate : model -> metric, deterministic. It may return an iterator instead: each item is the
        metric of more data, and the last one counts. Then the search's pruner can stop a trial
        early. Score other data than what you report in the end, which would be over-fitted.
    goal : greatest loss against the float model: "1%" of its metric, or a number, in the metric's
        unit
    higher_is_better : True for an accuracy, False for a perplexity
    space : what to search; None: `SearchSpace()`
    storage : where the trials are kept, see `storage.opened_storage`. A study of the same job is
        continued, after whatever stopped it, and together with other processes and machines.
    study : its name in the storage
    job : anything else that must agree for that, such as the text that evaluate scores
    trials, refine_trials : greatest number of evaluations in the search and in the refinement
    time_limit : seconds; half of it for the search
    rank : "measured" evaluates every linear's change alone before the refinement ranks them
    sampler, pruner : Optuna's, of the search. None: TPE from `seed`, and none
    workers : processes on this machine that share its threads. They need a storage, and a model
        and an `evaluate` that can be pickled.
    tokens : rows of the linears' input that milliseconds are measured with: 512 for a prefill, 1
        for decoding
    costs : None takes those that the study was begun with; a new study's are measured, or come
        from this machine's cache
    say : takes one line for every new trial, where there is no progress bar

    Ctrl-C ends it with the best so far, and so does a signal whose handler raises
    `errors.Terminated`. One worker repeats its work exactly under the same seed.

    Raises
    ------
    SqCpuError
        When Optuna (the extra `tune`) is not installed, for arguments that cannot be, a storage
        that cannot be opened or belongs to another job (also by its calibration or costs),
        no linear to quantize, and when no configuration could be evaluated.
    """
    require("optuna", "tune")
    # Optuna is optional: these modules import it.
    from sq_cpu.autotuning.storage import check_storage, is_shared, opened_storage, quiet_optuna
    from sq_cpu.autotuning.trials import join_study
    from sq_cpu.autotuning.workers import SearchSettings, Worker, run_workers

    check_model(model)
    check_kind(Callable, "a function of the model", evaluate=evaluate)
    check_kind(Callable, "a function of a text", say=say)
    check_kind(SearchSpace | None, "a SearchSpace", space=space)
    check_kind(Costs | None, "Costs", costs=costs)
    check_kind(str, "a text", study=study, job=job)
    check_storage(storage)
    parsed = Goal.of(goal)
    check_whole(1, trials=trials, workers=workers, tokens=tokens)
    check_whole(0, refine_trials=refine_trials, seed=seed)
    if workers > 1 and not is_shared(storage):
        raise SqCpuError(
            "workers share a storage, which cannot be memory: pass storage='study.db', or workers=1"
        )
    start = time.monotonic()
    space = space or SearchSpace()
    settings = SearchSettings(
        study=study,
        space=space,
        trials=trials,
        refine_trials=refine_trials,
        time_limit=_seconds(time_limit),
        rank=rank,
        sampler=sampler,
        pruner=pruner,
        seed=seed,
    )
    if not isinstance(batches, Calibration):
        batches = calibrate(
            model, batches, ignore=ignore, gradient_rows=TUNING_ROWS, progress=progress
        )
    task = TuningJob(model, batches, evaluate, parsed, higher_is_better, ignore)
    if not task.linears:
        raise SqCpuError("nothing to tune: the calibration reached no linear that is not ignored")

    def prepare() -> dict[str, Any]:
        say("evaluating the float model")
        metric = task.measure_float()
        dtype = next(iter(task.linears.values())).weight.dtype
        table = costs or measured_costs(
            task.linears.values(), tokens=tokens, dtype=dtype, progress=progress
        )
        return {
            "float_metric": metric,
            "ranges": task.ranges(),
            "costs": table.to_dict(),
            "measured_on": str(Machine.here()) if costs is None else None,
        }

    identity = task.identity() | {
        "space": space.to_dict(),
        "tokens": tokens if costs is None else costs.tokens,
        "sq_cpu": version("sq_cpu"),
        "job": job,
    }
    with quiet_optuna(), opened_storage(storage) as opened:
        facts = record(_Facts, join_study(opened, study, identity, prepare), f"the study {study}")
        task.check_ranges(facts.ranges)
        task.float_metric = facts.float_metric
        task.costs = _costs_of(facts, costs, say)
        passed = time.monotonic() - start
        settings = replace(settings, time_limit=max(0.0, settings.time_limit - passed))
        worker = Worker(task, opened, settings)
        with _reporting(worker, progress, say) as report:
            if workers == 1:
                stopped = worker.work(report)
            else:
                assert storage is not None
                stopped = run_workers(worker, storage, workers, report)
        return _conclusion(worker, stopped)


def _seconds(limit: object) -> float:
    if limit is None:
        return math.inf
    is_number = isinstance(limit, int | float) and not isinstance(limit, bool)
    if not is_number or not cast(float, limit) >= 0:
        raise SqCpuError(f"time_limit is {limit!r}, not a number of seconds >= 0, nor None")
    return float(min(cast(float, limit), 1 << 62))  # an integer may be one that no float holds


@dataclass(frozen=True)
class _Facts:
    """What a study was begun with."""

    float_metric: float
    ranges: tuple[float, ...]
    costs: Costs
    measured_on: str | None = None

    def __post_init__(self) -> None:
        check_fields(self, "the study")


def _costs_of(facts: _Facts, given: Costs | None, log: Callable[[str], object]) -> Costs:
    """Return the costs that a study was begun with: all its milliseconds come from one table.

    Raises `SqCpuError` when others were given.
    """
    if given is not None and given.to_dict() != facts.costs.to_dict():
        raise SqCpuError(
            "the study of the storage was begun with other costs: use those, or none, or another "
            "storage or study name"
        )
    where = facts.measured_on
    if where not in (None, str(Machine.here())):
        log(f"milliseconds are those of where the study was begun: {where}")
    return facts.costs


def _conclusion(worker: Worker, stopped: Stopped) -> Autotuned:
    """Return the result; `SqCpuError` when there is none."""
    best = worker.best()
    if best is None or not best.scored:
        errors = [one.error for one in worker.evaluated().values() if one.error]
        reason = f"the first: {errors[0]}" if errors else "give it more time"
        raise SqCpuError(f"no configuration could be evaluated; {reason}")
    assert worker.job.costs is not None
    return Autotuned(
        plan=_explained(worker, best.configuration),
        metric=best.metric,
        loss=best.loss,
        goal_met=best.loss <= worker.job.goal.limit,
        milliseconds=best.milliseconds,
        float_metric=worker.job.float_metric,
        float_milliseconds=worker.job.costs.of(worker.job.linears.values()),
        configuration=best.configuration,
        trials=(*worker.search.evaluated().values(), *worker.refined.evaluated().values()),
        stopped=stopped,
    )


def _explained(worker: Worker, configuration: Configuration) -> SmoothPlan:
    """Return the plan; the note of a linear says what the loss would be without its override."""
    plan = worker.job.plan(configuration)
    known = worker.evaluated()
    layers = []
    for layer in plan.layers:
        less: Precision = "per_token" if layer.in_float else configuration.activations
        single = configuration.changed([layer.name], less).key
        if layer.note and single in known and known[single].scored:
            text = worker.job.goal.text(known[single].loss)
            layer = replace(layer, note=f"{layer.note}; with {less} the loss is {text}")
        layers.append(layer)
    return replace(plan, layers=tuple(layers))


@contextmanager
def _reporting(
    worker: Worker, progress: bool | None, log: Callable[[str], object]
) -> Iterator[Callable[[], None]]:
    """Yield what reports the progress: on the bar, or a line for every new trial."""
    goal = worker.job.goal
    reported = set(worker.evaluated())

    def text(one: EvaluatedConfiguration) -> str:
        if not one.scored:
            return f"failed: {one.error}" if one.error else "infinite loss"
        return (
            f"metric {one.metric:.5g} ({goal.text(one.loss)}), {one.milliseconds:.2f} ms, "
            f"{one.in_float} linears in float"
        )

    with status("autotune", progress) as show:

        def report() -> None:
            evaluated = worker.evaluated()
            best = worker.best()
            if show is not None and best is not None:
                met = "goal met" if best.value < 1 else "goal missed"
                show(f"{len(evaluated)} trials; best: {text(best)}, {met}")
            for key, one in evaluated.items():
                if show is None and key not in reported:
                    reported.add(key)
                    log(f"{one.phase} {one.number}: {text(one)}")

        yield report
