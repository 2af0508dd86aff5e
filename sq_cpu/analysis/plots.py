"""The pictures of a report: what an `Analysis` found, and the trials of a search."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sq_cpu.analysis.analysis import GroupAnalysis, LinearAnalysis
from sq_cpu.analysis.figures import THEME, Picture, new_figure, picture_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "KINDS",
    "alphas",
    "clip_rates",
    "errors",
    "heat_maps",
    "loss_curves",
    "pareto",
    "worst_groups",
]

KINDS = 16
"""Kinds of layers that get a picture each: a language model has 4 to 8, some models dozens."""

_COLUMNS = 192  # of a heat map: more are finer than a screen's pixels
_ROWS = 128
_CELLS = 60  # of the loss curves of one kind
_STRIPS = 6

_INK, _MUTED, _GRID, _BEFORE, _AFTER = (
    THEME[name][0] for name in ("ink", "muted", "grid", "before", "after")
)

# --- figures ------------------------------------------------------------------------------------


def heat_maps(groups: Sequence[GroupAnalysis]) -> tuple[Picture, ...]:
    """Return, for each kind of group, absmax over blocks and channels before and after smoothing.

    The activations come first, then the weights. Both parts of a picture share one logarithmic
    scale.
    """
    pictures: list[Picture] = []
    for kind, members in _greatest(_by_kind(groups), lambda group: group.severity).items():
        for what, symbol in (("activations", "|X|"), ("weights", "|W|")):
            stem = "act_absmax" if what == "activations" else "weight_absmax"
            pair = [_image([getattr(g, stem + s) for g in members]) for s in ("", "_smoothed")]
            peaks = [float(image.max()) for image in pair]
            with new_figure(3.3) as figure:
                _draw_pair(figure, pair, members, f"max {symbol}")
                pictures.append(
                    picture_of(
                        figure,
                        f"{what}-{kind}",
                        f"{kind}: {what}",
                        f"Heat maps of the {what} of {kind}, max {symbol} by block and input "
                        f"channel. Largest {peaks[0]:.3g} before smoothing, {peaks[1]:.3g} after.",
                    )
                )
    return tuple(pictures)


def worst_groups(groups: Sequence[GroupAnalysis], count: int = 6) -> tuple[Picture, ...]:
    """Return the channels' absmax of the groups with the greatest outlier severity."""
    pictures: list[Picture] = []
    for group in sorted(groups, key=lambda g: -g.severity)[:count]:
        with new_figure(2.6) as figure:
            axes = figure.subplots(2, 1, sharex=True)
            pairs = (
                (group.act_absmax, group.act_absmax_smoothed, "max |X|"),
                (group.weight_absmax, group.weight_absmax_smoothed, "max |W|"),
            )
            for ax, (before, after, label) in zip(axes, pairs, strict=True):
                _draw_bars(ax, before, after, label)
            axes[1].set_xlabel("input channel")
            axes[0].legend(ncols=2, loc="lower right", bbox_to_anchor=(1.02, 0.96), borderpad=0)
            pictures.append(
                picture_of(
                    figure,
                    f"worst-{len(pictures) + 1}",
                    f"{group.name} \N{RIGHTWARDS ARROW} {group.kind}",
                    f"max |X| and max |W| of each input channel of {group.name} before and after "
                    f"smoothing. Outlier severity {group.severity:.1f} before, "
                    f"{group.severity_smoothed:.1f} after.",
                )
            )
    return tuple(pictures)


def alphas(groups: Sequence[GroupAnalysis]) -> tuple[Picture, ...]:
    """Return alpha along the depth of the model; nothing when it is the same for all."""
    planned = [group for group in groups if group.alpha is not None]
    if len({group.alpha for group in planned}) < 2:
        return ()
    lines = _along_depth("alpha", planned, lambda group: group.alpha or 0.0, "alpha", 1.0)
    return tuple(lines)


def loss_curves(groups: Sequence[GroupAnalysis]) -> tuple[Picture, ...]:
    """Return the loss over alpha of every group that has a curve, as small multiples by kind."""
    pictures: list[Picture] = []
    for kind, members in _by_kind([g for g in groups if len(g.curve) > 1]).items():
        # Where there are too many, those with the widest range.
        shown = sorted(members, key=lambda g: -_span(g))[:_CELLS]
        shown = [group for group in members if group in shown]
        top = max(float(np.quantile([_span(g) for g in shown], 0.8)), 1.05)
        columns = min(6, len(shown))
        rows = math.ceil(len(shown) / columns)
        with new_figure(0.4 + 0.5 * rows) as figure:
            _draw_cells(figure.subplots(), shown, columns, rows, top)
            pictures.append(
                picture_of(
                    figure,
                    f"curves-{kind}",
                    kind,
                    f"Loss over alpha of {len(shown)} of {len(members)} groups {kind}, a small "
                    f"curve each, from its least to {top:.3g} times that, with a dot at the "
                    "chosen alpha.",
                )
            )
    return tuple(pictures)


def errors(linears: Sequence[LinearAnalysis]) -> tuple[Picture, ...]:
    """Return the output error along the depth, naive and with the plan, of each kind of linear."""
    values = [e for one in linears for e in (one.error_naive, one.error) if e > 0]
    if not values:
        return ()
    limits = min(values) / 1.5, max(values) * 1.5
    pictures: list[Picture] = []
    for kind, members in _greatest(_by_kind(linears), lambda one: one.error_naive).items():
        with new_figure(2.0) as figure:
            ax = figure.subplots()
            _draw_line(ax, members, lambda x: x.error_naive, _BEFORE, label="naive", marker="s")
            _draw_line(ax, members, lambda x: x.error, _AFTER, label="plan", marker="o")
            kept = [one for one in members if one.in_float]
            if kept:
                ax.plot(
                    [one.depth for one in kept],
                    [one.error for one in kept],
                    "o",
                    markersize=7,
                    markerfacecolor="none",
                    markeredgecolor=_INK,
                    label="left in float",
                )
            ax.set_yscale("log")
            ax.set_ylim(*limits)
            _decimal_ticks(ax, percent=True)
            _label(ax, members, "output error")
            _legend_above(ax)
            naive, planned = (
                max(getattr(one, key) for one in members) for key in ("error_naive", "error")
            )
            pictures.append(
                picture_of(
                    figure,
                    f"error-{kind}",
                    kind,
                    f"Output error of {kind} along the blocks, at most {naive:.2%} naive and "
                    f"{planned:.2%} with the plan.",
                )
            )
    return tuple(pictures)


def clip_rates(linears: Sequence[LinearAnalysis]) -> tuple[Picture, ...]:
    """Return the share of input values beyond the static range; nothing where none is."""
    return _shares("clip", linears, lambda one: one.clipped, "clipped, %")


def row_rates(linears: Sequence[LinearAnalysis]) -> tuple[Picture, ...]:
    """Return the share of input rows that do not fit the static scale; nothing where all do."""
    label = "rows that do not fit, %"
    return _shares("rows", linears, lambda one: one.rows_clipped + one.rows_underflowed, label)


def _shares(
    name: str,
    linears: Sequence[LinearAnalysis],
    share: Callable[[LinearAnalysis], float],
    label: str,
) -> tuple[Picture, ...]:
    kinds = {one.kind for one in linears if share(one)}
    shown = [one for one in linears if one.kind in kinds]
    top = 100 * max(map(share, shown), default=0.0)
    return tuple(_along_depth(name, shown, lambda one: 100 * share(one), label, top))


def pareto(
    trials: Sequence[tuple[float, float, str]], front: Sequence[tuple[float, float, str]]
) -> Picture:
    """Return loss over latency: (milliseconds, loss in percent, label) of all trials and the front.

    The front is sorted by milliseconds; its points are labelled.
    """
    with new_figure(2.9) as figure:
        ax = figure.subplots()
        others = [trial for trial in trials if trial not in front]
        if others:
            xs, ys = [t[0] for t in others], [t[1] for t in others]
            ax.plot(xs, ys, "o", color=_MUTED, markersize=3.5, alpha=0.7, label="other trials")
        xs, ys = [t[0] for t in front], [t[1] for t in front]
        ax.plot(xs, ys, color=_AFTER, drawstyle="steps-post", linewidth=1)
        ax.plot(xs, ys, "D", color=_AFTER, markersize=4.5, label="Pareto front, linears in float")
        for x, y, label in front:
            # No trial is below and to the left of the front, so the label hides none.
            ax.annotate(label, (x, y), (-3, -3), textcoords="offset points", ha="right", va="top")
        ax.margins(0.12)
        ax.grid(True, axis="both")
        ax.set_axisbelow(True)
        ax.set_xlabel("latency, ms")
        ax.set_ylabel("loss against float, %")
        _legend_above(ax)
        points = "; ".join(f"{label}: {x:.3g} ms, {y:+.2f} %" for x, y, label in front)
        return picture_of(
            figure, "trials", "", f"Loss over latency of {len(trials)} trials. Front: {points}."
        )


# --- how they are drawn -------------------------------------------------------------------------

_Layer = TypeVar("_Layer", GroupAnalysis, LinearAnalysis)


def _by_kind(layers: Iterable[_Layer]) -> dict[str, list[_Layer]]:
    """Return the layers of each kind, both in the order of the model."""
    kinds: dict[str, list[_Layer]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, []).append(layer)
    return kinds


def _greatest(
    kinds: dict[str, list[_Layer]], value: Callable[[_Layer], float]
) -> dict[str, list[_Layer]]:
    """Return the kinds with the greatest values, where there are too many for a page."""
    ranked = sorted(kinds, key=lambda kind: -max(map(value, kinds[kind])))[:KINDS]
    return {kind: layers for kind, layers in kinds.items() if kind in ranked}


def _pooled(values: NDArray[Any], size: int) -> NDArray[Any]:
    """Stretch or shrink the last axis to `size`, where it shrinks by the maximum."""
    count = values.shape[-1]
    starts = np.arange(size) * count // size
    stops = np.maximum(starts + 1, -(-(np.arange(size) + 1) * count // size))
    parts = [values[..., i:j].max(axis=-1) for i, j in zip(starts, stops, strict=True)]
    return np.stack(parts, axis=-1)


def _image(rows: Sequence[Tensor]) -> NDArray[Any]:
    columns = min(_COLUMNS, max(len(row) for row in rows))
    image = np.stack([_pooled(row.numpy(), columns) for row in rows])
    return image if len(image) <= _ROWS else _pooled(image.T, _ROWS).T


def _draw_pair(
    figure: Figure, pair: Sequence[NDArray[Any]], members: Sequence[GroupAnalysis], label: str
) -> None:
    from matplotlib.colors import LogNorm

    alive = np.concatenate([image[image > 0] for image in pair])
    largest = float(alive.max()) if alive.size else 1.0
    least = max(float(alive.min()) if alive.size else 0.1, largest / 1e4)
    norm = LogNorm(min(least, largest * 0.9), largest)
    sizes = {len(group.act_absmax) for group in members}
    width = max(sizes) if len(sizes) == 1 else 100
    first = {g.depth: row for row, g in reversed(list(enumerate(members)))}
    shown_depths = _thinned(sorted(first))
    axes = figure.subplots(2, 1, sharex=True)
    for ax, image, title in zip(axes, pair, ("before", "after"), strict=True):
        shown = ax.imshow(
            np.ma.masked_less_equal(image, 0),
            norm=norm,
            cmap="viridis",
            aspect="auto",
            interpolation="none",
            extent=(0, width, len(members), 0),
        )
        ax.set_title(title)
        ax.set_ylabel("block")
        ax.set_yticks([first[depth] + 0.5 for depth in shown_depths], map(str, shown_depths))
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
    axes[1].set_xlabel("input channel" if len(sizes) == 1 else "input channel, % of all")
    bar = figure.colorbar(shown, ax=axes, label=label, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    _decimal_ticks(bar.ax)


def _thinned(values: Sequence[int]) -> Sequence[int]:
    """Return at most six of the values, evenly spaced."""
    steps = (digit * 10**power for power in range(9) for digit in (1, 2, 5))
    return values[:: next(step for step in steps if 5 * step >= len(values) - 1)]


def _draw_bars(ax: Axes, before: Tensor, after: Tensor, label: str) -> None:
    size = min(_COLUMNS, len(before))
    edges = np.linspace(0, len(before), size + 1)
    pooled = [_pooled(values.numpy(), size) for values in (before, after)]
    alive = np.concatenate([values[values > 0] for values in pooled])
    floor = float(alive.min()) / 1.5 if alive.size else 0.1
    for values, colour, name in zip(pooled, (_BEFORE, _AFTER), ("before", "after"), strict=True):
        values = np.maximum(values, floor)
        ax.stairs(values, edges, baseline=floor, fill=True, color=colour, alpha=0.25, linewidth=0)
        ax.stairs(values, edges, baseline=None, color=colour, linewidth=0.8, label=name)
    ax.set_yscale("log")
    ax.set_ylim(bottom=floor)
    ax.set_xlim(0, len(before))
    _decimal_ticks(ax)
    ax.grid(True)
    ax.set_axisbelow(True)
    ax.set_ylabel(label)


def _along_depth(
    name: str,
    layers: Sequence[_Layer],
    value: Callable[[_Layer], float],
    label: str,
    top: float,
) -> Iterator[Picture]:
    """Yield values over the blocks, from 0 to `top`: a strip for each kind of layer."""
    kinds = list(_by_kind(layers).items())
    for start in range(0, len(kinds), _STRIPS):
        part = kinds[start : start + _STRIPS]
        with new_figure(0.45 + 0.8 * len(part)) as figure:
            axes = figure.subplots(len(part), 1, sharex=True, squeeze=False)[:, 0]
            for ax, (kind, members) in zip(axes, part, strict=True):
                _draw_line(ax, members, value, _AFTER, label=kind, marker="o")
                ax.set_ylim(-0.05 * top, 1.05 * top)
                ax.set_title(kind)
                _label(ax, members, label)
                ax.label_outer()
            spans = [(kind, [value(member) for member in members]) for kind, members in part]
            said = "; ".join(f"{kind} {min(of):.3g} to {max(of):.3g}" for kind, of in spans)
            number = start // _STRIPS + 1
            yield picture_of(figure, f"{name}-{number}", "", f"{label} along the blocks: {said}.")


def _draw_line(
    ax: Axes,
    layers: Sequence[_Layer],
    value: Callable[[_Layer], float],
    colour: str,
    *,
    label: str,
    marker: str,
) -> None:
    """Draw the mean of each block, and its range where the block has several layers."""
    at: dict[int, list[float]] = {}
    for layer in layers:
        at.setdefault(layer.depth, []).append(value(layer))
    depths = sorted(at)
    means = [sum(at[depth]) / len(at[depth]) for depth in depths]
    if len(depths) < len(layers):
        low, high = [min(at[depth]) for depth in depths], [max(at[depth]) for depth in depths]
        ax.fill_between(depths, low, high, color=colour, alpha=0.2, linewidth=0)
    ax.plot(depths, means, color=colour, marker=marker, label=label)


def _span(group: GroupAnalysis) -> float:
    """Return the ratio of a group's greatest loss to its least."""
    losses = [loss for _, loss in group.curve]
    return max(losses) / min(losses) if min(losses) > 0 else 1.0


def _draw_cells(
    ax: Axes, groups: Sequence[GroupAnalysis], columns: int, rows: int, top: float
) -> None:
    from matplotlib.collections import LineCollection

    width, height = 0.82, 0.64
    lines, floors, chosen = [], [], []
    for index, group in enumerate(groups):
        left, base = index % columns, rows - 1 - index // columns
        least = min(loss for _, loss in group.curve)

        def place(
            alpha: float, loss: float, left: int = left, base: int = base, least: float = least
        ) -> tuple[float, float]:
            over = math.log(loss / least) / math.log(top) if least > 0 and loss > 0 else 0.0
            return left + width * alpha, base + height * min(max(over, 0.0), 1.0)

        points = [place(*point) for point in group.curve]
        lines.append(points)
        floors.append([(left, base), (left + width, base)])
        nearest = min(group.curve, key=lambda p: abs(p[0] - (group.alpha or 0.0)))
        if group.alpha is not None:
            chosen.append(place(group.alpha, nearest[1]))
        place_of_label = left + width / 2, base - 0.06
        ax.text(
            *place_of_label, f"{group.depth}", fontsize=6.5, color=_MUTED, ha="center", va="top"
        )
    ax.add_collection(LineCollection(floors, colors=_GRID, linewidths=0.6))
    ax.add_collection(LineCollection(lines, colors=_AFTER, linewidths=1.0))
    ax.plot([x for x, _ in chosen], [y for _, y in chosen], "o", color=_BEFORE, markersize=3)
    ax.set_title(f"full height: {top:.3g} times the least loss")
    ax.set_xlim(-0.04, columns)
    ax.set_ylim(-0.3, rows - 0.3)
    ax.set_axis_off()


def _label(ax: Axes, layers: Sequence[_Layer], y: str) -> None:
    ax.set_xlabel("block")
    ax.set_ylabel(y)
    ax.set_xticks(_thinned(sorted({layer.depth for layer in layers})))
    ax.grid(True)
    ax.set_axisbelow(True)


def _legend_above(ax: Axes) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0.1)


def _decimal_ticks(ax: Axes, *, percent: bool = False) -> None:
    """Label a logarithmic y axis with plain numbers, at 1, 2 and 5 where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = ax.get_ylim()
    decades = math.log10(high / low) if low > 0 else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0, 3.0) if decades < 2.8 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    scale, unit = (100, " %") if percent else (1, "")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:.6g}{unit}"))
    ax.yaxis.set_minor_locator(NullLocator())
