"""Folding a smoothing scale into the weights.

Producer: output channels / s (a norm's weight and bias, a linear's rows and bias). Consumers: input
columns * s. Right if, and only if, the group holds every consumer of the producer's output and all
between is linear in it; the family's row says so, and `proof` proves it on the model at hand.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from sq_cpu.models.groups import SmoothingGroup

__all__ = ["apply_folds", "folded_columns", "folded_producer", "producer_of"]

_ROWS = 256  # of a weight that are in fp32 at a time


def apply_folds(model: nn.Module, scales: Mapping[SmoothingGroup, Tensor]) -> None:
    """Fold s into the weights of each group, in fp32, rounded once to the parameters' dtype."""
    with torch.no_grad():
        for group, s in scales.items():
            for name in group.consumers:
                for rows in torch.split(model.get_parameter(f"{name}.weight"), _ROWS):
                    rows.copy_(folded_columns(rows, group.layout.widen(s)))
            producer = model.get_submodule(producer_of(group))
            weight = producer.get_parameter("weight")
            by = group.layout.spread(s, len(weight))
            for rows, divisor in zip(
                torch.split(weight, _ROWS), torch.split(by, _ROWS), strict=True
            ):
                rows.copy_(_divided(rows, divisor, group.norm_offset))
            if isinstance(bias := getattr(producer, "bias", None), Tensor):
                bias.copy_(bias.float() / by)


def producer_of(group: SmoothingGroup) -> str:
    """Return the full name of what makes the input of a group that has such a producer."""
    assert group.producer is not None
    return group.producer


def folded_columns(weight: Tensor, s: Tensor) -> Tensor:
    """Return a consumer's weight with its input columns multiplied by s, [in_features]; fp32."""
    return weight.float() * s


def folded_producer(module: nn.Module, group: SmoothingGroup, s: Tensor) -> dict[str, Tensor]:
    """Return the producer's changed parameters, fp32."""
    weight = module.get_parameter("weight").detach()
    by = group.layout.spread(s, len(weight))
    folded = {"weight": _divided(weight, by, group.norm_offset)}
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        folded["bias"] = bias.detach().float() / by
    return folded


def _divided(weight: Tensor, by: Tensor, norm_offset: float) -> Tensor:
    """Return the rows of a linear's weight, or a norm's entries, each divided, fp32."""
    divisor = by if weight.dim() == 1 else by[:, None]
    return (weight.float() + norm_offset) / divisor - norm_offset
