"""The pictures of a report: matplotlib figures of an `Analysis`, as PNG and as SVG for a web page.

matplotlib is imported where it is needed: it takes a while. Its global state (pyplot, a user's
style) is neither read nor changed. A figure is as wide as the column of a phone.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sq_cpu.analysis import GroupAnalysis, LinearAnalysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = [
    "THEME",
    "Picture",
    "alphas",
    "clip_rates",
    "errors",
    "heat_maps",
    "loss_curves",
    "pareto",
    "worst_groups",
]

_WIDTH = 3.7  # inches of 72 points
_COLUMNS = 192  # of a heat map: more are finer than a screen's pixels
_ROWS = 128
_CELLS = 60  # of the loss curves of one kind
_DPI = 200

# By name of the CSS variable: in light and in dark. The light ones are what is drawn with; the
# series are those of Okabe and Ito, darkened to a contrast of 3 on white.
THEME: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e4e8ee"),
    "muted": ("#57606c", "#a2acb9"),
    "grid": ("#d3d8de", "#3a424d"),
    "before": ("#c4500a", "#f58b4c"),
    "after": ("#0069b4", "#5cb3f0"),
    "green": ("#00805c", "#37c59c"),
    "purple": ("#a34882", "#e29ac8"),
    "ochre": ("#8f6400", "#e3b23f"),
    "slate": ("#4b5563", "#bcc5d1"),
}
_INK, _MUTED, _GRID, _BEFORE, _AFTER = (THEME[name][0] for name in list(THEME)[:5])
_SERIES = tuple(light for light, _ in list(THEME.values())[3:])
_MARKERS = "os^Dvp"

_STYLE: dict[str, Any] = {
    "font.size": 8.0,
    "text.parse_math": False,  # names may hold a dollar sign
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _MUTED,
    "axes.titlesize": 8.0,
    "axes.titlelocation": "left",
    "axes.labelsize": 8.0,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "axes.grid.axis": "y",
    "grid.color": _GRID,
    "grid.linewidth": 0.6,
    "xtick.color": _MUTED,
    "ytick.color": _MUTED,
    "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK,
    "xtick.labelsize": 7.5,
    "ytick.labelsize": 7.5,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "lines.linewidth": 1.2,
    "lines.markersize": 3.0,
    "figure.facecolor": "white",
    "svg.fonttype": "none",
    "svg.hashsalt": "sq_cpu",  # the same figure is the same text
    "svg.image_inline": True,
}


@dataclass(frozen=True)
class Picture:
    """A figure; `name` is free of blanks and slashes."""

    name: str
    title: str
    alt: str
    """What it shows, in words and numbers."""
    svg: str
    """An element for a page that defines the variables of `THEME`; ids begin with the name."""
    png: bytes


# --- figures ------------------------------------------------------------------------------------


def heat_maps(groups: Sequence[GroupAnalysis]) -> tuple[Picture, ...]:
    """Return, for each kind of group, absmax over blocks and channels before and after smoothing.

    Of the activations, then of the weights; the two of a picture have one logarithmic scale.
    """
    pictures: list[Picture] = []
    for kind, members in _by_kind(groups).items():
        for what, symbol in (("activations", "|X|"), ("weights", "|W|")):
            stem = "act_absmax" if what == "activations" else "weight_absmax"
            pair = [_image([getattr(g, stem + s) for g in members]) for s in ("", "_smoothed")]
            peaks = [float(image.max()) for image in pair]
            with _figure(3.3) as figure:
                _draw_pair(figure, pair, members, f"max {symbol}")
                pictures.append(
                    _picture(
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
        with _figure(2.6) as figure:
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
                _picture(
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
    lines = _along_depth("alpha", planned, lambda group: group.alpha or 0.0, "alpha", top=1.0)
    return tuple(lines)


def loss_curves(groups: Sequence[GroupAnalysis]) -> tuple[Picture, ...]:
    """Return the loss over alpha of every group that has a curve, as small multiples by kind."""
    pictures: list[Picture] = []
    for kind, members in _by_kind([g for g in groups if len(g.curve) > 1]).items():
        # Those with most to lose, where there are too many.
        shown = sorted(members, key=lambda g: -_span(g))[:_CELLS]
        shown = [group for group in members if group in shown]
        top = max(float(np.quantile([_span(g) for g in shown], 0.8)), 1.05)
        columns = min(6, len(shown))
        rows = math.ceil(len(shown) / columns)
        with _figure(0.25 + 0.5 * rows) as figure:
            _draw_cells(figure.subplots(), shown, columns, rows, top)
            pictures.append(
                _picture(
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
    for kind, members in _by_kind(linears).items():
        with _figure(2.0) as figure:
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
            _label(ax, "block", "output error")
            _legend_above(ax)
            naive, planned = (
                max(getattr(one, key) for one in members) for key in ("error_naive", "error")
            )
            pictures.append(
                _picture(
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
    kinds = {one.kind for one in linears if one.clipped}
    clipped = [one for one in linears if one.kind in kinds]
    return tuple(_along_depth("clip", clipped, lambda one: 100 * one.clipped, "values clipped, %"))


def pareto(
    trials: Sequence[tuple[float, float, str]], front: Sequence[tuple[float, float, str]]
) -> Picture:
    """Return loss over latency: (milliseconds, loss in percent, label) of all trials and the front.

    The front is sorted by milliseconds; its points are labelled.
    """
    with _figure(2.9) as figure:
        ax = figure.subplots()
        others = [trial for trial in trials if trial not in front]
        if others:
            xs, ys = [t[0] for t in others], [t[1] for t in others]
            ax.plot(xs, ys, "o", color=_MUTED, markersize=3.5, alpha=0.7, label="other trials")
        xs, ys = [t[0] for t in front], [t[1] for t in front]
        ax.plot(xs, ys, color=_AFTER, drawstyle="steps-post", linewidth=1)
        ax.plot(xs, ys, "D", color=_AFTER, markersize=4.5, label="Pareto front")
        for x, y, label in front:
            ax.annotate(label, (x, y), (4, 4), textcoords="offset points", fontsize=7)
        ax.margins(0.12)
        ax.grid(True, axis="both")
        ax.set_axisbelow(True)
        ax.set_xlabel("latency, ms")
        ax.set_ylabel("loss against float, %")
        _legend_above(ax)
        points = "; ".join(f"{label}: {x:.3g} ms, {y:+.2f} %" for x, y, label in front)
        return _picture(
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
        ticks = sorted({round(i * (len(members) - 1) / 3) for i in range(4)})
        ax.set_yticks([tick + 0.5 for tick in ticks], [str(members[i].depth) for i in ticks])
        for side in ("left", "bottom"):
            ax.spines[side].set_visible(False)
    axes[1].set_xlabel("input channel" if len(sizes) == 1 else "input channel, % of all")
    bar = figure.colorbar(shown, ax=axes, label=label, aspect=30, pad=0.02)
    bar.outline.set_visible(False)
    _decimal_ticks(bar.ax)


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
    top: float | None = None,
) -> Iterator[Picture]:
    """Yield a line for each kind of layer over the blocks, as many in a picture as it can tell."""
    kinds = list(_by_kind(layers).items())
    for start in range(0, len(kinds), len(_SERIES)):
        part = kinds[start : start + len(_SERIES)]
        with _figure(2.6) as figure:
            ax = figure.subplots()
            for index, (kind, members) in enumerate(part):
                colour, marker = _SERIES[index], _MARKERS[index]
                _draw_line(ax, members, value, colour, label=kind, marker=marker)
            if top is None:
                ax.set_ylim(bottom=0)
            else:
                ax.set_ylim(-0.03 * top, 1.03 * top)
            _label(ax, "block", label)
            _legend_above(ax, columns=2)
            spans = [(kind, [value(member) for member in members]) for kind, members in part]
            said = "; ".join(f"{kind} {min(of):.3g} to {max(of):.3g}" for kind, of in spans)
            number = start // len(_SERIES) + 1
            yield _picture(figure, f"{name}-{number}", "", f"{label} along the blocks: {said}.")


def _draw_line(
    ax: Axes,
    layers: Sequence[_Layer],
    value: Callable[[_Layer], float],
    colour: str,
    *,
    label: str,
    marker: str,
) -> None:
    """Draw the mean of each block, and what there is around it where it has several layers."""
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
    """Return how many times its least loss a group's greatest is."""
    losses = [loss for _, loss in group.curve]
    return max(losses) / min(losses) if min(losses) > 0 else 1.0


def _draw_cells(
    ax: Axes, groups: Sequence[GroupAnalysis], columns: int, rows: int, top: float
) -> None:
    from matplotlib.collections import LineCollection

    width, height = 0.82, 0.62
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
        ax.text(left, base + height + 0.05, f"{group.depth}", fontsize=6.5, color=_MUTED)
    ax.add_collection(LineCollection(floors, colors=_GRID, linewidths=0.6))
    ax.add_collection(LineCollection(lines, colors=_AFTER, linewidths=1.0))
    ax.plot([x for x, _ in chosen], [y for _, y in chosen], "o", color=_BEFORE, markersize=3)
    ax.set_xlim(-0.04, columns)
    ax.set_ylim(-0.12, rows)
    ax.set_axis_off()


def _label(ax: Axes, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.grid(True)
    ax.set_axisbelow(True)


def _legend_above(ax: Axes, columns: int = 3) -> None:
    ax.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=columns, borderpad=0.1)


def _decimal_ticks(ax: Axes, *, percent: bool = False) -> None:
    """Label a logarithmic y axis with plain numbers, at 1, 2 and 5 where there are few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    low, high = ax.get_ylim()
    decades = math.log10(high / low) if low > 0 else 1.0
    subs = (1.0, 2.0, 5.0) if decades < 1.7 else (1.0,)
    ax.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    scale, unit = (100, " %") if percent else (1, "")
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value * scale:.6g}{unit}"))
    ax.yaxis.set_minor_formatter(NullFormatter())


# --- from figure to picture ---------------------------------------------------------------------


@contextmanager
def _figure(height: float) -> Iterator[Figure]:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def _picture(figure: Figure, name: str, title: str, alt: str) -> Picture:
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    if title:
        figure.suptitle(title, fontsize=8.5, x=0.01, ha="left")
    figure.savefig(png, format="png", dpi=_DPI, metadata={"Software": None})
    return Picture(name, title, alt, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """Make a part of a page of an SVG file: no prolog, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")])
        + (svg[svg.index(">") :])
    )
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*sans-serif)?", "system-ui, sans-serif", svg)
    svg = re.sub(r"(\d\.\d\d)\d+", r"\1", svg)  # of a point: far less than a pixel
    for variable, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)
