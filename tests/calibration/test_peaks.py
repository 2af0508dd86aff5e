"""The rows that reach farthest when rotated: their ends are a rotated input's range."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import sq_cpu
from sq_cpu import Calibration, SmoothPlan
from sq_cpu.kernels.hadamard import fwht64
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.scales import linear_sample


def calibrated(rows: int = 32) -> tuple[list[torch.Tensor], Calibration]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(100, 24))
    batches = [torch.randn(200, 100) * torch.logspace(-1, 1, 100) for _ in range(4)]
    batches[2][77, 5] = 400.0
    batches[0] *= 1.2
    return batches, sq_cpu.calibrate(model, batches, ignore=(), rows=rows)


def test_they_reach_as_far_as_any_row() -> None:
    batches, calibration = calibrated()
    peaks, every = calibration.peaks["0"], torch.cat(batches)
    assert peaks.shape == (32, 100)
    assert batches[2][77].tolist() in peaks.tolist()
    for alpha in (0.25, 0.5, 0.75):
        s = calibration.absmax("0") ** alpha
        reach, most = (fwht64(x / s).abs().max() for x in (peaks, every))
        assert 0.85 * most <= reach <= most
    assert calibrated(rows=0)[1].peaks == {}


@pytest.mark.parametrize(("count", "kept"), [(1, 16), (3, 48), (4, 64), (6, 64)])
def test_each_fold_has_a_quarter_of_them(count: int, kept: int) -> None:
    model = nn.Sequential(nn.Linear(100, 24))
    found = sq_cpu.calibrate(model, [torch.randn(200, 100)] * count, ignore=(), rows=64)
    assert len(found.peaks["0"]) == kept
    assert set(found.peak_folds["0"].bincount().tolist()) == {16}


def test_a_part_that_is_held_out_has_those_of_the_others() -> None:
    batches, calibration = calibrated()
    held = calibration.held_out(["0"])
    assert len(held) == 4
    for fold, part in enumerate(held):
        own = {tuple(row) for row in batches[fold].tolist()}
        assert own.isdisjoint(map(tuple, part.peaks["0"].tolist()))
    assert batches[2][77].tolist() in held[0].peaks["0"].tolist()


def test_a_static_range_covers_the_sample_too() -> None:
    _, calibration = calibrated()
    beyond = replace(calibration, peaks={"0": 0.1 * calibration.peaks["0"]})
    scheme = Scheme.of("O3", static_range="minmax")
    seen = linear_sample("0", torch.ones(24, 100), scheme, SmoothPlan(()), beyond)
    fake = FakeQuantizedLinear(seen, torch.ones(100), scheme, hadamard=64)
    reach = fwht64(calibration.rows["0"])
    assert fake.range == (float(reach.min()), float(reach.max()))
    for part in calibration.held_out(["0"]):  # is scored on its rows
        assert torch.equal(part.farthest("0"), part.peaks["0"])
        assert len(part.typical("0")) + len(part.rows["0"]) == len(calibration.rows["0"])
    assert replace(calibration, peaks={}).farthest("0") is None


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    _, calibration = calibrated()
    loaded = Calibration.load(calibration.save(tmp_path / "calibration"))
    assert torch.equal(loaded.peaks["0"], calibration.peaks["0"])
    assert torch.equal(loaded.peak_folds["0"], calibration.peak_folds["0"])
