"""Which linears suffer most from being int8: the estimate that an autotuning ranks them by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn

from sq_cpu.autotuning.latency import Precision
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan, quantized_consumers
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.scales import (
    WeightStatistics,
    as_planned,
    group_statistics,
    planned_scale,
)
from sq_cpu.tuning.losses import default_loss, loss_of

__all__ = ["Errors", "estimated_errors"]

Errors = dict[str, dict[Precision, float]]


def estimated_errors(
    model: nn.Module,
    calibration: Calibration,
    plan: SmoothPlan,
    scheme: Scheme,
    choices: Iterable[Precision],
    *,
    weights: WeightStatistics | None = None,
    progress: bool | None = None,
) -> Errors:
    """Return what each calibrated linear's int8 output would be off, by how it is quantized.

    It is `tune`'s default loss (nats per token where the calibration has gradients, the share of
    the output's energy otherwise) over the calibration's sampled rows, with the smoothing of `plan`
    and the numerics of the kernels; 0 for "float". Which linears the plan leaves in float or gives
    activations of their own does not matter. `weights` are those of the model; None looks at them
    anew. The model is not changed; extra memory is one group's weights in fp32, a few times.

    Raises `SqCpuError` for a calibration without sampled rows, and where `smoothing_scale` does.
    """
    scheme = scheme.resolve(has_vnni())
    choices = tuple(choices)
    # Weight clips stay; the other overrides are what is asked about.
    layers = tuple(replace(layer, activations=None, in_float=False) for layer in plan.layers)
    everything = replace(plan, layers=layers)
    errors: Errors = {}
    loss = default_loss(calibration)
    with linearized(model):
        groups = smoothing_groups(model)
        everything = decided(model, everything, calibration, scheme, groups, weights=weights)
        planned = {group.name: group for group in everything.groups}
        for group in track(groups, "estimating errors", progress):
            names = quantized_consumers(model, group, calibration, scheme)
            for name in names:
                errors[name] = {"float": 0.0}
            if not names:
                continue
            of_group = group_statistics(model, group, calibration, scheme, everything, weights)
            entry = planned.get(group.name)
            for choice in choices:
                if choice == "float":
                    continue
                statistics = replace(of_group, scheme=scheme.with_activations(choice))
                s = torch.ones_like(statistics.act_absmax)
                if entry is not None:
                    statistics = as_planned(statistics, entry)
                    s = planned_scale(entry, statistics)
                for linear in statistics.fake_quantized(s):
                    error = loss_of(loss, linear, calibration.tokens)
                    errors[linear.sample.name][choice] = error
    return errors
