"""SmoothQuant: X W^T = (X / s) (W s)^T, with the division folded into whatever makes X.

`rules.RULES` has the rules, a `SmoothPlan` says which group gets which, and `fold` applies it to
the weights where that is proven to keep the function. Elsewhere the input is divided by s at run
time, while it is quantized.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.models.groups import SmoothingGroup, norm_weight, smoothing_groups
from sq_cpu.models.linears import is_ignored, linearized
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.fold import apply_folds
from sq_cpu.smoothing.plan import GroupPlan, SmoothPlan, check_groups, covered_consumers
from sq_cpu.smoothing.proof import FoldProof, prove_with, refused_folds
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.statistics import GroupStatistics

__all__ = [
    "Smoothed",
    "WeightStatistics",
    "consumer_scales",
    "fold",
    "fold_scales",
    "group_statistics",
    "linear_sample",
    "plan_scales",
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
        scales[group if planned.fold else group.unfolded(planned.note)] = s
    return scales


@dataclass(frozen=True)
class Smoothed:
    """What `fold` did."""

    plan: SmoothPlan
    """The plan as it was carried out: a fold that was refused has `fold=False` and the reason."""
    scales: dict[str, Tensor]
    """s of every consumer, by its full name, fp32 [in_features]."""
    at_run_time: frozenset[str]
    """Consumers whose weights are as they were: they and their input are scaled at run time."""


def fold(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    *,
    scheme: Scheme | None = None,
) -> Smoothed:
    """Fold into `model`, in place, what the plan says and is proven to keep the function.

    Afterwards the calibration no longer fits the model. The proof runs the model on the
    calibration's example, a few times in all. Raises `SqCpuError`, with the model unchanged, where
    `plan_scales`, `prove_folds` or `refused_folds` does.
    """
    with linearized(model):
        scales = plan_scales(model, plan, calibration, scheme=scheme)
        proof = prove_with(model, scales, calibration.example).without(calibration.in_float)
        return fold_scales(model, plan, scales, proof)


def fold_scales(
    model: nn.Module,
    plan: SmoothPlan,
    scales: Mapping[SmoothingGroup, Tensor],
    proof: FoldProof,
) -> Smoothed:
    """Do what `fold` does for the s that `plan_scales` gave, to a linearized model.

    `proof` is of these groups or more of them.
    """
    folds = {group: s for group, s in scales.items() if group.producer is not None}
    refused = refused_folds(model, folds, proof)
    apply_folds(model, {group: s for group, s in folds.items() if group not in refused})
    reasons = {group.name: reason for group, reason in refused.items()}
    return Smoothed(
        plan=replace(
            plan,
            groups=tuple(
                replace(group, fold=False, note=reasons[group.name])
                if group.name in reasons
                else group
                for group in plan.groups
            ),
        ),
        scales=consumer_scales(scales),
        at_run_time=frozenset(
            name
            for group in scales
            if group.producer is None or group in refused
            for name in group.consumers
        ),
    )


def consumer_scales(scales: Mapping[SmoothingGroup, Tensor]) -> dict[str, Tensor]:
    """Return s of every consumer, by full name, fp32 [in_features]."""
    return {name: group.layout.widen(s) for group, s in scales.items() for name in group.consumers}


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
    # An uncovered group fails here, by the name of its first consumer.
    covered = covered_consumers(group, calibration) or group.consumers[:1]
    for name in covered:
        calibration.check_weight(name, model.get_submodule(name))
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
        name=name,
    )
    if calibration is None:
        return sample
    low, high = calibration.channels(name)
    return replace(
        sample,
        rows=calibration.rows.get(name),
        peaks=calibration.farthest(name),
        low=low,
        high=high,
        gradient_rows=calibration.gradient_rows.get(name),
        gradient=calibration.gradients.get(name),
        gradient_weights=calibration.gradient_weights.get(name),
    )


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
    statistics = replace(statistics, clip=planned.clip, hadamard=planned.hadamard)
    try:
        return smoothing_scale(planned.rule, statistics, planned.alpha)
    except SqCpuError as error:
        raise SqCpuError(f"group {group.name}: {error}") from None
