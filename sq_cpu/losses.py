"""What a search minimizes: losses of the errors that quantization makes in a linear's output.

Each takes y, what the output should be, d, by how much it is off, the gradient of the model's loss
with respect to y, if known ([rows, out_features] all), and how many rows each stands for, [rows].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sq_cpu.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.rules import LinearSample

__all__ = ["LOSSES", "check_loss", "default_loss", "loss_of"]

_F64 = torch.float64


def _kl(_: Tensor, d: Tensor, gradient: Tensor | None, rows: Tensor) -> float:
    """E[(g . d)^2] / 2 summed over the rows: nats of KL divergence (see `sq_cpu.sensitivity`).

    The sum over a row's outputs is exact but noisy; that of the squares alone, which neglects how
    errors of one row hang together, is not noisy: their mean is taken.
    """
    if gradient is None:
        raise SqCpuError("the loss 'kl' needs gradients: calibrate with gradients=True")
    product = gradient.float() * d
    exact, diagonal = product.sum(dim=1).square(), product.square().sum(dim=1)
    return float((rows * (exact + diagonal)).sum(dtype=_F64)) / 4


def _nmse(y: Tensor, d: Tensor, _: Tensor | None, rows: Tensor) -> float:
    """|d|^2 / |y|^2: the share of the output's energy."""
    return _energy(d, rows) / max(_energy(y, rows), 1e-30)


def _mse(_: Tensor, d: Tensor, __: Tensor | None, rows: Tensor) -> float:
    """Mean of d^2."""
    return _energy(d, rows) / (float(rows.sum()) * d.shape[1])


def _aqas(_: Tensor, d: Tensor, __: Tensor | None, rows: Tensor) -> float:
    """E|d|^2 of a row (AQAS, arXiv 2311.05161)."""
    return _energy(d, rows) / float(rows.sum())


def _sqrt_abs(y: Tensor, d: Tensor, _: Tensor | None, rows: Tensor) -> float:
    """Mean of sqrt(|d| / max|y of its row|): the loss of Neural Compressor's auto-alpha."""
    peak = y.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    of_rows = (d.abs() / peak).sqrt().mean(dim=1)
    return float((rows * of_rows).sum(dtype=_F64) / rows.sum(dtype=_F64))


def _energy(values: Tensor, rows: Tensor) -> float:
    return float((rows * values.square().sum(dim=1)).sum(dtype=_F64))


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor | None, Tensor], float]] = {
    "kl": _kl,
    "nmse": _nmse,
    "mse": _mse,
    "aqas": _aqas,
    "sqrt_abs": _sqrt_abs,
}


def loss_of(loss: str, sample: LinearSample, y: Tensor) -> float:
    """Return the loss of y where a sample's `weighted_output` should be."""
    rows = sample.row_weights
    if rows is None:
        rows = torch.ones(len(y))
    expected = sample.weighted_output
    return LOSSES[loss](expected, y - expected, sample.gradient, rows)


def default_loss(calibration: Calibration) -> str:
    """Return "kl" where the calibration has gradients, "nmse" otherwise."""
    return "kl" if calibration.gradients else "nmse"


def check_loss(loss: str) -> None:
    """Raise `SqCpuError` unless `loss` is a key of `LOSSES`."""
    if loss not in LOSSES:
        raise SqCpuError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
