"""Which groups' inputs a plan rotates, where it leaves that open: those whose error that lowers.

One rule for every verb: the squared error of the quantized linears' outputs on the sampled rows,
with and without the Hadamard matrix, in the numerics of the kernels and for the scheme at hand.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace

import torch
from torch import nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.models.groups import NO_BLOCKS, SmoothingGroup
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import AUTO, GroupPlan, SmoothPlan, joined
from sq_cpu.smoothing.plan_checks import check_groups
from sq_cpu.smoothing.scales import (
    WeightStatistics,
    as_planned,
    channel_in_float,
    checked_consumers,
    group_statistics,
    planned_scale,
)
from sq_cpu.smoothing.statistics import GroupStatistics, output_errors

__all__ = ["MARGIN", "NO_PEAKS", "decided", "is_open", "rotated", "unrotated"]

MARGIN = 0.02
"""Share of the error that a rotation has to save: less is within the chance of 64 sampled rows, and
a rotation at run time costs a few per cent of its layer's time."""

NO_PEAKS = "not rotated: the calibration holds no sampled rows and peaks"
_OUTPUTS = 512  # of a linear that are scored: enough to compare two errors, and little memory


def rotated(group: SmoothingGroup, planned: GroupPlan) -> GroupPlan:
    """Return a group's plan with the rotation that its "auto" stands for."""
    if planned.hadamard == AUTO:
        return replace(planned, hadamard=BLOCK)
    return replace(planned, hadamard_fold=group.head_block)


def unrotated(planned: GroupPlan, note: str = "") -> GroupPlan:
    """Return a group's plan without a rotation, and why."""
    return replace(planned, hadamard=0, hadamard_fold=0, note=joined(planned.note, note))


def is_open(planned: GroupPlan) -> bool:
    """Say whether a plan leaves open if the group is rotated."""
    return AUTO in (planned.hadamard, planned.hadamard_fold)


@torch.no_grad()
def decided(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    scheme: Scheme,
    groups: Iterable[SmoothingGroup],
    *,
    linears: Collection[str] | None = None,
    weights: WeightStatistics | None = None,
) -> SmoothPlan:
    """Return the plan of a linearized model with a block, or 0, in the place of every "auto".

    `scheme`, resolved, is what the plan is carried out with, `linears` are those to quantize (None:
    all that the scheme does not ignore), and `weights` is as for `group_statistics`. Extra memory
    is a few times 512 rows of a weight in fp32, or all where these share scales.

    Raises `SqCpuError` where `group_statistics` and `smoothing_scale` do.
    """
    known = {group.name: group for group in groups}
    check_groups(plan, known.values())
    if not any(map(is_open, plan.groups)):
        return plan
    for planned in plan.groups:
        checked_consumers(model, known[planned.name], calibration)

    def decide(planned: GroupPlan) -> GroupPlan:
        if planned.hadamard_fold == AUTO and (planned.hadamard or not planned.fold):
            planned = replace(planned, hadamard_fold=0)
        if not is_open(planned):
            return planned
        group = known[planned.name]
        turned = rotated(group, planned)
        if not turned.rotation:
            return unrotated(planned, f"not rotated: {NO_BLOCKS}")
        if turned.hadamard_fold and channel_in_float(group, plan, scheme):
            return unrotated(planned, "not rotated: channels stay in float")
        statistics = group_statistics(model, group, calibration, scheme, plan, weights)
        samples = tuple(
            _thinned(sample, scheme)
            for sample in statistics.samples
            if linears is None or sample.name in linears
        )
        statistics = replace(statistics, samples=samples)
        if not samples:
            return unrotated(planned)
        if not statistics.can_rotate or not all(_has_rows(sample) for sample in samples):
            return unrotated(planned, NO_PEAKS)
        before, after = _error(statistics, unrotated(planned)), _error(statistics, turned)
        if after > (1 - MARGIN) * before:
            return unrotated(
                planned, f"not rotated: that saves less than {MARGIN:.0%} of the error"
            )
        return replace(turned, note=joined(planned.note, "rotated: that lowers the error"))

    return replace(plan, groups=tuple(map(decide, plan.groups)))


def _has_rows(sample: LinearSample) -> bool:
    return sample.rows is not None and len(sample.rows) > 0


def _thinned(sample: LinearSample, scheme: Scheme) -> LinearSample:
    """Return a sample with some of its outputs alone, evenly spaced, where each has its scale."""
    outputs = len(sample.weight)
    if outputs <= _OUTPUTS or scheme.weights != "per_channel":
        return sample
    rows = torch.arange(_OUTPUTS, device=sample.weight.device) * outputs // _OUTPUTS
    return replace(sample, weight=sample.weight[rows])


def _error(statistics: GroupStatistics, planned: GroupPlan) -> float:
    statistics = as_planned(statistics, planned)
    s = planned_scale(planned, statistics)
    return float(output_errors(statistics, s)[0].sum())
