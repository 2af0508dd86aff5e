"""A linear as if it was quantized, in plain torch and the numerics of the kernels.

For what looks at much and keeps little: the rules, the searches, the analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_rows, quantize_weight, static_code
from sq_cpu.scheme import Scheme

__all__ = [
    "LinearSample",
    "quantized_output",
    "quantized_rows",
    "quantized_weight",
    "smoothed_range",
]


@dataclass(frozen=True, eq=False)
class LinearSample:
    """What a search needs to know of one linear that will be quantized."""

    weight: Tensor
    """Floating point [out_features, in_features]; may be the model's own."""
    rows: Tensor | None
    """A sample of the linear's input, floating point [rows, in_features]; None if none was kept."""
    low: Tensor
    high: Tensor
    """Range of every input channel, fp32 [in_features] each."""
    scheme: Scheme | None = None
    """How it will be quantized, resolved; None: as its group."""
    gradient_rows: Tensor | None = None
    """Rows that are known with gradients, like `rows`; None: none are."""
    gradient: Tensor | None = None
    """Of the model's loss with respect to the output for each of them, [rows, out_features]."""
    gradient_weights: Tensor | None = None
    """How many rows each of them stands for, fp32."""
    weight_clip: float = 1.0
    """Fraction of a weight scale's absmax that the codes cover."""
    outliers: tuple[int, ...] = ()
    """Input channels that stay in float, beside those that reach the scheme's threshold."""
    name: str = ""
    """Its full name, for who asks for several."""

    @cached_property
    def output(self) -> Tensor:
        """What the float linear gives for `rows`, without bias: fp32 [rows, out_features]."""
        return self._output(self.inputs())

    @cached_property
    def gradient_output(self) -> Tensor:
        """What the float linear gives for `gradient_rows`, like `output`."""
        return self._output(self.gradient_inputs())

    def _output(self, x: Tensor) -> Tensor:
        return x @ self.weight.detach().float().T

    def inputs(self) -> Tensor:
        """Return `rows` in fp32; `SqCpuError` when there are none."""
        if self.rows is None or not len(self.rows):
            raise SqCpuError("the calibration holds no sampled rows: calibrate with rows=64")
        return self.rows.float()

    def gradient_inputs(self) -> Tensor:
        """Return `gradient_rows` in fp32; `SqCpuError` when none were looked for."""
        if self.gradient_rows is None:
            raise SqCpuError(
                f"the calibration holds no gradients of {self.name}: calibrate with "
                "gradient_rows=384, or, where the model runs without gradients, with 0"
            )
        return self.gradient_rows.float()


def quantized_output(
    x: Tensor, sample: LinearSample, s: Tensor, scheme: Scheme, clip: float = 1.0
) -> Tensor:
    """Return Q(X / s) Q(W s)^T of rows X in the kernels' numerics, fp32 [rows, out_features].

    `s` is fp32 [in_features], `clip` the share of its range that a static scale covers.
    """
    return quantized_rows(x, sample, s, scheme, clip) @ quantized_weight(sample, s, scheme).T


def quantized_rows(
    x: Tensor, sample: LinearSample, s: Tensor, scheme: Scheme, clip: float = 1.0
) -> Tensor:
    """Return Q(X / s) of rows X of the sample's linear, fp32; see `quantized_output`."""
    static = None
    if scheme.activations == "static":
        ends = smoothed_range(sample, s, scheme)
        static = static_code(scheme, *(clip * end for end in ends))
    x = x / s
    outliers = _outliers(sample, s, scheme)
    codes, row_scale, zero_point = quantize_rows(x.masked_fill(outliers, 0.0), scheme, static)
    return torch.where(outliers, x, (codes.float() - zero_point[:, None]) * row_scale[:, None])


def smoothed_range(sample: LinearSample, s: Tensor, scheme: Scheme) -> tuple[float, float]:
    """Return what `static_range` finds of X / s, for the channels that are quantized."""
    outliers = _outliers(sample, s, scheme)
    low, high = ((end / s).masked_fill(outliers, 0.0) for end in (sample.low, sample.high))
    rows = None if sample.rows is None else (sample.rows.float() / s).masked_fill(outliers, 0.0)
    return static_range(low, high, rows, scheme)


def quantized_weight(sample: LinearSample, s: Tensor, scheme: Scheme) -> Tensor:
    """Return Q(W s), fp32 [out_features, in_features]; see `quantized_output`."""
    weight = sample.weight.float() * s
    outliers = _outliers(sample, s, scheme)
    codes, scale = quantize_weight(
        weight.masked_fill(outliers, 0.0),
        scheme.weights,
        scheme.weight_group_rows,
        sample.weight_clip,
    )
    return torch.where(outliers, weight, codes.float() * scale[:, None])


def _outliers(sample: LinearSample, s: Tensor, scheme: Scheme) -> Tensor:
    """Return which channels of X / s and W s stay in float, bool [in_features]."""
    threshold = math.inf if scheme.outlier_threshold is None else scheme.outlier_threshold
    found = torch.maximum(-sample.low / s, sample.high / s) >= threshold
    found[list(sample.outliers)] = True
    return found
