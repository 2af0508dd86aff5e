"""Whether a plan fits a scheme and a model."""

from __future__ import annotations

from collections.abc import Iterable

from sq_cpu.errors import SqCpuError
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.numerics.ranges import fits_rows
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan

__all__ = ["check_clips", "check_groups"]


def check_clips(plan: SmoothPlan | None, scheme: Scheme) -> None:
    """Raise `SqCpuError` for a plan whose clips are of another range than that which most rows fit.

    They would be fractions of a much narrower one.
    """
    if plan is None or plan.scheme is None or all(group.clip == 1.0 for group in plan.groups):
        return
    if scheme.activations == "static" and fits_rows(scheme) and not fits_rows(plan.scheme):
        kind = "minmax" if plan.scheme.static_range == "auto" else plan.scheme.static_range
        raise SqCpuError(
            f"the plan's clips are of static_range={kind!r}, and the scheme has 'auto': give none, "
            f"so that the plan's is taken, or one with that range (--range {kind})"
        )


def check_groups(plan: SmoothPlan, groups: Iterable[SmoothingGroup]) -> None:
    """Raise `SqCpuError` for a planned group that is not among the model's, or smoothed twice."""
    known = {group.name: group for group in groups}
    for planned in plan.groups:
        group = known.get(planned.name)
        if group is None:
            raise SqCpuError(
                f"the model has no smoothing group {planned.name}; plan for this very model"
            )
        if name := next((name for name in group.consumers if plan.layer(name).smoothing), ""):
            raise SqCpuError(
                f"the plan smooths {name} with group {planned.name} and by itself: drop one of both"
            )
