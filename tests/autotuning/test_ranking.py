"""Which linears suffer most from int8, estimated."""

import pytest
import torch
from tiny import batches, tiny_model
from torch import nn
from tuning_cases import planted

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, SqCpuError
from sq_cpu.autotuning.latency import PRECISIONS
from sq_cpu.autotuning.ranking import estimated_errors
from sq_cpu.smoothing.plan import LayerPlan


@torch.no_grad()
def test_the_estimate_is_the_error_of_the_quantized_layer() -> None:
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    plan = SmoothPlan.uniform(model, calibration, 0.5, ignore=("lm_head",))
    scheme = Scheme.of("O3")
    errors = estimated_errors(model, calibration, plan, scheme, PRECISIONS)
    linears = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"}
    assert errors.keys() == linears.keys()
    for activations in ("static", "per_token", "per_tensor"):
        int8 = planted("llama")
        sq_cpu.quantize(int8, calibration, plan, scheme=scheme.with_activations(activations))
        # Queries' input is that of the group, divided by the s that was folded into the norm.
        name = "model.layers.0.self_attn.q_proj"
        norm = "model.layers.0.input_layernorm.weight"
        s = model.get_parameter(norm) / int8.get_parameter(norm)
        x = calibration.rows[name]
        bias = linears[name].bias
        exact = linears[name](x) - bias
        off = int8.get_submodule(name)(x / s) - bias - exact
        expected = off.square().sum() / exact.square().sum()
        assert errors[name][activations] == pytest.approx(float(expected), rel=1e-3)
    assert all(of_linear["float"] == 0 for of_linear in errors.values())


def test_static_scales_lose_most_and_overrides_do_not_matter() -> None:
    model = planted("opt")
    calibration = sq_cpu.calibrate(model, batches(3))
    plan = SmoothPlan.uniform(model, calibration, 0.5, ignore=("lm_head",))
    scheme = Scheme.of("O3")
    errors = estimated_errors(model, calibration, plan, scheme, ("static", "per_token"))
    total = {choice: sum(e[choice] for e in errors.values()) for choice in ("static", "per_token")}
    assert total["static"] > total["per_token"]
    overrides = (
        LayerPlan(name=next(iter(errors)), in_float=True),
        LayerPlan(name=list(errors)[-1], activations="per_tensor"),
    )
    mixed = SmoothPlan(plan.groups, overrides)
    assert estimated_errors(model, calibration, mixed, scheme, ("static", "per_token")) == errors


def test_it_needs_rows_and_changes_nothing() -> None:
    model = tiny_model("llama")
    before = {name: p.clone() for name, p in model.named_parameters()}
    calibration = sq_cpu.calibrate(model, batches(3), rows=0)
    plan = SmoothPlan.uniform(model, calibration, 0.5, ignore=("lm_head",))
    with pytest.raises(SqCpuError, match="no sampled rows"):
        estimated_errors(model, calibration, plan, Scheme(), ("per_token",))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
