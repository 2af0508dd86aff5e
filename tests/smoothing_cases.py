"""A group of linears whose input has outliers, as a calibration knows it."""

from __future__ import annotations

import torch

from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.statistics import GroupStatistics

SCHEMES = [
    Scheme(),
    Scheme.of("O2", symmetric=False),
    Scheme.of("O3"),
    Scheme(weights="per_tensor"),
]


def sampled(scheme: Scheme, *, dtype: torch.dtype = torch.float32) -> GroupStatistics:
    """Give the statistics of linears whose shared input has two channels of outliers."""
    torch.manual_seed(0)
    x = torch.randn(40, 32)
    x[:, [3, 17]] *= 50
    weights = [(0.1 * torch.randn(24, 32)).to(dtype) for _ in range(2)]
    samples = tuple(LinearSample(w, x.to(dtype), x.amin(0), x.amax(0)) for w in weights)
    absmax = torch.cat(weights).abs().amax(0).float()
    return GroupStatistics(x.abs().amax(0), absmax, samples=samples, scheme=scheme)
