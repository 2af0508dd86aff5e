"""Plans as values: what they refuse, their JSON, and whose scheme counts."""

from __future__ import annotations

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import batches, mixed_plan, tiny_model

from sq_cpu import GroupPlan, LayerPlan, Scheme, SmoothPlan, SqCpuError
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.smoothing.plan import scheme_of

O1, O3 = Scheme.of("O1"), Scheme.of("O3")


def test_plans_are_values(tmp_path: Path) -> None:
    model = tiny_model("llama")
    found = calibrate(model, batches())
    plan = SmoothPlan.uniform(model, found, alpha=0.75)
    assert len(plan.groups) == 8
    assert plan.groups[0] == GroupPlan(name="model.layers.0.input_layernorm", alpha=0.75)
    assert (plan.layers, plan.scheme) == ((), None)
    mixed = mixed_plan(model, found, Scheme(activations="static", ignore=("lm_head", "down_proj")))
    assert len(mixed.layers) == 10
    for given in (plan, mixed):
        assert SmoothPlan.from_json(given.to_json()) == given
        assert SmoothPlan.load(given.save(tmp_path / "plan.json")) == given


def test_json_says_what_is_not_the_default() -> None:
    curve = ((0.5, 1 / 3), (0.05, 2e-9), (1, 12345678))
    group = GroupPlan(name="a", alpha=0.25, clip=0.9, curve=curve)
    layers = LayerPlan(name="x", in_float=True, note="why"), LayerPlan(name="y", weight_clip=0.5)
    plan = SmoothPlan((group, GroupPlan(name="b")), layers, O3)
    assert plan.groups[0].curve == ((0.05, 2e-9), (0.5, 0.333333), (1.0, 12345700.0))
    default = {"rule": "smoothquant", "fold": True, "note": ""}
    assert json.loads(plan.to_json()) == {
        "groups": [
            {
                **{"name": "a", "alpha": 0.25, **default, "clip": 0.9},
                "curve": [[0.05, 2e-9], [0.5, 0.333333], [1.0, 12345700.0]],
            },
            {"name": "b", "alpha": 0.8, **default},
        ],
        "layers": [
            {"name": "x", "in_float": True, "note": "why"},
            {"name": "y", "weight_clip": 0.5},
        ],
        "scheme": O3.to_dict(),
    }
    assert '      "curve": [[0.05, 2e-09], [0.5, 0.333333], [1.0, 12345700.0]]\n' in plan.to_json()


def test_plans_of_older_versions_are_read() -> None:
    group = {"name": "a", "rule": "spiq", "alpha": 0.3, "fold": False, "note": "no row"}
    plan = SmoothPlan.from_dict({"groups": [group]})
    assert plan == SmoothPlan(
        (GroupPlan(name="a", rule="spiq", alpha=0.3, fold=False, note="no row"),)
    )
    assert plan.to_dict() == {"groups": [group]}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rule": "awq"}, "unknown rule 'awq'; known are smooth"),
        ({"alpha": 1.01}, r"alpha is 1.01; it lies in \[0, 1\]"),
        ({"fold": "no"}, "fold is 'no', not true or false"),
        ({"clip": 0}, r"clip is 0; it is a number in \(0, 2\]"),
        ({"clip": 2.01}, r"clip is 2.01; it is a number in \(0, 2\]"),
        ({"clip": True}, "clip is True, not a finite number"),
        ({"clip": "1"}, "clip is '1', not a finite number"),
        ({"clip": float("nan")}, "clip is nan, not a finite number"),
        ({"curve": [[0.5]]}, "curve has 1 items, not 2"),
        ({"curve": [["a", "b"]]}, "curve is 'a', not a finite number"),
        ({"curve": [[0.5, float("nan")]]}, "curve is nan, not a finite number"),
        ({"curve": 1}, "curve is 1, not a list"),
        ({"rule": "given"}, "scales go with the rule 'given': give both"),
        ({"scales": [1.0]}, "scales go with the rule 'given': give both"),
        ({"rule": "given", "scales": [1.0, 0]}, "scales hold 0; they and their reciprocals"),
        ({"rule": "given", "scales": [-1.0]}, "scales hold -1.0"),
        ({"rule": "given", "scales": [1e-320]}, "scales hold 1e-320"),
        ({"rule": "given", "scales": 1.0}, "scales is 1.0, not a list"),
    ],
)
def test_bad_groups_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=f"^group a: {message}") as caught:
        SmoothPlan.from_dict({"groups": [{"name": "a", **fields}]})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"in_float": 1}, "in_float is 1, not true or false"),
        ({"activations": "per_row"}, "activations is 'per_row', not one of 'per_token'"),
        ({"weight_clip": 0.0}, r"weight_clip is 0.0; it is a number in \(0, 1\]"),
        ({"weight_clip": 1.001}, r"weight_clip is 1.001; it is a number in \(0, 1\]"),
        ({"weight_clip": None}, "weight_clip is None, not a finite number"),
        (
            {"outliers": [3, 1]},
            r"outliers=\[3, 1\] is not a list of channels, each once",
        ),
        ({"outliers": [1, 1]}, r"outliers=\[1, 1\] is not a list"),
        ({"outliers": [-1]}, r"outliers=\[-1\] is not a list"),
        ({"outliers": [True]}, "outliers is True, not an integer"),
        ({"outliers": "01"}, "outliers is '01', not a list"),
        ({"outliers": 3}, "outliers is 3, not a list"),
        ({"in_float": True, "outliers": [3]}, "in_float leaves nothing to quantize"),
        ({"in_float": True, "activations": "static"}, "in_float leaves nothing to quantize"),
        ({"in_float": True, "weight_clip": 0.5}, "in_float leaves nothing to quantize"),
        ({"in_float": True, "smoothing": [1.0]}, "in_float leaves nothing to quantize"),
        ({"in_float": True, "input_range": [0, 1]}, "in_float leaves nothing to quantize"),
        ({"smoothing": [1.0, -1.0]}, "smoothing hold -1.0; they and their reciprocals"),
        ({"smoothing": [float("nan")]}, "smoothing is nan, not a finite number"),
        ({"input_range": [1.0, 1.0]}, r"input_range is \(1.0, 1.0\); it is \(least, greatest\)"),
        ({"input_range": [1.0]}, "input_range has 1 items, not 2"),
    ],
)
def test_bad_layers_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=f"^layer x: {message}") as caught:
        SmoothPlan.from_dict({"groups": [], "layers": [{"name": "x", **fields}]})
    assert "\n" not in str(caught.value)


def test_bad_plans_are_refused(tmp_path: Path) -> None:
    group, layer = GroupPlan(name="nowhere"), LayerPlan(name="x")
    with pytest.raises(SqCpuError, match="2 entries for group nowhere"):
        SmoothPlan((group, group))
    with pytest.raises(SqCpuError, match="2 entries for layer x; keep one"):
        SmoothPlan((), (layer, LayerPlan(name="x", in_float=True)))
    with pytest.raises(SqCpuError, match="the plan: scheme is 'O3', not a table"):
        SmoothPlan((), scheme="O3")  # type: ignore[arg-type]
    with pytest.raises(SqCpuError, match="scheme: no field 'bits'"):
        SmoothPlan.from_dict({"groups": [], "scheme": {"bits": 4}})
    with pytest.raises(SqCpuError, match="not JSON"):
        SmoothPlan.from_json("{")
    for text in (
        "[]",
        "{}",
        '{"groups": [{"beta": 1}]}',
        '{"groups": [], "layers": [{"name": "x", "bits": 4}]}',
        '{"groups": [], "layers": 1}',
        '{"groups": [], "blocks": []}',
    ):
        with pytest.raises(SqCpuError, match=r"^the plan"):
            SmoothPlan.from_json(text)
    with pytest.raises(SqCpuError, match="cannot read the smoothing plan"):
        SmoothPlan.load(tmp_path / "missing")


def test_the_scheme_of_a_layer() -> None:
    layers = (
        LayerPlan(name="static", activations="static"),
        LayerPlan(name="token", activations="per_token"),
        LayerPlan(name="clipped", weight_clip=0.5),
    )
    plan = SmoothPlan((), layers)
    base = Scheme(activations="static", static_range="percentile", percentile=99, symmetric=False)
    assert plan.layer_scheme(base, "token") == Scheme(symmetric=False)
    for name in ("static", "clipped", "other"):
        assert plan.layer_scheme(base, name) is base
    threshold = Scheme(outlier_threshold=6.0, weights="per_tensor")
    assert plan.layer_scheme(threshold, "token") is threshold
    expected = Scheme(activations="static", weights="per_tensor")
    assert plan.layer_scheme(threshold, "static") == expected
    assert plan.layer("other") == LayerPlan(name="other")


def test_what_needs_a_calibration() -> None:
    assert not SmoothPlan(()).needs_calibration(O1)
    assert SmoothPlan(()).needs_calibration(O3)
    assert SmoothPlan((GroupPlan(name="a"),)).needs_calibration(O1)
    assert SmoothPlan((), (LayerPlan(name="x", activations="static"),)).needs_calibration(O1)
    assert not SmoothPlan((), (LayerPlan(name="x", in_float=True),)).needs_calibration(O1)


def test_a_given_scheme_counts_before_that_of_the_plan() -> None:
    assert scheme_of(None, None) == scheme_of(None, SmoothPlan(())) == O1
    assert scheme_of(None, SmoothPlan((), scheme=O3)) == O3
    assert scheme_of("O2", SmoothPlan((), scheme=O3)) == Scheme.of("O2")


def test_why_linears_stay_in_float() -> None:
    layers = (
        LayerPlan(name="a", in_float=True, note="reverted"),
        LayerPlan(name="b", in_float=True),
        LayerPlan(name="c", note="not this one"),
    )
    expected = {"a": "reverted", "b": "the plan keeps it in float"}
    assert SmoothPlan((), layers).in_float == expected


def test_making_a_plan_keeps_no_frame_alive() -> None:
    """The float weights that a caller holds go when it ends, not when cycles are collected."""

    def caller() -> weakref.ref[Any]:
        weight = torch.ones(1)
        SmoothPlan((), (LayerPlan(name="lm_head"),)).layer("x")
        return weakref.ref(weight)

    gc.disable()
    try:
        assert caller()() is None
    finally:
        gc.enable()
