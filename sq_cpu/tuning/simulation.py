"""Linears that compute as if they were quantized, while the model stays as it is.

Plain torch, in the numerics of the kernels: for searches, which try much and keep little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sq_cpu.models.hooks import hooked
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.smoothing.plan import GroupPlan
from sq_cpu.smoothing.scales import as_planned, planned_scale
from sq_cpu.smoothing.statistics import GroupStatistics

__all__ = ["fake_quantized", "simulating"]


def fake_quantized(
    statistics: GroupStatistics, planned: GroupPlan
) -> Iterator[FakeQuantizedLinear]:
    """Yield the linears of a group as its plan has them quantized; none where it has none."""
    if statistics.samples:
        statistics = as_planned(statistics, planned)
        yield from statistics.fake_quantized(planned_scale(planned, statistics))


@contextmanager
def simulating(
    model: nn.Module,
    statistics: Mapping[str, GroupStatistics],
    plans: Iterable[GroupPlan],
    observe: Callable[[LinearSample, Tensor], object] = lambda _, __: None,
    *,
    hold: bool = False,
    counted: Callable[[Tensor], Tensor | None] = lambda _: None,
) -> Iterator[None]:
    """Run a block in which the groups' linears compute as planned.

    `statistics` has the groups by name; `observe` is called with each linear's sample and the rows
    of its input, of the model's dtype [rows, in_features]. With `hold` each linear's range and
    quantized weight are found once, and the weight is kept in fp32. `counted` tells which rows of
    an input [..., in_features] are quantized, bool [rows]; None: all.
    """
    hooks = [
        (model.get_submodule(linear.sample.name), _quantized(linear, observe, hold, counted))
        for planned in plans
        for linear in fake_quantized(statistics[planned.name], planned)
    ]
    with hooked(after=hooks):
        yield


def _quantized(
    fake: FakeQuantizedLinear,
    observe: Callable[[LinearSample, Tensor], object],
    hold: bool,
    counted: Callable[[Tensor], Tensor | None],
) -> Callable[..., Tensor]:
    def hook(linear: nn.Linear, args: Any, kwargs: Any, y: Tensor) -> Tensor:
        x = args[0] if args else kwargs["input"]
        rows = x.reshape(-1, x.shape[-1])
        observe(fake.sample, rows)
        # A copy keeps what it finds for itself.
        made = (fake if hold else replace(fake))(rows)
        if linear.bias is not None:
            made = made + linear.bias.float()
        made = made.to(y.dtype).reshape(y.shape)
        kept = counted(x)
        return made if kept is None else made.where(kept.view(*y.shape[:-1], 1), y)

    return hook
