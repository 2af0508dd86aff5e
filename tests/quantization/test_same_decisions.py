"""What `quantize` carries out is what the searches looked at: one decision, in one place."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, mixed_plan
from tuning_cases import planted

import sq_cpu
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.numerics.rounding import static_code
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.scales import as_planned, group_statistics

KINDS = ("plain", "clipped", "decomposed", "mixed")


def plan_of(kind: str, model: Any, found: Any, scheme: Scheme) -> SmoothPlan:
    if kind == "mixed":
        plan = mixed_plan(model, found, scheme)
        turned = (replace(g, hadamard=64 if g.name.endswith("up_proj") else 0) for g in plan.groups)
        return replace(plan, groups=tuple(turned))
    plan = SmoothPlan.uniform(model, found, 0.6, ignore=scheme.ignore)
    if kind == "clipped":
        plan = replace(plan, groups=tuple(replace(group, clip=0.7) for group in plan.groups))
    if kind == "decomposed":
        names = [name for name in found.channel_min if name != "lm_head"]
        plan = replace(plan, layers=tuple(LayerPlan(name=n, outliers=(3, 17)) for n in names))
    return replace(plan, scheme=scheme)


@pytest.mark.parametrize(
    "scheme",
    [
        Scheme.of("O3"),
        Scheme.of("O3", static_range="mse"),
        Scheme.of("O3", static_range="percentile", percentile=99.0, symmetric=False),
        Scheme.of("O1", outlier_threshold=0.7),
    ],
    ids=lambda scheme: f"{scheme.activations}-{scheme.static_range}",
)
@pytest.mark.parametrize("kind", KINDS)
def test_ranges_and_outliers_are_those_of_the_search(kind: str, scheme: Scheme) -> None:
    model = planted("llama")
    found = sq_cpu.calibrate(model, batches(3))
    scheme = scheme.resolve(True)
    plan = plan_of(kind, model, found, scheme)
    quantized = sq_cpu.quantize(copy.deepcopy(model), found, plan)
    planned = {group.name: group for group in quantized.sq_cpu_config.plan.groups}
    assert {group.rotation for group in planned.values()} >= {64}
    compared = decomposed = static = 0
    for group in smoothing_groups(model):
        if group.name not in planned:
            continue
        entry = planned[group.name]
        statistics = group_statistics(model, group, found, scheme, plan)
        if not statistics.samples:
            continue
        statistics = as_planned(statistics, entry)
        s = smoothing_scale(entry.rule, statistics, entry.alpha)
        for linear in statistics.fake_quantized(s):
            layer = quantized.get_submodule(linear.sample.name)
            columns = linear.outliers.nonzero().flatten()
            compared += 1
            if len(columns):
                decomposed += 1
                assert isinstance(layer, DecomposedLinear)
                assert torch.equal(layer.columns, columns)
                layer = layer.regular
            assert isinstance(layer, QuantLinear)
            assert layer.scheme == linear.scheme
            if linear.scheme.activations == "static":
                static += 1
                assert layer.static == static_code(linear.scheme, *linear.range)
    assert compared >= 5
    assert (decomposed > 0) == (kind in ("decomposed", "mixed") or scheme.activations != "static")
    assert (static > 0) == (kind == "mixed" or scheme.activations == "static")
