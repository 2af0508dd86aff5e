"""SmoothQuant: X W^T = (X / s) (W s)^T, with the division folded into whatever makes X.

`rules.RULES` has the rules, `SmoothPlan` says which group gets which, and `fold` applies it: to the
weights where that is proven to keep the function, and otherwise to the pass that quantizes the
input, which divides it by s.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.calibrate import Calibration, Example, evaluating
from sq_cpu.errors import SqCpuError
from sq_cpu.files import replacing
from sq_cpu.folding import apply_folds, refused_folds
from sq_cpu.groups import SmoothingGroup, smoothing_groups
from sq_cpu.linears import is_ignored, linearized
from sq_cpu.rules import GroupStatistics, LinearSample, check_rule, smoothing_scale
from sq_cpu.scheme import Scheme

__all__ = [
    "GroupPlan",
    "Run",
    "SmoothPlan",
    "Smoothed",
    "consumer_scales",
    "fold",
    "fold_scales",
    "group_statistics",
    "plan_scales",
    "running",
    "uniform_plan",
]

Run = Callable[[], Sequence[Tensor]]


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What one smoothing group gets."""

    name: str
    rule: str = "smoothquant"
    """A key of `rules.RULES`."""
    alpha: float = 0.5
    """The migration strength, for the rule that has one."""
    fold: bool = True
    """Folded into the producer; or s divides the input while that is quantized."""
    note: str = ""
    """Why it is not folded, or how alpha was chosen."""

    def __post_init__(self) -> None:
        try:
            check_rule(self.rule)
        except SqCpuError as error:
            raise SqCpuError(f"group {self.name}: {error}") from None
        if not isinstance(self.alpha, int | float) or not 0.0 <= self.alpha <= 1.0:
            raise SqCpuError(f"group {self.name}: alpha is {self.alpha}; it lies in [0, 1]")
        if not isinstance(self.fold, bool):
            raise SqCpuError(f"group {self.name}: fold is {self.fold!r}, not true or false")


@dataclass(frozen=True)
class SmoothPlan:
    """The groups to smooth, each with its rule; a group that is not listed is left as it is."""

    groups: tuple[GroupPlan, ...]

    def __post_init__(self) -> None:
        for name, count in Counter(group.name for group in self.groups).items():
            if count > 1:
                raise SqCpuError(f"the plan has {count} entries for group {name}; keep one")

    @classmethod
    def uniform(
        cls,
        model: nn.Module,
        calibration: Calibration,
        alpha: float = 0.5,
        *,
        rule: str = "smoothquant",
        ignore: tuple[str, ...] = (),
    ) -> SmoothPlan:
        """Plan one rule for every group with a consumer that is calibrated and not ignored.

        "outlier_suppression" is planned only for the groups behind a norm: it has no scale for
        others. Raises `SqCpuError` on an unknown rule, and on weights that changed since the
        calibration.
        """
        with linearized(model):
            groups = smoothing_groups(model)
            return uniform_plan(model, groups, calibration, alpha, rule=rule, ignore=ignore)

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as JSON types."""
        return {"groups": [asdict(group) for group in self.groups]}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SmoothPlan:
        """Rebuild what `to_dict` gave; `SqCpuError` on anything else."""
        try:
            return cls(tuple(GroupPlan(**group) for group in values["groups"]))
        except (KeyError, TypeError) as error:
            raise SqCpuError(f"not a smoothing plan of this version: {error}") from error

    def to_json(self) -> str:
        """Return the plan as JSON text."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> SmoothPlan:
        """Rebuild what `to_json` gave; `SqCpuError` on anything else."""
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            raise SqCpuError(f"the smoothing plan is not JSON: {error}") from error
        return cls.from_dict(values)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the plan as JSON; the file appears whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(self.to_json() + "\n", encoding="utf-8")
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SmoothPlan:
        """Read what `save` wrote."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise SqCpuError(f"cannot read the smoothing plan {path}: {error}") from error


def uniform_plan(
    model: nn.Module,
    groups: Iterable[SmoothingGroup],
    calibration: Calibration,
    alpha: float = 0.5,
    *,
    rule: str = "smoothquant",
    ignore: tuple[str, ...],
) -> SmoothPlan:
    """Do what `SmoothPlan.uniform` does, for these groups of a linearized model."""
    check_rule(rule)
    planned = []
    for group in groups:
        covered = _covered(group, calibration)
        for name in covered:
            calibration.check_weight(name, model.get_submodule(name))
        if all(is_ignored(model, name, ignore) for name in covered):
            continue
        if rule == "outlier_suppression" and _norm_weight(model, group) is None:
            continue
        planned.append(
            GroupPlan(
                name=group.name,
                rule=rule,
                alpha=alpha,
                fold=group.producer is not None,
                note=group.reason,
            )
        )
    return SmoothPlan(tuple(planned))


def plan_scales(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    *,
    scheme: Scheme | None = None,
    among: Iterable[SmoothingGroup] | None = None,
) -> dict[SmoothingGroup, Tensor]:
    """Return s of every planned group, fp32 [its entries], of a linearized model.

    `among` are the model's groups; None: `smoothing_groups` finds them.

    All are computed from the weights as they stand, so the order of the groups does not matter.
    What the plan does not fold has no producer here. `scheme`, resolved, is what the rule "aqas"
    minimizes the error of; other rules need none.

    Raises `SqCpuError` for a group that the model lacks or the calibration does not cover, for one
    to be folded that cannot be, on weights that changed since the calibration, and where
    `smoothing_scale` does.
    """
    among = smoothing_groups(model) if among is None else among
    groups = {group.name: group for group in among}
    scales = {}
    for planned in plan.groups:
        group = groups.get(planned.name)
        if group is None:
            raise SqCpuError(
                f"the model has no smoothing group {planned.name}; plan for this very model"
            )
        s = _group_scales(model, group, planned, calibration, scheme)
        if planned.fold and group.producer is None:
            raise SqCpuError(f"group {group.name} cannot be folded ({group.reason}): fold=False")
        scales[group if planned.fold else group.in_pass(planned.note)] = s
    return scales


@dataclass(frozen=True)
class Smoothed:
    """What `fold` did."""

    plan: SmoothPlan
    """The plan as it was carried out: a fold that was refused has `fold=False` and the reason."""
    scales: dict[str, Tensor]
    """s of every consumer, by its full name, fp32 [in_features]."""
    in_pass: frozenset[str]
    """Consumers whose weights are as they were: they and their input are still to be scaled."""


def fold(
    model: nn.Module,
    plan: SmoothPlan,
    calibration: Calibration,
    *,
    scheme: Scheme | None = None,
) -> Smoothed:
    """Fold into `model`, in place, what the plan says and `refused_folds` proves.

    Afterwards the calibration no longer fits the model. The proof runs the model on the
    calibration's example, a few times in all. Raises `SqCpuError`, with the model unchanged, where
    `plan_scales` or `refused_folds` does.
    """
    with linearized(model):
        scales = plan_scales(model, plan, calibration, scheme=scheme)
        return fold_scales(model, plan, scales, running(model, calibration.example))


def running(model: nn.Module, example: Example | None) -> Run | None:
    """Return what calls the model with an example and gives its outputs; None without one."""
    if example is None:
        return None
    args, kwargs = example

    def run() -> list[Tensor]:
        # All: a fold may spoil the second alone. But a cache, whose v folds change, is no output.
        outputs = tree_leaves(model(*args, **kwargs), is_leaf=_is_cache)
        return [leaf for leaf in outputs if isinstance(leaf, Tensor)]

    return run


def _is_cache(value: Any) -> bool:
    return hasattr(value, "get_seq_length")


def fold_scales(
    model: nn.Module,
    plan: SmoothPlan,
    scales: Mapping[SmoothingGroup, Tensor],
    run: Run | None,
) -> Smoothed:
    """Do what `fold` does for the s that `plan_scales` gave, to a linearized model.

    `run` is what `refused_folds` needs; without it nothing is folded.
    """
    folds = {group: s for group, s in scales.items() if group.producer is not None}
    refused = dict.fromkeys(folds, "the calibration holds no example to prove it with")
    if run is not None:
        with evaluating(model):
            refused = refused_folds(model, folds, run)
    apply_folds(model, {group: s for group, s in folds.items() if group not in refused})
    reasons = {group.name: reason for group, reason in refused.items()}
    return Smoothed(
        plan=SmoothPlan(
            tuple(
                replace(group, fold=False, note=reasons[group.name])
                if group.name in reasons
                else group
                for group in plan.groups
            )
        ),
        scales=consumer_scales(scales),
        in_pass=frozenset(
            name
            for group in scales
            if group.producer is None or group in refused
            for name in group.consumers
        ),
    )


def consumer_scales(scales: Mapping[SmoothingGroup, Tensor]) -> dict[str, Tensor]:
    """Return s of every consumer, by full name, fp32 [in_features]."""
    return {name: group.layout.widen(s) for group, s in scales.items() for name in group.consumers}


def group_statistics(
    model: nn.Module,
    group: SmoothingGroup,
    calibration: Calibration,
    scheme: Scheme | None = None,
) -> GroupStatistics:
    """Return what the smoothing rules look at; weights and rows are not copied.

    Raises `SqCpuError` when the calibration does not cover the group, or weights changed since.
    """
    # An uncovered group fails here, by the name of its first consumer.
    covered = _covered(group, calibration) or group.consumers[:1]
    for name in covered:
        calibration.check_weight(name, model.get_submodule(name))
    weights = {name: model.get_parameter(f"{name}.weight").detach() for name in group.consumers}
    ends = [torch.aminmax(weight, dim=0) for weight in weights.values()]  # abs() would copy it
    absmax = torch.stack([torch.maximum(-low, high).float() for low, high in ends])
    return GroupStatistics(
        act_absmax=group.layout.narrow(calibration.absmax(covered[0])),
        weight_absmax=group.layout.narrow(absmax.amax(dim=0)),
        norm_weight=_norm_weight(model, group),
        samples=tuple(
            LinearSample(weights[name], calibration.rows.get(name), *calibration.channels(name))
            for name in covered
            if scheme is not None and not is_ignored(model, name, scheme.ignore)
        ),
        scheme=scheme,
        widen=group.layout.widen,
    )


def _group_scales(
    model: nn.Module,
    group: SmoothingGroup,
    planned: GroupPlan,
    calibration: Calibration,
    scheme: Scheme | None,
) -> Tensor:
    statistics = group_statistics(model, group, calibration, scheme)
    try:
        return smoothing_scale(planned.rule, statistics, planned.alpha)
    except SqCpuError as error:
        raise SqCpuError(f"group {group.name}: {error}") from None


def _norm_weight(model: nn.Module, group: SmoothingGroup) -> Tensor | None:
    """Return gamma of the norm that makes the group's input; None if a linear or no one does."""
    if group.producer is None:
        return None
    weight = model.get_parameter(f"{group.producer}.weight").detach().float()
    return weight + group.norm_offset if weight.dim() == 1 else None


def _covered(group: SmoothingGroup, calibration: Calibration) -> tuple[str, ...]:
    return tuple(name for name in group.consumers if name in calibration.channel_min)
