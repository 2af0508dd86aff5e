"""Linears that compute as if they were quantized, while the model stays as it is.

Plain torch, in the numerics of the kernels: for searches, which try much and keep little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from sq_cpu.models.hooks import removing
from sq_cpu.numerics.fake_quant import LinearSample, quantized_rows, quantized_weight
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.statistics import GroupStatistics

__all__ = ["simulating", "smoothing_of"]


def smoothing_of(statistics: GroupStatistics, planned: GroupPlan) -> Tensor:
    """Return s of a group's linears, fp32 [in_features]."""
    return statistics.widen(smoothing_scale(planned.rule, statistics, planned.alpha))


@contextmanager
def simulating(
    model: nn.Module,
    statistics: Mapping[str, GroupStatistics],
    plans: Iterable[GroupPlan],
    see: Callable[[LinearSample, Tensor], object] = lambda _, __: None,
    *,
    hold: bool = False,
) -> Iterator[None]:
    """Run a block in which the groups' linears compute as planned.

    `statistics` has the groups by name; `see` is told each linear's sample and the rows of its
    input, of the model's dtype [rows, in_features]. With `hold` each linear's quantized weight is
    made once, and kept in fp32.
    """
    handles = [
        model.get_submodule(sample.name).register_forward_hook(
            _quantized(sample, scheme, smoothing_of(of_group, planned), planned.clip, see, hold),
            with_kwargs=True,
        )
        for planned in plans
        for of_group in (statistics[planned.name],)
        if of_group.samples
        for sample, scheme in of_group.quantized()
    ]
    with removing(handles):
        yield


def _quantized(
    sample: LinearSample,
    scheme: Scheme,
    s: Tensor,
    clip: float,
    see: Callable[[LinearSample, Tensor], object],
    hold: bool,
) -> Callable[..., Tensor]:
    held = quantized_weight(sample, s, scheme) if hold else None

    def hook(linear: nn.Linear, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        rows = x.reshape(-1, x.shape[-1])
        see(sample, rows)
        weight = quantized_weight(sample, s, scheme) if held is None else held
        made = quantized_rows(rows.float(), sample, s, scheme, clip) @ weight.T
        if linear.bias is not None:
            made = made + linear.bias.float()
        return made.to(y.dtype).reshape(y.shape)

    return hook
