"""`Recipe`: checked once, the same for memory, streaming and the command line."""

from __future__ import annotations

import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import pytest

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.smoothing.rules import RULES
from sq_cpu.streaming.streaming import quantize_checkpoint

O3 = Scheme.of("O3")
PLAN = SmoothPlan((GroupPlan(name="a", alpha=0.8),), scheme=O3)

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"scheme": "O4"}, "unknown scheme 'O4'; known are O1, O2, O3"),
    ({"plan": PLAN, "smooth": False}, "a plan and smooth=False; drop one of them"),
    ({"plan": "plan.json"}, "plan is a str, not a SmoothPlan; .* SmoothPlan.load"),
    ({"alpha": -0.1}, r"alpha is -0.1; the migration strength lies in \[0, 1\]"),
    ({"alpha": math.nan}, r"alpha is nan; the migration strength lies in \[0, 1\]"),
    ({"alpha": "0.5"}, r"alpha is '0.5'; the migration strength lies in \[0, 1\]"),
    ({"target_length": 0}, "target_length is 0, not a whole number >= 1"),
    ({"target_length": 8.0}, "target_length is 8.0, not a whole number >= 1"),
    ({"target_length": True}, "target_length is True, not a whole number >= 1"),
    ({"alpha": True}, r"alpha is True; the migration strength lies in \[0, 1\]"),
    ({"smooth": "no"}, "smooth is 'no'; it is True or False"),
    ({"rule": "smooth"}, "smooth.*smoothquant"),
    ({"hadamard": 8}, "hadamard is 8; blocks are of 64 columns, or 0: none"),
    ({"hadamard": 64, "plan": PLAN}, "hadamard goes with smoothing, and a plan says it itself"),
    ({"hadamard": 64, "smooth": False}, "hadamard goes with smoothing"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=message) as caught:
        Recipe.of(**settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_streaming_refuses_them_before_it_looks_at_the_source(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(SqCpuError, match=message):
        quantize_checkpoint(tmp_path / "none", tmp_path / "out", **settings)
    assert not list(tmp_path.iterdir())


def test_a_scheme_that_is_not_decided_is_refused() -> None:
    with pytest.raises(SqCpuError, match=r"is not a resolved Scheme; make it with Recipe\.of"):
        Recipe(scheme=Scheme(reduce_range="auto"))
    assert Recipe.of(Scheme(reduce_range="auto")).scheme.reduce_range is not has_vnni()


def test_a_recipe_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Recipe.of("O1").alpha = 0.7  # type: ignore[misc]
    with pytest.raises(SqCpuError, match="alpha is 2"):
        replace(Recipe.of("O1"), alpha=2)


def test_the_scheme_is_the_given_one_else_the_plans_else_o1() -> None:
    assert Recipe.of().scheme == Scheme.of("O1")
    assert Recipe.of(None, PLAN).scheme == O3
    assert Recipe.of("O2", PLAN).scheme == Scheme.of("O2")


def test_what_needs_a_calibration() -> None:
    static = SmoothPlan((), (LayerPlan(name="x", activations="static"),))
    for recipe, needed in (
        (Recipe.of("O1"), True),
        (Recipe.of("O1", smooth=False), False),
        (Recipe.of("O3", smooth=False), True),
        (Recipe.of(Scheme(outlier_threshold=6.0), smooth=False), True),
        (Recipe.of("O1", SmoothPlan(())), False),
        (Recipe.of("O1", static), True),
        (Recipe.of("O1", PLAN), True),
    ):
        assert recipe.needs_calibration is needed, recipe


@pytest.mark.parametrize("rule", RULES)
def test_as_json_it_says_only_what_has_an_effect(rule: str) -> None:
    recipe = Recipe.of("O3", rule=rule, alpha=0.7)
    values = recipe.to_dict()
    assert recipe.is_uniform
    assert (values["rule"], values["alpha"], values["plan"]) == (rule, 0.7, None)
    assert Scheme.from_dict(json.loads(json.dumps(values))["scheme"]) == O3
    for other in (replace(recipe, plan=PLAN), replace(recipe, smooth=False)):
        assert not other.is_uniform
        assert (other.to_dict()["rule"], other.to_dict()["alpha"]) == (None, None)
