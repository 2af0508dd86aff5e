"""Whether a plan rotates, where it leaves that open."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model

import sq_cpu
from sq_cpu import Calibration, GroupPlan, SmoothPlan, SqCpuError
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.smoothing.scales import plan_scales

SCHEMES = ["O1", "O2", "O3"]
DOWN, OUT = "model.layers.{}.mlp.up_proj", "model.layers.{}.self_attn.v_proj"


def model_of(planted: bool) -> Any:
    """Give a model with heads of 64 channels; `planted`: one channel of the first down is large.

    Without, the input of down is a constant, which no rotation spreads any more.
    """
    model = tiny_model("llama", head_dim=64, intermediate_size=128)
    up, down = model.model.layers[0].mlp.up_proj, model.model.layers[0].mlp.down_proj
    with torch.no_grad():
        if planted:
            up.weight[5] *= 100
            down.weight[:, 5] /= 4
        else:
            up.weight.zero_()
            up.bias.fill_(1.0)
            model.model.layers[0].mlp.gate_proj.weight.zero_()
            model.model.layers[0].mlp.gate_proj.bias.fill_(1.0)
    return model


def plan_of(
    model: Any, calibration: Calibration, scheme: str, alpha: float = DEFAULT_ALPHA, **changes: Any
) -> dict[str, GroupPlan]:
    """Give what is decided of a uniform plan with the changes, by group."""
    plan = replace(SmoothPlan.uniform(model, calibration, alpha), **changes)
    resolved = Scheme.of(scheme).resolve(True)
    found = decided(model, plan, calibration, resolved, smoothing_groups(model))
    return {group.name: group for group in found.groups}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_an_outlier_is_rotated_and_what_gains_nothing_is_not(scheme: str) -> None:
    for planted in (True, False):
        model = model_of(planted)
        calibration = sq_cpu.calibrate(model, batches())
        found = plan_of(model, calibration, scheme)[DOWN.format(0)]
        assert found.hadamard == (64 if planted else 0)
        assert found.note == (
            "rotated: that lowers the error"
            if planted
            else "not rotated: that saves less than 2% of the error"
        )


def test_quantize_takes_the_default_and_records_it() -> None:
    model = model_of(True)
    calibration = sq_cpu.calibrate(model, batches())
    planned = plan_of(model, calibration, "O3")
    record = sq_cpu.quantize(model, calibration, scheme="O3").sq_cpu_config
    recorded = {group.name: group for group in record.plan.groups}
    assert recorded == planned
    rotated = {name for name, group in planned.items() if group.hadamard}
    assert DOWN.format(0) in rotated
    assert record.hadamard == {name.replace("up", "down"): 64 for name in rotated}


def test_without_rows_nothing_is_rotated_and_nothing_refused() -> None:
    model = model_of(True)
    calibration = sq_cpu.calibrate(model, batches(), rows=0)
    for scheme in SCHEMES:
        found = plan_of(model, calibration, scheme)
        assert not any(group.rotation for group in found.values())
        why = "not rotated: the calibration holds no sampled rows and peaks"
        assert found[DOWN.format(0)].note == why
    # A file of version 5 has rows and no peaks: those are for static ranges alone.
    calibration = sq_cpu.calibrate(model, batches())
    calibration = replace(calibration, peaks={}, peak_folds={})
    assert plan_of(model, calibration, "O3")[DOWN.format(0)].hadamard == 0
    assert plan_of(model, calibration, "O1")[DOWN.format(0)].hadamard == 64


def test_channels_in_float_keep_values_as_they_are() -> None:
    model = model_of(True)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight[7] *= 100
        model.model.layers[0].self_attn.o_proj.weight[:, 7] /= 4
    calibration = sq_cpu.calibrate(model, batches())
    name = OUT.format(0)
    assert plan_of(model, calibration, "O1")[name].hadamard_fold == 64
    layer = LayerPlan(name="model.layers.0.self_attn.o_proj", outliers=(7,))
    found = plan_of(model, calibration, "O1", layers=(layer,))[name]
    assert (found.hadamard_fold, found.note) == (0, "not rotated: channels stay in float")
    plan = SmoothPlan((replace(found, hadamard_fold=64),), (layer,))
    with pytest.raises(SqCpuError, match=r"o_proj keeps some in float: drop one of both"):
        sq_cpu.quantize(model, calibration, plan)


def test_zero_rotates_nothing_and_a_plan_of_before_stays_so() -> None:
    model = model_of(True)
    calibration = sq_cpu.calibrate(model, batches())
    plain = SmoothPlan.uniform(model, calibration, hadamard=0)
    assert not any(group.rotation for group in plain.groups)
    old = SmoothPlan.from_dict({"groups": [{"name": DOWN.format(0), "alpha": 0.7}]})
    assert old.groups[0].rotation == 0
    record = sq_cpu.quantize(model, calibration, old).sq_cpu_config
    assert record.hadamard == {}


def test_values_stay_where_s_is_not_folded() -> None:
    model = model_of(True)
    calibration = sq_cpu.calibrate(model, batches())
    uniform = SmoothPlan.uniform(model, calibration)
    assert any(group.hadamard_fold == "auto" for group in uniform.groups)
    at_run_time = tuple(replace(group, fold=False) for group in uniform.groups)
    found = plan_of(model, calibration, "O1", groups=at_run_time)
    assert not any(group.hadamard_fold for group in found.values())
    assert found[DOWN.format(0)].hadamard == 64


def test_what_is_open_has_no_rotation_yet() -> None:
    for which in ("hadamard", "hadamard_fold"):
        given = GroupPlan(name="up", **{which: "auto"})
        message = (
            f'group up: {which} is "auto", and not decided yet: take the plan that tune returns, '
            f"or quantize records in model.sq_cpu_config, or plan {which}=0"
        )
        with pytest.raises(SqCpuError, match=re.escape(message)):
            _ = given.rotation
        assert replace(given, **{which: 0}).rotation == 0


def test_scales_of_an_open_plan_say_what_to_do() -> None:
    model = model_of(True)
    calibration = sq_cpu.calibrate(model, batches())
    plan = SmoothPlan.uniform(model, calibration)
    with linearized(model), pytest.raises(SqCpuError, match=r'"auto", and not .*: take the plan'):
        plan_scales(model, plan, calibration, scheme=Scheme.of("O3").resolve(True))


def test_which_blocks_there_are() -> None:
    for wrong in ({"hadamard_fold": 8}, {"hadamard_fold": 128}):
        with pytest.raises(SqCpuError, match="blocks are of 64, 32 or 16 columns, or 0"):
            GroupPlan(name="v", **wrong)
    for wrong in ({"hadamard": 64}, {"fold": False}):
        with pytest.raises(SqCpuError, match="goes with fold and without hadamard"):
            GroupPlan(name="v", hadamard_fold=64, **wrong)
