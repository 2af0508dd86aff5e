"""Neural Compressor's auto-alpha, restated: the baseline of `sq_cpu.tune`.

For every sample, the float model gives each linear's output y, and the fully quantized model, at
the alphas so far, its input; each alpha of the grid then makes an output from that input, and its
loss is sum(|y - y~| / max|y of the row|)^0.5. After every quarter of the samples each group takes
its best alpha. As in the original, the table of losses begins anew with every sample, so the last
one before an update decides.

Source: neural_compressor/adaptor/torch_utils/smooth_quant.py, class TorchSmoothQuant, method
_auto_tune_alpha, version 2.x; the product has been retired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.models.calls import Batch, evaluating, model_inputs
from sq_cpu.models.groups import SmoothingGroup
from sq_cpu.models.hooks import hooked
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan
from sq_cpu.smoothing.scales import group_statistics
from sq_cpu.smoothing.statistics import GroupStatistics
from sq_cpu.tuning.losses import LOCAL_LOSSES
from sq_cpu.tuning.simulation import fake_quantized, simulating

__all__ = ["Choose", "auto_alpha"]

_FIRST_ALPHA = 0.5
_UPDATES = 4

Choose = Callable[[Mapping[float, Mapping[str, float]]], float]
"""(alpha -> linear -> loss) -> alpha."""


def auto_alpha(
    model: nn.Module,
    groups: Mapping[str, SmoothingGroup],
    plans: Sequence[GroupPlan],
    calibration: Calibration,
    batches: Iterable[Batch],
    scheme: Scheme,
    alphas: Sequence[float],
    choose: Choose,
    progress: bool | None,
) -> list[GroupPlan]:
    """Return the plans of a linearized model's groups with the alphas that the samples chose.

    It runs the model twice a sample, and every linear once for each alpha. It keeps one sample's
    inputs and outputs of all linears.
    """
    samples = list(batches)
    statistics = {
        planned.name: group_statistics(model, groups[planned.name], calibration, scheme)
        for planned in plans
    }
    chosen = {planned.name: replace(planned, alpha=_FIRST_ALPHA) for planned in plans}
    curves: dict[str, dict[float, Mapping[str, float]]] = {}
    update_every = max(1, len(samples) // _UPDATES)
    with evaluating(model):
        inputs = model_inputs(model, samples, "tuning", "auto-alpha", progress)
        for number, (args, kwargs) in enumerate(inputs, start=1):
            outputs: dict[str, Tensor] = {}
            with _recording_outputs(model, statistics, outputs):
                model(*args, **kwargs)
            seen: dict[str, Tensor] = {}

            def observe(sample: LinearSample, rows: Tensor, seen: dict[str, Tensor] = seen) -> None:
                seen[sample.name] = rows

            with simulating(model, statistics, chosen.values(), observe):
                model(*args, **kwargs)
            for name, of_group in statistics.items():
                curve: dict[float, Mapping[str, float]] = {
                    alpha: _losses(of_group, replace(chosen[name], alpha=alpha), seen, outputs)
                    for alpha in alphas
                }
                if any(curve.values()):
                    curves[name] = curve
            if number % update_every == 0 or number == len(samples):
                for name, curve in curves.items():
                    chosen[name] = replace(chosen[name], alpha=choose(curve))
    return [
        replace(
            chosen[planned.name],
            curve=tuple(
                (alpha, sum(losses.values()))
                for alpha, losses in curves.get(planned.name, {}).items()
            ),
        )
        for planned in plans
    ]


def _losses(
    statistics: GroupStatistics,
    planned: GroupPlan,
    seen: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
) -> dict[str, float]:
    found = {}
    for linear in fake_quantized(statistics, planned):
        name = linear.sample.name
        y, x = outputs.get(name), seen.get(name)
        # An expert that the quantized pass routes other tokens to has nothing to compare with.
        if y is None or x is None or len(x) != len(y):
            continue
        found[name] = LOCAL_LOSSES["sqrt_abs"](y, linear(x) - y) * y.numel()
    return found


@contextmanager
def _recording_outputs(
    model: nn.Module, statistics: Mapping[str, GroupStatistics], outputs: dict[str, Tensor]
) -> Iterator[None]:
    """Run a block that keeps each linear's output, without bias, fp32 [rows, out_features]."""

    def keep(name: str) -> Callable[..., None]:
        def hook(linear: nn.Linear, _args: Any, _kwargs: Any, y: Tensor) -> None:
            bias = 0.0 if linear.bias is None else linear.bias.float()
            outputs[name] = y.float().reshape(-1, y.shape[-1]) - bias

        return hook

    hooks = [
        (model.get_submodule(sample.name), keep(sample.name))
        for of_group in statistics.values()
        for sample in of_group.samples
    ]
    with hooked(after=hooks):
        yield
