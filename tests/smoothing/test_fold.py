"""Folds keep the model's function, or are refused, and the input is divided at run time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from folding_cases import TYPES, LeakyNorm, assert_unchanged, random_scales, state
from tiny import batches, logits, tiny_model

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.smoothing.fold import apply_folds
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.smooth import fold


@pytest.mark.parametrize("model_type", TYPES)
def test_random_scales_keep_the_function(model_type: str) -> None:
    model = tiny_model(model_type)
    before, weights = logits(model), state(model)
    scales = random_scales(model)
    apply_folds(model, scales)
    # Every product is rounded to 2^-24 relative; two layers of sums up to 48 long amplify that by
    # far less than the 2^10 allowed here, and a missed consumer moves logits by their own size.
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())
    changed = {name for name, value in model.state_dict().items() if (value != weights[name]).any()}
    modules = {name for group in scales for name in (group.name, *group.consumers)}
    assert {f"{name}.weight" for name in modules} <= changed


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_power_of_two_scales_keep_the_logits_bits(model_type: str, dtype: torch.dtype) -> None:
    model = tiny_model(model_type, dtype=dtype)
    before = logits(model)
    scales = random_scales(model, spread=1)
    apply_folds(model, {group: s.log2().round().exp2() for group, s in scales.items()})
    # Rounding commutes with powers of two, so every product x * w is the same number as before.
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize("model_type", TYPES)
def test_planted_outliers_are_smoothed_away(model_type: str) -> None:
    model = tiny_model(model_type)
    before = logits(model)
    planted = smoothing_groups(model)[0]
    s = torch.ones(planted.layout.channels)
    s[[3, 7]] = 2.0**-6
    apply_folds(model, {planted: s})  # the norm's output is 64 times larger there
    assert torch.equal(logits(model), before)

    found = calibrate(model, batches())
    name = planted.consumers[0]
    absmax = found.absmax(name)
    assert absmax[[3, 7]].min() > 8 * absmax.median()
    smoothed = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    again = calibrate(model, batches()).absmax(name)
    # Static ranges rest on this: ranges after folding are the ranges before, divided by s.
    torch.testing.assert_close(again, absmax / smoothed.scales[name])
    assert again.max() / again.median() < absmax.max() / absmax.median() / 4
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


def test_a_narrow_dtype_is_rounded_once() -> None:
    model, wide = tiny_model("opt", dtype=torch.bfloat16), tiny_model("opt", dtype=torch.bfloat16)
    wide.float()
    # One group: the product of a second is taken from what the first has rounded.
    scales = dict([next(iter(random_scales(model).items()))])
    apply_folds(model, scales)
    apply_folds(wide, scales)
    for (name, narrow), exact in zip(model.named_parameters(), wide.parameters(), strict=True):
        assert torch.equal(narrow, exact.bfloat16()), name


# --- refusals -----------------------------------------------------------------------------------


def test_a_refused_fold_divides_at_run_time_and_says_why() -> None:
    model = tiny_model("llama")
    model.model.layers[1].mlp = LeakyNorm(model.model.layers[1].mlp)
    before = logits(model)
    found = calibrate(model, batches())
    planned = SmoothPlan.uniform(model, found, hadamard=0)
    smoothed = fold(model, planned, found)
    name = "model.layers.1.post_attention_layernorm"
    (changed,) = (group for group in smoothed.plan.groups if group not in planned.groups)
    assert (changed.name, changed.fold) == (name, False)
    assert "something else uses the output" in changed.note
    mlp = "model.layers.1.mlp"
    assert smoothed.at_run_time == {f"{mlp}.gate_proj", f"{mlp}.up_proj"}
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2.0**-14 * before.abs().max())


def test_without_an_example_nothing_is_folded() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    before = state(model)
    plan = SmoothPlan.uniform(model, found)
    smoothed = fold(model, plan, replace(found, example=None))
    assert all("no example" in group.note and not group.fold for group in smoothed.plan.groups)
    assert smoothed.at_run_time == found.channel_min.keys()
    assert_unchanged(model, before)


# --- a real model -------------------------------------------------------------------------------


@pytest.mark.slow
def test_smollm2_keeps_its_logits(smollm2: Callable[[], tuple[Any, Any]]) -> None:
    model, tokenizer = smollm2()
    ids = tokenizer("The whale is a fish that spouts, with a horizontal tail.", return_tensors="pt")
    with torch.no_grad():
        before = model(**ids).logits
    found = calibrate(model, [dict(ids)])
    down = "model.layers.11.mlp.down_proj"
    assert found.absmax(down).max() > 100 * found.absmax(down).median()  # its known outlier
    smoothed = fold(model, SmoothPlan.uniform(model, found, alpha=0.8), found)
    assert smoothed.at_run_time == frozenset()
    with torch.no_grad():
        after = model(**ids).logits
    # fp32 eps is 1.2e-7; this network amplifies a relative change of its weights about 100 times.
    assert (after - before).norm() < 1e-4 * before.norm()
    absmax = found.absmax(down) / smoothed.scales[down]
    assert absmax.max() < 100 * absmax.median()
