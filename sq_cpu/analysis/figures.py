"""Figures as PNG, and as SVG for a page that is light or dark.

matplotlib is imported where it is needed: it is optional, and takes a while. Its global state
(pyplot, a user's style) is neither read nor changed. A figure is as wide as the column of a phone.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["THEME", "Picture", "new_figure", "picture_of"]

_WIDTH = 3.7  # inches of 72 points
_LINE, _CHARACTERS = 0.16, 52  # of a title, inches high and as many as fit
_DPI = 200

# By name of the CSS variable: in light and in dark. The light ones are what is drawn with. Before
# and after are vermillion and blue (Okabe and Ito), as bright as text has to be on either page.
THEME: Mapping[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e4e8ee"),
    "muted": ("#57606c", "#a2acb9"),
    "grid": ("#d3d8de", "#3a424d"),
    "before": ("#c4500a", "#f58b4c"),
    "after": ("#0069b4", "#5cb3f0"),
}
_INK, _MUTED, _GRID = (THEME[name][0] for name in ("ink", "muted", "grid"))

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


@contextmanager
def new_figure(height: float) -> Iterator[Figure]:
    """Yield a figure of that height in inches, and its style, in which it must also be saved."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]):
        yield Figure(figsize=(_WIDTH, height), layout="constrained")


def picture_of(figure: Figure, name: str, title: str, alt: str) -> Picture:
    """Save a figure of `new_figure`, within its context; only the PNG has the title."""
    from matplotlib.transforms import Bbox

    name = re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once: that is what takes longest
    svg, png = io.StringIO(), io.BytesIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    width, height = figure.get_size_inches()
    lines = textwrap.wrap(title, _CHARACTERS)
    above = 0.06 + _LINE * len(lines) if lines else 0.0
    figure.text(0.02, 1 + 0.06 / height, "\n".join(lines), fontsize=8.5)
    box = Bbox([[0.0, 0.0], [width, height + above]])
    figure.savefig(png, format="png", dpi=_DPI, bbox_inches=box, metadata={"Software": None})
    return Picture(name, title, alt, _inline(svg.getvalue(), name), png.getvalue())


def _inline(svg: str, name: str) -> str:
    """Turn an SVG file into a part of a page: no prolog, ids of its own, the page's colours."""
    svg = svg[svg.index("<svg") :].strip()
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = (
        re.sub(r'\s(xmlns(:\w+)?|version|width|height)="[^"]*"', "", svg[: svg.index(">")])
        + (svg[svg.index(">") :])
    )
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r"'DejaVu Sans'(, [^;\"]*sans-serif)?", "system-ui, sans-serif", svg)
    svg = re.sub(r'\bd="[^"]*"', _rounded, svg)
    for variable, (light, _) in THEME.items():
        svg = svg.replace(light, f"var(--{variable})")
    return svg.replace("<svg", '<svg aria-hidden="true"', 1)


def _rounded(path: re.Match[str]) -> str:
    """Cut coordinates to hundredths of a point: far less than a pixel, and half the text."""
    return re.sub(r"(\.\d\d)\d+", r"\1", path[0]).replace("\n", "")
