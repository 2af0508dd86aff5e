"""Rows that do not fit a static scale: their share in calibration, and while the model runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from quantize_cases import calibrated
from tiny import batches, change_config, tiny_model

import sq_cpu
from sq_cpu import Drift, Scheme, SmoothPlan, SqCpuError, drift
from sq_cpu.numerics.rounding import row_fits
from sq_cpu.smoothing.plan import LayerPlan

Q_PROJ = "model.layers.0.self_attn.q_proj"
DOWN = "model.layers.1.mlp.down_proj"


def clipping(*layers: LayerPlan) -> tuple[Any, sq_cpu.Calibration, SmoothPlan]:
    """A static model whose scales cover half of what calibration saw."""
    model, calibration = calibrated("llama")
    plan = SmoothPlan.uniform(model, calibration)
    groups = tuple(replace(group, clip=0.5) for group in plan.groups)
    plan = replace(plan, groups=groups, layers=layers)
    return sq_cpu.quantize(model, calibration, plan, scheme="O3"), calibration, plan


def test_the_record_has_what_the_analysis_finds() -> None:
    layers = (
        LayerPlan(name=DOWN, outliers=(3,)),
        LayerPlan(name=DOWN.replace("1", "0"), activations="per_token"),
    )
    model, calibration, plan = clipping(*layers)
    found = sq_cpu.analyze(tiny_model("llama"), calibration, plan, scheme="O3")
    static = [each for each in found.linears if each.activations == "static"]
    misfits = model.sq_cpu_config.misfits
    assert len(misfits) == len(model.sq_cpu_config.layers) - 1
    assert misfits == {e.name: e.rows_clipped + e.rows_underflowed for e in static}
    assert 0 <= min(misfits.values()) < max(misfits.values())


def test_rows_of_a_naive_model_are_counted_as_in_calibration() -> None:
    """Nothing is folded: the sampled rows are what reaches the layers."""
    model, calibration = calibrated("llama")
    sq_cpu.quantize(model, calibration, scheme="O3", smooth=False)
    scheme = model.sq_cpu_config.scheme
    for name, share in model.sq_cpu_config.misfits.items():
        rows, layer = calibration.rows[name], model.get_submodule(name)
        low, high = torch.aminmax(rows, dim=1)
        fits = row_fits(low.clamp_max(0), high.clamp_min(0), scheme, layer.static)
        assert share == float((fits[0] | fits[1]).double().mean())
        drift(model, reset=True)
        layer(rows)
        found = drift(model)[name]
        assert found == Drift(len(rows), round(share * len(rows)), share, 1 / 16)


def test_rows_that_underflow_are_misfits_too() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 4))
    rows = torch.ones(40, 8)
    rows[3] = 100.0  # sets the scale, of which the others use less than an eighth
    rows[7] = 0.0
    calibration = sq_cpu.calibrate(model, [rows])
    scheme = Scheme.of("O3", ignore=(), static_range="minmax")
    sq_cpu.quantize(model, calibration, scheme=scheme, smooth=False)
    assert model.sq_cpu_config.misfits == {"0": 38 / 40}
    model(rows)
    assert drift(model) == {"0": Drift(40, 38, 38 / 40)}


def test_no_rows_no_shares(tmp_path: Path) -> None:
    model = tiny_model("llama")
    seen = sq_cpu.calibrate(model, batches(), rows=0)
    sq_cpu.quantize(model, seen, scheme="O3", smooth=False)
    assert model.sq_cpu_config.misfits == {}
    assert (
        "misfits"
        not in json.loads((sq_cpu.save(model, tmp_path / "out") / "config.json").read_text())[
            "quantization_config"
        ]
    )
    with torch.no_grad():
        model.get_submodule(Q_PROJ)(torch.full((300, 32), 1e4))
    found = drift(model)[Q_PROJ]
    assert (found.share, found.calibrated, found.drifts) == (1.0, None, False)


def test_saved_and_of_before(tmp_path: Path) -> None:
    model, _, _ = clipping()
    folder = sq_cpu.save(model, tmp_path / "out")
    record = sq_cpu.load(folder).sq_cpu_config
    assert record == model.sq_cpu_config
    assert any(record.misfits.values())

    def former(config: dict[str, Any]) -> None:
        del config["quantization_config"]["misfits"]
        config["quantization_config"].update(format_version=8)

    change_config(folder, former)
    assert sq_cpu.load(folder).sq_cpu_config == replace(model.sq_cpu_config, misfits={})


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_text_of_another_kind_drifts(fused: bool) -> None:
    model, calibration = calibrated("llama")
    sq_cpu.quantize(model, calibration, scheme="O3")
    if fused:
        sq_cpu.fuse(model)
        drift(model, reset=True)  # what fusing ran to prove itself
    for ids in batches() * 4:
        model(ids)
    found = drift(model, reset=True)
    assert found.keys() == model.sq_cpu_config.misfits.keys()
    assert found[DOWN].rows == 4 * sum(ids.numel() for ids in batches()) >= 256
    assert not any(each.drifts for each in found.values())
    assert {each.rows for each in drift(model).values()} == {0}
    layer = model.get_submodule(DOWN)
    layer(torch.full((256, layer.in_features), 1e4))
    assert [name for name, each in drift(model).items() if each.drifts] == [DOWN]


def test_what_counts_as_drift() -> None:
    assert Drift(256, 17, 0.0).drifts
    assert not Drift(256, 16, 0.0).drifts  # 4 / 64, and 0 may be 1 / 64
    assert not Drift(255, 255, 0.0).drifts
    assert Drift(1000, 401, 0.1).drifts
    assert not Drift(1000, 400, 0.1).drifts
    assert not Drift(1000, 1000, 0.25).drifts
    assert not Drift(1000, 1000, None).drifts
    assert Drift(0, 0, 0.5).share == 0.0
    assert Drift(1300, 9, 0.1).since(Drift(300, 4, 0.1)) == Drift(1000, 5, 0.1)
    assert Drift(500, 100, 0.0).to_dict() == {
        "rows": 500, "misfits": 100, "calibrated": 0.0, "least": 1 / 64, "share": 0.2,
        "drifts": True,
    }  # fmt: skip


@pytest.mark.parametrize("static_range", ["auto", "minmax"])
def test_what_the_range_leaves_out_is_no_drift(static_range: str) -> None:
    model, calibration = calibrated("llama")
    scheme = Scheme.of("O3", static_range=static_range)
    sq_cpu.quantize(model, calibration, scheme=scheme, smooth=False)
    model.sq_cpu_config = replace(model.sq_cpu_config, misfits={DOWN: 2 / 64})
    layer = model.get_submodule(DOWN)
    fitting = torch.full((1, layer.in_features), layer.static[0] * 100)

    def drifts(share: int) -> bool:
        drift(model, reset=True)
        layer(torch.cat([fitting.expand(1000 - share, -1), 1e4 * fitting.expand(share, -1)]))
        found = drift(model)[DOWN]
        assert found.misfits == share
        assert found.since(found) == replace(found, rows=0, misfits=0)
        return found.drifts

    # One in 20 by itself; of 64 rows, the calibration's share may be half of that by chance.
    assert drifts(126) is (static_range == "minmax")
    assert drifts(251)


def test_a_decomposed_layer_has_its_own_name() -> None:
    model, _, _ = clipping(LayerPlan(name=DOWN, outliers=(3,)))
    assert DOWN in drift(model)
    assert drift(model)[DOWN].calibrated == model.sq_cpu_config.misfits[DOWN]
    assert f"{DOWN}.regular" not in drift(model)


def test_models_without_static_layers_or_a_record() -> None:
    model = tiny_model("llama")
    with pytest.raises(SqCpuError, match="is not quantized: call sq_cpu"):
        drift(model)
    assert drift(sq_cpu.quantize(model, smooth=False)) == {}
