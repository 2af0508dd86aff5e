"""Smoothing: which groups are planned, and the scales that a plan gives."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor, nn

import sq_cpu
import sq_cpu.smoothing.scales as scales_module
from sq_cpu.autotuning.ranking import estimated_errors
from sq_cpu.calibration.calibrate import Calibration, calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, SmoothPlan
from sq_cpu.smoothing.rules import DEFAULT_ALPHA, smoothing_scales
from sq_cpu.smoothing.smooth import fold

# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Calibration]:
    model = tiny_model("llama")
    return model, calibrate(model, batches())


def test_a_plan_of_another_model_is_refused(llama: tuple[Any, Calibration]) -> None:
    with pytest.raises(SqCpuError, match="no smoothing group nowhere"):
        fold(llama[0], SmoothPlan((GroupPlan(name="nowhere"),)), llama[1])


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
    norm_s = smoothing_scales(found.absmax(name), absmax.detach(), DEFAULT_ALPHA)
    scales = fold(model, SmoothPlan.uniform(model, found), found).scales
    torch.testing.assert_close(scales[name], norm_s)
    assert torch.equal(scales[name], scales["model.layers.1.mlp.gate_proj"])
    heads = scales["model.layers.1.self_attn.o_proj"].reshape(2, 2, 12)
    assert torch.equal(heads[:, 0], heads[:, 1])


def test_the_weights_of_a_group_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = tiny_model("llama"), batches(4)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[7] *= 4000  # a massive activation
    calibration = calibrate(model, data, gradient_rows=16)
    looked: Counter[str] = Counter()
    original = scales_module.weight_absmax

    def counted(of: nn.Module, group: SmoothingGroup) -> Tensor:
        looked[group.name] += 1
        return original(of, group)

    monkeypatch.setattr(scales_module, "weight_absmax", counted)
    names = {g.name for g in smoothing_groups(model) if g.consumers != ("lm_head",)}
    # Rows with their own scale would make do without channels in float.
    scheme = Scheme.of("O3", dynamic_fallback=False)
    for options in ({}, {"sequential": True, "batches": data}):
        looked.clear()
        settings: dict[str, Any] = {"scheme": scheme, "hadamard": 0, **options}
        plan = sq_cpu.tune(model, calibration, alphas=(0.3, 0.7, 0.4), **settings)
        assert plan.layers  # so the search ran again, with channels in float
        assert looked == dict.fromkeys(names, 1)
    looked.clear()
    estimated_errors(model, calibration, plan, Scheme.of("O3"), ("static", "per_token"))
    assert looked == dict.fromkeys(names, 1)
    looked.clear()
    sq_cpu.analyze(model, calibration, plan)
    assert looked == dict.fromkeys(names, 1)
