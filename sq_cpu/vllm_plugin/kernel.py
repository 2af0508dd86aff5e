"""vLLM's int8 linears of compressed-tensors (W8A8) by our kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.model_executor.kernels.linear import (
    Int8ScaledMMLinearKernel,
    Int8ScaledMMLinearLayerConfig,
)
from vllm.platforms import current_platform

from sq_cpu.kernels.torch_ops import LinearSettings, linear_settings
from sq_cpu.vllm_plugin.packing import apply_packed, drop, pack_into

__all__ = ["SqCpuInt8LinearKernel"]

_POINT = 128  # what is added to codes in int8, to store them as u8


class SqCpuInt8LinearKernel(Int8ScaledMMLinearKernel):  # type: ignore[misc]
    """Static inputs keep their scale, which vLLM's AMX kernel takes anew from each row.

    Static grids have the codes -128 to 127, as in compressed-tensors; a dynamic symmetric one spans
    127 steps, as in vLLM.
    """

    @classmethod
    def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
        """Say where it runs."""
        return (True, None) if current_platform.is_cpu() else (False, "requires CPU.")

    @classmethod
    def can_implement(cls, c: Int8ScaledMMLinearLayerConfig) -> tuple[bool, str | None]:
        """Say which linears it computes: all that the format has."""
        return True, None

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the weight, and free what was loaded."""
        weight, scale, input_scale, input_point, _ = self._get_layer_params(layer)
        if self.config.is_channelwise:
            scales = scale.flatten()
        else:  # one of each of the linears that vLLM laid side by side
            widths = torch.tensor(layer.logical_widths)
            scales = scale.flatten().repeat_interleave(widths)
        settings = _settings(self.config, input_scale, input_point)
        pack_into(layer, weight.detach(), scales.detach(), settings)
        drop(layer, *self.layer_param_names)

    def apply_weights(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return y [..., N] of x [..., K]."""
        return apply_packed(layer, x, bias)


def _settings(
    config: Int8ScaledMMLinearLayerConfig, scale: Tensor | None, point: Tensor | None
) -> LinearSettings:
    if not config.is_static_input_scheme:
        return linear_settings("per_token", bool(config.input_symmetric))
    assert scale is not None  # vLLM makes it for such layers, and reads it
    zero_point = _POINT + (0 if point is None else int(point.flatten()[0]))
    # A symmetric grid from -128 is an asymmetric one with its point in the middle.
    return linear_settings("static", False, static=(float(scale.flatten()[0]), zero_point))
