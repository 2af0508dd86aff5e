"""Static ranges: values worked out by hand, and clips against an exhaustive search."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_rows, row_fits, static_code
from sq_cpu.scheme import Scheme

GRIDS = list(itertools.product((True, False), (False, True)))


def scheme_of(kind: Any, percentile: float | None = None, **kwargs: Any) -> Scheme:
    # A range is chosen as if every row had it.
    fields = {"dynamic_fallback": False} | kwargs
    fields |= {} if percentile is None else {"percentile": percentile}
    return Scheme(activations="static", static_range=kind, **fields)


def range_of(scheme: Scheme, rows: Tensor, low: float, high: float) -> tuple[float, float]:
    """Give the range of rows [n, 2] whose calibrated extremes are in different channels."""
    return static_range(torch.tensor([low, 0.0]), torch.tensor([0.0, high]), rows, scheme)


def squared_error(rows: Tensor, scheme: Scheme, ends: tuple[float, float]) -> float:
    codes, scale, zero_point = quantize_rows(rows, scheme, static_code(scheme, *ends))
    decoded = (codes.double() - zero_point[:, None]) * scale[:, None].double()
    return float((decoded - rows.double()).square().sum())


def test_minmax_is_the_calibrated_range_and_needs_no_rows() -> None:
    low, high = torch.tensor([0.5, -1.0]), torch.tensor([3.0, 2.0])
    assert static_range(low, high, None, scheme_of("minmax")) == (-1.0, 3.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_auto_covers_19_of_20_rows_where_the_others_get_their_own_scale(symmetric: bool) -> None:
    scheme = scheme_of("auto", symmetric=symmetric, dynamic_fallback=True)
    # Row k reaches from -k to 3k in two channels; the calibration saw more than the sample.
    reach = torch.arange(1.0, 102.0)
    rows = torch.stack([-reach, 3 * reach, 0 * reach], dim=1)[torch.randperm(101)]
    ends = torch.tensor([-500.0, 0.0, 0.0]), torch.tensor([0.0, 900.0, 0.0])
    low, high = static_range(*ends, rows, scheme)
    # At 95 % of 101 rows; of an asymmetric scheme, at 97.5 % of either end.
    assert (low, high) == pytest.approx((-288, 288) if symmetric else (-98.5, 3 * 98.5))
    # Not beyond what was seen, as where rows in bf16 round up.
    assert static_range(*ends, 100 * rows, scheme) == (-500.0, 900.0)
    # And all of it where no row gets a scale of its own, or none was sampled.
    assert static_range(*ends, rows, scheme_of("auto", symmetric=symmetric)) == (-500.0, 900.0)
    for none in (None, rows[:0]):
        assert static_range(*ends, none, scheme) == (-500.0, 900.0)


@pytest.mark.parametrize("symmetric", [True, False])
def test_of_the_rows_that_auto_is_found_on_19_of_20_do_not_clip(symmetric: bool) -> None:
    scheme = scheme_of("auto", symmetric=symmetric, dynamic_fallback=True)
    rows = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    static = static_code(scheme, *static_range(rows.amin(0), rows.amax(0), rows, scheme))
    clips, underflows = row_fits(rows.amin(1), rows.amax(1), scheme, static)
    assert not underflows.any()
    # A value less than half a step beyond is rounded to the end.
    assert 0.8 * 0.05 < clips.float().mean() <= 0.05


@pytest.mark.parametrize(
    ("percentile", "low", "expected"),
    [
        (90.0, -200.0, (-90.0, 90.0)),  # place 90 of 0, 1, ... 99, 200
        (90.0, -50.0, (-50.0, 90.0)),  # no wider than the calibrated range
        (99.5, -200.0, (-149.5, 149.5)),  # halfway from 99 to the calibrated 200
        (100.0, -30.0, (-30.0, 200.0)),
    ],
)
def test_symmetric_percentiles(
    percentile: float, low: float, expected: tuple[float, float]
) -> None:
    magnitudes = torch.arange(100.0)
    # Every third one negative, where the calibrated range reaches that far.
    negative = (magnitudes % 3 == 0) & (magnitudes <= -low)
    rows = torch.where(negative, -magnitudes, magnitudes).reshape(50, 2)
    found = range_of(scheme_of("percentile", percentile), rows, low, 200.0)
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("percentile", "expected"),
    [
        (90.0, (-36.0, 54.0)),  # places 5 and 95 of -100, -40, -39, ... 58, 100
        (99.0, (-70.0, 79.0)),  # places .5 and 99.5
        (100.0, (-100.0, 100.0)),
    ],
)
def test_asymmetric_percentiles_cut_both_tails(
    percentile: float, expected: tuple[float, float]
) -> None:
    values = torch.arange(-40.0, 59.0)
    scheme = scheme_of("percentile", percentile, symmetric=False)
    rows = values.reshape(-1, 1)
    found = static_range(torch.tensor([-100.0]), torch.tensor([100.0]), rows, scheme)
    assert found == pytest.approx(expected)


def test_asymmetric_percentiles_hold_zero() -> None:
    scheme = scheme_of("percentile", 90.0, symmetric=False)
    rows = torch.arange(10.0, 110.0).reshape(50, 2)
    low, high = static_range(torch.tensor([10.0]), torch.tensor([109.0]), rows, scheme)
    assert low == 0.0
    assert 100 < high < 109
    low, high = static_range(torch.tensor([-109.0]), torch.tensor([-10.0]), -rows, scheme)
    assert -109 < low < -100
    assert high == 0.0


def test_mse_finds_the_grid_that_holds_every_value() -> None:
    # Integers up to the largest code, and a calibrated range twice as wide: half of it is exact.
    cases = (
        ({}, 0, 127, (0.0, 127.0)),
        ({"reduce_range": True}, -63, 63, (-63.0, 63.0)),
        ({"symmetric": False}, 0, 255, (0.0, 255.0)),
        ({"symmetric": False}, -100, 155, (-100.0, 155.0)),
        ({"symmetric": False, "reduce_range": True}, -127, 0, (-127.0, 0.0)),
    )
    for fields, first, last, expected in cases:
        rows = torch.arange(float(first), last + 1).reshape(-1, 1)
        ends = torch.tensor([2.0 * first]), torch.tensor([2.0 * last])
        scheme = scheme_of("mse", **fields)
        assert static_range(*ends, rows, scheme) == expected, fields
        assert squared_error(rows, scheme, expected) == 0.0


def test_mse_clips_one_value_where_the_others_gain_more() -> None:
    # n values spread evenly over many steps and one at M: the error is M^2 (1 - f)^2 for that one
    # and n (f M / 127)^2 / 12 for the others, least at f = 1 / (1 + n / (12 * 127^2)).
    n = 200_000
    rows = torch.cat([torch.linspace(-30, 30, n), torch.tensor([100.0])]).reshape(-1, 1)
    low, high = static_range(rows.amin(0), rows.amax(0), rows, scheme_of("mse"))
    # The loss is flat there, and rounding to a grid is not quite uniform noise: 2 %.
    assert high == pytest.approx(100 / (1 + n / (12 * 127**2)), rel=0.02)
    assert low == pytest.approx(-0.3 * high)


def test_mse_moves_the_ends_apart_where_the_grid_is_asymmetric() -> None:
    # As above with the range [-20, h] in 255 steps: (100 - h)^2 + n ((h + 20) / 255)^2 / 12 is
    # least at h = 75.5, while the lower end, where many values lie, stays.
    n = 200_000
    rows = torch.cat([torch.linspace(-20, 20, n), torch.tensor([100.0])]).reshape(-1, 1)
    scheme = scheme_of("mse", symmetric=False)
    low, high = static_range(rows.amin(0), rows.amax(0), rows, scheme)
    assert high == pytest.approx(75.5, rel=0.02)
    assert low == pytest.approx(-20, rel=0.02)


@pytest.mark.parametrize(("symmetric", "reduce_range"), GRIDS)
def test_mse_is_the_best_clip_and_never_worse_than_minmax(
    symmetric: bool, reduce_range: bool
) -> None:
    scheme = scheme_of("mse", symmetric=symmetric, reduce_range=reduce_range)
    generator = torch.Generator().manual_seed(0)
    for tail in (0.0, 1.0, 3.0):
        rows = torch.randn(64, 96, generator=generator)
        rows *= torch.exp(tail * torch.randn(96, generator=generator))
        least, greatest = float(rows.min()), float(rows.max())
        low, high = static_range(rows.amin(0), rows.amax(0), rows, scheme)
        assert least <= low <= 0 <= high <= greatest
        best = squared_error(rows, scheme, (low, high))
        # In fp32 a value midway between two codes may take the other one: 1e-5 of the error.
        assert best <= squared_error(rows, scheme, (least, greatest)) * (1 + 1e-5)
        clips = torch.linspace(0.02, 1, 100).tolist()
        exhaustive = min(squared_error(rows, scheme, (f * least, f * greatest)) for f in clips)
        assert best <= exhaustive * 1.01


@pytest.mark.parametrize("kind", ["percentile", "mse"])
@pytest.mark.parametrize(("symmetric", "reduce_range"), GRIDS)
def test_ranges_are_deterministic_within_minmax_and_of_any_dtype(
    kind: str, symmetric: bool, reduce_range: bool
) -> None:
    scheme = scheme_of(kind, symmetric=symmetric, reduce_range=reduce_range)
    torch.manual_seed(0)
    rows = (torch.randn(32, 48) ** 3).to(torch.bfloat16)
    # Calibrated on less than what was sampled: the rounding of bf16 rows divided by s does that.
    ends = rows.float().amin(0) * 0.9, rows.float().amax(0) * 0.9
    low, high = static_range(*ends, rows, scheme)
    assert ends[0].min() <= low < 0 < high <= ends[1].max()
    assert static_range(*ends, rows.float(), scheme) == (low, high)
    shuffled = rows[torch.randperm(32)]
    assert static_range(*ends, shuffled, scheme) == pytest.approx((low, high), rel=1e-6)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_an_input_of_zeros_has_an_empty_range(kind: str, symmetric: bool) -> None:
    zeros = torch.zeros(4, 3)
    assert static_range(zeros[0], zeros[0], zeros, scheme_of(kind, symmetric=symmetric)) == (0, 0)


@pytest.mark.parametrize("kind", ["percentile", "mse"])
@pytest.mark.parametrize("rows", [None, torch.empty(0, 2)])
def test_missing_rows_are_refused(kind: str, rows: Tensor | None) -> None:
    with pytest.raises(SqCpuError, match=f"'{kind}' needs sampled rows: calibrate with rows=64"):
        static_range(torch.zeros(2), torch.ones(2), rows, scheme_of(kind))
