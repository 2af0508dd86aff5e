"""SmoothQuant: X W^T = (X / s) (W s)^T, with the division folded into whatever makes X.

`smoothing_scales` is the rule, `SmoothPlan` says which group gets it and with which alpha, and
`fold` applies the plan to the weights.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.calibrate import Calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.families import SmoothingGroup, is_ignored, smoothing_groups
from sq_cpu.files import replacing
from sq_cpu.folding import apply_scales

__all__ = [
    "GroupPlan",
    "SmoothPlan",
    "consumer_scales",
    "fold",
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
    note: str = ""

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

        Raises `SqCpuError` on an unknown family, and on weights that changed since the calibration.
        """
        planned = []
        for group in smoothing_groups(model):
            covered = _covered(group, calibration)
            for name in covered:
                calibration.check_weight(name, model.get_submodule(name))
            if not all(is_ignored(name, ignore) for name in covered):
                planned.append(GroupPlan(name=group.name, alpha=alpha))
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


def plan_scales(model: nn.Module, plan: SmoothPlan, calibration: Calibration) -> dict[str, Tensor]:
    """Return s of every planned group, by group name, fp32 [the producer's output channels].

    All are computed from the weights as they stand, so the order of the groups does not matter.

    Raises `SqCpuError` for a group that the model lacks or the calibration does not cover, and on
    weights that changed since the calibration.
    """
    groups = {group.name: group for group in smoothing_groups(model)}
    for planned in plan.groups:
        if planned.name not in groups:
            raise SqCpuError(
                f"the model has no smoothing group {planned.name}; plan for this very model"
            )
    return {
        planned.name: _group_scales(model, groups[planned.name], planned.alpha, calibration)
        for planned in plan.groups
    }


def fold(model: nn.Module, plan: SmoothPlan, calibration: Calibration) -> dict[str, Tensor]:
    """Smooth `model` in place by `plan`; return s of every consumer, fp32 [in_features].

    Afterwards the calibration no longer fits the model. Raises `SqCpuError`, with the model
    unchanged, where `plan_scales` or `apply_scales` does.
    """
    scales = plan_scales(model, plan, calibration)
    apply_scales(model, scales)
    return consumer_scales(model, scales)


def consumer_scales(model: nn.Module, scales: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return s of every consumer linear, fp32 [in_features], for the s of groups (by name)."""
    return {
        name: group.widen(scales[group.name])
        for group in smoothing_groups(model)
        if group.name in scales
        for name in group.consumers
    }


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
        return smoothing_scales(group.narrow(act), group.narrow(weight), alpha)
    except SqCpuError as error:
        raise SqCpuError(f"group {group.name}: {error}") from None


def _covered(group: SmoothingGroup, calibration: Calibration) -> tuple[str, ...]:
    return tuple(name for name in group.consumers if name in calibration.channel_min)
