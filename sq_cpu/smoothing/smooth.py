"""A plan carried out on the weights: s, and rotations, where they are proven to keep the function.

Elsewhere the input is divided by s at run time, while it is quantized.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.fold import apply_folds
from sq_cpu.smoothing.plan import GroupPlan, SmoothPlan, joined, scheme_of
from sq_cpu.smoothing.proof import FoldProof, prove_with, refused_folds
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.scales import consumer_scales, plan_scales

__all__ = ["Smoothed", "fold", "rotated_groups", "settled"]


@dataclass(frozen=True)
class Smoothed:
    """What is done to a model's weights, by `apply` or already."""

    plan: SmoothPlan
    """The plan as it is carried out: a fold that is refused has `fold=False` and the reason."""
    scales: dict[str, Tensor]
    """s of every consumer, by its full name, fp32 [in_features]."""
    at_run_time: frozenset[str]
    """Consumers whose weights stay as they are: they and their input are scaled at run time."""
    folds: Mapping[SmoothingGroup, Tensor]
    """s of the groups that are folded."""

    def apply(self, model: nn.Module) -> None:
        """Fold into the weights of a linearized model; afterwards no calibration fits it."""
        apply_folds(model, self.folds, rotated_groups(self.plan, self.folds))


def rotated_groups(
    plan: SmoothPlan, groups: Mapping[SmoothingGroup, Tensor]
) -> dict[SmoothingGroup, int]:
    """Return the columns of a block for those of the groups whose values the plan rotates."""
    planned = {group.name: group for group in plan.groups}
    return {g: planned[g.name].rotation for g in groups if planned[g.name].hadamard_fold}


def fold(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    *,
    scheme: Scheme | None = None,
) -> Smoothed:
    """Fold into `model`, in place, what the plan says and is proven to keep the function.

    Afterwards the calibration no longer fits the model. The proof runs the model on the
    calibration's example, a few times in all. `scheme`, resolved, is what the linears are then
    quantized with; None: that of the plan, or O1, and no rule may need it. Raises `SqCpuError`,
    with the model unchanged, where `plan_scales`, `prove_folds` or `refused_folds` does.
    """
    with linearized(model):
        carried = scheme or scheme_of(None, plan).resolve(has_vnni())
        plan = decided(model, plan, calibration, carried, smoothing_groups(model))
        scales = plan_scales(model, plan, calibration, scheme=scheme)
        rotated = rotated_groups(plan, scales)
        proof = prove_with(model, scales, calibration.example, rotated=rotated)
        smoothed = settled(model, plan, scales, proof.without(calibration.in_float))
        smoothed.apply(model)
        return smoothed


def settled(
    model: nn.Module,
    plan: SmoothPlan,
    scales: Mapping[SmoothingGroup, Tensor],
    proof: FoldProof,
) -> Smoothed:
    """Return what of a plan can be done to a linearized model; change nothing.

    `scales` are those that `plan_scales` gave, and `proof` is of these groups or more of them.
    """
    folds = {group: s for group, s in scales.items() if group.producer is not None}
    rotated = rotated_groups(plan, folds)
    refused = refused_folds(model, folds, proof, rotated)
    reasons = {group.name: reason for group, reason in refused.items()}
    unproven = {g.name: proof.rotations.get(g, "its proof was not asked for") for g in rotated}

    def settle(planned: GroupPlan) -> GroupPlan:
        if reason := reasons.get(planned.name, ""):
            return replace(planned, fold=False, hadamard_fold=0, note=reason)
        if reason := unproven.get(planned.name, ""):
            note = joined(planned.note, f"not rotated in the end: {reason}")
            return replace(planned, hadamard_fold=0, note=note)
        return planned

    return Smoothed(
        plan=replace(plan, groups=tuple(map(settle, plan.groups))),
        scales=consumer_scales(scales),
        at_run_time=frozenset(
            name
            for group in scales
            if group.producer is None or group in refused
            for name in group.consumers
        ),
        folds={group: s for group, s in folds.items() if group not in refused},
    )
