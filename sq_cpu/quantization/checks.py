"""What `quantize` refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.models.checks import additions, check_weights
from sq_cpu.models.linears import is_ignored
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = [
    "check_calibration",
    "check_layers",
    "check_linears",
    "check_quantizes",
    "check_reached",
    "check_replaceable",
]


def check_quantizes(linears: Collection[str], kept: Mapping[str, str]) -> None:
    """Raise `SqCpuError` where no linear is left to quantize."""
    if not linears:
        first = next((f": {name}, {why}" for name, why in kept.items() if why != "ignored"), "")
        raise SqCpuError(
            "nothing to quantize: the model has no Linear that is not ignored or kept in float"
            + first
        )


def check_reached(any_reached: bool) -> None:
    """Raise `SqCpuError` where the calibration reached none of the linears to quantize."""
    if not any_reached:
        raise SqCpuError("no calibration batch reached any linear: calibrate on other batches")


def check_linears(linears: Mapping[str, nn.Linear]) -> None:
    """Raise `SqCpuError` for linears that int8 kernels cannot run."""
    if "" in linears:
        raise SqCpuError(
            "the model is itself a Linear, which cannot be replaced in place; "
            "use QuantLinear.from_float"
        )
    check_weights(linears)
    for name, linear in linears.items():
        if linear.in_features > _core.MAX_DEPTH:
            raise SqCpuError(
                f"{name} has {linear.in_features} input channels; int32 sums hold "
                f"{_core.MAX_DEPTH}: ignore it"
            )
        for kind, parameter in linear.named_parameters():
            if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
                raise SqCpuError(f"{name}.{kind} has NaN or Inf; repair the model or ignore it")


def check_layers(linears: Mapping[str, nn.Linear], plan: SmoothPlan | None) -> None:
    """Raise `SqCpuError` for layers of the plan that these linears to quantize do not have."""
    known = set(linears)
    unknown = [layer.name for layer in plan.layers if layer.name not in known] if plan else []
    if unknown:
        raise SqCpuError(
            f"the plan has an entry for {', '.join(unknown)}, no linear of the model that the "
            "scheme would quantize; plan for this very model, and for what is not ignored"
        )
    for layer in plan.layers if plan else ():
        channels = linears[layer.name].in_features
        if layer.outliers and layer.outliers[-1] >= channels:
            raise SqCpuError(
                f"the plan keeps channel {layer.outliers[-1]} of {layer.name} in float, which has "
                f"{channels}; plan for this very model"
            )
        if len(layer.smoothing) not in (0, channels):
            raise SqCpuError(
                f"the plan gives {layer.name} {len(layer.smoothing)} smoothing scales for "
                f"{channels} channels; plan for this very model"
            )


def check_replaceable(
    model: nn.Module,
    ignore: tuple[str, ...],
    in_float: Mapping[str, str],
    but: str | None = None,
) -> None:
    """Raise `SqCpuError` for a linear to quantize that does more than its class."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or name in in_float:
            continue
        if name != but and is_ignored(model, name, ignore):
            continue
        if added := additions(module):
            raise SqCpuError(f"{name} {added}, or ignore it")
        parent = model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, "base_layer") and hasattr(parent, "unmerge"):  # peft's adapters
            raise SqCpuError(
                f"{name} has an adapter beside it: merge that first (model.merge_and_unload())"
            )


def check_calibration(
    linears: Mapping[str, nn.Linear], calibration: Calibration | None, needed: bool
) -> None:
    """Raise `SqCpuError` where a calibration is needed, and for one of other weights."""
    if not needed:
        return
    if calibration is None:
        raise SqCpuError(
            "smoothing, static activation scales and outlier_threshold need a calibration; pass "
            "calibrate(...), or a dynamic scheme without threshold and smooth=False"
        )
    for name, linear in linears.items():
        if name not in calibration.unreached:
            calibration.check_weight(name, linear)
