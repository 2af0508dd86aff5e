"""The smoothing rules: by hand, on a group's statistics, and as plans of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from smoothing_cases import SCHEMES, sampled
from tiny import batches, logits, tiny_model
from torch import Tensor

import sq_cpu
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.errors import SqCpuError
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, LayerPlan, SmoothPlan
from sq_cpu.smoothing.rules import (
    ALPHAS,
    DEFAULT_ALPHA,
    RULES,
    smoothing_scale,
    smoothing_scales,
    without_quiet,
)
from sq_cpu.smoothing.scales import group_statistics, plan_scales
from sq_cpu.smoothing.smooth import fold
from sq_cpu.smoothing.statistics import GroupStatistics, output_errors


def statistics(
    act: list[float], weight: list[float], norm: list[float] | None = None
) -> GroupStatistics:
    gamma = None if norm is None else torch.tensor(norm)
    return GroupStatistics(torch.tensor(act), torch.tensor(weight), gamma)


# --- each rule ----------------------------------------------------------------------------------


def test_the_formula_by_hand() -> None:
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
def test_the_formula_keeps_s_finite(alpha: float) -> None:
    act = torch.tensor([0.0, 5.0, 0.0, 3e38, 1e-45, 3e38, 1e-45])
    weight = torch.tensor([2.0, 0.0, 0.0, 1e-45, 3e38, 3e38, 1e-45])
    s = smoothing_scales(act, weight, alpha)
    assert s.dtype == torch.float32
    # Dead: the median of the others, or the greatest where the weights are zero.
    assert s[:3].tolist() == [s[3:].median(), s[3:].max(), s[3:].max()]
    assert (s.isfinite() & (s > 0)).all()


@pytest.mark.parametrize("alpha", [-0.01, 1.01, float("nan")])
def test_alpha_outside_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(SqCpuError, match=r"lies in \[0, 1\]"):
        smoothing_scales(torch.ones(2), torch.ones(2), alpha)


def test_bad_absmax_is_refused() -> None:
    with pytest.raises(SqCpuError, match=r"not \(2,\) and \(3,\)"):
        smoothing_scales(torch.ones(2), torch.ones(3), 0.5)
    with pytest.raises(SqCpuError, match="NaN or Inf"):
        smoothing_scales(torch.tensor([torch.nan]), torch.ones(1), 0.5)


def test_smoothquant_is_the_formula() -> None:
    found = statistics([16.0, 1.0, 0.0], [4.0, 0.25, 1.0])
    s = smoothing_scale("smoothquant", found, 0.5)
    assert s[:2].tolist() == [2, 2]
    # A quiet channel counts as 0.6 of the median one.
    assert s[2] == pytest.approx(0.6**0.5)
    assert smoothing_scale("smoothquant", found, 0.0)[:2].tolist() == [0.25, 4]


def test_quiet_channels_are_not_amplified() -> None:
    assert without_quiet(torch.tensor([0.0, 0.5, 1.0, 2.0, 9.0])).tolist() == pytest.approx(
        [0.6, 0.6, 1, 2, 9]
    )
    # Where most are dead (behind a ReLU) there is no typical one.
    assert without_quiet(torch.tensor([0.0, 0.0, 0.0, 0.1])).tolist() == pytest.approx(
        [0, 0, 0, 0.1]
    )


def test_spiq_gives_every_channel_its_activation_scale() -> None:
    found = statistics([16.0, 0.25, 0.0, 3.0], [4.0, 0.25, 1.0, 0.0])
    assert smoothing_scale("spiq", found).tolist() == [16, 0.25, 3, 3]


def test_outlier_suppression_takes_the_norms_weight() -> None:
    found = statistics([1.0] * 4, [1.0] * 4, norm=[0.5, -8.0, 0.0, 2.0])
    assert smoothing_scale("outlier_suppression", found).tolist() == [0.5, 8, 2, 2]


def test_outlier_suppression_needs_a_norm() -> None:
    with pytest.raises(SqCpuError, match=r"the norm before, and there is none: plan another") as e:
        smoothing_scale("outlier_suppression", statistics([1.0], [1.0]))
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "aqas"])
def test_extreme_channels_keep_s_positive_and_finite(rule: str) -> None:
    act = [0.0, 5.0, 3e38, 1e-45, 3e38, 1e-45]
    weight = [2.0, 0.0, 1e-45, 3e38, 3e38, 1e-45]
    s = smoothing_scale(rule, statistics(act, weight, norm=act))
    assert s.dtype == torch.float32
    assert (s.isfinite() & (s > 0) & (1 / s).isfinite()).all()
    assert s[1:].min() <= s[0] <= s[1:].max()


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule != "aqas"])
def test_nan_is_refused(rule: str) -> None:
    nan = float("nan")
    with pytest.raises(SqCpuError, match="NaN or Inf"):
        smoothing_scale(rule, statistics([nan], [1.0], norm=[nan]))


def test_unknown_rules_are_refused() -> None:
    with pytest.raises(SqCpuError, match="unknown rule 'awq'; known are smoothquant, spiq, out"):
        smoothing_scale("awq", statistics([1.0], [1.0]))


# --- the search of the least output error -------------------------------------------------------


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_aqas_is_never_worse_than_the_grid(scheme: Scheme) -> None:
    found = sampled(scheme)

    def error(s: torch.Tensor) -> float:
        return float(output_errors(found, s)[0].sum())

    grid = [error(smoothing_scale("smoothquant", found, alpha)) for alpha in ALPHAS]
    best = error(smoothing_scale("aqas", found))
    assert best <= min(grid)
    assert best < 0.9 * max(grid)
    # That it is refined: here the best alpha lies between those of the grid.
    assert best < min(grid)
    assert torch.equal(smoothing_scale("aqas", found), smoothing_scale("aqas", found, 0.9))


def test_a_search_without_what_it_needs_says_so() -> None:
    found = replace(sampled(Scheme()), samples=())
    with pytest.raises(SqCpuError, match="needs a scheme and linears that it quantizes"):
        smoothing_scale("aqas", found)
    with pytest.raises(SqCpuError, match="needs a scheme and linears that it quantizes"):
        smoothing_scale("aqas", statistics([1.0], [1.0]))
    bare = LinearSample(torch.ones(2, 1), None, torch.zeros(1), torch.ones(1))
    found = GroupStatistics(torch.ones(1), torch.ones(1), samples=(bare,), scheme=Scheme())
    with pytest.raises(SqCpuError, match="no sampled rows: calibrate with rows=64"):
        smoothing_scale("aqas", found)


# --- as plans of a model ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model_type", ["llama", "opt"])
def test_every_rule_is_planned_folded_and_keeps_the_function(model_type: str, rule: str) -> None:
    model = tiny_model(model_type)
    before, found = logits(model), calibrate(model, batches())
    plan = SmoothPlan.uniform(model, found, rule=rule)
    assert SmoothPlan.from_json(plan.to_json()) == plan
    assert all(group.rule == rule for group in plan.groups)
    norms = {g.name for g in smoothing_groups(model) if "norm" in g.name}
    planned = {group.name for group in plan.groups}
    assert norms <= planned
    assert (planned == norms) == (rule == "outlier_suppression")
    fold(model, plan, found, scheme=Scheme())
    # fp32 rounds each weight once more: a few hundred roundings of 2^-24 of values up to 10.
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)


def test_outlier_suppression_leaves_the_norm_without_a_weight() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    norm = model.model.layers[0].input_layernorm
    fold(model, SmoothPlan.uniform(model, found, rule="outlier_suppression"), found)
    torch.testing.assert_close(norm.weight.abs(), torch.ones(32))


def test_rules_look_at_the_calibrated_group() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    group = smoothing_groups(model)[1]  # v -> o: one key-value head for two query heads
    seen = group_statistics(model, group, found, Scheme())
    assert seen.norm_weight is None
    assert seen.act_absmax.shape == (24,)
    assert seen.widen(seen.act_absmax).shape == (48,)
    [sample] = seen.samples
    assert sample.weight.shape == (32, 48)
    assert sample.rows is found.rows[group.consumers[0]]
    weight = model.get_parameter(f"{group.consumers[0]}.weight").detach()
    expected = smoothing_scales(
        group.layout.narrow(found.absmax(group.consumers[0])),
        group.layout.narrow(weight.abs().amax(0)),
        DEFAULT_ALPHA,
    )
    [s] = plan_scales(model, SmoothPlan((GroupPlan(name=group.name),)), found).values()
    assert torch.equal(s, expected)
    spared = Scheme(ignore=("lm_head", "o_proj"))
    assert group_statistics(model, group, found, spared).samples == ()


def test_a_group_that_its_rule_cannot_smooth_is_named() -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches(), rows=0)
    name = "model.layers.0.mlp.up_proj"
    plan = SmoothPlan((GroupPlan(name=name, rule="outlier_suppression"),))
    with pytest.raises(SqCpuError, match=rf"group {name}: outlier_suppression takes the weight"):
        fold(model, plan, found)
    plan = SmoothPlan((GroupPlan(name=name, rule="aqas"),))
    with pytest.raises(SqCpuError, match=rf"group {name}: the output error needs a scheme"):
        fold(model, plan, found)
    with pytest.raises(SqCpuError, match=rf"group {name}: the calibration holds no sampled rows"):
        sq_cpu.quantize(model, found, plan, scheme="O3")
    with pytest.raises(SqCpuError, match="unknown rule 'awq'"):
        SmoothPlan.uniform(model, found, rule="awq")


def test_aqas_minimizes_the_error_of_what_the_plan_makes_of_the_layers() -> None:
    model = tiny_model("opt")
    found = calibrate(model, batches())
    plan = SmoothPlan.uniform(model, found, rule="aqas", hadamard=0)
    qkv = [f"model.decoder.layers.0.self_attn.{name}_proj" for name in "qkv"]
    o1, o3 = Scheme.of("O1"), Scheme.of("O3")

    def scale(scheme: Scheme, *layers: LayerPlan, clip: float = 1.0) -> Tensor:
        groups = tuple(replace(group, clip=clip) for group in plan.groups)
        scales = plan_scales(model, SmoothPlan(groups, layers), found, scheme=scheme)
        return next(s for group, s in scales.items() if set(group.consumers) == set(qkv))

    static = [LayerPlan(name=name, activations="static") for name in qkv]
    assert torch.equal(scale(o1, *static), scale(o3))
    o3 = replace(o3, static_range="minmax")  # of which the best alpha is not that of one layer
    in_float = [LayerPlan(name=name, in_float=True) for name in qkv[:2]]
    assert torch.equal(scale(o3, *in_float), scale(replace(o3, ignore=("q_proj", "k_proj"))))
    clipped = [LayerPlan(name=name, weight_clip=0.5) for name in qkv]
    others = [scale(o1), scale(o3, *in_float), scale(o3, *clipped), scale(o3, clip=0.5)]
    assert not any(torch.equal(scale(o3), other) for other in others)
