"""Which linears suffer most from being int8: the estimate that an autotuning ranks them by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from sq_cpu.calibrate import Calibration
from sq_cpu.costs import Choice
from sq_cpu.groups import smoothing_groups
from sq_cpu.linears import linearized
from sq_cpu.plan import SmoothPlan, covered_consumers
from sq_cpu.progress import track
from sq_cpu.rules import output_errors, smoothing_scale
from sq_cpu.runtime import has_vnni
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import group_statistics

__all__ = ["estimated_errors"]

Errors = dict[str, dict[Choice, float]]


def estimated_errors(
    model: nn.Module,
    calibration: Calibration,
    plan: SmoothPlan,
    scheme: Scheme,
    choices: Iterable[Choice],
    *,
    progress: bool | None = None,
) -> Errors:
    """Return what each calibrated linear's int8 output would be off, by how it is quantized.

    It is |Q(X / s) Q(W s)^T - X W^T|^2 / |X W^T|^2 over the calibration's rows, with the smoothing
    of `plan` and the numerics of the kernels; 0 for "float". Which linears the plan leaves in float
    or gives activations of their own does not matter. The model is not changed; extra memory is one
    group's weights in fp32, a few times.

    Raises `SqCpuError` for a calibration without sampled rows, and where `smoothing_scale` does.
    """
    scheme = scheme.resolve(has_vnni())
    choices = tuple(choices)
    planned = {group.name: group for group in plan.groups}
    clipped = tuple(
        replace(layer, activations=None, in_float=False) for layer in plan.layers
    )  # weight clips stay
    errors: Errors = {}
    with linearized(model):
        for group in track(smoothing_groups(model), "estimating errors", progress):
            names = covered_consumers(group, calibration)
            found: dict[Choice, list[float]] = {}
            for choice in choices:
                if choice == "float":
                    continue
                of_choice = scheme.with_activations(choice)
                statistics = group_statistics(
                    model, group, calibration, of_choice, replace(plan, layers=clipped)
                )
                if not statistics.samples:
                    break
                s = statistics.act_absmax.new_ones(len(statistics.act_absmax))
                if group.name in planned:
                    entry = planned[group.name]
                    statistics = replace(statistics, clip=entry.clip)
                    s = smoothing_scale(entry.rule, statistics, entry.alpha)
                off, total = output_errors(statistics, s)
                found[choice] = (off / total.clamp_min(1e-30)).tolist()
            quantized = [n for n in names if not _ignored(model, n, scheme)]
            for index, name in enumerate(quantized if found else []):
                errors[name] = {choice: values[index] for choice, values in found.items()}
                if "float" in choices:
                    errors[name]["float"] = 0.0
    return errors
