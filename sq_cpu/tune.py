"""Choose the migration strength alpha of every smoothing group from one calibration pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from sq_cpu.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.groups import smoothing_groups
from sq_cpu.linears import linearized
from sq_cpu.plan import SmoothPlan
from sq_cpu.progress import track
from sq_cpu.rules import ALPHAS, GroupStatistics, output_errors, smoothing_scale
from sq_cpu.runtime import has_vnni
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import group_statistics

__all__ = ["tune"]


def tune(
    model: nn.Module,
    calibration: Calibration,
    *,
    scheme: str | Scheme = "O3",
    alphas: Sequence[float] = ALPHAS,
    progress: bool | None = None,
) -> SmoothPlan:
    """Return the plan whose alphas give each group's linears the least output error.

    For every alpha, the sampled rows X of the calibration and the weights W are smoothed and
    quantized with the numerics of the kernels, and the group's loss is the normalized error

        |Q(X / s) Q(W s)^T - X W^T|^2 / |X W^T|^2

    averaged over its quantized linears (the objective of AQAS, arXiv 2311.05161, on alpha's grid).
    Each group is scored alone, on the float model's inputs; the model is not changed. Extra memory
    is one group's weights in fp32, a few times.

    Raises `SqCpuError` for an unknown scheme, an alpha outside [0, 1], no alphas, a
    calibration without sampled rows, and weights that changed since it.
    """
    scheme = Scheme.of(scheme).resolve(has_vnni())
    if not alphas:
        raise SqCpuError("tune got no alphas; leave the argument out for 0, .05, ... 1")
    uniform = SmoothPlan.uniform(model, calibration, ignore=scheme.ignore)
    tuned = []
    with linearized(model):
        groups = {group.name: group for group in smoothing_groups(model)}
        for planned in track(uniform.groups, "tuning alpha", progress):
            statistics = group_statistics(model, groups[planned.name], calibration, scheme)
            losses = [_loss(statistics, alpha) for alpha in alphas]
            loss = min(losses)
            note = "; ".join(filter(None, [planned.note, f"normalized output error {loss:.3g}"]))
            tuned.append(replace(planned, alpha=alphas[losses.index(loss)], note=note))
    return SmoothPlan(tuple(tuned))


def _loss(statistics: GroupStatistics, alpha: float) -> float:
    s = smoothing_scale("smoothquant", statistics, alpha)
    errors, outputs = output_errors(statistics, s)
    return float((errors / outputs.clamp_min(1e-30)).mean())
