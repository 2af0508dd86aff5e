"""The range of a static activation scale: of most rows, min/max, a percentile, or of least error.

A range narrower than min/max clips the rare large values, or gives their rows scales of their own,
and rounds all the others more finely. `Scheme.static_range` chooses; all but min/max need the rows
that `calibrate` samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.golden_section import argmin
from sq_cpu.numerics.rounding import static_code
from sq_cpu.scheme import Scheme

__all__ = ["covered_range", "fits_rows", "static_range"]

_FITTING = 0.95
"""Share of the rows that a range of rows covers. SmolLM2 and Gemma 3 lose as little
with it as with 0.9, and more with 1; rows beyond cost a second quantization each."""

# Where one of n values is far beyond the rest, the best clip is at about 12 qmax^2 / n of it (its
# error against n * step^2 / 12): ten octaves suffice for 2e8 values on the 8-bit grid.
_FRACTIONS: tuple[float, ...] = tuple(2.0 ** (-step / 10) for step in range(101))
_GOLDEN_STEPS = 16  # a bracket of two grid steps, 14 %, shrinks to 0.006 %: less than a code


def static_range(
    low: Tensor, high: Tensor, rows: Tensor | None, scheme: Scheme
) -> tuple[float, float]:
    """Return the range of a linear's input that its static scale shall cover, for `static_code`.

    - auto: with `Scheme.dynamic_fallback`, what 95 % of the sampled rows lie within (of an
      asymmetric scheme, 97.5 % at either end): the others get scales of their own, and all min/max
      would do is to round 19 rows more coarsely for one. Without it, or without rows, minmax.
    - minmax: from the least to the greatest calibrated value.
    - percentile: the central `scheme.percentile` % of the sampled values (of a symmetric scheme:
      that share of their magnitudes), interpolated between neighbours. The calibrated extremes
      count as one value each, so that 100 % is min/max, whatever was sampled.
    - mse: the clip that minimizes the squared error of the quantized sample, by grid and
      golden-section search: a fraction of min/max (of an asymmetric scheme: the same for both
      ends, then one for each). It knows of outliers what was sampled: those of a few tokens in
      thousands want more than the 64 rows that `calibrate` keeps by default. Rows that would get
      their own scale (`Scheme.dynamic_fallback`) count as if they did not: a range that no row fits
      would be best otherwise.

    Parameters
    ----------
    low, high : fp32 [in_features]
        Calibrated range of every channel, divided by the smoothing scale if there is one.
    rows : floating point [n, in_features] or None
        Sampled input rows, divided likewise; auto and minmax do not need them.
    scheme : Scheme
        Resolved (its `reduce_range` is not "auto").

    Returns
    -------
    (min, max), never beyond the least and greatest calibrated value and 0

    Raises
    ------
    SqCpuError
        When rows are needed and there are none.
    """
    if scheme.static_range in ("auto", "minmax"):
        least_covered, greatest_covered = covered_range(low, high, rows, scheme)
        return float(least_covered), float(greatest_covered)
    if rows is None or not rows.numel():
        raise SqCpuError(
            f"static_range={scheme.static_range!r} needs sampled rows: calibrate with rows=64"
        )
    least, greatest = min(float(low.min()), 0.0), max(float(high.max()), 0.0)
    # A model's bf16 rows divided by s may round beyond the fp32 range.
    values = rows.detach().double().flatten().clamp(least, greatest)
    if scheme.static_range == "mse":
        return _least_error(values.sort().values, least, greatest, scheme)
    share = scheme.percentile / 100
    if scheme.symmetric:
        extreme = values.new_tensor([max(-least, greatest)])
        clip = _quantile(torch.cat([values.abs(), extreme]), share)
        return max(least, -clip), min(greatest, clip)
    values = torch.cat([values, values.new_tensor([least, greatest])])
    tail = (1 - share) / 2
    return min(_quantile(values, tail), 0.0), max(_quantile(values, 1 - tail), 0.0)


def fits_rows(scheme: Scheme) -> bool:
    """Tell whether a static range is what most rows fit, as the others get scales of their own.

    There is nothing to search then: a narrower one would cost no error, but time.
    """
    return scheme.static_range == "auto" and scheme.dynamic_fallback


def covered_range(
    low: Tensor, high: Tensor, rows: Tensor | None, scheme: Scheme
) -> tuple[Tensor, Tensor]:
    """Return what `static_range` does for "auto" and "minmax", as tensors [] with gradients."""
    least, greatest = low.min(), high.max()
    if not fits_rows(scheme) or rows is None or not rows.numel():
        return least, greatest
    low_end, high_end = _fitting(rows, scheme)
    return (
        torch.maximum(least.clamp_max(0), low_end),
        torch.minimum(greatest.clamp_min(0), high_end),
    )


def _fitting(rows: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Return what most rows lie within: one magnitude, or if asymmetric, either end by itself."""
    low, high = rows.float().amin(dim=1).clamp_max(0), rows.float().amax(dim=1).clamp_min(0)
    share = _FITTING
    if scheme.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    else:  # other rows may be beyond the one end than beyond the other
        share = (1 + _FITTING) / 2
    return torch.quantile(low, 1 - share), torch.quantile(high, share)


def _quantile(values: Tensor, share: float) -> float:
    """Return a quantile, linear between neighbours; torch.quantile takes 2^24 values at most."""
    place = share * (len(values) - 1)
    below = min(math.floor(place), len(values) - 2)
    first = float(values.kthvalue(below + 1).values)
    second = float(values.kthvalue(below + 2).values)
    return first + (place - below) * (second - first)


def _least_error(
    values: Tensor, least: float, greatest: float, scheme: Scheme
) -> tuple[float, float]:
    error = _squared_error(values, scheme)
    clip = argmin(lambda f: error(f * least, f * greatest), _FRACTIONS, _GOLDEN_STEPS)
    if scheme.symmetric:
        return clip * least, clip * greatest
    # The two ends share the codes, but outliers may be at one of them alone.
    grid = (clip, *_FRACTIONS)
    low = argmin(lambda f: error(f * least, clip * greatest), grid, _GOLDEN_STEPS)
    high = argmin(lambda f: error(low * least, f * greatest), grid, _GOLDEN_STEPS)
    return low * least, high * greatest


def _squared_error(values: Tensor, scheme: Scheme) -> Callable[[float, float], float]:
    """Return what gives the squared error of sorted fp64 values, quantized in a range.

    Sorted, the values of one code lie side by side: with q the code's value,
    sum (x - q)^2 = sum x^2 - 2 q sum x + n q^2, from running sums in the time of 256 look-ups.
    """
    squares = float(values.square().sum())
    sums = torch.cat([values.new_zeros(1), values.cumsum(0)])
    ends = sums.new_tensor([0, len(values)], dtype=torch.int64)

    def error(low: float, high: float) -> float:
        scale, zero_point = static_code(scheme, low, high)
        first, last = -zero_point, scheme.levels - zero_point
        if scheme.symmetric:
            first, last = -scheme.qmax, scheme.qmax
        codes = torch.arange(first, last + 1, dtype=torch.float64, device=values.device)
        grid = codes * scale
        inside = torch.searchsorted(values, (grid[:-1] + grid[1:]) / 2)
        edges = torch.cat([ends[:1], inside, ends[1:]])
        total, count = sums[edges].diff(), edges.diff()
        return squares + float((grid * (grid * count - 2 * total)).sum())

    return error
