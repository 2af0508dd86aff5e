"""SmoothQuant: X W^T = (X / s) (W s)^T, with the division folded into whatever makes X.

`smoothing_scales` is the rule, `SmoothPlan` says which group gets it and with which alpha, and
`fold` applies the plan: to the weights where that is proven to keep the function, and otherwise to
the pass that quantizes the input, which divides it by s.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
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

__all__ = [
    "GroupPlan",
    "SmoothPlan",
    "Smoothed",
    "consumer_scales",
    "fold",
    "fold_scales",
    "plan_scales",
    "smoothing_scales",
]

# Far beyond any useful s, and far within fp32: W * s and gamma / s stay finite.
_S_LIMIT = 2.0**30


def smoothing_scales(act_absmax: Tensor, weight_absmax: Tensor, alpha: float) -> Tensor:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) (SmoothQuant, arXiv 2211.10438, eq. 4).

    `act_absmax` and `weight_absmax` are [in_features], >= 0 and finite; the weights' maximum is
    taken over all linears that share the input. The result is fp32 [in_features], positive and
    finite. A dead channel, whose activations or weights are all zero, keeps s = 1.

    Raises `SqCpuError` on alpha outside [0, 1], on other shapes, and on NaN or Inf.
    """
    if not 0.0 <= alpha <= 1.0:
        raise SqCpuError(f"alpha is {alpha}; the migration strength lies in [0, 1]")
    if act_absmax.dim() != 1 or act_absmax.shape != weight_absmax.shape:
        raise SqCpuError(
            "smoothing needs one absmax per channel on both sides, not "
            f"{tuple(act_absmax.shape)} and {tuple(weight_absmax.shape)}"
        )
    x, w = act_absmax.double(), weight_absmax.double()
    if not (x.isfinite().all() and w.isfinite().all()):
        raise SqCpuError("smoothing got an absmax that is NaN or Inf; check weights and batches")
    s = (x**alpha / w ** (1.0 - alpha)).clamp(1.0 / _S_LIMIT, _S_LIMIT)
    return torch.where((x > 0) & (w > 0), s, 1.0).float()


@dataclass(frozen=True, kw_only=True)
class GroupPlan:
    """What one smoothing group gets."""

    name: str
    rule: str = "smoothquant"
    alpha: float = 0.5
    fold: bool = True
    """Folded into the producer; or s divides the input while that is quantized."""
    note: str = ""
    """Why it is not folded, or how alpha was chosen."""

    def __post_init__(self) -> None:
        if self.rule != "smoothquant":
            raise SqCpuError(f"group {self.name}: unknown rule {self.rule!r}; use 'smoothquant'")
        if not isinstance(self.alpha, int | float) or not 0.0 <= self.alpha <= 1.0:
            raise SqCpuError(f"group {self.name}: alpha is {self.alpha}; it lies in [0, 1]")


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
        ignore: tuple[str, ...] = (),
    ) -> SmoothPlan:
        """Plan one alpha for every group with a consumer that is calibrated and not ignored.

        Raises `SqCpuError` on weights that changed since the calibration.
        """
        with linearized(model):
            planned = []
            for group in smoothing_groups(model):
                covered = _covered(group, calibration)
                for name in covered:
                    calibration.check_weight(name, model.get_submodule(name))
                if not all(is_ignored(model, name, ignore) for name in covered):
                    folded = group.producer is not None
                    planned.append(
                        GroupPlan(name=group.name, alpha=alpha, fold=folded, note=group.reason)
                    )
            return cls(tuple(planned))

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


def plan_scales(
    model: nn.Module, plan: SmoothPlan, calibration: Calibration
) -> dict[SmoothingGroup, Tensor]:
    """Return s of every planned group, fp32 [its entries], of a linearized model.

    All are computed from the weights as they stand, so the order of the groups does not matter.
    What the plan does not fold has no producer here.

    Raises `SqCpuError` for a group that the model lacks or the calibration does not cover, for one
    to be folded that cannot be, and on weights that changed since the calibration.
    """
    groups = {group.name: group for group in smoothing_groups(model)}
    scales = {}
    for planned in plan.groups:
        group = groups.get(planned.name)
        if group is None:
            raise SqCpuError(
                f"the model has no smoothing group {planned.name}; plan for this very model"
            )
        s = _group_scales(model, group, planned.alpha, calibration)
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


def fold(model: nn.Module, plan: SmoothPlan, calibration: Calibration) -> Smoothed:
    """Fold into `model`, in place, what the plan says and `refused_folds` proves.

    Afterwards the calibration no longer fits the model. The proof runs the model on the
    calibration's example, a few times in all. Raises `SqCpuError`, with the model unchanged, where
    `plan_scales` or `refused_folds` does.
    """
    with linearized(model):
        scales = plan_scales(model, plan, calibration)
        return fold_scales(model, plan, scales, calibration.example)


def fold_scales(
    model: nn.Module,
    plan: SmoothPlan,
    scales: Mapping[SmoothingGroup, Tensor],
    example: Example | None,
) -> Smoothed:
    """Do what `fold` does for the s that `plan_scales` gave, to a linearized model."""
    folds = {group: s for group, s in scales.items() if group.producer is not None}
    refused = dict.fromkeys(folds, "the calibration holds no example to prove it with")
    if example is not None:
        args, kwargs = example

        def run() -> list[Tensor]:
            output = model(*args, **kwargs)
            first = output if isinstance(output, Tensor) else output[0]
            return [leaf for leaf in tree_leaves(first) if isinstance(leaf, Tensor)]

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


def _group_scales(
    model: nn.Module, group: SmoothingGroup, alpha: float, calibration: Calibration
) -> Tensor:
    # An uncovered group fails here, by the name of its first consumer.
    covered = _covered(group, calibration) or group.consumers[:1]
    for name in covered:
        calibration.check_weight(name, model.get_submodule(name))
    act = calibration.absmax(covered[0])
    weights = [model.get_parameter(f"{name}.weight") for name in group.consumers]
    weight = torch.stack([w.detach().abs().amax(dim=0).float() for w in weights]).amax(dim=0)
    try:
        return smoothing_scales(group.layout.narrow(act), group.layout.narrow(weight), alpha)
    except SqCpuError as error:
        raise SqCpuError(f"group {group.name}: {error}") from None


def _covered(group: SmoothingGroup, calibration: Calibration) -> tuple[str, ...]:
    return tuple(name for name in group.consumers if name in calibration.channel_min)
