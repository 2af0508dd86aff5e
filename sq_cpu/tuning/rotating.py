"""Rotations that a plan leaves open: searched with and without, and kept where that pays."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.smoothing.plan import GroupPlan, joined
from sq_cpu.smoothing.rotation import MARGIN, NO_PEAKS, is_open, rotated, unrotated
from sq_cpu.tuning.alpha_search import FoundPlans

__all__ = ["rotating"]


def rotating(
    unit: list[GroupPlan],
    groups: Mapping[str, SmoothingGroup],
    can_rotate: Callable[[GroupPlan], bool],
    best: Callable[[list[GroupPlan]], FoundPlans],
    loss: str,
) -> tuple[list[GroupPlan], FoundPlans]:
    """Return groups that share a choice with the rotations decided, and what `best` finds of them.

    One is taken where the loss of all falls by `MARGIN` of its group's. `can_rotate` says whether a
    group's calibration has what the range of rotated rows is found on.
    """
    tried = {p.name for p in unit if is_open(p) and can_rotate(p)}
    chosen = [
        planned
        if not is_open(planned)
        else unrotated(planned, "" if planned.name in tried else NO_PEAKS)
        for planned in unit
    ]
    found = best(chosen)
    for index, planned in enumerate(unit):
        if planned.name not in tried:
            continue
        before = found.losses[planned.name]
        note = joined(planned.note, f"{loss} {before:.3g} not rotated")
        turned = replace(rotated(groups[planned.name], planned), note=note)
        others = [*chosen[:index], turned, *chosen[index + 1 :]]
        now = best(others)
        if sum(now.losses.values()) <= sum(found.losses.values()) - MARGIN * before:
            chosen, found = others, now
    return chosen, found
