"""What a search minimizes: losses of the errors that quantization makes in a linear's output.

Each takes y, what the output should be, d, by how much it is off, and the gradient of the model's
loss with respect to y, if known; all are [rows, out_features]. The losses of several linears add
up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sq_cpu.calibration import Calibration
from sq_cpu.errors import SqCpuError

__all__ = ["LOSSES", "check_loss", "default_loss"]

_F64 = torch.float64


def _kl(_: Tensor, d: Tensor, gradient: Tensor | None) -> float:
    """E[(g . d)^2] / 2: nats of KL divergence per row (see `sq_cpu.sensitivity`).

    The sum over a row's outputs is exact but noisy; that of the squares alone, which neglects how
    errors of one row hang together, is not noisy: their mean is taken.
    """
    if gradient is None:
        raise SqCpuError("the loss 'kl' needs gradients: calibrate with gradients=True")
    product = gradient.float() * d
    exact = product.sum(dim=1).square().sum(dtype=_F64)
    return float(exact + product.square().sum(dtype=_F64)) / 4 / len(d)


def _nmse(y: Tensor, d: Tensor, _: Tensor | None) -> float:
    """|d|^2 / |y|^2: the share of the output's energy."""
    return float(_energy(d) / _energy(y).clamp_min(1e-30))


def _mse(_: Tensor, d: Tensor, __: Tensor | None) -> float:
    """Mean of d^2."""
    return float(_energy(d)) / d.numel()


def _aqas(_: Tensor, d: Tensor, __: Tensor | None) -> float:
    """E|d|^2 of a row (AQAS, arXiv 2311.05161)."""
    return float(_energy(d)) / len(d)


def _sqrt_abs(y: Tensor, d: Tensor, _: Tensor | None) -> float:
    """Mean of sqrt(|d| / max|y of its row|): the loss of Neural Compressor's auto-alpha."""
    peak = y.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    return float((d.abs() / peak).sqrt().mean(dtype=_F64))


def _energy(values: Tensor) -> Tensor:
    return values.double().square().sum()


LOSSES: Mapping[str, Callable[[Tensor, Tensor, Tensor | None], float]] = {
    "kl": _kl,
    "nmse": _nmse,
    "mse": _mse,
    "aqas": _aqas,
    "sqrt_abs": _sqrt_abs,
}


def default_loss(calibration: Calibration) -> str:
    """Return "kl" where the calibration has gradients, "nmse" otherwise."""
    return "kl" if calibration.gradients else "nmse"


def check_loss(loss: str) -> None:
    """Raise `SqCpuError` unless `loss` is a key of `LOSSES`."""
    if loss not in LOSSES:
        raise SqCpuError(f"unknown loss {loss!r}; known are {', '.join(LOSSES)}")
