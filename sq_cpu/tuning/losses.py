"""What a search minimizes: losses of the errors that quantization makes in a linear's output.

A local loss looks at a uniform sample of the linear's rows alone; "kl" knows what the model makes
of an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear

__all__ = [
    "LOCAL_LOSSES",
    "LOSSES",
    "NEGLIGIBLE",
    "check_loss",
    "default_loss",
    "loss_of",
    "of_parts",
]

_KL = "kl"


def _kl(d: Tensor, gradient: Tensor, weights: Tensor) -> float:
    """E[(g . d)^2] / 2 summed over the rows: nats of KL divergence (see `calibration.gradients`).

    The sum over a row's outputs is exact but noisy; that of the squares alone, which neglects how
    errors of one row hang together, is not noisy: their mean is taken.
    """
    product = gradient.float() * d
    exact, diagonal = product.sum(dim=1).square(), product.square().sum(dim=1)
    return float((weights * (exact + diagonal)).sum(dtype=torch.float64)) / 4


def _nmse(y: Tensor, d: Tensor) -> float:
    """|d|^2 / |y|^2: the share of the output's energy."""
    return _energy(d) / max(_energy(y), 1e-30)


def _mse(_: Tensor, d: Tensor) -> float:
    """Mean of d^2."""
    return _energy(d) / max(1, d.numel())


def _aqas(_: Tensor, d: Tensor) -> float:
    """E|d|^2 of a row (AQAS, arXiv 2311.05161)."""
    return _energy(d) / max(1, len(d))


def _sqrt_abs(y: Tensor, d: Tensor) -> float:
    """Mean of sqrt(|d| / max|y of its row|): the loss of Neural Compressor's auto-alpha."""
    peak = y.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return float((d.abs() / peak).sqrt().mean(dtype=torch.float64)) if len(d) else 0.0


def _energy(values: Tensor) -> float:
    return float(values.double().square().sum())


LOCAL_LOSSES: Mapping[str, Callable[[Tensor, Tensor], float]] = {
    "nmse": _nmse,
    "mse": _mse,
    "aqas": _aqas,
    "sqrt_abs": _sqrt_abs,
}
"""Each takes y, what the output should be, and d, by how much it is off, [rows, out_features]."""

LOSSES = (_KL, *LOCAL_LOSSES)

NEGLIGIBLE: Mapping[str, float] = {_KL: 2e-4}
"""Below this, a change of one group's loss is not seen: in nats 0.02 % of a perplexity."""


def loss_of(loss: str, linear: FakeQuantizedLinear, tokens: int) -> float:
    """Return what a linear's output loses by quantization, on the calibration's rows of its input.

    "kl" is in nats for each of the `tokens` that all rows stand for: so losses of all linears add
    up. Raises `SqCpuError` where the calibration has no rows of the loss's kind.
    """
    sample = linear.sample
    if loss != _KL:
        return LOCAL_LOSSES[loss](sample.output, linear(sample.inputs()) - sample.output)
    y = linear(sample.gradient_inputs())
    assert sample.gradient is not None
    assert sample.gradient_weights is not None
    return _kl(y - sample.gradient_output, sample.gradient, sample.gradient_weights) / tokens


def of_parts(loss: str, values: Sequence[float]) -> float:
    """Return the loss of rows that were measured in parts."""
    return sum(values) if loss == _KL else sum(values) / len(values)


def default_loss(calibration: Calibration) -> str:
    """Return "kl" where the calibration has gradients, "nmse" otherwise."""
    return _KL if calibration.gradients else "nmse"


def check_loss(loss: str) -> None:
    """Raise `SqCpuError` unless `loss` is one of `LOSSES`."""
    if loss not in LOSSES:
        raise SqCpuError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
