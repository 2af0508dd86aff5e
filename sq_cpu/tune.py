"""Choose the migration strength alpha of every smoothing group from one calibration pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sq_cpu.calibrate import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.groups import SmoothingGroup
from sq_cpu.linears import is_ignored, linearized
from sq_cpu.progress import track
from sq_cpu.ranges import static_range
from sq_cpu.rounding import quantize_rows, quantize_weight, static_code
from sq_cpu.runtime import has_vnni
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import GroupPlan, SmoothPlan, plan_scales

__all__ = ["tune"]

_ALPHAS = tuple(step / 20 for step in range(21))


def tune(
    model: nn.Module,
    calibration: Calibration,
    *,
    scheme: str | Scheme = "O3",
    alphas: Sequence[float] = _ALPHAS,
    progress: bool | None = None,
) -> SmoothPlan:
    """Return the plan whose alphas give each group's linears the least output error.

    For every alpha, the sampled rows X of the calibration and the weights W are smoothed and
    quantized with the numerics of the kernels, and the group's loss is the normalized error

        |Q(X / s) Q(W s)^T - X W^T|^2 / |X W^T|^2

    averaged over its quantized linears (the objective of AQAS, arXiv 2311.05161, on alpha's grid).
    Each group is scored alone, on the float model's inputs; the model is not changed. Extra memory
    is one group's weights in fp32, a few times.

    Raises `SqCpuError` for an unknown scheme or family, an alpha outside [0, 1], no alphas, a
    calibration without sampled rows, and weights that changed since it.
    """
    scheme = Scheme.of(scheme).resolve(has_vnni())
    if not alphas:
        raise SqCpuError("tune got no alphas; leave the argument out for 0, .05, ... 1")
    uniform = SmoothPlan.uniform(model, calibration, ignore=scheme.ignore)
    best: dict[str, tuple[float, GroupPlan]] = {}
    with linearized(model):
        for alpha in track(list(alphas), "tuning alpha", progress):
            plan = SmoothPlan(tuple(replace(group, alpha=alpha) for group in uniform.groups))
            scales = plan_scales(model, plan, calibration)
            for planned, (group, s) in zip(plan.groups, scales.items(), strict=True):
                loss = _loss(model, group, s, calibration, scheme)
                if group.name not in best or loss < best[group.name][0]:
                    note = "; ".join(filter(None, [planned.note, f"output error {loss:.3g}"]))
                    best[group.name] = loss, replace(planned, note=note)
    return SmoothPlan(tuple(planned for _, planned in best.values()))


@torch.no_grad()
def _loss(
    model: nn.Module, group: SmoothingGroup, s: Tensor, calibration: Calibration, scheme: Scheme
) -> float:
    total, linears = 0.0, 0
    s = group.layout.widen(s)
    for name in group.consumers:
        if name not in calibration.channel_min or is_ignored(model, name, scheme.ignore):
            continue  # it stays in float
        if name not in calibration.rows:
            raise SqCpuError("the calibration holds no sampled rows: calibrate with rows=64")
        x = calibration.rows[name].float()
        weight = model.get_parameter(f"{name}.weight").float()
        static = None
        if scheme.activations == "static":
            low, high = calibration.channels(name)
            static = static_code(scheme, *static_range(low / s, high / s, x / s, scheme))
        codes, row_scale, zero_point = quantize_rows(x / s, scheme, static)
        x_hat = (codes.float() - zero_point[:, None]) * row_scale[:, None]
        weight_codes, weight_scale = quantize_weight(
            weight * s, scheme.weights, scheme.weight_group_rows
        )
        y = x @ weight.T
        error = x_hat @ weight_codes.float().T * weight_scale - y
        total += float(error.square().sum() / y.square().sum().clamp_min(1e-30))
        linears += 1
    return total / linears
