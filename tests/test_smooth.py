"""Smoothing: the rule, plans as values, and the scales that a plan gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model

from sq_cpu.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.smooth import GroupPlan, SmoothPlan, fold, smoothing_scales

# --- the rule -----------------------------------------------------------------------------------


def test_the_rule_by_hand() -> None:
    act, weight = torch.tensor([16.0, 1.0, 0.25]), torch.tensor([4.0, 0.25, 0.0625])
    # 16^.5 / 4^.5 = 2, 1 / .25^.5 = 2, .25^.5 / .0625^.5 = 2
    assert smoothing_scales(act, weight, 0.5).tolist() == [2, 2, 2]
    assert smoothing_scales(act, weight, 1.0).tolist() == act.tolist()
    assert smoothing_scales(act, weight, 0.0).tolist() == [0.25, 4, 16]
    # 16^.75 / 4^.25 = 8 / sqrt(2)
    torch.testing.assert_close(smoothing_scales(act, weight, 0.75)[0].item(), 32**0.5)


def test_half_way_balances_both_sides() -> None:
    act, weight = torch.rand(50) * 100, torch.rand(50)
    s = smoothing_scales(act, weight, 0.5)
    torch.testing.assert_close(act / s, weight * s)


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_and_extreme_channels_keep_s_finite(alpha: float) -> None:
    act = torch.tensor([0.0, 5.0, 0.0, 3e38, 1e-45, 3e38, 1e-45])
    weight = torch.tensor([2.0, 0.0, 0.0, 1e-45, 3e38, 3e38, 1e-45])
    s = smoothing_scales(act, weight, alpha)
    assert s.dtype == torch.float32
    assert s[:3].tolist() == [1, 1, 1]
    assert (s.isfinite() & (s > 0)).all()


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(SqCpuError, match=r"lies in \[0, 1\]"):
        smoothing_scales(torch.ones(2), torch.ones(2), alpha)
    with pytest.raises(SqCpuError, match=r"group a: alpha is .* lies in \[0, 1\]"):
        GroupPlan(name="a", alpha=alpha)


def test_bad_absmax_is_refused() -> None:
    with pytest.raises(SqCpuError, match=r"not \(2,\) and \(3,\)"):
        smoothing_scales(torch.ones(2), torch.ones(3), 0.5)
    with pytest.raises(SqCpuError, match="NaN or Inf"):
        smoothing_scales(torch.tensor([torch.nan]), torch.ones(1), 0.5)


# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Calibration]:
    model = tiny_model("llama")
    return model, calibrate(model, batches())


def test_plans_are_values(llama: tuple[Any, Calibration], tmp_path: Path) -> None:
    plan = SmoothPlan.uniform(*llama, alpha=0.75)
    assert len(plan.groups) == 8
    assert plan.groups[0] == GroupPlan(name="model.layers.0.input_layernorm", alpha=0.75)
    assert SmoothPlan.from_json(plan.to_json()) == plan
    assert SmoothPlan.load(plan.save(tmp_path / "plan.json")) == plan


def test_bad_plans_are_refused(llama: tuple[Any, Calibration], tmp_path: Path) -> None:
    group = GroupPlan(name="nowhere")
    with pytest.raises(SqCpuError, match="no smoothing group nowhere"):
        fold(llama[0], SmoothPlan((group,)), llama[1])
    with pytest.raises(SqCpuError, match="2 entries for group nowhere"):
        SmoothPlan((group, group))
    with pytest.raises(SqCpuError, match="unknown rule 'spiq'"):
        GroupPlan(name="a", rule="spiq")
    with pytest.raises(SqCpuError, match="not JSON"):
        SmoothPlan.from_json("{")
    for text in ("[]", "{}", '{"groups": [{"beta": 1}]}'):
        with pytest.raises(SqCpuError, match="not a smoothing plan of this version"):
            SmoothPlan.from_json(text)
    with pytest.raises(SqCpuError, match="cannot read the smoothing plan"):
        SmoothPlan.load(tmp_path / "missing")


@pytest.mark.parametrize("settings", [{"seed": 1}, {"intermediate_size": 64}])
def test_a_calibration_of_another_model_is_refused(
    llama: tuple[Any, Calibration], settings: dict[str, Any]
) -> None:
    other = tiny_model("llama", **settings)
    with pytest.raises(SqCpuError, match=r"weights of .* changed since the calibration"):
        SmoothPlan.uniform(other, llama[1])
    with pytest.raises(SqCpuError, match=r"weights of .* changed since the calibration"):
        fold(other, SmoothPlan.uniform(*llama), llama[1])


def test_folding_twice_is_refused() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    plan = SmoothPlan.uniform(model, found)
    fold(model, plan, found)
    once = {name: p.clone() for name, p in model.named_parameters()}
    with pytest.raises(SqCpuError, match=r"weights of model\.layers\.0\.self_attn\.q_proj changed"):
        fold(model, plan, found)
    assert all(torch.equal(p, once[name]) for name, p in model.named_parameters())


def test_groups_of_ignored_linears_are_not_planned(llama: tuple[Any, Calibration]) -> None:
    plan = SmoothPlan.uniform(*llama, ignore=("down_proj", "q_proj"))
    names = {group.name for group in plan.groups}
    assert "model.layers.0.mlp.up_proj" not in names
    assert "model.layers.0.input_layernorm" in names  # k and v are quantized
    assert len(names) == 6


def test_a_plan_leaves_out_what_was_not_calibrated() -> None:
    model = tiny_model("opt")
    found = calibrate(model, batches(), ignore=("lm_head", "fc1", "q_proj"))
    names = [group.name for group in SmoothPlan.uniform(model, found).groups]
    assert "model.decoder.layers.0.self_attn_layer_norm" in names  # k and v saw the same input
    assert "model.decoder.layers.0.final_layer_norm" not in names


def test_scales_follow_the_rule_over_all_consumers_and_heads(
    llama: tuple[Any, Calibration],
) -> None:
    model, found = tiny_model("llama"), llama[1]
    block = model.model.layers[1]
    absmax = torch.stack(
        [block.mlp.gate_proj.weight.abs().amax(0), block.mlp.up_proj.weight.abs().amax(0)]
    ).amax(0)
    name = "model.layers.1.mlp.up_proj"
    norm_s = smoothing_scales(found.absmax(name), absmax.detach(), 0.5)
    scales = fold(model, SmoothPlan.uniform(model, found), found).scales
    torch.testing.assert_close(scales[name], norm_s)
    assert torch.equal(scales[name], scales["model.layers.1.mlp.gate_proj"])
    heads = scales["model.layers.1.self_attn.o_proj"].reshape(2, 2, 12)
    assert torch.equal(heads[:, 0], heads[:, 1])
