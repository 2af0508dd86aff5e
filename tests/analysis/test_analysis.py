"""What int8 does to each layer: against the layers that `quantize` makes, and by definition."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import batches, inputs, tiny_model
from torch import nn
from tuning_cases import planted

import sq_cpu
from sq_cpu import (
    Analysis,
    Calibration,
    GroupPlan,
    LayerPlan,
    QuantLinear,
    Scheme,
    SmoothPlan,
    SqCpuError,
    analyze,
)
from sq_cpu.analysis.analysis import outlier_severity
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.smoothing.smooth import fold


def planted_plan(
    scheme: str | Scheme = "O3", clip: float = 1.0, alpha: float = 0.8
) -> tuple[Any, Calibration, SmoothPlan]:
    """Make a model with outliers, and a uniform plan that divides at run time."""
    model = planted("llama")
    calibration = sq_cpu.calibrate(model, batches(3))
    uniform = SmoothPlan.uniform(
        model, calibration, alpha, ignore=Scheme.of(scheme).ignore, hadamard=0
    )
    groups = tuple(replace(g, fold=False, clip=clip, note="so") for g in uniform.groups)
    return model, calibration, replace(uniform, groups=groups, scheme=Scheme.of(scheme))


@torch.no_grad()
def errors_of_layers(
    model: nn.Module, calibration: Calibration, plan: SmoothPlan
) -> dict[str, float]:
    """Return the normalized error of each layer that `quantize` makes, on the sampled rows."""
    quantized = planted("llama")
    sq_cpu.quantize(quantized, calibration, plan)
    found = {}
    for name, layer in quantized.named_modules():
        if isinstance(layer, QuantLinear):
            rows = calibration.rows[name]
            linear: Any = model.get_submodule(name)
            exact = linear(rows)
            without = exact if linear.bias is None else exact - linear.bias
            error = (layer(rows) - exact).double().square().sum()
            found[name] = float(error / without.double().square().sum())
    return found


@pytest.mark.parametrize("clip", [1.0, 0.7])
@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_errors_are_those_of_the_quantized_layers(scheme: str, clip: float) -> None:
    model, calibration, plan = planted_plan(scheme, clip)
    layers = (
        LayerPlan(name="model.layers.0.mlp.down_proj", activations="per_token"),
        LayerPlan(name="model.layers.1.self_attn.q_proj", weight_clip=0.8, note="clipped"),
    )
    plan = replace(plan, layers=layers)
    found = analyze(model, calibration, plan)
    planned = errors_of_layers(model, calibration, plan)
    naive = replace(plan, groups=(), layers=())
    unsmoothed = errors_of_layers(model, calibration, naive)
    assert {one.name for one in found.linears} == set(planned)
    for one in found.linears:
        # Sums of 32 to 48 products in fp32, in another order.
        assert one.error == pytest.approx(planned[one.name], rel=1e-3)
        assert one.error_naive == pytest.approx(unsmoothed[one.name], rel=1e-3)
    by_name = {one.name: one for one in found.linears}
    assert by_name["model.layers.0.mlp.down_proj"].activations == "per_token"
    assert by_name["model.layers.1.self_attn.q_proj"].note == "clipped"
    worst = max(found.groups, key=lambda group: group.severity)
    assert worst.error < 0.5 * worst.error_naive


def test_channels_are_divided_and_multiplied_by_s() -> None:
    model, calibration, plan = planted_plan()
    found = analyze(model, calibration, plan)
    groups = {group.name: group for group in smoothing_groups(model)}
    assert [group.name for group in found.groups] == [g.name for g in plan.groups]
    for group in found.groups:
        consumers = groups[group.name].consumers
        narrow = groups[group.name].layout.narrow
        absmax = narrow(calibration.absmax(consumers[0]))
        weights = [model.get_submodule(name).weight.detach().abs().amax(0) for name in consumers]
        assert torch.equal(group.act_absmax, absmax)
        assert torch.equal(group.weight_absmax, narrow(torch.stack(weights).amax(0)))
        s = group.act_absmax / group.act_absmax_smoothed
        torch.testing.assert_close(group.weight_absmax_smoothed, group.weight_absmax * s)
        assert (group.alpha, group.rule, group.fold, group.note) == (
            0.8,
            "smoothquant",
            False,
            "so",
        )
    norms = [group for group in found.groups if "norm" in group.name]
    assert all(group.severity > 20 > group.severity_smoothed for group in norms)


def test_outlier_severity() -> None:
    assert outlier_severity(torch.tensor([1.0, 2.0, 8.0])) == 4
    assert outlier_severity(torch.tensor([0.0, 0.0, 0.0, 1.0, 2.0, 8.0])) == 4  # none are dead
    assert outlier_severity(torch.zeros(3)) == 1


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_is_the_share_of_values_beyond_the_range(symmetric: bool) -> None:
    scheme = Scheme.of("O3", symmetric=symmetric, static_range="minmax")
    model, calibration, plan = planted_plan(scheme, clip=0.5)
    found = analyze(model, calibration, plan)
    for group, of_group in zip(smoothing_groups(model), found.groups, strict=False):
        s = group.layout.widen(of_group.act_absmax / of_group.act_absmax_smoothed)
        for one in of_group.linears:
            low, high = (end / s for end in calibration.channels(one.name))
            least, greatest = 0.5 * float(low.min()), 0.5 * float(high.max())
            if symmetric:
                greatest = max(-least, greatest)
                least = -greatest
            values = (calibration.rows[one.name] / s).flatten().tolist()
            beyond = sum(not least <= value <= greatest for value in values)
            assert one.clipped == pytest.approx(beyond / len(values), abs=1e-9)
            assert one.clipped > 0
            assert one.clipped_naive == 0  # min/max covers the sample
    dynamic = analyze(model, calibration, plan, scheme="O1")
    assert not any(one.clipped or one.clipped_naive for one in dynamic.linears)


@torch.no_grad()
@pytest.mark.parametrize("clip", [1.0, 0.3])
def test_rows_that_do_not_fit_are_those_that_the_layers_count(clip: float) -> None:
    scheme = Scheme.of("O3", static_range="minmax")
    model, calibration, plan = planted_plan(scheme, clip=clip)
    for rows in calibration.rows.values():
        rows[:5] *= 0.01  # far below the range
    found = {one.name: one for one in analyze(model, calibration, plan).linears}
    quantized = planted("llama")
    sq_cpu.quantize(quantized, calibration, plan)
    for name, one in found.items():
        quantized.get_submodule(name)(calibration.rows[name])
        counts = sq_cpu.row_counts(quantized)[name]
        assert (one.rows_clipped, one.rows_underflowed) == pytest.approx(
            (counts.clipped / counts.rows, counts.underflowed / counts.rows)
        )
        assert one.rows_underflowed >= 5 / counts.rows
        assert (one.rows_clipped > 0) == (clip < 1)
    dynamic = analyze(model, calibration, plan, scheme="O1")
    assert not any(one.rows_clipped or one.rows_underflowed for one in dynamic.linears)


def test_what_stays_in_float_is_measured_and_named() -> None:
    model, calibration, plan = planted_plan()
    both = ("model.layers.0.mlp.gate_proj", "model.layers.0.mlp.up_proj")
    layers = tuple(LayerPlan(name=name, in_float=True, note="sensitive") for name in both)
    found = analyze(model, calibration, replace(plan, layers=layers))
    assert found.kept == {"lm_head": "ignored", **dict.fromkeys(both, "sensitive")}
    as_int8 = {one.name: one for one in analyze(model, calibration, plan).linears}
    for one in found.linears:
        assert one.in_float == (one.name in both)
        assert one.error == as_int8[one.name].error
    in_float = [group.name for group in found.groups if group.in_float]
    assert in_float == ["model.layers.0.post_attention_layernorm"]


def test_only_what_is_planned_is_smoothed() -> None:
    model, calibration, plan = planted_plan()
    found = analyze(model, calibration, replace(plan, groups=plan.groups[:1]))
    assert [group.rule for group in found.groups] == ["smoothquant"] + [None] * 7
    for group in found.groups[1:]:
        assert group.error == group.error_naive
        assert group.alpha is None
        assert torch.equal(group.act_absmax, group.act_absmax_smoothed)


def test_curves_and_rules_of_the_plan() -> None:
    model, calibration, plan = planted_plan()
    curve = ((0.5, 2.0), (0.8, 1.0))
    first = replace(plan.groups[0], curve=curve)
    second = replace(plan.groups[1], rule="spiq")
    found = analyze(model, calibration, replace(plan, groups=(first, second)))
    assert found.groups[0].curve == curve
    assert (found.groups[1].rule, found.groups[1].alpha) == ("spiq", None)


def test_defaults_are_those_of_quantize() -> None:
    model, calibration, _ = planted_plan()
    found = analyze(model, calibration)
    assert found.scheme == Scheme()
    assert {group.alpha for group in found.groups} == {DEFAULT_ALPHA}
    planned = SmoothPlan.uniform(model, calibration, ignore=("lm_head",))
    assert same(found, analyze(model, calibration, planned, scheme="O1"))
    # The plan's own scheme, unless another is given.
    own = replace(planned, scheme=Scheme.of("O3"))
    assert analyze(model, calibration, own).scheme.activations == "static"
    assert analyze(model, calibration, own, scheme="O2").scheme.activations == "per_tensor"


def same(one: Analysis, other: Analysis) -> bool:
    return json.dumps(one.to_dict()) == json.dumps(other.to_dict())


def test_json_has_it_all() -> None:
    model, calibration, plan = planted_plan()
    found = analyze(model, calibration, plan)
    values = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert values["scheme"] == found.scheme.to_dict()
    assert values["tokens"] == 96
    assert values["sampled_rows"] == 64
    for stored, group in zip(values["groups"], found.groups, strict=True):
        assert stored["act_absmax_smoothed"] == group.act_absmax_smoothed.tolist()
        assert stored["error"] == group.error
        assert stored["severity"] == group.severity
        assert [one["name"] for one in stored["linears"]] == [one.name for one in group.linears]
    short = found.to_dict(channels=False)
    assert "act_absmax" not in short["groups"][0]
    assert short["groups"][0]["linears"][0]["shape"] == [48, 32]


def test_nothing_is_changed_and_all_is_deterministic() -> None:
    model, calibration, plan = planted_plan()
    before = {name: p.clone() for name, p in model.named_parameters()}
    assert same(analyze(model, calibration, plan), analyze(model, calibration, plan))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    sq_cpu.quantize(model, calibration, plan)  # and it still can be quantized


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("llama", ["q_proj, k_proj, v_proj", "o_proj", "gate_proj, up_proj", "down_proj"]),
        ("gpt2", ["c_attn", "attn.c_proj", "c_fc", "mlp.c_proj"]),
    ],
)
def test_kinds_are_short_and_blocks_are_counted(name: str, kinds: list[str]) -> None:
    model = tiny_model(name)
    found = analyze(model, sq_cpu.calibrate(model, inputs(name)))
    assert [group.kind for group in found.groups] == kinds * 2
    assert [group.depth for group in found.groups] == [0] * 4 + [1] * 4
    assert {one.depth for one in found.linears} == {0, 1}


@pytest.mark.parametrize("name", ["t5", "whisper", "clip", "mixtral", "deepseek_v3"])
def test_kinds_tell_different_layers_apart(name: str) -> None:
    model = tiny_model(name)
    calibration = sq_cpu.calibrate(model, inputs(name), ignore=())
    found = analyze(model, calibration, scheme=Scheme(ignore=()))
    by_kind: dict[str, set[str]] = {}
    for one in found.linears:
        plain = ".".join("*" if part.isdigit() else part for part in one.name.split("."))
        by_kind.setdefault(one.kind, set()).add(plain)
    assert all(len(names) == 1 for names in by_kind.values())
    assert len(set.union(*by_kind.values())) == len(by_kind)


def test_a_model_without_blocks() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    calibration = sq_cpu.calibrate(model, [torch.randn(5, 8)], ignore=())
    found = analyze(model, calibration, scheme=Scheme(ignore=()))
    assert [group.depth for group in found.groups] == [0, 1]
    assert {group.kind for group in found.groups} == {"linear"}


def test_unreached_linears_are_left_out() -> None:
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1)
    calibration = sq_cpu.calibrate(model, [torch.tensor([[5, 6]])])
    assert calibration.unreached
    for scheme in ("O1", "O3"):
        found = analyze(model, calibration, scheme=scheme)
        assert not set(calibration.unreached) & {one.name for one in found.linears}
        assert all("no calibration batch" in found.kept[name] for name in calibration.unreached)
    dynamic = analyze(model, calibration, scheme=Scheme(unreached="quantize"))
    assert not set(calibration.unreached) & set(dynamic.kept)


def test_bad_input() -> None:
    model = planted("llama")
    with pytest.raises(SqCpuError, match="no sampled rows: calibrate with rows=64"):
        analyze(model, sq_cpu.calibrate(model, batches(), rows=0))
    calibration = sq_cpu.calibrate(model, batches())
    other = SmoothPlan((GroupPlan(name="model.norm"),))
    with pytest.raises(SqCpuError, match=r"no smoothing group model.norm; plan for this very"):
        analyze(model, calibration, other)
    unknown = SmoothPlan((), layers=(LayerPlan(name="nowhere", in_float=True),))
    with pytest.raises(SqCpuError, match="an entry for nowhere"):
        analyze(model, calibration, unknown)
    with pytest.raises(SqCpuError, match="unknown scheme 'O9'"):
        analyze(model, calibration, scheme="O9")
    every = Scheme(ignore=("lm_head", *{n.rpartition(".")[2] for n in calibration.channel_min}))
    with pytest.raises(SqCpuError, match="nothing to analyze"):
        analyze(model, calibration, scheme=every)
    fold(model, SmoothPlan.uniform(model, calibration), calibration)
    with pytest.raises(SqCpuError, match="changed since the calibration: calibrate again"):
        analyze(model, calibration)
