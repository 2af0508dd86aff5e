"""The fastest mix that keeps a goal."""

import math
from collections.abc import Iterator
from itertools import combinations
from typing import Any, get_args

import optuna
import pytest
import torch
from tiny import batches
from torch import nn
from tuning_cases import GOAL, PER_TOKEN, Divergence, costs, llama, tuned

import sq_cpu
from sq_cpu import SearchSpace, SqCpuError
from sq_cpu.autotuning import evaluator
from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluator import Goal, TuningJob
from sq_cpu.autotuning.ranking import Errors, estimated_errors
from sq_cpu.scheme import Activations


def test_the_plan_is_worth_what_is_said_and_the_model_unchanged() -> None:
    model = llama()
    before = {name: p.clone() for name, p in model.named_parameters()}
    # All there is to search, at the least: tune takes longest.
    found = tuned(model, 1e-4, space=SearchSpace(), trials=2)
    assert found.goal_met
    assert found.stopped == "done"
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    evaluate = Divergence(model)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, batches(3)), found.plan)
    assert evaluate(model) == found.metric == found.loss <= 1e-4
    assert found.float_metric == 0
    assert found.milliseconds < found.float_milliseconds
    assert found.metric in {trial.metric for trial in found.trials}


@pytest.mark.parametrize("smoothing", ["tuned", "smoothquant"])
@pytest.mark.parametrize("kind", ["auto", "minmax", "mse"])
def test_a_plan_has_the_range_of_its_configuration(smoothing: str, kind: str) -> None:
    model = llama()
    calibration = sq_cpu.calibrate(model, batches(3))
    job = TuningJob(model, calibration, Divergence(model), Goal.of(1.0), False, ("lm_head",))
    alpha = (0.4, 0.6) if smoothing == "tuned" else (0.5,)
    for activations in get_args(Activations):
        configuration = Configuration(
            activations=activations, static_range=kind, smoothing=smoothing, alpha=alpha
        )
        plan = job.plan(configuration)
        assert plan.scheme is not None
        static = activations == "static"
        assert plan.scheme.activations == activations
        assert plan.scheme.static_range == (kind if static else "auto")
        clips = static and kind != "auto" and smoothing == "tuned"
        assert any(group.clip != 1 for group in plan.groups) is clips


def test_as_few_in_float_as_of_all_subsets() -> None:
    model = llama()
    calibration = sq_cpu.calibrate(model, batches(3))
    job = TuningJob(model, calibration, Divergence(model), Goal.of(1.0), False, ("lm_head",))
    job.costs, job.float_metric = costs(model), 0.0
    per_token = Configuration(activations="per_token", smoothing="smoothquant", alpha=(0.5,))

    def loss(names: tuple[str, ...]) -> float:
        return job.result(per_token.changed(names, "float")).loss

    subsets = {
        names: loss(names) for count in range(8) for names in combinations(job.linears, count)
    }
    assert len(job.linears) == 7
    least = [min(loss for names, loss in subsets.items() if len(names) == k) for k in range(8)]
    # Goals that need one to six linears in float, and leave the search some room.
    for count in range(1, 7):
        goal = math.sqrt(least[count] * least[count - 1])
        found = tuned(model, goal, space=PER_TOKEN, rank="measured")
        assert found.goal_met
        assert len(found.plan.in_float) == count
        for name in found.plan.in_float:
            kept = tuple(n for n in job.linears if n in found.plan.in_float and n != name)
            assert subsets[kept] > goal


def test_the_notes_say_what_a_linear_in_float_is_for() -> None:
    found = tuned(llama(), 1e-6, space=PER_TOKEN)
    assert found.plan.in_float
    for note in found.plan.in_float.values():
        assert note.startswith("autotune: in float; with per_token the loss is +")


def test_static_and_per_token_linears_are_mixed() -> None:
    model = llama()
    goal = 8e-5
    found = tuned(model, goal)
    best = found.configuration
    assert found.goal_met
    assert not found.plan.in_float
    assert best.activations == "static"
    per_token = best.overrides("per_token")
    assert 0 < len(per_token) < 7
    calibration = sq_cpu.calibrate(model, batches(3))
    job = TuningJob(model, calibration, Divergence(model), Goal.of(goal), False, ("lm_head",))
    job.costs, job.float_metric = costs(model), 0.0
    for name in per_token:
        assert job.result(best.changed([name], "static")).loss > goal
    # All per token meets the goal too, and is slower.
    everything = job.result(best.changed(list(job.linears), "per_token"))
    assert everything.milliseconds > found.milliseconds


def test_one_worker_does_the_same_again_under_a_seed() -> None:
    first, second = (tuned(llama(), GOAL, seed=3) for _ in range(2))
    assert first == second
    assert first.trials != tuned(llama(), GOAL, seed=4).trials


def test_goals_are_relative_or_absolute() -> None:
    assert Goal.of("1%") == Goal(0.01, True)
    assert Goal.of(" 0.5 % ") == Goal(0.005, True)
    assert Goal.of(0.2) == Goal(0.2, False)
    assert Goal.of("1%").loss(10.1, 10.0, False) == pytest.approx(0.01)
    assert Goal.of("1%").loss(0.79, 0.8, True) == pytest.approx(0.0125)
    assert Goal.of(1.0).loss(-3.0, -5.0, False) == 2.0
    assert Goal.of(1.0).loss(math.nan, 1.0, False) == math.inf
    for wrong in ("much", "-1%", math.nan, -0.1):
        with pytest.raises(SqCpuError, match="goal is"):
            Goal.of(wrong)


def test_an_accuracy_is_better_higher() -> None:
    model = llama()
    divergence = Divergence(model)

    def accuracy(candidate: nn.Module) -> float:
        return 1.0 - divergence(candidate)

    found = tuned(model, "0.01%", evaluate=accuracy, higher_is_better=True)
    assert found.float_metric == 1.0
    assert found.metric >= 1.0 - 1e-4
    assert found.loss == pytest.approx(1.0 - found.metric)


def test_a_relative_goal_needs_a_metric_that_is_not_zero() -> None:
    with pytest.raises(SqCpuError, match="set an absolute goal"):
        tuned(llama(), "1%")


def test_a_pruner_stops_trials_of_the_search_by_partial_metrics() -> None:
    model = llama()
    divergence = Divergence(model)
    ended = []

    def partial(candidate: nn.Module) -> Iterator[float]:
        value = divergence(candidate)
        yield 0.5 * value
        ended.append(value)
        yield value

    pruner = optuna.pruners.ThresholdPruner(upper=1e-4)
    storage = optuna.storages.InMemoryStorage()
    found = tuned(model, GOAL, evaluate=partial, pruner=pruner, storage=storage, trials=8)
    study = optuna.load_study(storage=storage, study_name="autotune")
    pruned = [t for t in study.trials if t.intermediate_values and t.state.name == "PRUNED"]
    assert pruned
    assert all(max(t.intermediate_values.values()) > 1e-4 for t in pruned)
    assert found.goal_met
    assert found.metric in ended


def test_what_cannot_be_scored_has_an_infinite_loss() -> None:
    model = llama()
    divergence = Divergence(model)

    def sometimes(candidate: nn.Module) -> float:
        if divergence.calls == 1:
            divergence.calls += 1
            raise SqCpuError("NaN on window 0")
        return divergence(candidate)

    found = tuned(model, 1e-4, evaluate=sometimes)
    assert found.trials[0].loss == math.inf
    assert found.goal_met

    def never(candidate: nn.Module) -> float:
        if divergence.calls > 20:
            raise SqCpuError("NaN on window 0")
        divergence.calls = 21
        return 0.0

    divergence.calls = 0
    with pytest.raises(SqCpuError, match="no configuration could be evaluated; the first: NaN on"):
        tuned(model, 1e-4, evaluate=never, trials=2, refine_trials=2)


def test_linears_are_ranked_only_for_what_needs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def counted(*arguments: Any, **options: Any) -> Errors:
        calls.append(arguments)
        return estimated_errors(*arguments, **options)

    monkeypatch.setattr(evaluator, "estimated_errors", counted)
    model = llama()
    found = tuned(model, 10.0)
    assert (found.goal_met, found.stopped, len(found.trials)) == (True, "done", 1)
    # Those of each kind of activations as they come, and nothing after.
    found = tuned(model, 1e-6, trials=3, refine_trials=0)
    assert (found.goal_met, found.stopped, len(found.trials)) == (False, "trials", 3)
    assert not calls
    tuned(model, 1e-6, trials=4, refine_trials=0)
    assert len(calls) == 1
    calls.clear()
    tuned(model, 1e-6, trials=3, refine_trials=1)
    assert len(calls) == 1


def test_lines_for_every_trial_where_there_is_no_bar() -> None:
    said: list[str] = []
    found = tuned(llama(), GOAL, say=said.append)
    assert said[0] == "evaluating the float model"
    assert len(said) == 1 + len(found.trials)
    assert all(line.startswith(("search ", "refine ")) for line in said[1:])
