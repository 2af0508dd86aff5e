"""Quantization that gradients pass through: fp32 in, what the codes stand for out.

Rounding counts as the identity, and saturation as what it is, so that a scale s has the gradient
of LSQ (arXiv 1902.08153, eq. 3): round(x / s) - x / s within the grid, and its end beyond.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sq_cpu.numerics.rounding import FLOOR, row_fits, shared_absmax, static_code
from sq_cpu.scheme import Scheme

__all__ = ["quantized_rows", "quantized_weight"]


def quantized_weight(weight: Tensor, scheme: Scheme, clip: float) -> Tensor:
    """Return what `quantize_weight` makes of a weight, fp32 [out_features, in_features]."""
    absmax = shared_absmax(weight.abs().amax(dim=1), scheme.weights, scheme.rows_per_scale)
    scale = (absmax * clip).clamp_min(FLOOR)[:, None] / 127
    return _round(weight / scale).clamp(-127, 127) * scale


def quantized_rows(x: Tensor, scheme: Scheme, ends: tuple[Tensor, Tensor] | None) -> Tensor:
    """Return what `quantize_rows` makes of finite rows, fp32 [rows, in_features].

    `ends` are the least and greatest value, fp32 [], that a static scale covers; None: dynamic.
    """
    low = x.amin(dim=1, keepdim=True).clamp_max(0)
    high = x.amax(dim=1, keepdim=True).clamp_min(0)
    if scheme.activations == "per_tensor" and len(x):
        low, high = low.min(), high.max()
    if ends is not None:
        least, greatest = ends[0].clamp_max(0), ends[1].clamp_min(0)
        static = static_code(scheme, float(least.detach()), float(greatest.detach()))
        clips, underflows = row_fits(low.detach(), high.detach(), scheme, static)
        own = (clips | underflows) & scheme.dynamic_fallback
        low, high = torch.where(own, low, least), torch.where(own, high, greatest)
    if not scheme.symmetric:
        scale = (high - low).clamp_min(FLOOR) / scheme.levels
        zero_point = torch.round(-low.detach() / scale.detach())
        q = torch.maximum(_round(x / scale), -zero_point)
        return torch.minimum(q, scheme.levels - zero_point) * scale
    scale = torch.maximum(-low, high).clamp_min(FLOOR) / scheme.qmax
    made = _round(x / scale).clamp(-scheme.qmax, scheme.qmax) * scale
    if scheme.terms == 1:
        return made
    finer = scale / (2 * scheme.qmax)
    return made + _round((x - made) / finer).clamp(-scheme.qmax, scheme.qmax) * finer


def _round(x: Tensor) -> Tensor:
    return x + (x.round() - x).detach()
