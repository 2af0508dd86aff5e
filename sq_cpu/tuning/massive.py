"""Massive activations: a few channels of a linear that stay in float, where that pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from torch import nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import LayerPlan, quantized_consumers
from sq_cpu.smoothing.statistics import live_median
from sq_cpu.tuning.alpha_search import FoundPlans
from sq_cpu.tuning.losses import NEGLIGIBLE

__all__ = ["OUTLIERS", "keeping", "massive_layers"]

OUTLIERS = 4
"""Channels that a linear may keep in float, unless told otherwise."""

# A channel is massive from so many times the median channel's absmax on. In SmolLM2 two of the 30
# down_proj gain sevenfold by keeping theirs in float, of 275 and 1730 times; the others gain less
# than half.
_MASSIVE = 16.0


def massive_layers(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme,
    most: int,
) -> list[LayerPlan]:
    """Return a group's linears with massive activations, keeping those channels in float."""
    found = []
    for name in quantized_consumers(model, group, calibration, scheme):
        absmax = calibration.absmax(name)
        median = live_median(absmax)
        massive = 0 if median is None else int((absmax >= _MASSIVE * median).sum())
        channels = absmax.topk(min(massive, most)).indices.sort().values.tolist()
        if channels:
            found.append(LayerPlan(name=name, outliers=tuple(channels)))
    return found


def keeping(
    massive: Mapping[str, Sequence[LayerPlan]],
    without: FoundPlans,
    best: Callable[[Sequence[LayerPlan]], FoundPlans],
    loss: str,
) -> tuple[FoundPlans, list[LayerPlan]]:
    """Return what `best` finds where those groups keep their channels that gain by it, and these.

    `massive` has by group the linears with massive channels, `without` what is found without.
    """

    def gains(name: str, found: FoundPlans) -> bool:
        before, after = without.losses[name], found.losses[name]
        return after <= 0.5 * before and before - after > NEGLIGIBLE.get(loss, 0.0)

    found = best([layer for linears in massive.values() for layer in linears])
    worth = [name for name in massive if gains(name, found)]
    kept = [
        replace(layer, note=f"massive activations; {loss} {without.losses[name]:.3g} without")
        for name in worth
        for layer in massive[name]
    ]
    if not worth:
        return without, []
    return (found if len(worth) == len(massive) else best(kept)), kept
