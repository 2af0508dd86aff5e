"""Choose smoothing and static clip of every group from one calibration, without running the model.

A group's alpha is sought on a grid and then by golden section; each is scored on the calibration's
sampled rows with the numerics of the kernels. Of several batches, rows are scored that did not take
part in the channels' ranges (`Calibration.held_out`): at a large alpha every channel just reaches
the static scale's end, so on the rows that made the range nothing ever clips, and on others much
does. Ranges by percentile or squared error, which are found on rows, see those that are scored.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.calls import Batch
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.numerics.fake_quant import quantized_weight
from sq_cpu.numerics.golden_section import argmin
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import (
    GroupPlan,
    LayerPlan,
    SmoothPlan,
    quantized_consumers,
    uniform_plan,
)
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.scales import group_statistics
from sq_cpu.smoothing.statistics import GroupStatistics
from sq_cpu.tuning.inc_auto_alpha import auto_alpha
from sq_cpu.tuning.losses import NEGLIGIBLE, check_loss, default_loss, loss_of, of_parts
from sq_cpu.tuning.sequential import QuantizedPrefix, is_inside

__all__ = ["OUTLIERS", "Criterion", "tune"]

Criterion = Literal["mean", "min", "max"]
Curve = Mapping[float, Mapping[str, float]]
"""The loss of every linear at each alpha that was tried."""

OUTLIERS = 4
"""Channels that a linear may keep in float, unless told otherwise."""

# Of the calibrated range: below 1 rare large values clip and all others are rounded more finely;
# above 1 there is room for values that calibration did not see.
_CLIPS = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2)
# A channel is massive from so many times the median channel's absmax on. In SmolLM2 two of the 30
# down_proj gain sevenfold by keeping theirs in float, of 275 and 1730 times; the others gain less
# than half.
_MASSIVE = 16.0
_GOLDEN_STEPS = 4  # a bracket of two grid steps, 0.1, shrinks to 0.015


def tune(
    model: nn.Module,
    calibration: Calibration,
    *,
    scheme: str | Scheme = "O3",
    loss: str | None = None,
    criterion: Criterion = "mean",
    block_wise: bool = False,
    alphas: tuple[float, float, float] = (0.0, 1.0, 0.05),
    sequential: bool = False,
    clip: bool = True,
    outliers: int = OUTLIERS,
    method: Literal["offline", "inc"] = "offline",
    batches: Iterable[Batch] | None = None,
    progress: bool | None = None,
) -> SmoothPlan:
    """Return the plan whose alphas, clips of static scales and outliers give the least loss.

    Each group is scored alone, on the float model's inputs unless `sequential`; the model is not
    changed. The result depends on nothing but the arguments. Extra memory is a few times one
    group's weights in fp32 (one for each of the 4 folds, and what the search is at), and one
    group's sampled rows; with `block_wise` those of a block; with `sequential` the batches' hidden
    states between two blocks, too, and one block's weights in fp32.

    Parameters
    ----------
    loss : one of `losses.LOSSES`, optional
        "kl" (nats that the model's prediction moves by; needs `calibrate(..., gradient_rows=)`),
        "nmse", "mse", "aqas" or "sqrt_abs". None: "kl" where the calibration has gradients, and
        "nmse" otherwise.
    criterion : "mean", "min" or "max"
        For linears that share an input: the alpha of the least summed loss, or the least or
        greatest of the alphas that are best for each.
    block_wise : bool
        One alpha, and one clip, for all groups of a decoder block: that of the least sum.
    alphas : (least, greatest, step)
        The grid, which a golden-section search then refines.
    sequential : bool
        Score each decoder block on the inputs that the blocks before it, quantized as tuned, give
        it on `batches`, which are to be those of the calibration. For a model with one stack of
        blocks; what is outside of it, and linears that not every token reaches, are scored on the
        float model's inputs. It runs every block twice on the batches.
    clip : bool
        Search a static scale's clip, too (`GroupPlan.clip`); dynamic schemes have none.
    outliers : int
        Greatest number of a linear's input channels that may stay in float (`LayerPlan.outliers`).
        They are those of massive activations, whose absmax is 16 times the median channel's or
        more. They do where that halves the loss of their group, and by more than
        `losses.NEGLIGIBLE`. 0: none.
    method : "offline" or "inc"
        "inc" is Neural Compressor's auto-alpha (see `inc_auto_alpha`), a baseline: it runs the
        model on `batches`, and takes of these settings only `criterion` and `alphas`.
    batches : iterable, optional
        As for `calibrate`; for `sequential` and "inc" alone.

    Raises
    ------
    SqCpuError
        For an unknown scheme, loss or criterion, negative `outliers`, alphas outside [0, 1], a
        calibration without sampled rows (or gradients, for "kl"), and weights that changed since
        it; with `sequential` for other batches, and a model whose blocks are not one chain.
    """
    scheme = Scheme.of(scheme).resolve(has_vnni())
    loss = loss or default_loss(calibration)
    check_loss(loss)
    if criterion not in get_args(Criterion):
        raise SqCpuError(f"criterion is {criterion!r}; it is one of {get_args(Criterion)}")
    if method not in ("offline", "inc"):
        raise SqCpuError(f'method is {method!r}; it is "offline" or "inc"')
    if sequential and method == "inc":
        raise SqCpuError('method="inc" has its own way of running the model: drop sequential')
    if outliers < 0:
        raise SqCpuError(f"outliers={outliers}: a number of channels is >= 0")
    grid = _grid(alphas)
    with linearized(model):
        groups = {group.name: group for group in smoothing_groups(model)}
        uniform = uniform_plan(model, groups.values(), calibration, ignore=scheme.ignore)
        if batches is None and (sequential or method == "inc"):
            which = 'method="inc"' if method == "inc" else "sequential=True"
            raise SqCpuError(f"{which} runs the model: pass batches, as to calibrate")
        if method == "inc":
            assert batches is not None
            choose = CRITERIA[criterion]
            plans = auto_alpha(
                model, groups, uniform.groups, calibration, batches, scheme, grid, choose, progress
            )
            return SmoothPlan(tuple(plans), scheme=scheme)
        search = _Search(
            tokens=calibration.tokens,
            loss=loss,
            criterion=criterion,
            grid=grid,
            clips=_CLIPS if clip and scheme.activations == "static" else (1.0,),
        )

        def best(
            unit: list[GroupPlan], seen: Calibration, layers: Sequence[LayerPlan] = ()
        ) -> _Found:
            departing = SmoothPlan((), tuple(layers))
            return search.best(
                [
                    _Scored(p, _statistics(model, groups[p.name], seen, scheme, departing))
                    for p in unit
                ]
            )

        tuned: dict[str, GroupPlan] = {}
        layers: dict[str, LayerPlan] = {}
        units = _units(uniform, groups, block_wise)
        fed: Iterable[_Fed] = [(unit, calibration) for unit in units]
        if sequential:
            assert batches is not None
            prefix = QuantizedPrefix(model, calibration, batches, groups, scheme)
            fed = _block_by_block(units, groups, prefix, calibration, tuned, layers)
        for unit, seen in track(fed, "tuning alpha", progress, total=len(units)):
            found = best(unit, seen)
            massive = {
                planned.name: linears
                for planned in unit
                if (linears := _massive(model, groups[planned.name], seen, scheme, outliers))
            }
            if massive:
                found, kept = _keeping(massive, found, partial(best, unit, seen), loss)
                layers |= {layer.name: layer for layer in kept}
            tuned |= {planned.name: planned for planned in found.plans}
    # Named as the uniform plan is, so in the model's order.
    return SmoothPlan(
        tuple(tuned[group.name] for group in uniform.groups), tuple(layers.values()), scheme
    )


def _grid(alphas: tuple[float, float, float]) -> tuple[float, ...]:
    try:
        least, greatest, step = map(float, alphas)
    except (TypeError, ValueError):
        raise SqCpuError(f"alphas={alphas!r} is not (least, greatest, step)") from None
    if not (0 <= least <= greatest <= 1 and 0 < step < math.inf):
        raise SqCpuError(f"alphas={alphas!r}: need 0 <= least <= greatest <= 1 and a positive step")
    steps = math.floor((greatest - least) / step + 1e-6)
    # Rounded, so that 3 * 0.05 is the 0.15 that a reader of the plan expects.
    return tuple(round(least + index * step, 6) for index in range(steps + 1))


def _units(
    plan: SmoothPlan, groups: dict[str, SmoothingGroup], block_wise: bool
) -> list[list[GroupPlan]]:
    """Return the groups that share a choice, in lists."""
    units: dict[str, list[GroupPlan]] = {}
    for planned in plan.groups:
        block = groups[planned.name].block
        units.setdefault(block if block_wise and block else planned.name, []).append(planned)
    return list(units.values())


_Fed = tuple[list[GroupPlan], Calibration]
"""Groups that share a choice, and the calibration that they are scored on."""


def _block_by_block(
    units: Sequence[list[GroupPlan]],
    groups: Mapping[str, SmoothingGroup],
    prefix: QuantizedPrefix,
    calibration: Calibration,
    tuned: Mapping[str, GroupPlan],
    layers: Mapping[str, LayerPlan],
) -> Iterator[_Fed]:
    """Yield the units of each block in its turn, then those outside of the blocks."""
    rest = list(units)
    for block, seen in prefix.blocks(tuned, layers):
        inside = [is_inside(groups[unit[0].name], block) for unit in rest]
        yield from ((unit, seen) for unit, here in zip(rest, inside, strict=True) if here)
        rest = [unit for unit, here in zip(rest, inside, strict=True) if not here]
    yield from ((unit, calibration) for unit in rest)


class _Scored:
    """A group, with what each fold knows of it."""

    def __init__(self, planned: GroupPlan, folds: Sequence[GroupStatistics]) -> None:
        self.planned = planned
        self._folds = folds
        # Of the alpha asked for last: many clips are tried with one, and weights take most time.
        self._alpha = math.nan
        self._scales: list[Tensor] = []
        self._weights: list[list[Tensor]] = []

    def _quantize_weights(self, alpha: float) -> None:
        self._alpha = alpha
        self._weights = []  # freed before the next are made
        self._scales = [
            of_fold.widen(smoothing_scale("smoothquant", of_fold, alpha)) for of_fold in self._folds
        ]
        self._weights = [
            [quantized_weight(sample, s, scheme) for sample, scheme in of_fold.quantized()]
            for of_fold, s in zip(self._folds, self._scales, strict=True)
        ]

    @torch.no_grad()
    def losses(self, loss: str, tokens: int, alpha: float, clip: float) -> dict[str, float]:
        """Return each linear's loss over all folds."""
        if alpha != self._alpha:
            self._quantize_weights(alpha)
        found: dict[str, list[float]] = {}
        for of_fold, s, weights in zip(self._folds, self._scales, self._weights, strict=True):
            for (sample, scheme), weight in zip(of_fold.quantized(), weights, strict=True):
                value = loss_of(loss, sample, s, weight, scheme, clip, tokens)
                found.setdefault(sample.name, []).append(value)
        return {name: of_parts(loss, values) for name, values in found.items()}


@dataclass(frozen=True)
class _Found:
    """The plans of groups that share a choice, and the loss of each by its name."""

    plans: list[GroupPlan]
    losses: Mapping[str, float]


def _keeping(
    massive: Mapping[str, Sequence[LayerPlan]],
    without: _Found,
    best: Callable[[Sequence[LayerPlan]], _Found],
    loss: str,
) -> tuple[_Found, list[LayerPlan]]:
    """Return what `best` finds where those groups keep their channels that gain by it, and these.

    `massive` has by group the linears with massive channels, `without` what is found without.
    """

    def gains(name: str, found: _Found) -> bool:
        before, after = without.losses[name], found.losses[name]
        return after <= 0.5 * before and before - after > NEGLIGIBLE.get(loss, 0.0)

    found = best([layer for linears in massive.values() for layer in linears])
    worth = [name for name in massive if gains(name, found)]
    kept = [
        replace(layer, note=f"massive activations; {loss} {without.losses[name]:.3g} without")
        for name in worth
        for layer in massive[name]
    ]
    if not worth:
        return without, []
    return (found if len(worth) == len(massive) else best(kept)), kept


@dataclass(frozen=True)
class _Search:
    """How the choice that groups share is found."""

    loss: str
    tokens: int
    criterion: Criterion
    grid: tuple[float, ...]
    clips: tuple[float, ...]

    def best(self, groups: Sequence[_Scored]) -> _Found:
        """Return these groups planned with the alpha and clip that suit them best together."""
        tried: dict[tuple[float, float], list[dict[str, float]]] = {}

        def losses(alpha: float, clip: float) -> list[dict[str, float]]:
            if (alpha, clip) not in tried:
                tried[alpha, clip] = [
                    group.losses(self.loss, self.tokens, alpha, clip) for group in groups
                ]
            return tried[alpha, clip]

        def total(alpha: float, clip: float) -> float:
            return _sum(losses(alpha, clip))

        def best_alpha(clip: float, grid: Sequence[float], steps: int) -> float:
            return argmin(lambda alpha: total(alpha, clip), grid, steps)

        def best_clip(alpha: float, first: float) -> float:
            grid = (first, *self.clips)
            return argmin(lambda clip: total(alpha, clip), grid, _GOLDEN_STEPS)

        # Of equals, such as the losses of a linear that the model ignores, the middle is taken.
        grid = sorted(self.grid, key=lambda alpha: abs(alpha - 0.5))
        clip, alpha = 1.0, best_alpha(1.0, grid, _GOLDEN_STEPS)
        if len(self.clips) > 1:
            # Each moves the other, in a wide valley: twice is enough.
            for _ in range(2):
                clip = best_clip(alpha, clip)
                near = [a for a in self.grid if abs(a - alpha) <= _width(self.grid)]
                alpha = best_alpha(clip, (alpha, *near), 0)
        if self.criterion != "mean":
            curve = {a: _merged(losses(a, clip)) for a in (alpha, *self.grid)}
            alpha = CRITERIA[self.criterion](curve)
        plans = [
            replace(
                group.planned,
                alpha=round(alpha, 4),
                clip=round(clip, 4),
                note=_joined(group.planned.note, f"{self.loss} {_sum([of_group]):.3g}"),
                curve=tuple(
                    (a, _sum([values[index]])) for (a, c), values in tried.items() if c == 1.0
                ),
            )
            for index, (group, of_group) in enumerate(zip(groups, losses(alpha, clip), strict=True))
        ]
        pairs = zip(plans, losses(alpha, clip), strict=True)
        return _Found(plans, {planned.name: _sum([of_group]) for planned, of_group in pairs})


def _least_sum(curve: Curve) -> float:
    return min(curve, key=lambda alpha: sum(curve[alpha].values()))


def _best_of_each(curve: Curve) -> list[float]:
    names = {name for losses in curve.values() for name in losses}
    return [min(curve, key=lambda a: curve[a].get(name, math.inf)) for name in names]


CRITERIA: Mapping[Criterion, Callable[[Curve], float]] = {
    "mean": _least_sum,
    "min": lambda curve: min(_best_of_each(curve)),
    "max": lambda curve: max(_best_of_each(curve)),
}
"""How linears that share an input agree on an alpha."""


def _merged(losses: Iterable[dict[str, float]]) -> dict[str, float]:
    return {name: value for of_group in losses for name, value in of_group.items()}


def _width(grid: Sequence[float]) -> float:
    """Return a step and a half of the grid: within it are the neighbours on both sides."""
    return 1.5 * (grid[1] - grid[0]) if len(grid) > 1 else 0.0


def _sum(losses: Iterable[dict[str, float]]) -> float:
    return sum(value for of_group in losses for value in of_group.values())


def _joined(*notes: str) -> str:
    return "; ".join(filter(None, notes))


def _massive(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme,
    most: int,
) -> list[LayerPlan]:
    """Return a group's linears with massive activations, keeping those channels in float."""
    found = []
    for name in quantized_consumers(model, group, calibration, scheme):
        absmax = calibration.absmax(name)
        alive = absmax[absmax > 0]
        massive = int((alive >= _MASSIVE * alive.median()).sum()) if len(alive) else 0
        channels = absmax.topk(min(massive, most)).indices.sort().values.tolist()
        if channels:
            found.append(LayerPlan(name=name, outliers=tuple(channels)))
    return found


def _statistics(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme,
    departing: SmoothPlan,
) -> list[GroupStatistics]:
    """Return what each fold says of a group; one that reached none of it says nothing."""
    found = [
        group_statistics(model, group, held_out, scheme, departing)
        for held_out in calibration.held_out(group.consumers)
        if any(name in held_out.channel_min for name in group.consumers)
    ]
    return found or [group_statistics(model, group, calibration, scheme, departing)]
