"""How a layer quantizes its input, checked before the kernels are told."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core, ops
from sq_cpu.kernels.torch_ops import LinearSettings, linear_settings
from sq_cpu.scheme import Scheme

__all__ = ["layer_quantizer", "layer_settings", "own_copy"]


def layer_quantizer(
    scheme: Scheme,
    in_features: int,
    static: tuple[float, int] | None,
    smoothing: Tensor | None,
    hadamard: int,
) -> _core.ActivationQuantizer:
    """Return the kernels' quantizer of a layer.

    Parameters
    ----------
    static : (scale, zero point) of a static scheme's activations, from `static_code`
    smoothing : s, fp32 [in_features], or None
    hadamard : 64 where blocks of so many columns are rotated, else 0

    Raises
    ------
    SqCpuError
        For a scale, zero point, s or size of blocks that the scheme or the layer cannot have.
    """
    if static is not None:
        scale, zero_point = static
        fits = (
            zero_point == scheme.zero_point
            if scheme.symmetric
            else 0 <= zero_point <= scheme.levels
        )
        if not (0 < scale < math.inf and fits):
            raise SqCpuError(
                f"static input scale {scale:g} with zero point {zero_point} is not of this "
                "scheme: calibrate and quantize the model again"
            )
    if smoothing is not None and smoothing.shape != (in_features,):
        raise SqCpuError(
            f"the smoothing scale is {list(smoothing.shape)}, the layer needs [{in_features}]"
        )
    return ops.make_quantizer(
        scheme.activations,
        scheme.symmetric,
        scheme.qmax == 63,
        0.0 if static is None else static[0],
        0 if static is None else static[1],
        smoothing,
        hadamard,
        scheme.dynamic_fallback,
    )


def layer_settings(
    scheme: Scheme, static: tuple[float, int] | None, hadamard: int
) -> LinearSettings:
    """Return the same as `layer_quantizer` for the torch operator, which takes 1 / s beside it."""
    return linear_settings(
        scheme.activations,
        scheme.symmetric,
        scheme.qmax == 63,
        static,
        scheme.dynamic_fallback,
        hadamard,
    )


def own_copy(smoothing: Tensor) -> Tensor:
    """Return s as a layer keeps it, fp32 on the CPU."""
    # No tensor of inference mode, which autograd cannot save.
    with torch.inference_mode(False):
        return smoothing.detach().to("cpu", torch.float32, copy=True).contiguous()
