"""The fastest mix that keeps a goal, as a job that can be killed."""

import importlib
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import autotune_worker
import optuna
import postgres
import pytest
import torch
from processes import kill_at, start
from tiny import batches
from torch import nn
from tuning_cases import QUICK, Divergence, costs, planted

import sq_cpu
from sq_cpu import Calibration, SearchSpace, SqCpuError
from sq_cpu.autotuning import evaluator, workers
from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluator import Goal, TuningJob
from sq_cpu.autotuning.latency import Costs
from sq_cpu.autotuning.ranking import Errors, estimated_errors
from sq_cpu.kernels.runtime import Machine

# Every linear per token at first, nothing else to choose: what remains is which stay in float.
PER_TOKEN = SearchSpace(
    activations=("per_token",),
    symmetric=(True,),
    smoothing=("smoothquant",),
    alpha=(0.5,),
    weight_clip=(1.0,),
    in_float=(0.0,),
)


GOAL = 6e-5
"""That needs some linears in float, whatever the settings."""


def llama(**config: Any) -> nn.Module:
    """Return a model of seven linears, with outliers."""
    return planted("llama", num_hidden_layers=1, **config)


def tuned(model: nn.Module, goal: str | float, **options: Any) -> sq_cpu.Autotuned:
    settings = {"costs": costs(model), "trials": 6, "space": QUICK, "progress": False}
    evaluate = options.pop("evaluate", None) or Divergence(model)
    return sq_cpu.autotune(model, batches(3), evaluate, goal, **(settings | options))


def evaluations(found: sq_cpu.Autotuned) -> int:
    """Return how many configurations took an evaluation; the float model is known."""
    return sum(trial.in_float < 7 for trial in found.trials)


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


def test_as_few_in_float_as_of_all_subsets() -> None:
    model = llama()
    calibration = sq_cpu.calibrate(model, batches(3))
    job = TuningJob(model, calibration, Divergence(model), Goal.of(1.0), False, ("lm_head",))
    job.costs, job.float_metric = costs(model), 0.0
    per_token = Configuration(activations="per_token", smoothing="smoothquant", alpha=(0.5,))

    def loss(names: tuple[str, ...]) -> float:
        return float(job.result(per_token.changed(names, "float"))["loss"])

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
    goal = 1e-4
    found = tuned(model, goal)
    best = found.configuration
    assert found.goal_met
    assert not found.plan.in_float
    assert best.activations == "static"
    per_token = best.chosen("per_token")
    assert 0 < len(per_token) < 7
    calibration = sq_cpu.calibrate(model, batches(3))
    job = TuningJob(model, calibration, Divergence(model), Goal.of(goal), False, ("lm_head",))
    job.costs, job.float_metric = costs(model), 0.0
    for name in per_token:
        assert job.result(best.changed([name], "static"))["loss"] > goal
    # All per token meets the goal too, and is slower.
    everything = job.result(best.changed(list(job.linears), "per_token"))
    assert everything["milliseconds"] > found.milliseconds


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
    module = importlib.import_module("sq_cpu.autotuning.autotune")
    monkeypatch.setattr(module, "measured_costs", lambda *_, **__: table)
    begun = tuned(model, GOAL, costs=None, **options)
    with pytest.raises(SqCpuError, match="begun with other costs"):
        tuned(model, GOAL, costs=Costs(32, "float32", doubled), **options)

    # Not measured again, on another machine neither.
    elsewhere = Machine(cpu="another", isa="avx2", threads=3)
    monkeypatch.setattr(module, "measured_costs", None)
    said: list[str] = []
    assert tuned(model, GOAL, costs=None, say=said.append, **options) == begun
    assert not said
    monkeypatch.setattr(Machine, "here", lambda: elsewhere)
    assert tuned(model, GOAL, costs=None, say=said.append, **options) == begun
    assert len(said) == 1
    assert said[0].startswith("milliseconds are those of where the study was begun: ")


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


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activations": ("int4",)}, "one of 'per_token', "),
        ({"activations": "static"}, "is a tuple of one choice or more"),
        ({"weight_clip": ()}, "is a tuple of one choice or more"),
        ({"symmetric": (1,)}, "one of True, False"),
        ({"smoothing": ("awq",)}, "one of 'tuned', 'smoothquant'"),
        ({"static_range": ("percentile",)}, "percentile in"),
        ({"static_range": (50,)}, "percentile in"),
        ({"static_range": (100.1,)}, "percentile in"),
        ({"alpha": (0.5, 1.1)}, "a number in"),
        ({"alpha": (-0.1,)}, "a number in"),
        ({"alpha": (math.nan,)}, "a number in"),
        ({"alpha": ("0.5",)}, "a number in"),
        ({"alpha_ranges": (0.0, 1.0)}, "least <= greatest"),
        ({"alpha_ranges": ((0.6, 0.4),)}, "least <= greatest"),
        ({"alpha_ranges": ((0.5, 1.5),)}, "least <= greatest"),
        ({"alpha_ranges": ((0.5,),)}, "least <= greatest"),
        ({"weight_clip": (0.0,)}, "a number in"),
        ({"weight_clip": (1.1,)}, "a number in"),
        ({"dynamic": (-0.5,)}, "a share of the linears"),
        ({"in_float": (1.5,)}, "a share of the linears"),
        ({"in_float": (True,)}, "a share of the linears"),
    ],
)
def test_a_search_space_of_what_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SqCpuError, match=f"^search space: {next(iter(wrong))} .*{said}"):
        SearchSpace(**wrong)


def test_a_search_space_of_the_limits() -> None:
    SearchSpace(
        static_range=("mse", 50.1, 100),
        alpha=(0, 1.0),
        alpha_ranges=((0, 1), (0.5, 0.5)),
        weight_clip=(0.01, 1),
        dynamic=(0, 1),
        in_float=(0.0, 1.0),
    )


def test_equal_configurations_have_one_key() -> None:
    one = Configuration(layers=(("b", "float"), ("a", "static")), alpha=(0.1 + 0.2, 1.0))
    other = Configuration(alpha=(0.3, 1.0)).changed(["b"], "float").changed(["a"], "per_token")
    assert one == other.changed(["a"], "static")
    assert one.key == other.changed(["a"], "static").key
    assert Configuration.from_key(one.key) == one
    assert Configuration(activations="per_token", static_range="mse") == Configuration(
        activations="per_token"
    )
    assert json.loads(one.key)["layers"] == {"b": "float"}
    with pytest.raises(SqCpuError, match="not a configuration"):
        Configuration.from_key("{}")
