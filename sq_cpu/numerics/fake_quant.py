"""A linear as if it was quantized, in plain torch and the numerics of the kernels.

For what looks at much and keeps little: the rules, the searches, the analysis. `quantize` takes the
range and the channels in float from here too, so that each is decided in one place.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.hadamard import rotated
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_rows, quantize_weight, row_fits, static_code
from sq_cpu.scheme import Scheme

__all__ = ["FakeQuantizedLinear", "LinearSample"]


@dataclass(frozen=True, eq=False)
class LinearSample:
    """What is known of one linear that will be quantized."""

    weight: Tensor
    """Floating point [out_features, in_features]; may be the model's own."""
    rows: Tensor | None
    """A sample of the linear's input, floating point [rows, in_features]; None if none was kept."""
    low: Tensor | None
    high: Tensor | None
    """Range of every input channel, fp32 [in_features] each; None where no input was seen."""
    scheme: Scheme | None = None
    """How it will be quantized, resolved; None: as its group."""
    gradient_rows: Tensor | None = None
    """Rows that are known with gradients, like `rows`; None: none are."""
    gradient: Tensor | None = None
    """Of the model's loss with respect to the output for each of them, [rows, out_features]."""
    gradient_weights: Tensor | None = None
    """How many rows each of them stands for, fp32."""
    range_rows: Tensor | None = None
    """Like `rows`: what a static range is found on (`Calibration.typical`); None: `rows`."""
    peaks: Tensor | None = None
    """Rows whose ends are the calibrated range of rotated rows (`Calibration.farthest`), like
    `rows`."""
    weight_clip: float = 1.0
    """Fraction of a weight scale's absmax that the codes cover."""
    outliers: tuple[int, ...] = ()
    """Input channels that stay in float, beside those that reach the scheme's threshold."""
    input_range: tuple[float, float] | None = None
    """What a static scale covers of X / s; None: what `static_range` finds."""
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
        return _product(x, self.weight.detach().float())

    def squared_output(self) -> Tensor:
        """Return |X W^T|^2 over `rows`, fp64."""
        return self.output.double().square().sum()

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


@dataclass(frozen=True, eq=False)
class FakeQuantizedLinear:
    """Q(X / s) Q(W s)^T of one linear, for any rows X; with `hadamard` of both times that matrix.

    What does not depend on the rows (range, codes of the weight) is found when first asked for, and
    kept.
    """

    sample: LinearSample
    s: Tensor
    """The smoothing scale, fp32 [in_features]."""
    scheme: Scheme
    """Resolved."""
    clip: float = 1.0
    """Fraction of the found range that a static scale covers."""
    hadamard: int = 0
    """Columns of a block that is rotated: 64 (`fwht64`), or less where the model's weights are
    (`GroupPlan.hadamard_fold`); 0: none."""

    @cached_property
    def outliers(self) -> Tensor:
        """Which channels of X / s and W s stay in float, bool [in_features]."""
        low, high = self.sample.low, self.sample.high
        found = torch.zeros_like(self.s, dtype=torch.bool)
        if self.scheme.outlier_threshold is not None and low is not None and high is not None:
            found = torch.maximum(-low / self.s, high / self.s) >= self.scheme.outlier_threshold
        found[list(self.sample.outliers)] = True
        return found

    @cached_property
    def _full_range(self) -> tuple[float, float]:
        """What is given, or `static_range` finds, before the clip."""
        if self.sample.input_range is not None:
            return self.sample.input_range
        low, high = self.channel_ends()
        return static_range(low, high, self.range_rows(), self.scheme)

    def range_rows(self) -> Tensor | None:
        """Return the rows that a static range is found on: fp32 [rows, columns of `coded`].

        Channels that stay in float or are unread are 0.
        """
        rows = self.sample.rows if self.sample.range_rows is None else self.sample.range_rows
        if rows is None:
            return None
        rows = self.coded(rows)
        return rows if self.hadamard else rows.masked_fill(self._unread, 0.0)

    def channel_ends(self) -> tuple[Tensor, Tensor]:
        """Return the range of what becomes codes: fp32 [columns of `coded`] each.

        Channels that stay in float or are unread have none. Raises as `range` does.
        """
        sample = self.sample
        if sample.low is None or sample.high is None:
            raise SqCpuError(f"no input of {sample.name} was seen: calibrate on other batches")
        low, high = sample.low / self.s, sample.high / self.s
        if not (low.isfinite().all() and high.isfinite().all()):
            raise SqCpuError(
                f"the calibrated range of {sample.name} is not finite: calibrate again, or ignore "
                "it"
            )
        if self.hadamard:
            if sample.peaks is None or not len(sample.peaks):
                raise SqCpuError(
                    f"the calibration holds no peaks of {sample.name}, whose static range is that "
                    "of rotated rows: calibrate again, with rows=64"
                )
            peaks = self.coded(sample.peaks)
            return peaks.amin(dim=0), peaks.amax(dim=0)
        left_out = self.outliers | self._unread
        return low.masked_fill(left_out, 0.0), high.masked_fill(left_out, 0.0)

    @property
    def _unread(self) -> Tensor:
        """Which channels no weight reads, so that they may saturate; none if that is all."""
        low, high = torch.aminmax(self.sample.weight.detach(), dim=0)
        unread = (low == 0) & (high == 0)
        return unread & ~unread.all()

    @property
    def range(self) -> tuple[float, float]:
        """What a static scale covers of X / s, without channels that stay in float or are unread.

        Raises `SqCpuError` where no input was seen, where its range is not finite, and where the
        scheme's range needs rows that are not there.
        """
        low, high = self._full_range
        return self.clip * low, self.clip * high

    @cached_property
    def weight(self) -> Tensor:
        """Q(W s), fp32 [out_features, columns of `quantize`]."""
        codes, scale = quantize_weight(
            self.coded_weight(),
            self.scheme.weights,
            self.scheme.rows_per_scale,
            self.sample.weight_clip,
        )
        return self._beside(codes.float() * scale[:, None], self._smoothed_weight())

    def coded_weight(self) -> Tensor:
        """Return what becomes codes of the weight, fp32 [out_features, columns of `coded`]."""
        rest = self._smoothed_weight().masked_fill(self.outliers, 0.0)
        return rotated(rest, self.hadamard) if self.hadamard else rest

    def _smoothed_weight(self) -> Tensor:
        return self.sample.weight.detach().float() * self.s

    def with_clip(self, clip: float) -> FakeQuantizedLinear:
        """Return this linear with another clip; what does not depend on it is shared."""
        other = replace(self, clip=clip)
        vars(other).update(outliers=self.outliers, weight=self.weight)
        if self.scheme.activations == "static":
            vars(other).update(_full_range=self._full_range)
        return other

    def coded(self, rows: Tensor) -> Tensor:
        """Return what becomes codes of rows X: X / s, 0 in the channels that stay in float; fp32.

        With `hadamard` it is rotated, and padded to whole blocks.
        """
        smoothed = (rows.float() / self.s).masked_fill(self.outliers, 0.0)
        return rotated(smoothed, self.hadamard) if self.hadamard else smoothed

    @property
    def static(self) -> tuple[float, int] | None:
        """Scale and zero point of a static scheme's activations."""
        static = self.scheme.activations == "static"
        return static_code(self.scheme, *self.range) if static else None

    def row_fits(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return which of rows X clip and which underflow, bool [rows] each.

        With `Scheme.dynamic_fallback` these have their own scale; where scales are dynamic, none
        does either.
        """
        static = self.static
        if static is None:
            return (rows.new_zeros(len(rows), dtype=torch.bool),) * 2
        low, high = torch.aminmax(self.coded(rows), dim=1)
        return row_fits(low.clamp_max(0), high.clamp_min(0), self.scheme, static)

    def quantize(self, rows: Tensor) -> Tensor:
        """Return Q(X / s) of rows X, fp32, and then the channels that stay in float."""
        static = self.static
        codes, row_scale, zero_point = quantize_rows(self.coded(rows), self.scheme, static)
        made = (codes.float() - zero_point[:, None]) * row_scale[:, None]
        made = made.view(len(rows), self.scheme.terms, codes.shape[1]).sum(dim=1)
        return self._beside(made, rows.float() / self.s)

    def _beside(self, quantized: Tensor, exact: Tensor) -> Tensor:
        if not self.outliers.any():
            return quantized
        return torch.cat([quantized, exact[:, self.outliers]], dim=1)

    def __call__(self, rows: Tensor) -> Tensor:
        """Return the output for rows X, without bias: fp32 [rows, out_features]."""
        return _product(self.quantize(rows), self.weight)

    def squared_error(self) -> Tensor:
        """Return |Q(X / s) Q(W s)^T - X W^T|^2 over the sample's rows, fp64."""
        error = self(self.sample.inputs()) - self.sample.output
        return error.double().square().sum()


def _product(x: Tensor, weight: Tensor) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        return x @ weight.T
