"""What quantization does to a model's layers, before and after smoothing, as numbers.

`analyze` measures on one calibration and changes nothing; `sq_cpu.report` shows the result.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import (
    check_ignore,
    float_linears,
    linearized,
    quantizable_linears,
)
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.parsing import check_kind
from sq_cpu.progress import track
from sq_cpu.quantization.checks import check_layers
from sq_cpu.quantization.kept import kept_linears
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import (
    GroupPlan,
    SmoothPlan,
    quantized_consumers,
    scheme_of,
    uniform_plan,
)
from sq_cpu.smoothing.plan_checks import check_clips
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.scales import (
    WeightStatistics,
    group_statistics,
    own_scales,
    plan_scales,
)
from sq_cpu.smoothing.statistics import GroupStatistics, live_median

__all__ = ["Analysis", "GroupAnalysis", "LinearAnalysis", "analyze", "outlier_severity"]


@dataclass(frozen=True, kw_only=True)
class LinearAnalysis:
    """One linear that the scheme quantizes; errors and shares are those of the sampled rows."""

    name: str
    kind: str
    """What its namesakes in other blocks have in common, as in "q_proj"."""
    depth: int
    """Number of its block; without blocks, of its namesakes before it."""
    shape: tuple[int, int]
    """(out_features, in_features)"""
    activations: str
    """Granularity of its activation scale, as in `Scheme.activations`."""
    in_float: bool
    """The plan leaves it in float; the other fields are those of int8 all the same."""
    note: str
    """Why, or what else the plan says of it."""
    error_naive: float
    """|Q(X) Q(W)^T - X W^T|^2 / |X W^T|^2: the scheme without a plan."""
    error: float
    """The same with the plan: its smoothing, clips and granularity."""
    clipped_naive: float
    """Share of the input's values beyond the static range; 0 where the scale is dynamic."""
    clipped: float
    rows_clipped: float
    """Share of the input's rows of which some value is beyond the planned static grid, and ..."""
    rows_underflowed: float
    """... whose codes span less than an eighth of it: see `Scheme.dynamic_fallback`."""


@dataclass(frozen=True, eq=False, kw_only=True)
class GroupAnalysis:
    """One smoothing group: linears with one input X, and max|X_j|, max|W_j| per channel."""

    name: str
    kind: str
    """What its namesakes in other blocks have in common, as in "q_proj, k_proj, v_proj"."""
    depth: int
    """Number of its block; without blocks, of its namesakes before it."""
    rule: str | None
    """None: the plan does not smooth it."""
    alpha: float | None
    """Of the rule "smoothquant"; None with another."""
    fold: bool
    clip: float
    """Fraction of the range found by `Scheme.static_range` that a static scale covers."""
    hadamard: int
    """Columns of a block that is rotated, at run time or in the weights; 0: none."""
    note: str
    curve: tuple[tuple[float, float], ...]
    """(alpha, loss) that a search tried, sorted by alpha."""
    act_absmax: Tensor
    act_absmax_smoothed: Tensor
    weight_absmax: Tensor
    weight_absmax_smoothed: Tensor
    """fp32 [channels] each; of the weights, the most over all linears of the group."""
    linears: tuple[LinearAnalysis, ...]
    """Those that the scheme does not ignore."""

    @property
    def in_float(self) -> bool:
        """Whether all its linears stay in float, so that it is not smoothed after all."""
        return all(linear.in_float for linear in self.linears)

    @property
    def severity(self) -> float:
        """Return the outlier severity of the input: see `outlier_severity`."""
        return outlier_severity(self.act_absmax)

    @property
    def severity_smoothed(self) -> float:
        """Return the outlier severity of the smoothed input."""
        return outlier_severity(self.act_absmax_smoothed)

    @property
    def error_naive(self) -> float:
        """Return the mean over the linears."""
        return _mean([linear.error_naive for linear in self.linears])

    @property
    def error(self) -> float:
        """Return the mean over the linears."""
        return _mean([linear.error for linear in self.linears])

    def to_dict(self, *, channels: bool = True) -> dict[str, Any]:
        """Return the fields and properties as JSON types; `channels=False` omits the tensors."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
        linears = values.pop("linears")
        plain = {key: value for key, value in values.items() if key not in tensors}
        plain["curve"] = [list(point) for point in self.curve]
        for key in ("severity", "severity_smoothed", "error_naive", "error"):
            plain[key] = getattr(self, key)
        if channels:
            plain |= {key: value.tolist() for key, value in tensors.items()}
        return plain | {"linears": [vars(one) | {"shape": list(one.shape)} for one in linears]}


@dataclass(frozen=True, eq=False, kw_only=True)
class Analysis:
    """What `analyze` found; groups in the order of the model."""

    scheme: Scheme
    """Resolved."""
    groups: tuple[GroupAnalysis, ...]
    kept: Mapping[str, str]
    """What is not quantized, by full name, and why."""
    tokens: int
    """Of the calibration."""
    sampled_rows: int
    """At most, of each linear: what errors and clip rates are of."""

    @property
    def linears(self) -> tuple[LinearAnalysis, ...]:
        """Return the linears of all groups."""
        return tuple(linear for group in self.groups for linear in group.linears)

    def to_dict(self, *, channels: bool = True) -> dict[str, Any]:
        """Return all as JSON types; `channels=False` omits what there is of each channel."""
        return {
            "scheme": self.scheme.to_dict(),
            "groups": [group.to_dict(channels=channels) for group in self.groups],
            "kept": dict(self.kept),
            "tokens": self.tokens,
            "sampled_rows": self.sampled_rows,
        }


def analyze(
    model: nn.Module,
    calibration: Calibration,
    plan: SmoothPlan | None = None,
    *,
    scheme: str | Scheme | None = None,
    progress: bool | None = None,
) -> Analysis:
    """Measure what `quantize` would do to each layer of a float model; the model is not changed.

    Parameters
    ----------
    calibration : with sampled rows
    plan : None smooths every group at alpha 0.8, as `quantize` does
    scheme : None takes the plan's, or O1
    progress : None shows a bar when stderr is a terminal

    Extra memory is one group's weights in fp32, a few times. Each layer is measured alone, on the
    float model's inputs. Linears that no batch reached are not measured. What the plan folds is
    taken as folded, which `quantize` proves first.

    Raises `SqCpuError` for what `quantize` refuses of scheme, plan and calibration, for a
    calibration without sampled rows, and when nothing is left to measure.
    """
    check_model(model)
    check_is_calibration(calibration)
    check_kind(SmoothPlan | None, "a SmoothPlan", plan=plan)
    scheme = scheme_of(scheme, plan).resolve(has_vnni())
    check_clips(plan, scheme)
    if not calibration.rows:
        raise SqCpuError("the calibration holds no sampled rows: calibrate with rows=64")
    with linearized(model):
        check_ignore(model, scheme.ignore)
        linears = quantizable_linears(model, scheme.ignore)
        check_layers(linears, plan)
        groups = smoothing_groups(model)
        if plan is None:
            plan = uniform_plan(model, groups, calibration, ignore=scheme.ignore)
        plan = decided(model, plan, calibration, scheme, groups)
        measured = [
            group for group in groups if quantized_consumers(model, group, calibration, scheme)
        ]
        if not measured:
            raise SqCpuError("nothing to analyze: the scheme ignores every linear that was reached")
        places = _Places(measured)
        found = tuple(
            _group(model, group, calibration, plan, scheme, places)
            for group in track(measured, "measuring layers", progress)
        )
        kept = float_linears(model, scheme.ignore)
        kept |= kept_linears(linears, calibration, scheme, plan)
    return Analysis(
        scheme=scheme,
        groups=found,
        kept=kept,
        tokens=calibration.tokens,
        sampled_rows=max(len(rows) for rows in calibration.rows.values()),
    )


def outlier_severity(absmax: Tensor) -> float:
    """Return the largest of the channels' absmax over their median, dead channels not counted."""
    median = live_median(absmax)
    return 1.0 if median is None else float(absmax.max() / median)


def _group(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    plan: SmoothPlan,
    scheme: Scheme,
    places: _Places,
) -> GroupAnalysis:
    planned = next((one for one in plan.groups if one.name == group.name), None)
    weights = WeightStatistics()
    naive = group_statistics(model, group, calibration, scheme, weights=weights)
    s = torch.ones_like(naive.act_absmax)
    if planned is not None:
        # What stays in float is measured as if it did not, so a rule may look at it too.
        layers = tuple(layer for layer in plan.layers if not layer.in_float)
        alone = replace(plan, groups=(planned,), layers=layers)
        (s,) = plan_scales(
            model, alone, calibration, scheme=scheme, among=(group,), weights=weights
        ).values()
    carried = planned or GroupPlan(name=group.name)
    names = quantized_consumers(model, group, calibration, scheme)
    linears = tuple(
        _linear(naive, sample, s, plan, carried, places.of(group, name))
        for name, sample in zip(names, naive.samples, strict=True)
    )
    return GroupAnalysis(
        name=group.name,
        kind=places.of(group).kind,
        depth=places.of(group).depth,
        rule=None if planned is None else planned.rule,
        alpha=planned.alpha if planned is not None and planned.rule == "smoothquant" else None,
        fold=planned is not None and planned.fold,
        clip=carried.clip,
        hadamard=carried.rotation,
        note="" if planned is None else planned.note,
        curve=() if planned is None else planned.curve,
        act_absmax=naive.act_absmax,
        act_absmax_smoothed=naive.act_absmax / s,
        weight_absmax=naive.weight_absmax,
        weight_absmax_smoothed=naive.weight_absmax * s,
        linears=linears,
    )


@torch.no_grad()
def _linear(
    naive: GroupStatistics,
    sample: LinearSample,
    s: Tensor,
    plan: SmoothPlan,
    group: GroupPlan,
    place: _Place,
) -> LinearAnalysis:
    assert naive.scheme is not None  # _group passes it
    layer, own = plan.layer(place.name), plan.layer_scheme(naive.scheme, place.name)
    wide = own_scales(plan).get(place.name, naive.widen(s))
    as_naive = FakeQuantizedLinear(sample, torch.ones_like(wide), naive.scheme)
    planned = replace(
        sample,
        weight_clip=layer.weight_clip,
        outliers=layer.outliers,
        input_range=layer.input_range,
    )
    as_planned = FakeQuantizedLinear(planned, wide, own, group.clip, group.rotation)
    rows_clipped, rows_underflowed = (
        float(fits.double().mean()) for fits in as_planned.row_fits(sample.inputs())
    )
    return LinearAnalysis(
        name=place.name,
        kind=place.kind,
        depth=place.depth,
        shape=(sample.weight.shape[0], sample.weight.shape[1]),
        activations=own.activations,
        in_float=layer.in_float,
        note=layer.note,
        error_naive=_error(as_naive),
        error=_error(as_planned),
        clipped_naive=_clipped(as_naive),
        clipped=_clipped(as_planned),
        rows_clipped=rows_clipped,
        rows_underflowed=rows_underflowed,
    )


def _error(linear: FakeQuantizedLinear) -> float:
    return float(linear.squared_error() / linear.sample.squared_output().clamp_min(1e-30))


def _clipped(linear: FakeQuantizedLinear) -> float:
    if linear.scheme.activations != "static":
        return 0.0
    low, high = linear.range
    if linear.scheme.symmetric:
        high = max(-low, high)
        low = -high
    rows = linear.coded(linear.sample.inputs())
    return float(((rows < low) | (rows > high)).double().mean())


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class _Place(NamedTuple):
    name: str
    kind: str
    depth: int


class _Places:
    """Where layers are, and names for those that differ only in the number of their block."""

    def __init__(self, groups: Sequence[SmoothingGroup]) -> None:
        self._depths: dict[str, int] = {}
        before: Counter[tuple[str, ...]] = Counter()
        for group in groups:
            kind = _kind(group.consumers)
            number = group.block.rpartition(".")[2]
            self._depths[group.name] = int(number) if number.isdigit() else before[kind]
            before[kind] += 1
        kinds = {_kind(group.consumers) for group in groups}
        kinds |= {_kind((name,)) for group in groups for name in group.consumers}
        self._labels = _labels(kinds)

    def of(self, group: SmoothingGroup, linear: str | None = None) -> _Place:
        """Return the place of a group, or of one of its linears."""
        kind = _kind(group.consumers if linear is None else (linear,))
        return _Place(linear or group.name, self._labels[kind], self._depths[group.name])


def _kind(names: Sequence[str]) -> tuple[str, ...]:
    """Return full names with "*" for every number, each once."""
    return tuple(dict.fromkeys(re.sub(r"(?<![^.])\d+(?![^.])", "*", name) for name in names))


def _labels(kinds: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Name each kind by the last parts of its names, and what tells it from others of that name."""
    labels: dict[tuple[str, ...], str] = {}
    rest = sorted(kinds)
    for parts in (1, 2):
        short = {kind: _last(kind, parts) for kind in rest}
        alike = Counter(short.values())
        labels |= {kind: label for kind, label in short.items() if alike[label] == 1}
        rest = [kind for kind in rest if kind not in labels]
    for label in sorted({_last(kind, 2) for kind in rest}):
        # As in an encoder and a decoder: with the first part that differs.
        same = [kind for kind in rest if _last(kind, 2) == label]
        columns = zip(*(kind[0].split(".") for kind in same), strict=False)
        differing = next((column for column in columns if len(set(column)) == len(same)), None)
        for index, kind in enumerate(same):
            full = ", ".join(kind)
            labels[kind] = (
                f"{differing[index]} \N{HORIZONTAL ELLIPSIS} {label}" if differing else full
            )
    return labels


def _last(kind: tuple[str, ...], parts: int) -> str:
    """Return the last so many parts of the first name and the last one of the others."""
    first, *others = [[part for part in name.split(".") if part != "*"] for name in kind]
    start = ".".join(first[-parts:]) or "linear"  # of an nn.Sequential no name is left
    return ", ".join([start, *(".".join(name[-1:]) for name in others)])
