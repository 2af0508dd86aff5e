"""Recipes of archived tools: a `SmoothPlan` of what they found on their calibration.

Intel Extension for PyTorch writes them as `save_qconf_summary` (best_configure.json, qconf.json),
Neural Compressor as `tune_cfg` (qconfig.json): for every module, its operators in the order of
their calls. A linear's input is multiplied by `smooth_quant_scaling_factor` and quantized with
`scale` and `zero_point`; its weight is multiplied by the reciprocal. IPEX writes a table of these
for each input, keyed "operator_input" where consumers have observers of their own, and Neural
Compressor plain lists. A recipe holds no weights: it is for the float model that it was made of.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.files import as_path
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.parsing import read_json, typed
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GIVEN, GroupPlan, LayerPlan, SmoothPlan

__all__ = ["QCONF_SCHEME", "Qconf", "plan_from_qconf"]

QCONF_SCHEME = Scheme.of("O3", symmetric=False, ignore=())
"""Of a recipe's linears: static u8 codes, and no linear left out that it lists."""

_LINEAR = "torch.nn.modules.linear.Linear"
_FLOAT = "torch.float32"
_LEAST_CODE = {"torch.quint8": 0, "torch.qint8": -128}
"""The inputs' types that recipes have, both with 256 codes."""
_NOTE = "the recipe leaves it in float"
_TOLERANCE = 1e-3  # of the weight's factor against the reciprocal of its input's


def plan_from_qconf(path: str | os.PathLike[str], model: nn.Module) -> SmoothPlan:
    """Return the plan of a recipe that IPEX or Neural Compressor wrote for the float `model`.

    Its smoothing scales and static ranges are the recipe's own; linears that share an input and a
    scale are a group, which is folded where the model allows it, and the others divide their input
    at run time. What the recipe leaves in float, or does not list, stays in float. The weights'
    scales are found anew. Operators other than linears run in float.

    Parameters
    ----------
    path : of best_configure.json, qconf.json or qconfig.json
    model : the float model; it is not changed

    Raises
    ------
    SqCpuError
        For a file that is no such recipe, one of dynamic quantization, linears that the model
        lacks, and scales that are not positive or of another length than its inputs.
    """
    return Qconf.load(path).plan(model)


@dataclass(frozen=True)
class _Entry:
    """What a recipe says of one linear that it quantizes."""

    s: tuple[float, ...]
    """Divides the input; empty where it is not smoothed."""
    input_range: tuple[float, float]
    """What the input's codes cover, after that."""


@dataclass(frozen=True)
class Qconf:
    """A recipe that was read; `load` makes it."""

    path: str
    linears: Mapping[str, _Entry | None]
    """By full name; None: left in float."""

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Qconf:
        """Read a recipe; `SqCpuError` for a file that is none."""
        where = f"the recipe {path}"
        modules = typed(Mapping[str, Any], read_json(as_path(path)), where)
        linears: dict[str, _Entry | None] = {}
        for name, entry in _linears_of(modules, where):
            if linears.setdefault(name, entry) != entry:
                raise SqCpuError(
                    f"{where} quantizes {name} in two ways, for two calls: a linear has one here"
                )
        if not any(linears.values()):
            raise SqCpuError(
                f"{where} quantizes no linear: it is to be what IPEX's save_qconf_summary or "
                "Neural Compressor's save wrote"
            )
        return cls(str(path), linears)

    def plan(self, model: nn.Module) -> SmoothPlan:
        """Do what `plan_from_qconf` does."""
        check_model(model)
        with linearized(model):
            linears = quantizable_linears(model, ())
            if unknown := sorted(self.linears.keys() - linears.keys()):
                raise SqCpuError(
                    f"the recipe {self.path} has {unknown[0]}, which is no linear of the model: "
                    "take the float model that it was made of"
                )
            for name, entry in self.linears.items():
                channels = linears[name].in_features
                if entry is not None and len(entry.s) not in (0, channels):
                    raise SqCpuError(
                        f"the recipe {self.path} has {len(entry.s)} smoothing factors for {name}, "
                        f"which has {channels} input channels: take the model that it was made of"
                    )
            groups = list(self._groups(smoothing_groups(model)))
        grouped = {name for group, _ in groups for name in group.consumers}
        layers = []
        for name in linears:
            entry = self.linears.get(name)
            if entry is None:
                layers.append(LayerPlan(name=name, in_float=True, note=_NOTE))
                continue
            s = () if name in grouped else entry.s
            layers.append(LayerPlan(name=name, smoothing=s, input_range=entry.input_range))
        return SmoothPlan(
            tuple(planned for _, planned in groups),
            tuple(layers),
            QCONF_SCHEME,
        )

    def _groups(
        self, groups: tuple[SmoothingGroup, ...]
    ) -> Iterator[tuple[SmoothingGroup, GroupPlan]]:
        """Yield the groups whose linears share their scales, and these."""
        for group in groups:
            entries = [self.linears.get(name) for name in group.consumers]
            given = {entry.s for entry in entries if entry is not None}
            if len(given) != 1 or not (wide := torch.tensor(given.pop())).numel():
                continue
            s = group.layout.narrow(wide)
            if torch.equal(group.layout.widen(s), wide):
                yield group, _group_plan(group, s)


def _group_plan(group: SmoothingGroup, s: Tensor) -> GroupPlan:
    return GroupPlan(
        name=group.name,
        rule=GIVEN,
        scales=tuple(s.tolist()),
        fold=group.producer is not None,
        note=group.reason,
    )


def _linears_of(modules: Mapping[str, Any], where: str) -> Iterator[tuple[str, _Entry | None]]:
    """Yield every linear's full name, and how it is quantized."""
    for key, module in modules.items():
        at = f"{where}: {key.strip() or 'the model'}"
        operators = typed(Mapping[str, Any], module, at).get("q_op_infos", {})
        for index, operator in typed(Mapping[str, Any], operators, f"{at}: q_op_infos").items():
            info = typed(Mapping[str, Any], operator, f"{at}: operator {index}")
            if _LINEAR in str(info.get("op_type")):
                name = typed(str, info.get("fqn"), f"{at}: operator {index}: fqn")
                yield name, _entry(info, index, f"{where}: {name}")


def _entry(info: Mapping[str, Any], index: str, where: str) -> _Entry | None:
    seen, weight = (
        _only(info.get(kind), f"{where}: {kind}")
        for kind in ("input_tensor_infos", "weight_tensor_infos")
    )
    kind = seen.get("inf_dtype")
    if kind == _FLOAT or weight.get("inf_dtype") == _FLOAT:
        return None
    if kind not in _LEAST_CODE:
        raise SqCpuError(f"{where}: inf_dtype is {kind!r}, not one of {', '.join(_LEAST_CODE)}")
    own = f"{index}_0"
    scale = _numbers(seen.get("scale"), own, f"{where}: scale")
    zero_point = _numbers(seen.get("zero_point"), own, f"{where}: zero_point")
    if len(scale) != 1 or len(zero_point) != 1:
        raise SqCpuError(
            f"{where} has {len(scale)} input scales, not one: only recipes of static quantization "
            "have what is needed; quantize with scheme O1, which needs no recipe"
        )
    if not 0 <= zero_point[0] - _LEAST_CODE[kind] <= 255:
        raise SqCpuError(f"{where}: zero point {zero_point[0]:g} is no code of {kind}")
    least = (_LEAST_CODE[kind] - zero_point[0]) * scale[0]
    factors = _numbers(seen.get("smooth_quant_scaling_factor"), own, f"{where}: smoothing factors")
    of_weight = _numbers(
        weight.get("smooth_quant_scaling_factor"), own, f"{where}: the weight's factors"
    )
    # What the weight was multiplied by, which the input's factors are the reciprocals of.
    matches = len(factors) == len(of_weight) and all(
        abs(factor * by - 1) < _TOLERANCE for factor, by in zip(factors, of_weight, strict=True)
    )
    if of_weight and not matches:
        raise SqCpuError(
            f"{where}: the factors of input and weight are no reciprocals of each other; the "
            "recipe is damaged"
        )
    if any(factor <= 0 for factor in factors):
        raise SqCpuError(f"{where}: a smoothing factor is not positive; the recipe is damaged")
    s = tuple(1 / factor for factor in factors)
    return _Entry(s, (least, least + 255 * scale[0]))


def _only(infos: Any, where: str) -> Mapping[str, Any]:
    found: list[Any] = typed(list[Any], infos, where)
    if len(found) != 1:
        raise SqCpuError(f"{where} has {len(found)} entries, and a linear has one")
    entry: Mapping[str, Any] = typed(Mapping[str, Any], found[0], where)
    return entry


def _numbers(value: Any, own: str, where: str) -> list[float]:
    """Return a list of numbers, of a table the one of this operator; none where there is none.

    A table with one entry is of an observer that several consumers share.
    """
    if isinstance(value, dict) and value:
        if own not in value and len(value) > 1:
            raise SqCpuError(f"{where} has no entry {own}; the recipe is damaged")
        value = value.get(own, next(iter(value.values())))
    numbers: list[float] = [] if value is None or value == {} else typed(list[float], value, where)
    return numbers
