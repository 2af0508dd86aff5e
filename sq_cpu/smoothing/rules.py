"""Smoothing rules: how a group's statistics become its scale s.

`RULES` is the list of them; `smoothing_scale` applies one. Nothing here knows of models. All is
computed in fp32 or better, whatever the dtype of rows and weights.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.golden_section import argmin
from sq_cpu.smoothing.statistics import GroupStatistics, output_errors

__all__ = [
    "ALPHAS",
    "DEFAULT_ALPHA",
    "RULES",
    "check_rule",
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

DEFAULT_ALPHA = 0.8
"""Migration strength where nothing says otherwise: what SmoothQuant (arXiv 2211.10438) takes for
LLaMA. The 0.5 that it takes for OPT and BLOOM does no better on these (bench/results)."""

ALPHAS = tuple(step / 20 for step in range(21))
"""The grid on which the migration strength is searched."""


def smoothing_scales(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, eq. 4).

    `act_absmax` and `weight_absmax` are [in_features], >= 0 and finite; the weights' maximum is
    taken over all linears that share the input. The result is fp32 [in_features], positive and
    finite. A dead channel gets an s of the others: the greatest where its weights are zero, so that
    X / s is least there, and else, where its activations are, the median one.

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
    s = _bounded(x**alpha / w ** (1.0 - alpha), alive=(x > 0) & (w > 0))
    return torch.where(w > 0, s, s.amax()) if len(s) else s


def without_quiet(act_absmax: Tensor) -> Tensor:
    """Return the absmax of every channel, or 0.6 of the median channel's where that is more."""
    return torch.maximum(act_absmax, _QUIET * act_absmax.median())


def _smoothquant(statistics: GroupStatistics, alpha: float) -> Tensor:
    """Return eq. 4 of arXiv 2211.10438, but that quiet channels are not amplified."""
    act_absmax = without_quiet(statistics.act_absmax)
    return smoothing_scales(act_absmax, statistics.weight_absmax, alpha)


def _spiq(statistics: GroupStatistics, _: float) -> Tensor:
    """s_j = max|X_j| (SPIQ, arXiv 2203.14642): one activation scale per input channel.

    The paper's 1 / 127 is left out: a common factor changes no code, as the scales of weight and
    activation take it up.
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
    if not isinstance(rule, str) or rule not in RULES:
        raise SqCpuError(f"unknown rule {rule!r}; known are {', '.join(RULES)}")


def smoothing_scale(rule: str, statistics: GroupStatistics, alpha: float = DEFAULT_ALPHA) -> Tensor:
    """Return s of a group by a rule: fp32 [channels], positive and finite.

    Raises `SqCpuError` for an unknown rule, statistics that are NaN or Inf or of different shapes,
    alpha outside [0, 1] (smoothquant), a group without a norm before it (outlier_suppression), and
    a group without scheme, quantized linears or sampled rows (aqas).
    """
    check_rule(rule)
    return RULES[rule](statistics, alpha)


def _squared_error(statistics: GroupStatistics, s: Tensor) -> float:
    return float(output_errors(statistics, s)[0].sum())


def _finite(values: Tensor) -> Tensor:
    values = values.double()
    if not values.isfinite().all():
        raise SqCpuError("smoothing got an absmax that is NaN or Inf; check weights and batches")
    return values


def _bounded(s: Tensor, alive: Tensor) -> Tensor:
    """Return fp32 s within its limits where `alive`, and the median of these elsewhere.

    Any other constant might be far from them, and then take the range of X / s or of W s.
    """
    s = s.clamp(1.0 / _S_LIMIT, _S_LIMIT).float()
    typical = s[alive].median() if alive.any() else s.new_tensor(1.0)
    return torch.where(alive, s, typical)
