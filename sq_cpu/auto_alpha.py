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
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sq_cpu.calibrate import Batch, evaluating, model_inputs
from sq_cpu.calibration import Calibration
from sq_cpu.groups import SmoothingGroup
from sq_cpu.losses import LOCAL_LOSSES
from sq_cpu.plan import GroupPlan
from sq_cpu.rules import GroupStatistics, LinearSample, quantized_output, smoothing_scale
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import group_statistics

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

    Runs the model twice a sample, and every linear once for each alpha; one sample's inputs and
    outputs of all linears are held.
    """
    samples = list(batches)
    statistics = {
        planned.name: group_statistics(model, groups[planned.name], calibration, scheme)
        for planned in plans
    }
    chosen = {planned.name: _FIRST_ALPHA for planned in plans}
    curves: dict[str, dict[float, Mapping[str, float]]] = {}
    update_every = max(1, len(samples) // _UPDATES)
    with evaluating(model):
        inputs = model_inputs(model, samples, "tuning", "auto-alpha", progress)
        for number, (args, kwargs) in enumerate(inputs, start=1):
            outputs: dict[str, Tensor] = {}
            with _watching_outputs(model, statistics, outputs):
                model(*args, **kwargs)
            seen: dict[str, LinearSample] = {}
            with _quantizing(model, statistics, chosen, seen):
                model(*args, **kwargs)
            for name, of_group in statistics.items():
                curve: dict[float, Mapping[str, float]] = {
                    alpha: _losses(of_group, alpha, seen, outputs) for alpha in alphas
                }
                if any(curve.values()):
                    curves[name] = curve
            if number % update_every == 0 or number == len(samples):
                chosen |= {name: choose(curve) for name, curve in curves.items()}
    return [
        replace(
            planned,
            alpha=chosen[planned.name],
            curve=tuple(
                (alpha, sum(losses.values()))
                for alpha, losses in curves.get(planned.name, {}).items()
            ),
        )
        for planned in plans
    ]


def _s(statistics: GroupStatistics, alpha: float) -> Tensor:
    return statistics.widen(smoothing_scale("smoothquant", statistics, alpha))


def _losses(
    statistics: GroupStatistics,
    alpha: float,
    seen: Mapping[str, LinearSample],
    outputs: Mapping[str, Tensor],
) -> dict[str, float]:
    assert statistics.scheme is not None
    s = _s(statistics, alpha)
    found = {}
    for sample in statistics.samples:
        y = outputs.get(sample.name)
        # An expert that the quantized pass routes other tokens to has nothing to compare with.
        if y is None or sample.name not in seen or len(seen[sample.name].inputs()) != len(y):
            continue
        delta = quantized_output(seen[sample.name], s, statistics.scheme) - y
        found[sample.name] = LOCAL_LOSSES["sqrt_abs"](y, delta) * y.numel()
    return found


@contextmanager
def _hooked(
    model: nn.Module,
    statistics: Mapping[str, GroupStatistics],
    hook: Callable[[GroupStatistics, str, LinearSample], Callable[..., Any]],
) -> Iterator[None]:
    handles = [
        model.get_submodule(sample.name).register_forward_hook(
            hook(of_group, group, sample), with_kwargs=True
        )
        for group, of_group in statistics.items()
        for sample in of_group.samples
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watching_outputs(
    model: nn.Module, statistics: Mapping[str, GroupStatistics], outputs: dict[str, Tensor]
) -> AbstractContextManager[None]:
    """Return a context that keeps each linear's output, without bias, fp32 [rows, out_features]."""

    def hook(_: GroupStatistics, __: str, sample: LinearSample) -> Callable[..., Any]:
        def keep(linear: nn.Linear, _: Any, __: Any, y: Tensor) -> None:
            bias = 0.0 if linear.bias is None else linear.bias.float()
            outputs[sample.name] = y.float().reshape(-1, y.shape[-1]) - bias

        return keep

    return _hooked(model, statistics, hook)


def _quantizing(
    model: nn.Module,
    statistics: Mapping[str, GroupStatistics],
    alphas: Mapping[str, float],
    seen: dict[str, LinearSample],
) -> AbstractContextManager[None]:
    """Return a context in which the linears compute as if quantized; `seen` gets their inputs."""

    def hook(of_group: GroupStatistics, group: str, sample: LinearSample) -> Callable[..., Any]:
        s = _s(of_group, alphas[group])

        def quantized(linear: nn.Linear, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            rows = replace(sample, rows=x.reshape(-1, x.shape[-1]))
            seen[sample.name] = rows
            assert of_group.scheme is not None
            made = quantized_output(rows, s, of_group.scheme)
            if linear.bias is not None:
                made = made + linear.bias.float()
            return made.to(y.dtype).reshape(y.shape)

        return quantized

    return _hooked(model, statistics, hook)
