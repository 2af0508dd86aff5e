"""One HTML file, and PNGs beside it, that show what a plan does to a model."""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from sq_cpu.analysis import plots
from sq_cpu.analysis.analysis import Analysis, GroupAnalysis, LinearAnalysis
from sq_cpu.analysis.figures import THEME, Picture
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.errors import SqCpuError
from sq_cpu.extras import require
from sq_cpu.files import write_file
from sq_cpu.scheme import Scheme

if TYPE_CHECKING:
    from markupsafe import Markup

__all__ = ["Trial", "pareto_front", "report", "require_report", "scheme_text"]

_PREFIX = "sq_cpu-"  # of PNG files: it tells those of an earlier report from others


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One row of the trials of a search, whatever the search; None where it did not get so far."""

    number: int
    metric: float | None = None
    loss_percent: float | None = None
    """Of the metric against the float model's; positive is worse."""
    milliseconds: float | None = None
    float_layers: int | Sequence[str] = 0
    """How many linears, or which, were left in float."""
    settings: Mapping[str, Any] | str = ""
    state: str = ""
    """As in "complete", "pruned", "failed"."""

    @property
    def measured(self) -> bool:
        """Whether it has both a loss and a latency."""
        values = (self.loss_percent, self.milliseconds)
        return all(value is not None and math.isfinite(value) for value in values)

    @property
    def place(self) -> tuple[float, float]:
        """Return (milliseconds, loss in percent) of one that was measured."""
        assert self.milliseconds is not None
        assert self.loss_percent is not None
        return self.milliseconds, self.loss_percent

    @property
    def floats(self) -> int:
        """Return how many linears were left in float."""
        return self.float_layers if isinstance(self.float_layers, int) else len(self.float_layers)

    @property
    def said(self) -> str:
        """Return the settings as text."""
        if isinstance(self.settings, str):
            return self.settings
        return ", ".join(f"{key} {value}" for key, value in self.settings.items())


def require_report() -> None:
    """Raise `SqCpuError` unless what a report is made with (the extra `report`) is installed."""
    for module in ("matplotlib", "jinja2", "markupsafe"):
        require(module, "report")


def report(
    path: str | os.PathLike[str],
    analysis: Analysis,
    *,
    name: str = "",
    trials: Iterable[EvaluatedConfiguration | Trial | Mapping[str, Any]] = (),
    png: str | os.PathLike[str] | None = None,
) -> Path:
    """Write a report on what `analyze` found, and return its path.

    The HTML file is self-contained: no network, no script, no font. It follows the reader's choice
    of light or dark. Sections without data are left out. The same input gives the same bytes.

    Parameters
    ----------
    path : the HTML file to write
    name : the model's, for the title
    trials : those of an accuracy-aware search: `Autotuned.trials`, or of another search each a
        `Trial` or a mapping of its fields
    png : folder for the figures as PNG; None puts it beside the file, "REPORT_files" for
        "REPORT.html". Figures of an earlier report in it are removed.

    Raises `SqCpuError` when the extra `report` is not installed, for a trial with other fields, and
    where a file cannot be written; the HTML file is then as it was.
    """
    require_report()
    path = Path(path)
    folder = path.with_name(f"{path.stem}_files") if png is None else Path(png)
    of_trials = tuple(_trial(number, one) for number, one in enumerate(trials))
    sections = _pictures(analysis, of_trials)
    html = _html(analysis, name, of_trials, sections)
    _save_pictures([picture for part in sections.values() for picture in part], folder)
    write_file(path, html)
    return path


def _trial(number: int, values: EvaluatedConfiguration | Trial | Mapping[str, Any]) -> Trial:
    if isinstance(values, EvaluatedConfiguration):
        return _evaluated(number, values)
    if isinstance(values, Trial):
        return values
    try:
        return Trial(**values)
    except TypeError as error:
        raise SqCpuError(f"not a trial: {error}; its fields are those of Trial") from error


def _evaluated(number: int, one: EvaluatedConfiguration) -> Trial:
    settings = json.loads(one.configuration.settings().key)
    del settings["layers"]
    return Trial(
        number=number,
        metric=one.metric if one.scored else None,
        loss_percent=one.loss_percent if math.isfinite(one.loss_percent) else None,
        milliseconds=one.milliseconds if one.scored else None,
        float_layers=one.in_float,
        settings={"phase": one.phase, **settings, "per_token": one.dynamic},
        state="complete" if one.scored else "failed",
    )


def pareto_front(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials that no other beats in both loss and latency, the fastest first."""
    front: list[Trial] = []
    for trial in sorted((t for t in trials if t.measured), key=lambda t: (t.place, t.number)):
        if not front or trial.place[1] < front[-1].place[1]:
            front.append(trial)
    return front


def _save_pictures(pictures: Sequence[Picture], folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        new = {f"{_PREFIX}{picture.name}.png": picture.png for picture in pictures}
        for name, content in new.items():
            write_file(folder / name, content)
        for old in folder.glob(f"{_PREFIX}*.png"):
            if old.name not in new:
                old.unlink()
    except OSError as error:
        raise SqCpuError(f"cannot write to {folder}: {error.strerror or error}") from error


def _pictures(analysis: Analysis, trials: Sequence[Trial]) -> dict[str, tuple[Picture, ...]]:
    """Return the pictures of each section; a section may have none."""
    groups, linears = analysis.groups, analysis.linears
    shown = {
        "heat_maps": plots.heat_maps(groups),
        "worst": plots.worst_groups(groups),
        "alphas": plots.alphas(groups),
        "curves": plots.loss_curves(groups),
        "errors": plots.errors(linears),
        "clips": plots.clip_rates(linears),
        "rows": plots.row_rates(linears),
        "pareto": (),
    }
    if front := pareto_front(trials):
        labelled = [
            [(*trial.place, str(trial.floats)) for trial in some]
            for some in ([trial for trial in trials if trial.measured], front)
        ]
        shown["pareto"] = (plots.pareto(*labelled),)
    return shown


def _html(
    analysis: Analysis,
    name: str,
    trials: Sequence[Trial],
    pictures: Mapping[str, Sequence[Picture]],
) -> str:
    from jinja2 import Environment, StrictUndefined  # optional, as is markupsafe

    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"number": _number, "percent": _percent, "breakable": _breakable}
    front = pareto_front(trials)
    template = (files("sq_cpu.analysis") / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(template).render(
        name=name,
        version=version("sq_cpu"),
        theme=THEME,
        analysis=analysis,
        scheme=scheme_text(analysis.scheme),
        facts=_facts(analysis),
        at_run_time=_at_run_time(analysis),
        kept=_kept(analysis),
        pictures=pictures,
        kinds=plots.KINDS,
        group_kinds=len({group.kind for group in analysis.groups}),
        linear_kinds=len({linear.kind for linear in analysis.linears}),
        front=front,
        others=[trial for trial in trials if trial not in front],
    )


def scheme_text(scheme: Scheme) -> str:
    """Say in words what a scheme does."""
    activations = {
        "per_token": "one activation scale per token",
        "per_token_x2": "one activation scale per token and two int8 terms",
        "per_tensor": "one activation scale per call",
        "static": "one static activation scale per layer",
    }[scheme.activations]
    weights = {
        "per_channel": "one weight scale per output channel",
        "per_tensor": "one weight scale per layer",
        "per_rows": f"one weight scale per {scheme.rows_per_scale} output channels",
    }[scheme.weights]
    parts = ["int8 weights", f"{7 if scheme.reduce_range else 8}-bit activations", activations]
    parts += [weights, "symmetric" if scheme.symmetric else "asymmetric activations"]
    if scheme.static_range != "auto":
        kept = f" of {scheme.percentile:g} %" if scheme.static_range == "percentile" else ""
        parts.append(f"static range by {scheme.static_range}{kept}")
    if scheme.activations == "static" and scheme.dynamic_fallback:
        parts.append("rows that do not fit it with their own")
    if scheme.outlier_threshold is not None:
        parts.append(f"channels that reach {scheme.outlier_threshold:g} in float")
    return f"{scheme.name}: {', '.join(parts)}"


def _facts(analysis: Analysis) -> list[tuple[str, str, str]]:
    """Return label, value and remark of each number of the summary."""
    groups, linears = analysis.groups, analysis.linears
    quantized = [one for one in linears if not one.in_float]
    smoothed = [group for group in groups if group.rule is not None and not group.in_float]
    folded = sum(group.fold for group in smoothed)
    severity = (max(getattr(g, key) for g in groups) for key in ("severity", "severity_smoothed"))
    facts = [
        ("linears in int8", f"{len(quantized)}", f"{len(analysis.kept)} left in float"),
        (
            "groups smoothed",
            f"{len(smoothed)} of {len(groups)}",
            f"{folded} folded into weights, {len(smoothed) - folded} divided at run time",
        ),
        ("alpha", *_alpha_text(smoothed)),
        (
            "largest outlier severity",
            _change(*map(_number, severity)),
            "largest channel over the median one, before and after smoothing",
        ),
    ]
    for label, pick in (("output error, median", median), ("output error, worst", max)):
        naive, planned = (
            pick(getattr(one, key) for one in quantized) if quantized else 0.0
            for key in ("error_naive", "error")
        )
        facts.append(
            (
                label,
                _change(_percent(naive), _percent(planned)),
                "of the linears in int8, naive and with the plan",
            )
        )
    return facts


def _alpha_text(smoothed: Sequence[GroupAnalysis]) -> tuple[str, str]:
    alphas = sorted({group.alpha for group in smoothed if group.alpha is not None})
    others = Counter(group.rule for group in smoothed if group.alpha is None)
    remark = ", ".join(f"{count} groups by {rule}" for rule, count in others.items())
    if not alphas:
        return "none", remark
    if len(alphas) == 1:
        return f"{alphas[0]:.3g}", remark or "the same in all groups"
    return f"{alphas[0]:.3g} to {alphas[-1]:.3g}", remark or f"{len(alphas)} different values"


def _at_run_time(analysis: Analysis) -> list[tuple[str, int]]:
    """Return why groups are divided at run time, and how many, the most first."""
    # Names in a reason differ from block to block.
    reasons = Counter(
        re.sub(r"\.\d+\.", ".N.", group.note) or "the plan says so"
        for group in analysis.groups
        if group.rule is not None and not group.fold and not group.in_float
    )
    return reasons.most_common()


def _kept(analysis: Analysis) -> list[tuple[str, str, LinearAnalysis | None]]:
    """Return name and reason of what stays in float, and the measures of what could be int8."""
    measured = {one.name: one for one in analysis.linears}
    return [(name, reason, measured.get(name)) for name, reason in analysis.kept.items()]


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def _breakable(name: str) -> Markup:
    """Let a line break after the dots and underscores of a name."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"([._])", r"\1<wbr>", str(escape(name))))


def _percent(share: float) -> str:
    return f"{_number(100 * share)}\N{NO-BREAK SPACE}%"


def _change(before: str, after: str) -> str:
    return f"{before} \N{RIGHTWARDS ARROW} {after}"
