"""SmoothQuant: X W^T = (X / s) (W s)^T, with the division folded into whatever makes X.

`rules.RULES` has the rules, and a `SmoothPlan` says which group gets which.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.models.groups import SmoothingGroup, norm_weight, smoothing_groups
from sq_cpu.models.linears import is_ignored
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GIVEN, GroupPlan, SmoothPlan, covered_consumers
from sq_cpu.smoothing.plan_checks import check_groups
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.statistics import GroupStatistics

__all__ = [
    "WeightStatistics",
    "as_planned",
    "channel_in_float",
    "checked_consumers",
    "consumer_scales",
    "group_statistics",
    "linear_sample",
    "own_scales",
    "plan_scales",
    "planned_scale",
    "weight_absmax",
]


def plan_scales(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    *,
    scheme: Scheme | None = None,
    among: Iterable[SmoothingGroup] | None = None,
    weights: WeightStatistics | None = None,
) -> dict[SmoothingGroup, Tensor]:
    """Return s of every planned group, fp32 [its entries], of a linearized model.

    `among` are the model's groups; None: `smoothing_groups` finds them. `weights` is as for
    `group_statistics`.

    All are computed from the weights as they stand, so the order of the groups does not matter.
    A group that the plan does not fold has no producer here. The rule "aqas" minimizes the error
    of `scheme`, resolved, with the plan's overrides; other rules need neither.

    Raises `SqCpuError` for a group that the model lacks or the calibration does not cover, for one
    to be folded that cannot be, on weights that changed since the calibration, and where
    `smoothing_scale` does.
    """
    among = smoothing_groups(model) if among is None else among
    groups = {group.name: group for group in among}
    check_groups(plan, groups.values())
    scales = {}
    for planned in plan.groups:
        group = groups[planned.name]
        s = _group_scales(model, group, planned, calibration, scheme, plan, weights)
        if planned.fold and group.producer is None:
            raise SqCpuError(f"group {group.name} cannot be folded ({group.reason}): fold=False")
        _check_rotation(group, planned, plan, scheme)
        scales[group if planned.fold else group.unfolded(planned.note)] = s
    return scales


def consumer_scales(scales: Mapping[SmoothingGroup, Tensor]) -> dict[str, Tensor]:
    """Return s of every consumer, by full name, fp32 [in_features]."""
    return {name: group.layout.widen(s) for group, s in scales.items() for name in group.consumers}


def own_scales(plan: SmoothPlan) -> dict[str, Tensor]:
    """Return s of the linears that have their own, by full name, fp32 [in_features]."""
    return {
        layer.name: torch.tensor(layer.smoothing, dtype=torch.float32, device="cpu")
        for layer in plan.layers
        if layer.smoothing
    }


def planned_scale(planned: GroupPlan, statistics: GroupStatistics) -> Tensor:
    """Return s of a group by its plan: fp32 [channels]; raises as `smoothing_scale` does."""
    if planned.rule != GIVEN:
        return smoothing_scale(planned.rule, statistics, planned.alpha)
    if len(planned.scales) != len(statistics.act_absmax):
        raise SqCpuError(
            f"the plan gives {len(planned.scales)} scales for {len(statistics.act_absmax)} "
            "channels; plan for this very model"
        )
    return torch.tensor(planned.scales, dtype=torch.float32, device="cpu")


class WeightStatistics:
    """max|W_j| of the groups of a model and of its copies, each found once.

    It holds no model: whoever asks gives one, linearized, with the weights as they were.
    """

    def __init__(self) -> None:
        self._absmax: dict[SmoothingGroup, Tensor] = {}

    def absmax(self, model: nn.Module, group: SmoothingGroup) -> Tensor:
        """Return max|W_j| over all linears of the group, fp32 [channels]."""
        if group not in self._absmax:
            self._absmax[group] = weight_absmax(model, group)
        return self._absmax[group]


def weight_absmax(model: nn.Module, group: SmoothingGroup) -> Tensor:
    """Return max|W_j| over all linears of the group, fp32 [channels]; no weight is copied."""
    weights = [model.get_parameter(f"{name}.weight").detach() for name in group.consumers]
    ends = [torch.aminmax(weight, dim=0) for weight in weights]  # abs() would copy it
    absmax = torch.stack([torch.maximum(-low, high).float() for low, high in ends])
    return group.layout.narrow(absmax.amax(dim=0))


def group_statistics(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme | None = None,
    plan: SmoothPlan | None = None,
    weights: WeightStatistics | None = None,
) -> GroupStatistics:
    """Return what the smoothing rules look at; weights and rows are not copied.

    `scheme`, resolved, says which linears are quantized and how; the layers of `plan` override it.
    `weights` are those of the model; None looks at them anew.

    Raises `SqCpuError` when the calibration does not cover the group, or weights changed since.
    """
    plan = plan or SmoothPlan(())
    covered = checked_consumers(model, group, calibration)
    return GroupStatistics(
        act_absmax=group.layout.narrow(calibration.absmax(covered[0])),
        weight_absmax=(weights or WeightStatistics()).absmax(model, group),
        norm_weight=norm_weight(model, group),
        samples=tuple(
            linear_sample(
                name, model.get_parameter(f"{name}.weight").detach(), scheme, plan, calibration
            )
            for name in covered
            if scheme is not None
            and name not in plan.in_float
            and not is_ignored(model, name, scheme.ignore)
        ),
        scheme=scheme,
        widen=group.layout.widen,
    )


def as_planned(statistics: GroupStatistics, planned: GroupPlan) -> GroupStatistics:
    """Return the statistics of a group for the clip and the rotation that its plan has."""
    return replace(statistics, clip=planned.clip, hadamard=planned.rotation)


def checked_consumers(
    model: nn.Module, group: SmoothingGroup, calibration: Calibration
) -> tuple[str, ...]:
    """Return the linears of a group that some batch reached.

    Raises `SqCpuError` when the calibration does not cover the group, or weights changed since.
    """
    # An uncovered group fails here, by the name of its first consumer.
    covered = covered_consumers(group, calibration) or group.consumers[:1]
    for name in covered:
        calibration.check_weight(name, model.get_submodule(name))
    return covered


def linear_sample(
    name: str,
    weight: Tensor,
    scheme: Scheme,
    plan: SmoothPlan,
    calibration: Calibration | None,
) -> LinearSample:
    """Return what is known of a linear; without a calibration, nothing of its input."""
    layer = plan.layer(name)
    sample = LinearSample(
        weight,
        rows=None,
        low=None,
        high=None,
        scheme=None if layer.activations is None else scheme.with_activations(layer.activations),
        weight_clip=layer.weight_clip,
        outliers=layer.outliers,
        input_range=layer.input_range,
        name=name,
    )
    if calibration is None:
        return sample
    low, high = calibration.channels(name)
    return replace(
        sample,
        rows=calibration.rows.get(name),
        range_rows=calibration.typical(name),
        peaks=calibration.farthest(name),
        low=low,
        high=high,
        gradient_rows=calibration.gradient_rows.get(name),
        gradient=calibration.gradients.get(name),
        gradient_weights=calibration.gradient_weights.get(name),
    )


def _check_rotation(
    group: SmoothingGroup, planned: GroupPlan, plan: SmoothPlan, scheme: Scheme | None
) -> None:
    """Raise `SqCpuError` for a rotation in the weights that these linears cannot have."""
    block = planned.hadamard_fold
    if not block:
        return
    if not group.head_block or group.layout.head % planned.rotation:
        raise SqCpuError(
            f"group {group.name}: hadamard_fold is {block!r}, and {group.head_block} is what fits: "
            "plan that, or 0"
        )
    if name := channel_in_float(group, plan, scheme):
        raise SqCpuError(
            f"group {group.name}: hadamard_fold mixes the channels of which {name} keeps some in "
            "float: drop one of both"
        )


def channel_in_float(group: SmoothingGroup, plan: SmoothPlan, scheme: Scheme | None) -> str:
    """Return the first of a group's linears that may keep channels in float; "": none."""
    any_may = scheme is not None and scheme.outlier_threshold is not None
    return next((n for n in group.consumers if any_may or plan.layer(n).outliers), "")


def _group_scales(
    model: nn.Module,
    group: SmoothingGroup,
    planned: GroupPlan,
    calibration: Calibration,
    scheme: Scheme | None,
    plan: SmoothPlan,
    weights: WeightStatistics | None,
) -> Tensor:
    statistics = group_statistics(model, group, calibration, scheme, plan, weights)
    try:
        return planned_scale(planned, as_planned(statistics, planned))
    except SqCpuError as error:
        raise SqCpuError(f"group {group.name}: {error}") from None
