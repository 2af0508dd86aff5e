"""A plan: which smoothing and static clip a group gets, and what single linears override.

It is the one value that goes from tuning to `quantize` and into the checkpoint, and a readable JSON
file.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import nn

from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.files import as_path, json_text, write_file
from sq_cpu.kernels.hadamard import check_hadamard
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import (
    HEAD_BLOCKS,
    SmoothingGroup,
    is_down,
    norm_weight,
    smoothing_groups,
)
from sq_cpu.models.linears import check_ignore, is_ignored, linearized
from sq_cpu.parsing import check_fields, parsed_json, record
from sq_cpu.scheme import Activations, Scheme
from sq_cpu.smoothing.rules import DEFAULT_ALPHA, check_rule

__all__ = [
    "AUTO",
    "GIVEN",
    "GroupPlan",
    "Hadamard",
    "LayerPlan",
    "SmoothPlan",
    "check_rotates",
    "check_rotation",
    "covered_consumers",
    "joined",
    "quantized_consumers",
    "scheme_of",
    "uniform_plan",
]

AUTO: Literal["auto"] = "auto"
Hadamard = int | Literal["auto"]
"""Columns that a Hadamard matrix mixes, 0: none; "auto": decided where the plan is carried out."""

GIVEN = "given"
"""The rule of a group whose plan has s itself."""

_MAX_CLIP = 2.0


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What one smoothing group gets. Raises `SqCpuError` for a value that is out of range."""

    name: str
    rule: str = "smoothquant"
    """A key of `rules.RULES`; "given": s is `scales`."""
    alpha: float = DEFAULT_ALPHA
    """The migration strength, for the rule that has one."""
    fold: bool = True
    """s is folded into the producer; if not, it divides the input at run time."""
    note: str = ""
    """Why it is not folded, or how alpha was chosen."""
    clip: float = 1.0
    """Fraction, in (0, 2], of the range that `Scheme.static_range` finds, which the static scale
    covers. It has no effect on linears whose activations are quantized dynamically."""
    hadamard: Hadamard = 0
    """64: after the division by s, blocks of so many columns are multiplied by the Hadamard matrix,
    as are those of W s (`fwht64`), which spreads an outlier over its block; 0: none. "auto": 64
    where that lowers the error (see `rotation.decided`)."""
    hadamard_fold: Hadamard = 0
    """64, 32 or 16: the same for the input of attention's output projection, after s, in the
    weights alone: the matrix multiplies rows of the values' projection, too, head by head; 0: none.
    "auto": the largest that divides a head, where that lowers the error. Only with `fold`."""
    curve: tuple[tuple[float, float], ...] = ()
    """(alpha, loss) that a search tried, kept sorted by alpha, with 6 significant digits."""
    scales: tuple[float, ...] = ()
    """s, one for each of the group's channels (`SmoothingGroup.layout`), where `rule` is "given".
    """

    def __post_init__(self) -> None:
        check_fields(self, f"group {self.name}")
        _check_scales(f"group {self.name}: scales", self.scales)
        if bool(self.scales) != (self.rule == GIVEN):
            raise SqCpuError(f"group {self.name}: scales go with the rule {GIVEN!r}: give both")
        try:
            if self.rule != GIVEN:
                check_rule(self.rule)
            check_rotation(self.hadamard)
            _check_folded(self.hadamard_fold)
        except SqCpuError as error:
            raise SqCpuError(f"group {self.name}: {error}") from None
        folded = self.hadamard_fold not in (AUTO, 0)
        if folded and (self.hadamard or not self.fold):
            raise SqCpuError(
                f"group {self.name}: hadamard_fold is in the weights with s, and goes with fold "
                "and without hadamard"
            )
        if not 0.0 <= self.alpha <= 1.0:
            raise SqCpuError(f"group {self.name}: alpha is {self.alpha}; it lies in [0, 1]")
        if not 0 < self.clip <= _MAX_CLIP:
            raise SqCpuError(
                f"group {self.name}: clip is {self.clip!r}; it is a number in (0, {_MAX_CLIP:g}]"
            )
        curve = sorted((_rounded(alpha), _rounded(loss)) for alpha, loss in self.curve)
        object.__setattr__(self, "curve", tuple(curve))

    @property
    def rotation(self) -> int:
        """Columns of a block of the consumers' input that is rotated, anywhere; 0: none.

        Raises `SqCpuError` where that is not decided.
        """
        block = self.hadamard or self.hadamard_fold
        if isinstance(block, str):
            which = "hadamard" if self.hadamard else "hadamard_fold"
            raise SqCpuError(
                f'group {self.name}: {which} is "auto", and not decided yet: take the plan that '
                f"tune returns, or quantize records in model.sq_cpu_config, or plan {which}=0"
            )
        return block

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types; the last five only where they say something."""
        curve = [list(point) for point in self.curve]
        optional = ("clip", "hadamard", "hadamard_fold", "curve", "scales")
        values = asdict(self) | {"curve": curve, "scales": list(self.scales)}
        return _without_defaults(self, values, optional)


@dataclass(frozen=True, kw_only=True)
class LayerPlan:
    """What one linear overrides of the scheme. Raises `SqCpuError` for what cannot be."""

    name: str
    """The linear's full name."""
    in_float: bool = False
    """Left in the model's own float dtype."""
    activations: Activations | None = None
    """Granularity of its activation scale; None: the scheme's."""
    weight_clip: float = 1.0
    """Fraction, in (0, 1], of a weight scale's absmax that its int8 codes cover; what lies beyond
    saturates."""
    outliers: tuple[int, ...] = ()
    """Input channels that stay in float, ascending: the linear is a `DecomposedLinear`."""
    smoothing: tuple[float, ...] = ()
    """s of its own, one for each input channel, by which the input is divided at run time; its
    group has no plan then."""
    input_range: tuple[float, float] | None = None
    """(least, greatest) that a static scale covers, of the input divided by s; None: what
    `Scheme.static_range` finds. It has no effect where activations are quantized dynamically."""
    note: str = ""
    """Why."""

    def __post_init__(self) -> None:
        check_fields(self, f"layer {self.name}")
        if not 0 < self.weight_clip <= 1.0:
            raise SqCpuError(
                f"layer {self.name}: weight_clip is {self.weight_clip!r}; it is a number in (0, 1]"
            )
        if list(self.outliers) != sorted({channel for channel in self.outliers if channel >= 0}):
            raise SqCpuError(
                f"layer {self.name}: outliers={list(self.outliers)} is not a list of channels, "
                "each once, ascending"
            )
        _check_scales(f"layer {self.name}: smoothing", self.smoothing)
        if self.input_range is not None and self.input_range[0] >= self.input_range[1]:
            raise SqCpuError(
                f"layer {self.name}: input_range is {self.input_range}; it is (least, greatest)"
            )
        if self.in_float and replace(self, in_float=False, note="") != LayerPlan(name=self.name):
            raise SqCpuError(
                f"layer {self.name}: in_float leaves nothing to quantize; drop it, or what else "
                "there is of it"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types, but for those that say nothing."""
        optional = tuple(field.name for field in fields(self) if field.name != "name")
        values = asdict(self) | {
            "outliers": list(self.outliers),
            "smoothing": list(self.smoothing),
            "input_range": self.input_range and list(self.input_range),
        }
        return _without_defaults(self, values, optional)


@dataclass(frozen=True)
class SmoothPlan:
    """The groups to smooth, each with its rule; a group that is not listed is left as it is."""

    groups: tuple[GroupPlan, ...]
    layers: tuple[LayerPlan, ...] = ()
    """The linears that override the scheme."""
    scheme: Scheme | None = None
    """What it was made for, and `quantize` takes when it is given none."""

    def __post_init__(self) -> None:
        check_fields(self, "the plan")
        for kind, entries in (("group", self.groups), ("layer", self.layers)):
            for name, count in Counter(entry.name for entry in entries).items():
                if count > 1:
                    raise SqCpuError(f"the plan has {count} entries for {kind} {name}; keep one")

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        calibration: Calibration,
        alpha: float = DEFAULT_ALPHA,
        *,
        rule: str = "smoothquant",
        ignore: tuple[str, ...] = (),
        hadamard: Hadamard = AUTO,
    ) -> SmoothPlan:
        """Plan one rule for every group with a consumer that is calibrated and not ignored.

        "outlier_suppression" is planned only for the groups behind a norm: it has no scale for
        others. `hadamard` is for the inputs of down projections (see `is_down`), where static and
        per-token activations lose most: 64 rotates them all (`GroupPlan.hadamard`), "auto" those
        whose error that lowers. Whichever of the two also leaves to that the inputs of attention's
        output projections, whose rotation costs nothing when the model runs
        (`GroupPlan.hadamard_fold`). 0 rotates nothing. What is "auto" is decided when the plan is
        carried out, for the scheme of then.

        Raises `SqCpuError` on an unknown rule or size, where `hadamard=64` would rotate nothing,
        and on weights that changed since the calibration.
        """
        check_model(model)
        check_is_calibration(calibration)
        with linearized(model):
            check_ignore(model, ignore)
            groups = smoothing_groups(model)
            plan = uniform_plan(
                model, groups, calibration, alpha, rule=rule, ignore=ignore, hadamard=hadamard
            )
        check_rotates(hadamard, [group.name for group in plan.groups if group.hadamard])
        return plan

    @cached_property
    def _by_name(self) -> dict[str, LayerPlan]:
        return {layer.name: layer for layer in self.layers}

    def layer(self, name: str) -> LayerPlan:
        """Return what is planned for a linear; of one that is not listed, the defaults."""
        return self._by_name.get(name) or LayerPlan(name=name)

    def layer_scheme(self, base: Scheme, name: str) -> Scheme:
        """Return the scheme of a linear of a model whose scheme is `base`, if it is quantized."""
        activations = self.layer(name).activations
        return base if activations is None else base.with_activations(activations)

    @cached_property
    def in_float(self) -> dict[str, str]:
        """The linears that stay in float, and why."""
        return {
            layer.name: layer.note or "the plan keeps it in float"
            for layer in self.layers
            if layer.in_float
        }

    def needs_calibration(self, base: Scheme) -> bool:
        """Whether carrying the plan out rests on what a calibration saw."""
        schemes = [self.layer_scheme(base, layer.name) for layer in self.layers]
        return bool(self.groups) or any(s.needs_calibration for s in (base, *schemes))

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types; `layers` and `scheme` only where there are any."""
        values: dict[str, Any] = {"groups": [group.to_dict() for group in self.groups]}
        if self.layers:
            values["layers"] = [layer.to_dict() for layer in self.layers]
        if self.scheme is not None:
            values["scheme"] = self.scheme.to_dict()
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmoothPlan:
        """Rebuild what `to_dict` gave; absent new fields take defaults, else `SqCpuError`."""
        return record(cls, values, "the plan")

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json_text(self.to_dict())

    @classmethod
    def from_json(cls, text: str) -> SmoothPlan:
        """Rebuild what `to_json` gave; `SqCpuError` on anything else."""
        return cls.from_dict(parsed_json(text, "the smoothing plan"))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; the file appears whole or not at all."""
        write_file(path, self.to_json() + "\n")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SmoothPlan:
        """Read what `save` wrote."""
        try:
            return cls.from_json(as_path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SqCpuError(f"cannot read the smoothing plan {path}: {error}") from error


def scheme_of(scheme: str | Scheme | None, plan: SmoothPlan | None) -> Scheme:
    """Return the scheme that is given, else the plan's, else O1.

    O3 by name leaves the static range to the plan, whose clips are fractions of it.
    """
    planned = None if plan is None else plan.scheme
    if scheme is None:
        return Scheme.of("O1") if planned is None else planned
    found = Scheme.of(scheme)
    if planned is None or not isinstance(scheme, str):
        return found
    if found.activations == planned.activations == "static":
        return replace(found, static_range=planned.static_range, percentile=planned.percentile)
    return found


def uniform_plan(
    model: nn.Module,
    groups: Iterable[SmoothingGroup],
    calibration: Calibration,
    alpha: float = DEFAULT_ALPHA,
    *,
    rule: str = "smoothquant",
    ignore: tuple[str, ...],
    hadamard: Hadamard = AUTO,
) -> SmoothPlan:
    """Do what `SmoothPlan.uniform` does, for these groups of a linearized model."""
    check_rule(rule)
    check_rotation(hadamard)
    planned = []
    for group in groups:
        covered = covered_consumers(group, calibration)
        for name in covered:
            calibration.check_weight(name, model.get_submodule(name))
        if all(is_ignored(model, name, ignore) for name in covered):
            continue
        if rule == "outlier_suppression" and norm_weight(model, group) is None:
            continue
        planned.append(
            GroupPlan(
                name=group.name,
                rule=rule,
                alpha=alpha,
                fold=group.producer is not None,
                note=group.reason,
                hadamard=hadamard if is_down(model, group) else 0,
                hadamard_fold=AUTO if hadamard and group.head_block else 0,
            )
        )
    return SmoothPlan(tuple(planned))


def covered_consumers(group: SmoothingGroup, calibration: Calibration) -> tuple[str, ...]:
    """Return the linears of a group that some calibration batch reached."""
    return tuple(name for name in group.consumers if name in calibration.channel_min)


def quantized_consumers(
    model: nn.Module, group: SmoothingGroup, calibration: Calibration, scheme: Scheme
) -> tuple[str, ...]:
    """Return the linears of a group that some batch reached and the scheme does not ignore."""
    covered = covered_consumers(group, calibration)
    return tuple(name for name in covered if not is_ignored(model, name, scheme.ignore))


def check_rotation(hadamard: object) -> None:
    """Raise `SqCpuError` unless it is "auto", 64 or 0."""
    if not (isinstance(hadamard, str) and hadamard == AUTO):
        check_hadamard(hadamard)


def _check_scales(what: str, scales: tuple[float, ...]) -> None:
    if bad := [s for s in scales if not (s > 0 and 0 < 1 / s < math.inf)]:
        raise SqCpuError(f"{what} hold {bad[0]!r}; they and their reciprocals are positive")


def _check_folded(block: Hadamard) -> None:
    if block not in (AUTO, *HEAD_BLOCKS, 0):
        raise SqCpuError(f"hadamard_fold is {block!r}; blocks are of 64, 32 or 16 columns, or 0")


def check_rotates(hadamard: Hadamard, rotated: Collection[str]) -> None:
    """Raise `SqCpuError` where 64 is asked for and nothing is `rotated`."""
    if hadamard not in (AUTO, 0) and not rotated:
        raise SqCpuError(
            f"hadamard={hadamard} rotates the inputs of down projections, and none is quantized "
            "and calibrated here: drop it"
        )


def joined(*notes: str) -> str:
    """Join notes that are not empty."""
    return "; ".join(filter(None, notes))


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _without_defaults(
    plan: GroupPlan | LayerPlan, values: dict[str, Any], optional: tuple[str, ...]
) -> dict[str, Any]:
    default = type(plan)(name=plan.name)
    return {
        name: value
        for name, value in values.items()
        if name not in optional or getattr(plan, name) != getattr(default, name)
    }
