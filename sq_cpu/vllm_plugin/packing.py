"""A linear's packed weight as a module of vLLM holds it, and the call that computes with it."""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.logger import init_logger

from sq_cpu.kernels import ops, torch_ops
from sq_cpu.kernels.runtime import isa
from sq_cpu.kernels.torch_ops import LinearSettings
from sq_cpu.nn.packed_weight import PackedWeight

__all__ = ["apply_packed", "drop", "pack_into"]

_log = init_logger("vllm.sq_cpu")

_NOTED = "sq_cpu_settings"
_PACKED = "sq_cpu_packed"
_INVERSE = "sq_cpu_inverse_smoothing"


def pack_into(
    layer: Any,
    weight: Tensor,
    scale: Tensor,
    settings: LinearSettings,
    smoothing: Tensor | None = None,
) -> None:
    """Pack a weight, int8 [N, K], its scales, [N], and the bias that `layer` adds itself.

    Parameters
    ----------
    layer : vLLM's linear; it gets buffers, as vLLM's compiler takes a module's for inputs
    settings : how the input is quantized
    smoothing : s, [in_features], which divides the input; None: it is folded or there is none

    Raises
    ------
    SqCpuError
        For a scale that is NaN or Inf.
    """
    bias = layer.bias if _adds_bias(layer) else None
    packed = PackedWeight.zeros(*weight.shape)
    packed.pack(weight.contiguous(), scale, None if bias is None else bias.detach())
    layer.register_buffer(_PACKED, packed.buffer, persistent=False)
    inverse = None if smoothing is None else ops.reciprocals(smoothing.float().contiguous())
    layer.register_buffer(_INVERSE, inverse, persistent=False)
    layer.sq_cpu_settings = settings
    _note(settings)
    layer.sq_cpu_rows = len(weight)
    layer.sq_cpu_has_bias = bias is not None
    _log.info_once("int8 linears are computed by sq_cpu, with %s", isa()["in_use"])


def apply_packed(layer: Any, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return y [..., N] of x [..., K], with the bias that vLLM hands to its kernels."""
    y = torch_ops.linear(
        x,
        layer.sq_cpu_packed,
        layer.sq_cpu_rows,
        layer.sq_cpu_inverse_smoothing,
        layer.sq_cpu_settings,
    )
    return y if bias is None or layer.sq_cpu_has_bias else y + bias


def _note(settings: LinearSettings) -> None:
    """Tell vLLM's cache of compiled models the numbers that a compiled graph holds.

    It knows a model by its path and config, in which static scales need not be.
    """
    config = get_current_vllm_config_or_none()
    if config is None or not isinstance(config.additional_config, dict):
        return
    known = f"{config.additional_config.get(_NOTED, '')} {settings}"
    config.additional_config[_NOTED] = hashlib.sha256(known.encode()).hexdigest()


def _adds_bias(layer: nn.Module) -> bool:
    """Say whether vLLM hands the bias to the kernel: of a layer whose input is split, one rank."""
    if getattr(layer, "bias", None) is None or getattr(layer, "skip_bias_add", False):
        return False
    return not hasattr(layer, "input_is_parallel") or bool(layer.tp_rank == 0)


def drop(layer: nn.Module, *names: str) -> None:
    """Free what is packed now."""
    for name in names:
        if name in layer._parameters:
            layer._parameters[name] = None
