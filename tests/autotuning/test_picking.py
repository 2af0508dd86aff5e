"""The fastest scheme that holds a goal: which is tried, which is picked, and what is said of it."""

from __future__ import annotations

import copy
import json
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer
from command_line import TEXT
from picking_cases import calibration as calibrated
from picking_cases import massive_model
from torch import nn
from tuning_cases import costs

import sq_cpu
from sq_cpu import Calibration, Scheme, SqCpuError, TextPerplexity
from sq_cpu.autotuning import picking
from sq_cpu.autotuning.latency import Costs

SCORED = TextPerplexity(byte_tokenizer(), TEXT, 64, 8)
PLAIN = tuple(Scheme.of(name, dynamic_fallback=False) for name in ("O3", "O1"))
"""Without own scales for rows that do not fit, a massive token ruins O3."""


@pytest.fixture(scope="module")
def model() -> nn.Module:
    built: nn.Module = massive_model()
    return built


@pytest.fixture(scope="module")
def calibration(model: nn.Module) -> Calibration:
    return calibrated(model)


@pytest.fixture
def pick(model: nn.Module, calibration: Calibration) -> Any:
    """Return `pick_scheme` of the model, with the text's perplexity and costs of a table."""

    def picked(goal: str | float, evaluate: Any = SCORED, **options: Any) -> sq_cpu.PickedScheme:
        options = {"costs": costs(model)} | options
        return sq_cpu.pick_scheme(model, calibration, evaluate, goal, **options)

    return picked


def dearer(table: Costs, variant: str, times: float) -> Costs:
    """Return costs with one variant of every shape so many times as slow."""
    entries = {
        shape: dict(row) | {variant: times * row[variant]} for shape, row in table.entries.items()
    }
    return replace(table, entries=entries)


def test_o1_where_o3_misses_the_goal(pick: Any, model: nn.Module, calibration: Calibration) -> None:
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    said: list[str] = []
    picked = pick("20%", schemes=PLAIN, say=said.append)
    assert [one.scheme for one in picked.tried] == [*PLAIN]
    assert [one.holds for one in picked.tried] == [False, True]
    o3, o1 = picked.tried
    assert picked.scheme == PLAIN[1]
    assert (picked.metric, picked.loss_percent) == (o1.metric, o1.loss_percent)
    assert (picked.milliseconds, picked.standard_error) == (o1.milliseconds, o1.standard_error)
    assert o3.loss_percent > 100 > 20 > picked.loss_percent  # neither is near the goal
    worse = 100 * (picked.metric / picked.float_metric - 1)
    assert picked.loss_percent == pytest.approx(worse, rel=1e-9)
    assert o3.milliseconds < picked.milliseconds < picked.float_milliseconds
    assert picked.goal == "20%"
    assert said[0] == "evaluating the float model"
    assert said[1::2] == ["trying O3", "trying O1"]
    assert said[2].startswith(f"O3: {o3.loss_percent:+.2f} % +- {o3.standard_error:.2f}, goal 20%;")

    # The model is as it was, and quantized so is worth what was measured.
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert not hasattr(model, "sq_cpu_config")
    assert [*SCORED(model)][-1] == picked.float_metric
    quantized = sq_cpu.quantize(copy.deepcopy(model), calibration, scheme=picked.scheme)
    assert [*SCORED(quantized)][-1] == picked.metric


def test_o3_where_it_holds(pick: Any) -> None:
    picked = pick("20%")
    assert picked.scheme == Scheme.of("O3")
    (one,) = picked.tried  # and O1 is not tried
    assert one.holds


def test_a_goal_in_the_unit_of_the_metric(pick: Any) -> None:
    worst, best = pick(math.nextafter(math.inf, 0), schemes=PLAIN[:1]).tried[0], pick("100%")
    limit = (worst.metric + best.metric) / 2 - best.float_metric
    said: list[str] = []
    picked = pick(limit, schemes=PLAIN, say=said.append)
    assert picked.scheme == PLAIN[1]
    worse, error = worst.metric - picked.float_metric, worst.standard_error / 100
    assert said[2].startswith(f"O3: {worse:+.4g} +- {error * picked.float_metric:.2g}, goal")


def test_none_holds(pick: Any) -> None:
    goal = "-1%"
    with pytest.raises(SqCpuError, match=r"goal is '-1%'"):
        pick(goal)
    for schemes, best in ((PLAIN, "O1"), (PLAIN[:1], "O3")):
        with pytest.raises(SqCpuError) as caught:
            pick("1%", schemes=schemes, smooth=False)
        said = str(caught.value)
        assert said.startswith(f"no scheme holds the goal of 1%: the best, {best}, is at +")
        for word in ("tune,", "autotune,", "a wider goal"):
            assert word in said
        assert "\n" not in said


def test_the_standard_error_is_over_the_windows_paired_losses(
    pick: Any, model: nn.Module, calibration: Calibration
) -> None:
    picked = pick("1000%", schemes=("O1",))
    quantized = sq_cpu.quantize(copy.deepcopy(model), calibration, scheme="O1")
    more = []
    for ids in sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=8):
        losses = []
        for each in (model, quantized):
            with torch.no_grad():
                likelihoods = each(ids).logits[0, :-1].double().log_softmax(-1)
            losses.append(-float(likelihoods.gather(1, ids[0, 1:, None]).mean()))
        more.append(losses[1] - losses[0])
    assert picked.loss_percent == pytest.approx(100 * math.expm1(statistics.fmean(more)), rel=1e-3)
    # Of exp(mean), to first order.
    error = 100 * math.exp(statistics.fmean(more)) * statistics.stdev(more) / math.sqrt(8)
    assert picked.standard_error == pytest.approx(error, rel=1e-3)
    assert error > 0


def test_what_has_no_standard_error(pick: Any) -> None:
    one_window = TextPerplexity(byte_tokenizer(), TEXT, 64, 1)
    for evaluate in (lambda each: [*SCORED(each)][-1], one_window):
        said: list[str] = []
        picked = pick("1000%", evaluate, say=said.append)
        assert picked.standard_error is None
        assert "+-" not in said[-1]


def test_the_fastest_by_the_costs_is_tried_first(pick: Any, model: nn.Module) -> None:
    table = dearer(costs(model), "static", 2)
    picked = pick("20%", costs=table)
    assert [one.scheme.name for one in picked.tried] == ["O1"]
    picked = pick("20%", schemes=("O2", "O1", "O3"))
    assert [one.scheme.name for one in picked.tried] == ["O3"]


def test_what_is_done_at_run_time_can_make_another_faster(pick: Any, model: nn.Module) -> None:
    """Down projections are rotated: with static scales, at a great cost."""
    calls: list[str] = []

    def counted(each: Any) -> Iterator[float]:
        calls.append(each.sq_cpu_config.scheme.name if hasattr(each, "sq_cpu_config") else "float")
        return SCORED(each)

    table = dearer(costs(model), "static+hadamard", 3)
    picked = pick("20%", counted, costs=table, hadamard=64)
    assert [one.scheme.name for one in picked.tried] == ["O3", "O1"]
    assert [one.holds for one in picked.tried] == [True, True]
    assert picked.scheme.name == "O1"
    o3, o1 = picked.tried
    assert picked.milliseconds == o1.milliseconds < o3.milliseconds
    assert calls == ["float", "O3", "O1"]

    # As dear for O1: it is not evaluated, since it is no faster.
    calls.clear()
    said: list[str] = []
    both = dearer(table, "per_token+hadamard", 3)
    picked = pick("20%", counted, costs=both, hadamard=64, say=said.append)
    assert picked.scheme.name == "O3"
    assert calls == ["float", "O3"]
    assert said[-1] == "O1: not faster than one that holds"
    assert picked.tried[1].why == "not faster than one that holds"
    assert picked.tried[1].metric is None
    assert picked.tried[1].milliseconds > picked.milliseconds


def test_a_scheme_that_cannot_be_scored_is_told_and_others_are_tried(pick: Any) -> None:
    def evaluate(each: Any) -> float:
        if hasattr(each, "sq_cpu_config") and each.sq_cpu_config.scheme.name in failing:
            if failing[each.sq_cpu_config.scheme.name]:
                raise SqCpuError("a reason")
            return math.nan
        return 1.0

    failing = {"O3": True}
    said: list[str] = []
    picked = pick("1%", evaluate, say=said.append)
    assert picked.scheme.name == "O1"
    assert picked.tried[0].why == "a reason"
    assert picked.tried[0].to_dict()["metric"] is None
    assert "O3: a reason" in said
    failing = {"O3": False}
    assert pick("1%", evaluate).tried[0].why == "no finite metric"
    failing = {"O3": True, "O1": True}
    with pytest.raises(SqCpuError, match=r"^no scheme could be measured; O3: a reason$"):
        pick("1%", evaluate)


def test_more_may_be_better(pick: Any) -> None:
    worth = {"O3": 0.8, "O1": 0.985}

    def accuracy(each: Any) -> float:
        return worth[each.sq_cpu_config.scheme.name] if hasattr(each, "sq_cpu_config") else 1.0

    picked = pick("2%", accuracy, higher_is_better=True)
    assert picked.scheme.name == "O1"
    assert picked.loss_percent == pytest.approx(1.5)
    with pytest.raises(SqCpuError, match=r"the best, O1, is at \+1.50 %;"):
        pick("1%", accuracy, higher_is_better=True)


def test_costs_are_measured_where_none_are_given(
    pick: Any, model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def measured(linears: Any, *, tokens: int, dtype: torch.dtype, progress: Any) -> Costs:
        asked.append((len([*linears]), tokens, dtype))
        return costs(model)

    monkeypatch.setattr(picking, "measured_costs", measured)
    assert pick("20%", costs=None, tokens=3) == pick("20%")
    assert asked == [(14, 3, torch.float32)]


def test_all_is_json(pick: Any) -> None:
    picked = pick("20%", schemes=PLAIN)
    told = json.loads(json.dumps(picked.to_dict()))
    assert told["scheme"] == picked.scheme.to_dict()
    assert (told["name"], told["goal"]) == ("O1", "20%")
    assert [(one["name"], one["holds"]) for one in told["tried"]] == [("O3", False), ("O1", True)]
    assert told["tried"][1]["metric"] == told["metric"] == picked.metric


def test_schemes_that_cannot_be_compared(pick: Any) -> None:
    for none in ("O3", None, {"O3"}):
        with pytest.raises(SqCpuError, match=r"^schemes is .*; give several"):
            pick("1%", schemes=none)
    with pytest.raises(SqCpuError, match="there is no scheme to try"):
        pick("1%", schemes=())
    other = Scheme.of("O1", ignore=("lm_head", "down_proj"))
    with pytest.raises(SqCpuError, match="ignore different linears"):
        pick("1%", schemes=("O3", other))
    with pytest.raises(SqCpuError, match="unknown scheme 'O4'"):
        pick("1%", schemes=("O3", "O4"))
    everything = Scheme.of("O1", ignore=("model", "lm_head"))
    with pytest.raises(SqCpuError, match="nothing to quantize"):
        pick("1%", schemes=(everything,))
