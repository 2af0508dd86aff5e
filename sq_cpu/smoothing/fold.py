"""Folding a smoothing scale into the weights.

Producer: output channels / s (a norm's weight and bias, a linear's rows and bias). Consumers: input
columns * s. Right if, and only if, the group holds every consumer of the producer's output and all
between is linear in it; the family's row says so, and `proof` proves it on the model at hand.

Attention mixes the tokens of a head alike in all its channels. So after s a Hadamard matrix H can
be folded, too (QuaRot, arXiv 2404.00456, section 4): H times each block of the values' rows, and
the columns of the consumers times H.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor, nn

from sq_cpu.kernels.hadamard import rotated
from sq_cpu.models.groups import SmoothingGroup

__all__ = ["apply_folds", "folded_columns", "folded_producer", "producer_of"]

_ROWS = 256  # of a weight that are in fp32 at a time


def apply_folds(
    model: nn.Module,
    scales: Mapping[SmoothingGroup, Tensor],
    blocks: Mapping[SmoothingGroup, int] = MappingProxyType({}),
) -> None:
    """Fold s into the weights of each group, in fp32, rounded once to the parameters' dtype.

    `blocks` has the columns of a block for the groups whose values are rotated.
    """
    with torch.no_grad():
        for group, s in scales.items():
            block = blocks.get(group, 0)
            for name in group.consumers:
                for rows in torch.split(model.get_parameter(f"{name}.weight"), _ROWS):
                    rows.copy_(folded_columns(rows, group.layout.widen(s), block))
            producer = model.get_submodule(producer_of(group))
            if block:  # which mixes rows
                for name, value in folded_producer(producer, group, s, block).items():
                    producer.get_parameter(name).copy_(value)
                continue
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


def folded_columns(weight: Tensor, s: Tensor, block: int = 0) -> Tensor:
    """Return a consumer's weight with its input columns multiplied by s, [in_features]; fp32.

    Then blocks of so many columns are rotated; 0: none.
    """
    columns = weight.float() * s
    return rotated(columns, block) if block else columns


def folded_producer(
    module: nn.Module, group: SmoothingGroup, s: Tensor, block: int = 0
) -> dict[str, Tensor]:
    """Return the producer's changed parameters, fp32; `block` is as for `folded_columns`."""
    weight = module.get_parameter("weight").detach()
    by = group.layout.spread(s, len(weight))
    folded = {"weight": _divided(weight, by, group.norm_offset)}
    if isinstance(bias := getattr(module, "bias", None), Tensor):
        folded["bias"] = bias.detach().float() / by
    if not block:
        return folded
    rotate = group.layout.rotate
    return {
        name: rotate(value.transpose(0, -1), block).transpose(0, -1)
        for name, value in folded.items()
    }


def _divided(weight: Tensor, by: Tensor, norm_offset: float) -> Tensor:
    """Return the rows of a linear's weight, or a norm's entries, each divided, fp32."""
    divisor = by if weight.dim() == 1 else by[:, None]
    return (weight.float() + norm_offset) / divisor - norm_offset
