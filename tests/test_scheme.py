"""Schemes: presets, validation, JSON, the integer grids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sq_cpu.errors import SqCpuError
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan


@pytest.mark.parametrize(
    ("name", "activations"), [("O1", "per_token"), ("O2", "per_tensor"), ("O3", "static")]
)
def test_presets_differ_in_activations_alone(name: str, activations: str) -> None:
    scheme = Scheme.of(name)
    assert scheme.activations == activations
    assert (scheme.weights, scheme.symmetric, scheme.reduce_range) == ("per_channel", True, False)
    assert scheme.ignore == ("lm_head",)
    assert scheme.name == name


def test_of_takes_a_scheme_and_overrides() -> None:
    scheme = Scheme(activations="static", symmetric=False)
    assert Scheme.of(scheme) is scheme or Scheme.of(scheme) == scheme
    assert Scheme.of("O3", symmetric=False) == scheme
    assert scheme.name == "custom"
    assert Scheme.of("O2", ignore=()).name == "O2"


@pytest.mark.parametrize(
    "fields",
    [
        {"weights": "per_tensor"},
        {"weights": "per_rows"},
        {"weights": "per_rows", "rows_per_scale": 128},
        {"static_range": "mse"},
        {"static_range": "percentile"},
        {"static_range": "percentile", "percentile": 99},
    ],
)
def test_every_other_field_makes_a_preset_custom(fields: dict[str, Any]) -> None:
    scheme = Scheme.of("O3", **fields)
    assert scheme.name == "custom"
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activations": "per_row"}, "activations='per_row' is not one of 'per_token'"),
        ({"weights": "per_row"}, "weights='per_row' is not one of"),
        ({"weights": "per_rows", "rows_per_scale": 0}, "=0 is not a positive integer"),
        ({"weights": "per_rows", "rows_per_scale": 8.0}, "=8.0 is not a positive integer"),
        ({"weights": "per_rows", "rows_per_scale": True}, "=True is not a positive integer"),
        ({"rows_per_scale": 32}, "rows_per_scale=32 has no effect on per_channel weights"),
        (
            {"static_range": "max"},
            "static_range='max' is not one of 'auto', 'minmax', 'percentile'",
        ),
        (
            {"static_range": "minmax"},
            "static_range='minmax' has no effect on per_token activations",
        ),
        ({"static_range": "mse"}, "static_range='mse' has no effect on per_token activations"),
        (
            {"activations": "per_tensor", "static_range": "percentile"},
            "static_range='percentile' has no effect on per_tensor activations",
        ),
        ({"percentile": 99.9}, r"percentile=99.9 has no effect on static_range='auto'"),
        (
            {"activations": "static", "static_range": "mse", "percentile": 99},
            "percentile=99 has no effect on static_range='mse'",
        ),
        ({"percentile": 50}, r"percentile=50 is not a number in \(50, 100\]"),
        ({"percentile": 100.1}, r"percentile=100.1 is not a number in \(50, 100\]"),
        ({"percentile": float("nan")}, "percentile=nan is not a number"),
        ({"percentile": "99"}, "percentile='99' is not a number"),
        ({"percentile": True}, "percentile=True is not a number"),
        ({"symmetric": 1}, "symmetric=1 is not one of True, False"),
        ({"reduce_range": "yes"}, "reduce_range='yes' is not one of"),
        ({"outlier_threshold": 0.0}, "outlier_threshold=0.0 is not a positive number"),
        ({"outlier_threshold": float("nan")}, "outlier_threshold=nan is not a positive number"),
        ({"outlier_threshold": float("inf")}, "outlier_threshold=inf is not a positive number"),
        ({"outlier_threshold": True}, "outlier_threshold=True is not a positive number"),
        ({"outlier_threshold": "6"}, "outlier_threshold='6' is not a positive number"),
        ({"outlier_threshold": 6, "symmetric": False}, "is for symmetric per_token"),
        ({"outlier_threshold": 6, "activations": "static"}, "is for symmetric per_token"),
        ({"outlier_threshold": 6, "activations": "per_tensor"}, "is for symmetric per_token"),
        ({"ignore": "lm_head"}, "ignore is a tuple of layer names"),
        ({"ignore": (1,)}, "ignore is a tuple of layer names"),
        ({"ignore": None}, "ignore is a tuple of layer names"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(SqCpuError, match=message) as caught:
        Scheme(**fields)
    assert "\n" not in str(caught.value)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SqCpuError, match="unknown scheme 'O4'; known are O1, O2, O3"):
        Scheme.of("O4")
    with pytest.raises(SqCpuError, match="must be one of O1, O2, O3 or a Scheme, not 3"):
        Scheme.of(3)  # type: ignore[arg-type]
    with pytest.raises(SqCpuError, match="no field 'bits'; the fields are activations"):
        Scheme.of("O1", bits=4)
    with pytest.raises(SqCpuError, match="no field 'codebook'"):
        Scheme.from_dict({"codebook": "int4"})


def test_json_round_trip() -> None:
    scheme = Scheme(activations="static", symmetric=False, reduce_range="auto", ignore=("a", "b.c"))
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_the_fields_of_the_first_checkpoints_are_enough() -> None:
    old = {
        "activations": "static",
        "weights": "per_channel",
        "symmetric": True,
        "reduce_range": False,
        "ignore": ["lm_head"],
    }
    # They quantized what no batch had reached, where they could, and by static scales alone.
    before = {"unreached": "quantize", "static_range": "minmax", "dynamic_fallback": False}
    assert Scheme.from_dict(old) == Scheme.of("O3", **before)
    assert Scheme.from_dict(old).name == "O3"
    assert Scheme.of("O3").to_dict() == old | {
        "rows_per_scale": 64,
        "static_range": "auto",
        "percentile": 99.99,
        "outlier_threshold": None,
        "unreached": "float",
        "dynamic_fallback": True,
    }
    assert Scheme.from_dict(Scheme.of("O3").to_dict()) == Scheme.of("O3")


@pytest.mark.parametrize("name", ["O1", "O2", "O3"])
def test_schemes_of_before_static_range_had_auto_keep_what_they_say(name: str) -> None:
    read = Scheme.from_dict(Scheme.of(name).to_dict() | {"static_range": "minmax"})
    assert read.name == name
    # min/max where it has an effect; the default's word for none where it has not.
    assert read.static_range == ("minmax" if name == "O3" else "auto")


def test_the_former_names_of_rows_per_scale_are_read_from_files_and_named_in_code() -> None:
    scheme = Scheme(weights="per_rows", rows_per_scale=5)
    former = scheme.to_dict() | {"weights": "per_group", "weight_group_rows": 5}
    del former["rows_per_scale"]
    assert Scheme.from_dict(former) == scheme
    assert SmoothPlan.from_dict({"groups": [], "scheme": former}).scheme == scheme
    before = Scheme(unreached="quantize", dynamic_fallback=False)
    assert Scheme.from_dict({"weight_group_rows": 64}) == before
    with pytest.raises(SqCpuError, match="'per_group' is now 'per_rows', with rows_per_scale"):
        Scheme(weights="per_group")  # type: ignore[arg-type]
    with pytest.raises(SqCpuError, match="weight_group_rows is now rows_per_scale"):
        Scheme.of("O1", weight_group_rows=5)
    with pytest.raises(SqCpuError, match="weight_group_rows is now rows_per_scale"):
        Scheme.from_dict({"weight_group_rows": 5, "rows_per_scale": 5})


def test_a_decomposition_is_no_preset_and_survives_json() -> None:
    scheme = Scheme.of("O1", outlier_threshold=6)
    assert scheme.name == "custom"
    assert type(scheme.outlier_threshold) is float
    assert Scheme.from_dict(json.loads(json.dumps(scheme.to_dict()))) == scheme


def test_auto_range_is_resolved_by_the_processor() -> None:
    auto = Scheme(reduce_range="auto")
    assert auto.resolve(has_vnni=True).reduce_range is False
    assert auto.resolve(has_vnni=False).reduce_range is True
    forced = Scheme(reduce_range=True)
    assert forced.resolve(has_vnni=True) is forced
    with pytest.raises(SqCpuError, match='reduce_range is "auto"; resolve'):
        _ = auto.qmax


def test_integer_grids() -> None:
    full, reduced = Scheme(), Scheme(reduce_range=True)
    assert (full.qmax, full.levels, full.zero_point) == (127, 255, 128)
    assert (reduced.qmax, reduced.levels, reduced.zero_point) == (63, 127, 64)
