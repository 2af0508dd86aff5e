"""Smoothing rules: how a group's statistics become its scale s.

`RULES` is the list of them; `smoothing_scale` applies one. Nothing here knows of models. All is
computed in fp32 or better, whatever the dtype of rows and weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.golden_section import argmin
from sq_cpu.numerics.ranges import static_range
from sq_cpu.numerics.rounding import quantize_rows, quantize_weight, static_code
from sq_cpu.scheme import Scheme

__all__ = [
    "ALPHAS",
    "RULES",
    "GroupStatistics",
    "LinearSample",
    "check_rule",
    "output_deltas",
    "output_errors",
    "quantized_output",
    "quantized_rows",
    "quantized_weight",
    "smoothed_range",
    "smoothing_scale",
    "smoothing_scales",
    "without_quiet",
]

# Far beyond any useful s, and far within fp32: W * s and gamma / s stay finite.
_S_LIMIT = 2.0**30

# Of the median channel's absmax: what a quieter channel counts as. It is seldom quiet for ever, and
# a small s would multiply what it says one day. Perplexity at alpha 0.8 with and without this:
# Whisper base, calibrated on 300 decoder tokens, O2 1.69 and 40.5, O1 1.69 and 2.10 (float 1.62);
# SmolLM2, on 8192, O3 34.18 and 34.24, O1 33.22 and 33.35. Shares from 0.3 to 1 are much the same.
_QUIET = 0.6

ALPHAS = tuple(step / 20 for step in range(21))
"""The grid on which the migration strength is searched."""


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


@dataclass(frozen=True, eq=False)
class GroupStatistics:
    """What the rules may look at: a group of linears with one input X, before smoothing.

    Channels are those of the group's producer; `widen` repeats them to the linears' input
    channels, where grouped-query attention has fewer of the former.
    """

    act_absmax: Tensor
    """max|X_j|, fp32 [channels]."""
    weight_absmax: Tensor
    """max|W_j| over all linears of the group, fp32 [channels]."""
    norm_weight: Tensor | None = None
    """gamma of the norm that makes X, any offset added, fp32 [channels]; None without a norm."""
    samples: tuple[LinearSample, ...] = ()
    """The linears of the group that will be quantized."""
    scheme: Scheme | None = None
    """How they will be, resolved."""
    widen: Callable[[Tensor], Tensor] = lambda s: s
    """[channels] -> [in_features]."""
    clip: float = 1.0
    """Fraction of the found range that a static scale covers."""

    def quantized(self) -> Iterator[tuple[LinearSample, Scheme]]:
        """Yield each sample with its scheme; `SqCpuError` without a scheme or samples."""
        if self.scheme is None or not self.samples:
            raise SqCpuError(
                "the output error needs a scheme and linears that it quantizes: pass the scheme, "
                "and leave out groups that it ignores"
            )
        for sample in self.samples:
            yield sample, sample.scheme or self.scheme


def smoothing_scales(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, eq. 4).

    `act_absmax` and `weight_absmax` are [in_features], >= 0 and finite; the weights' maximum is
    taken over all linears that share the input. The result is fp32 [in_features], positive and
    finite. A dead channel, whose activations or weights are all zero, keeps s = 1.

    Raises `SqCpuError` on alpha outside [0, 1], on other shapes, and on NaN or Inf.
    """
    if not 0.0 <= alpha <= 1.0:
        raise SqCpuError(f"alpha is {alpha}; the migration strength lies in [0, 1]")
    if act_absmax.dim() != 1 or act_absmax.shape != weight_absmax.shape:
        raise SqCpuError(
            "smoothing needs one absmax per channel on both sides, not "
            f"{tuple(act_absmax.shape)} and {tuple(weight_absmax.shape)}"
        )
    x, w = _finite(act_absmax), _finite(weight_absmax)
    return _bounded(x**alpha / w ** (1.0 - alpha), alive=(x > 0) & (w > 0))


def without_quiet(act_absmax: Tensor) -> Tensor:
    """Return the absmax of every channel, or 0.6 of the median channel's where that is more."""
    return torch.maximum(act_absmax, _QUIET * act_absmax.median())


def _smoothquant(statistics: GroupStatistics, alpha: float) -> Tensor:
    """Return eq. 4 of arXiv 2211.10438, but that quiet channels are not amplified."""
    act_absmax = without_quiet(statistics.act_absmax)
    return smoothing_scales(act_absmax, statistics.weight_absmax, alpha)


def _spiq(statistics: GroupStatistics, _: float) -> Tensor:
    """s_j = max|X_j| (SPIQ, arXiv 2203.14642): one activation scale per input channel.

    The paper's 1 / 127 is left out. A common factor changes no code, as the scales of weight and
    activation take it up; but a dead channel keeps s = 1, and its weights would then be 127 times
    those of the others in the row's absmax.
    """
    x = _finite(statistics.act_absmax)
    return _bounded(x, alive=x > 0)


def _outlier_suppression(statistics: GroupStatistics, _: float) -> Tensor:
    """s_j = |gamma_j| (Outlier Suppression, arXiv 2209.13325, "gamma migration")."""
    if statistics.norm_weight is None:
        raise SqCpuError(
            "outlier_suppression takes the weight of the norm before, and there is none: plan "
            "another rule for this group, or leave it out"
        )
    gamma = _finite(statistics.norm_weight.abs())
    return _bounded(gamma, alive=gamma > 0)


def _aqas(statistics: GroupStatistics, _: float) -> Tensor:
    """argmin_s E|Q(W diag s) Q(diag(s)^-1 X) - W X|^2 (AQAS, arXiv 2311.05161).

    s is sought among those of SmoothQuant: alpha on a grid, then by golden section around the
    best. The expectation is over the sampled rows, the norm over all quantized linears.
    """

    def error(alpha: float) -> float:
        return _squared_error(statistics, _smoothquant(statistics, alpha))

    return _smoothquant(statistics, argmin(error, ALPHAS, steps=8))


RULES: Mapping[str, Callable[[GroupStatistics, float], Tensor]] = {
    "smoothquant": _smoothquant,
    "spiq": _spiq,
    "outlier_suppression": _outlier_suppression,
    "aqas": _aqas,
}
"""Each takes the statistics and alpha, which only smoothquant reads, and returns s."""


def check_rule(rule: str) -> None:
    """Raise `SqCpuError` unless `rule` is a key of `RULES`."""
    if rule not in RULES:
        raise SqCpuError(f"unknown rule {rule!r}; known are {', '.join(RULES)}")


def smoothing_scale(rule: str, statistics: GroupStatistics, alpha: float = 0.5) -> Tensor:
    """Return s of a group by a rule: fp32 [channels], positive and finite.

    Raises `SqCpuError` for an unknown rule, statistics that are NaN or Inf or of different shapes,
    alpha outside [0, 1] (smoothquant), a group without a norm before it (outlier_suppression), and
    a group without scheme, quantized linears or sampled rows (aqas).
    """
    check_rule(rule)
    return RULES[rule](statistics, alpha)


@torch.no_grad()
def output_errors(statistics: GroupStatistics, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the squares of what `output_deltas` yields, and of the outputs.

    They are |Q(X / s) Q(W s)^T - X W^T|^2 and |X W^T|^2 over the sampled rows, fp64 [samples] each.
    Raises as `output_deltas`.
    """
    pairs = [(delta, sample.output) for sample, delta in output_deltas(statistics, s)]
    errors, outputs = zip(*pairs, strict=True)
    return _squares(errors), _squares(outputs)


@torch.no_grad()
def output_deltas(statistics: GroupStatistics, s: Tensor) -> Iterator[tuple[LinearSample, Tensor]]:
    """Yield what smoothing by s and quantizing do to the outputs, in the kernels' numerics.

    Parameters
    ----------
    s : fp32 [channels]

    Yields
    ------
    each sample and Q(X / s) Q(W s)^T - X W^T over its rows, fp32 [rows, out_features]

    Raises
    ------
    SqCpuError
        When the statistics have no scheme, no linear that is quantized, or no sampled rows.
    """
    s = statistics.widen(s)
    for sample, scheme in statistics.quantized():
        y = quantized_output(sample.inputs(), sample, s, scheme, statistics.clip)
        yield sample, y - sample.output


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
        scheme.rows_per_scale,
        sample.weight_clip,
    )
    return torch.where(outliers, weight, codes.float() * scale[:, None])


def _outliers(sample: LinearSample, s: Tensor, scheme: Scheme) -> Tensor:
    """Return which channels of X / s and W s stay in float, bool [in_features]."""
    threshold = math.inf if scheme.outlier_threshold is None else scheme.outlier_threshold
    found = torch.maximum(-sample.low / s, sample.high / s) >= threshold
    found[list(sample.outliers)] = True
    return found


def _squared_error(statistics: GroupStatistics, s: Tensor) -> float:
    return float(output_errors(statistics, s)[0].sum())


def _squares(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.stack([tensor.double().square().sum() for tensor in tensors])


def _finite(values: Tensor) -> Tensor:
    values = values.double()
    if not values.isfinite().all():
        raise SqCpuError("smoothing got an absmax that is NaN or Inf; check weights and batches")
    return values


def _bounded(s: Tensor, alive: Tensor) -> Tensor:
    """Return fp32 s within its limits where `alive`, and 1 elsewhere."""
    return torch.where(alive, s.clamp(1.0 / _S_LIMIT, _S_LIMIT), 1.0).float()
