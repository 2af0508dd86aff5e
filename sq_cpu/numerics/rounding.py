"""From floats to integer codes: weights, static activation ranges, and rows of activations.

Plain torch, rounding half to even; the kernels compute the same activation codes, bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.scheme import Scheme

__all__ = [
    "FLOOR",
    "quantize_rows",
    "quantize_weight",
    "row_fits",
    "shared_absmax",
    "static_code",
]

_ROWS = 256  # of a weight that are in fp32 at a time
FLOOR = 1e-30
"""Of an absolute maximum: keeps 127 / absmax finite."""


def quantize_weight(
    weight: Tensor,
    granularity: str = "per_channel",
    rows_per_scale: int = 64,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Quantize to int8, symmetric, rounding half to even.

    Parameters
    ----------
    weight : floating point [out_features, in_features]
    granularity : "per_channel" (one scale per row), "per_tensor" or "per_rows"
    rows_per_scale : consecutive rows that share a scale "per_rows"; the last ones may be fewer
    clip : fraction, in (0, 1], of a scale's absmax that the codes cover; what lies beyond saturates

    Returns
    -------
    codes int8 [out_features, in_features] in [-127, 127], and scales fp32 [out_features]

    Raises
    ------
    SqCpuError
        When the weight holds NaN or Inf, and for another granularity or clip.
    """
    if not 0 < clip <= 1:
        raise SqCpuError(f"the weight clip is {clip}; it lies in (0, 1]")
    weight = weight.detach()
    # No copies of the whole: in fp32, each would be twice a large bf16 weight.
    low, high = torch.aminmax(weight, dim=1) if weight.shape[1] else (weight.sum(1),) * 2
    absmax = shared_absmax(torch.maximum(-low, high).float(), granularity, rows_per_scale)
    if not torch.isfinite(absmax).all():
        raise SqCpuError("a weight holds NaN or Inf: quantize a sound checkpoint")
    scale = ((absmax.double() * clip).clamp_min(FLOOR) / 127).float()
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    for part, rows, by in zip(
        *(torch.split(t, _ROWS) for t in (codes, weight, scale)), strict=True
    ):
        part.copy_(torch.round(rows.float() / by[:, None]).clamp_(-127, 127))
    return codes, scale


def shared_absmax(absmax: Tensor, granularity: str, rows_per_scale: int) -> Tensor:
    """Return, from that of each row, the absmax that its scale covers, [out_features]."""
    sizes = {"per_channel": 1, "per_tensor": len(absmax), "per_rows": rows_per_scale}
    if granularity not in sizes:
        raise SqCpuError(f"weights are quantized {', '.join(sizes)}; not {granularity!r}")
    if sizes[granularity] == 1 or not len(absmax):
        return absmax
    groups = torch.split(absmax, sizes[granularity])
    return torch.cat([group.max().expand_as(group) for group in groups])


def static_code(scheme: Scheme, low: float, high: float) -> tuple[float, int]:
    """Return scale and zero point for activations within [low, high], extended to hold 0."""
    low, high = min(low, 0.0), max(high, 0.0)
    if scheme.symmetric:
        scale, zero_point = max(FLOOR, -low, high) / scheme.qmax, scheme.zero_point
    else:
        span = max(FLOOR, high - low)
        scale, zero_point = span / scheme.levels, round(-low * scheme.levels / span)
    return float(torch.tensor(scale, dtype=torch.float32, device="cpu")), zero_point


def row_fits(
    low: Tensor, high: Tensor, scheme: Scheme, static: tuple[float, int]
) -> tuple[Tensor, Tensor]:
    """Return which rows clip on a static grid and which underflow, bool [m] each.

    A row clips where a code would lie beyond the grid. It underflows where its codes span less
    than an eighth of it: the largest is below 16 of 128 (8 of 64), or of an asymmetric scheme, the
    distance of both ends' below 32 of 256 (16 of 128). A row of zeros does neither.

    Parameters
    ----------
    low, high : fp32 [m], each row's least and greatest value, extended to hold 0
    static : (scale, zero point), from `static_code`
    """
    scale, zero_point = static
    inverse = torch.tensor(1 / scale, dtype=torch.float32, device=low.device)
    zeros = (low == 0) & (high == 0)
    low, high = (torch.round(end.float() * inverse) for end in (low, high))
    smallest, largest = -zero_point, scheme.levels - zero_point
    if scheme.symmetric:
        smallest, largest = -scheme.qmax, scheme.qmax
    clips = (low < smallest) | (high > largest)
    span = 2 * torch.maximum(-low, high) if scheme.symmetric else high - low
    return clips, ~clips & ~zeros & (8 * span < scheme.levels + 1)


def quantize_rows(
    x: Tensor, scheme: Scheme, static: tuple[float, int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize activations as the kernels do.

    Parameters
    ----------
    x : fp32 [m, k]
    static : (scale, zero point) of a static scheme, from `static_code`; with
        `scheme.dynamic_fallback`, rows that do not fit it (`row_fits`) get their own

    Returns
    -------
    codes u8 [m, k], row scales fp32 [m] (NaN where a row is not finite), zero points int32 [m];
    a row stands for (codes - zero point) * scale. With activations "per_token_x2" there are two
    rows for each of x, [2m, k], which add up: the second has the codes of what the first leaves
    over, symmetric, of scale / 254 (126 with `reduce_range`).
    """
    finite = torch.isfinite(x).all(dim=1)
    clean = torch.where(finite[:, None], x, 0.0).double()
    low = clean.amin(dim=1).clamp_max(0) if x.shape[1] else clean.sum(dim=1)
    high = clean.amax(dim=1).clamp_min(0) if x.shape[1] else clean.sum(dim=1)
    if scheme.activations == "per_tensor" and len(x):
        low, high = low.min().expand_as(low), high.max().expand_as(high)
    scale, inverse, zero_point = _dynamic_grids(low, high, scheme)
    if static is not None:
        clips, underflows = row_fits(low, high, scheme, static)
        own = (clips | underflows) & scheme.dynamic_fallback
        scale = torch.where(own, scale, static[0])
        inverse = torch.where(own, inverse, 1 / static[0])
        zero_point = torch.where(own, zero_point, static[1])
    centre = zero_point[:, None]
    smallest = -centre if not scheme.symmetric else torch.full_like(centre, -scheme.qmax)
    largest = scheme.levels - centre if not scheme.symmetric else -smallest
    q = torch.round(clean.float() * inverse.float()[:, None]).double().clamp(smallest, largest)
    scale = scale.float()
    rows = [((q + centre).to(torch.uint8), scale, zero_point.to(torch.int32))]
    if scheme.terms == 2:
        rows.append(_residual_rows(clean - scale.double()[:, None] * q, scale, scheme))
    codes, scales, zero_points = (
        torch.stack(each, 1).flatten(0, 1) for each in zip(*rows, strict=True)
    )
    scales = scales.masked_fill(~finite.repeat_interleave(len(rows)), torch.nan)
    return codes, scales, zero_points


def _dynamic_grids(low: Tensor, high: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    """Return scale, its inverse and zero point of rows with these extremes, fp64 [m] each."""
    if scheme.symmetric:
        absmax = torch.maximum(-low, high).clamp_min(FLOOR)
        centre = torch.full_like(low, scheme.zero_point)
        return absmax / scheme.qmax, scheme.qmax / absmax, centre
    span = (high - low).clamp_min(FLOOR)
    centre = torch.round(-low * scheme.levels / span)
    return span / scheme.levels, scheme.levels / span, centre


def _residual_rows(left: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor]:
    # Exact until now, so that this is a fused multiply-add's one rounding.
    steps = 2 * scheme.qmax
    inverse = (steps / scale.double()).float()
    q = torch.round(left.float() * inverse[:, None]).clamp(-scheme.qmax, scheme.qmax)
    zero_point = torch.full_like(scale, scheme.zero_point, dtype=torch.int32)
    return (q + scheme.zero_point).to(torch.uint8), (scale.double() / steps).float(), zero_point
