"""Choose smoothing and static clip of every group from one calibration, without running the model.

A group's alpha is sought on a grid and then by golden section; each is scored on the calibration's
sampled rows with the numerics of the kernels. Of several batches, rows are scored that did not take
part in the channels' ranges (`Calibration.held_out`): at a large alpha every channel just reaches
the static scale's end, so on the rows that made the range nothing ever clips, and on others much
does. A range that most rows fit (`Scheme.static_range="auto"`) is found, and scored, as it will
run. With any other, no row has its own scale meanwhile (`Scheme.dynamic_fallback`): that costs no
error, but time, so clips that no row fits would win.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Literal, get_args

from torch import nn

from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.calls import Batch
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearized
from sq_cpu.models.unchanged import unchanged
from sq_cpu.numerics.ranges import fits_rows
from sq_cpu.parsing import check_whole
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import (
    AUTO,
    GroupPlan,
    Hadamard,
    LayerPlan,
    SmoothPlan,
    check_rotates,
    uniform_plan,
)
from sq_cpu.smoothing.rotation import is_open, unrotated
from sq_cpu.smoothing.scales import WeightStatistics, group_statistics
from sq_cpu.smoothing.statistics import GroupStatistics
from sq_cpu.tuning.alpha_search import (
    CLIPS,
    CRITERIA,
    AlphaSearch,
    Criterion,
    FoundPlans,
    ScoredGroup,
)
from sq_cpu.tuning.inc_auto_alpha import auto_alpha
from sq_cpu.tuning.losses import check_loss, default_loss
from sq_cpu.tuning.massive import OUTLIERS, keeping, massive_layers
from sq_cpu.tuning.rotating import rotating
from sq_cpu.tuning.sequential import QuantizedPrefix, is_inside

__all__ = ["OUTLIERS", "Criterion", "tune"]


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
    hadamard: Hadamard = AUTO,
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
        Search a static scale's clip, too (`GroupPlan.clip`), where there is one to find: a range
        that most rows fit ("auto") needs none, and dynamic schemes have none.
    outliers : int
        Greatest number of a linear's input channels that may stay in float (`LayerPlan.outliers`).
        They are those of massive activations, whose absmax is 16 times the median channel's or
        more. They do where that halves the loss of their group, and by more than
        `losses.NEGLIGIBLE`. 0: none.
    hadamard : "auto", 64 or 0
        As for `SmoothPlan.uniform`, with "auto" decided here: such a group is searched with a
        rotated input, too, and stays so where that saves 2 % of its loss (`rotation.MARGIN`: less
        is chance, and a rotation at run time has its cost). "inc" takes "auto" for 0.
    method : "offline" or "inc"
        "inc" is Neural Compressor's auto-alpha (see `inc_auto_alpha`), a baseline: it runs the
        model on `batches`, and takes of these settings only `criterion` and `alphas`.
    batches : iterable, optional
        As for `calibrate`; for `sequential` and "inc" alone.

    Raises
    ------
    SqCpuError
        For an unknown scheme, loss, criterion or `hadamard`, a `hadamard` that rotates nothing,
        negative `outliers`, alphas outside [0, 1], a calibration without sampled rows (or
        gradients, for "kl"), and weights that changed since it; with `sequential` for other
        batches, and a model whose blocks are not one chain; with "inc" for one with a prefix.
    """
    check_model(model)
    check_is_calibration(calibration)
    scheme = Scheme.of(scheme).resolve(has_vnni())
    loss = loss or default_loss(calibration)
    check_loss(loss)
    if criterion not in get_args(Criterion):
        raise SqCpuError(f"criterion is {criterion!r}; it is one of {get_args(Criterion)}")
    if method not in ("offline", "inc"):
        raise SqCpuError(f'method is {method!r}; it is "offline" or "inc"')
    if sequential and method == "inc":
        raise SqCpuError('method="inc" has its own way of running the model: drop sequential')
    if calibration.prefix and method == "inc":
        raise SqCpuError(
            'method="inc" knows no prefix, and scores its rows like any: calibrate without prefix, '
            'or take method="offline"'
        )
    check_whole(0, outliers=outliers)
    grid = _grid(alphas)
    with linearized(model), unchanged(model):
        groups = {group.name: group for group in smoothing_groups(model)}
        uniform = uniform_plan(
            model, groups.values(), calibration, ignore=scheme.ignore, hadamard=hadamard
        )
        check_rotates(hadamard, [group.name for group in uniform.groups if group.hadamard])
        if batches is None and (sequential or method == "inc"):
            which = 'method="inc"' if method == "inc" else "sequential=True"
            raise SqCpuError(f"{which} runs the model: pass batches, as to calibrate")
        if method == "inc":
            assert batches is not None
            choose = CRITERIA[criterion]
            fixed = [
                unrotated(planned) if is_open(planned) else planned for planned in uniform.groups
            ]
            plans = auto_alpha(
                model, groups, fixed, calibration, batches, scheme, grid, choose, progress
            )
            return SmoothPlan(tuple(plans), scheme=scheme)
        as_run = fits_rows(scheme)
        clips = CLIPS if clip and scheme.activations == "static" and not as_run else (1.0,)
        scored = scheme if as_run else replace(scheme, dynamic_fallback=False)
        weights = WeightStatistics()
        search = AlphaSearch(
            tokens=calibration.tokens,
            loss=loss,
            criterion=criterion,
            grid=grid,
            clips=clips,
        )

        def folds(
            planned: GroupPlan, seen: Calibration, layers: Sequence[LayerPlan] = ()
        ) -> list[GroupStatistics]:
            group, overrides = groups[planned.name], SmoothPlan((), tuple(layers))
            return _statistics(model, group, seen, scored, overrides, weights)

        def best(
            unit: list[GroupPlan], seen: Calibration, layers: Sequence[LayerPlan] = ()
        ) -> FoundPlans:
            return search.best([ScoredGroup(p, folds(p, seen, layers)) for p in unit])

        def can_rotate(planned: GroupPlan, seen: Calibration) -> bool:
            return all(of_fold.can_rotate for of_fold in folds(planned, seen))

        tuned: dict[str, GroupPlan] = {}
        layers: dict[str, LayerPlan] = {}
        units = _units(uniform, groups, block_wise)
        fed: Iterable[_Fed] = [(unit, calibration) for unit in units]
        if sequential:
            assert batches is not None
            prefix = QuantizedPrefix(model, calibration, batches, groups, scored, weights)
            fed = _block_by_block(units, groups, prefix, calibration, tuned, layers)
        for open_unit, seen in track(fed, "tuning alpha", progress, total=len(units)):
            unit, found = rotating(
                open_unit, groups, partial(can_rotate, seen=seen), partial(best, seen=seen), loss
            )
            massive = {
                planned.name: linears
                for planned in unit
                if not planned.hadamard_fold  # which mixes the channels
                and (linears := massive_layers(model, groups[planned.name], seen, scored, outliers))
            }
            if massive:
                found, kept = keeping(massive, found, partial(best, unit, seen), loss)
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


def _statistics(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme,
    overrides: SmoothPlan,
    weights: WeightStatistics,
) -> list[GroupStatistics]:
    """Return what each fold says of a group; one that reached none of it says nothing."""
    found = [
        group_statistics(model, group, held_out, scheme, overrides, weights)
        for held_out in calibration.held_out(group.consumers)
        if any(name in held_out.channel_min for name in group.consumers)
    ]
    return found or [group_statistics(model, group, calibration, scheme, overrides, weights)]
