"""The one stage that changes a model: fold the smoothing, then swap Linear for QuantLinear."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from sq_cpu import _core
from sq_cpu.calibrate import Calibration
from sq_cpu.decomposition import DecomposedLinear, outlier_columns
from sq_cpu.errors import SqCpuError
from sq_cpu.groups import SmoothingGroup, smoothing_groups
from sq_cpu.linear import QuantLinear
from sq_cpu.linears import (
    check_ignore,
    float_linears,
    free_experts,
    is_ignored,
    linearize,
    quantizable_linears,
    restore_modules,
)
from sq_cpu.plan import SmoothPlan, uniform_plan
from sq_cpu.progress import track
from sq_cpu.ranges import static_range
from sq_cpu.runtime import has_vnni
from sq_cpu.scheme import Scheme
from sq_cpu.smooth import (
    Run,
    consumer_scales,
    fold_scales,
    plan_scales,
    running,
)

__all__ = [
    "QuantizationRecord",
    "QuantizedPart",
    "mark_quantized",
    "quantize",
    "quantize_part",
    "replace_linears",
]


@dataclass(frozen=True)
class QuantizationRecord:
    """What was done to a model, kept as `model.sq_cpu_config` and in its checkpoint."""

    scheme: Scheme
    plan: SmoothPlan | None
    """As it was carried out; None for a model that was not smoothed."""
    layers: tuple[str, ...]
    """Full names of the quantized linears."""
    smoothed: tuple[str, ...] = ()
    """Full names of those that divide their input by a smoothing scale of their own."""
    decomposed: Mapping[str, int] = field(default_factory=dict)
    """Full names of those that are a `DecomposedLinear`, and how many channels each has in float.
    """
    kept: Mapping[str, str] = field(default_factory=dict)
    """Linears left in float, by full name, and why."""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON types; the last two only where there are such layers."""
        plan = None if self.plan is None else self.plan.to_dict()
        tables: dict[str, Any] = {
            "smoothed": list(self.smoothed),
            "decomposed": dict(self.decomposed),
            "kept": dict(self.kept),
        }
        return {
            "scheme": self.scheme.to_dict(),
            "plan": plan,
            "layers": list(self.layers),
            **{name: table for name, table in tables.items() if table},
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> QuantizationRecord:
        """Rebuild what `to_dict` gave, from a mapping that may hold more; else `SqCpuError`."""
        try:
            scheme, plan, layers = values["scheme"], values["plan"], values["layers"]
        except KeyError as error:
            raise SqCpuError(f"the quantization record has no field {error}") from error
        return cls(
            scheme=Scheme.from_dict(scheme),
            plan=None if plan is None else SmoothPlan.from_dict(plan),
            layers=tuple(layers),
            smoothed=tuple(values.get("smoothed", ())),
            decomposed=dict(values.get("decomposed", {})),
            kept=dict(values.get("kept", {})),
        )


def quantize(
    model: nn.Module,
    calibration: Calibration | None = None,
    plan: SmoothPlan | None = None,
    *,
    scheme: str | Scheme = "O1",
    smooth: bool = True,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize the linears of `model` in place to int8 and return it, ready to run.

    With `plan=None` every linear to quantize is smoothed at alpha 0.5. `smooth=False` leaves the
    weights as they are (naive W8A8); only there, and with a scheme that is neither static nor
    decomposing, may the calibration be omitted. Linears that no batch reached (an expert that no
    token was routed to) stay in float where the scheme is static, and are not smoothed otherwise.
    With `scheme.outlier_threshold`, a linear whose smoothed input reaches it in some channels
    becomes a `DecomposedLinear`.

    Afterwards the model is in evaluation mode, has no gradients, and carries a `QuantizationRecord`
    as `model.sq_cpu_config`: what was folded and what was not, which linears stayed in float, and
    why. transformers' Conv1D, FalconLinear and 3-D experts are then linears of their own (see
    `sq_cpu.linears`). Extra memory is that of the proof of the folds, then that of one linear.

    Raises `SqCpuError` before anything is changed: for an unknown scheme, an entry of `ignore` that
    matches no linear, a model that is quantized already or has no linear, linears with hooks or
    parametrizations or in a module that reads their weight itself, weights that are NaN, Inf or
    too long for int32 sums, and a calibration that is older than the weights, not finite, or
    without the rows that the scheme's range needs.
    """
    scheme = Scheme.of(scheme).resolve(has_vnni())
    if plan is not None and not smooth:
        raise SqCpuError("quantize got a plan and smooth=False; drop one of them")
    replaced = linearize(model)
    try:
        check_ignore(model, scheme.ignore)
        linears = quantizable_linears(model, scheme.ignore)
        kept = float_linears(model, scheme.ignore)
        _check_replaceable(model, scheme.ignore)
        example = None if calibration is None else calibration.example
        run = running(model, example)
        prepared = _prepare(model, linears, calibration, plan, scheme, smooth, None, run)
    except BaseException:
        restore_modules(replaced)
        raise
    part = _swap(model, linears, prepared, scheme, progress)
    free_experts(model)
    mark_quantized(model, part.record(scheme, kept))
    return model


@dataclass(frozen=True)
class QuantizedPart:
    """What was done to some of a model's linears."""

    plan: SmoothPlan | None
    layers: tuple[str, ...]
    smoothed: tuple[str, ...]
    decomposed: Mapping[str, int]
    unreached: tuple[str, ...]

    def record(self, scheme: Scheme, kept: Mapping[str, str]) -> QuantizationRecord:
        """Return the record of a model of which this is all."""
        unreached = dict.fromkeys(self.unreached, "no calibration batch reached it")
        return QuantizationRecord(
            scheme=scheme,
            plan=self.plan,
            layers=self.layers,
            smoothed=self.smoothed,
            decomposed=self.decomposed,
            kept={**kept, **unreached},
        )


def quantize_part(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    calibration: Calibration | None,
    plan: SmoothPlan | None,
    scheme: Scheme,
    groups: Sequence[SmoothingGroup],
    run: Run | None,
) -> QuantizedPart:
    """Quantize some linears of a linearized model as `quantize` does all of them.

    `groups` and `plan` (None: no smoothing) are those of these linears, `run` calls what holds
    them and returns its outputs. `linears` is emptied, so that each can be freed.
    """
    smooth = plan is not None
    prepared = _prepare(model, linears, calibration, plan, scheme, smooth, groups, run)
    return _swap(model, linears, prepared, scheme, progress=False)


_Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class _Prepared:
    """What `_swap` needs beside the folded linears."""

    plan: SmoothPlan | None
    scales: Mapping[str, Tensor]
    in_pass: frozenset[str]
    ranges: _Ranges
    outliers: Mapping[str, Tensor]


def _prepare(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Calibration | None,
    plan: SmoothPlan | None,
    scheme: Scheme,
    smooth: bool,
    groups: Sequence[SmoothingGroup] | None,
    run: Run | None,
) -> _Prepared:
    """Check, find all scales, and fold last: what raises leaves the weights as they were."""
    _check_model(model, linears)
    _check_calibration(linears, calibration, needed=smooth or scheme.needs_calibration)
    scales: dict[SmoothingGroup, Tensor] = {}
    if smooth:
        assert calibration is not None  # _check_calibration raised otherwise
        groups = smoothing_groups(model) if groups is None else groups
        plan = plan or uniform_plan(model, groups, calibration, ignore=scheme.ignore)
        scales = plan_scales(model, plan, calibration, scheme=scheme, among=groups)
    by_linear = consumer_scales(scales)
    ranges = _input_ranges(scheme, calibration, linears, by_linear)
    outliers = _outliers(scheme, calibration, linears, by_linear)
    in_pass: frozenset[str] = frozenset()
    if plan is not None:
        smoothed = fold_scales(model, plan, scales, run)
        plan, in_pass = smoothed.plan, smoothed.in_pass
    return _Prepared(plan, by_linear, in_pass, ranges, outliers)


def _swap(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    prepared: _Prepared,
    scheme: Scheme,
    progress: bool | None,
) -> QuantizedPart:
    ranges, outliers = prepared.ranges, prepared.outliers
    is_static = scheme.activations == "static"
    unreached = tuple(name for name in linears if is_static and name not in ranges)
    for name in unreached:
        del linears[name]
    layers = tuple(linears)
    places = _places(model, linears)
    for name in track(layers, "quantizing", progress):
        # One at a time, so that each float weight is freed before the next int8 one is made.
        linear = linears.pop(name)
        _untie(model, linear)
        s = prepared.scales[name] if name in prepared.in_pass else None
        layer: nn.Module
        if name in outliers:
            layer = DecomposedLinear.from_float(linear, scheme, outliers[name], smoothing=s)
        else:
            layer = QuantLinear.from_float(linear, scheme, ranges.get(name), smoothing=s)
        _put(layer, places[name])
    in_pass = prepared.in_pass.difference(outliers)
    return QuantizedPart(
        plan=prepared.plan,
        layers=layers,
        smoothed=tuple(name for name in layers if name in in_pass),
        decomposed={name: len(columns) for name, columns in outliers.items()},
        unreached=unreached,
    )


def mark_quantized(model: Any, record: QuantizationRecord) -> None:
    """Make a model whose linears are int8 one for inference, and say what was done to it."""
    model.eval().requires_grad_(False)
    model.sq_cpu_config = record
    if hasattr(model, "save_pretrained"):
        model.save_pretrained = _refuse_save_pretrained


def _refuse_save_pretrained(*_: Any, **__: Any) -> None:
    # Its config would not say int8, and whoever loaded it would read the codes as weights.
    raise SqCpuError("save_pretrained cannot write an int8 model: call sq_cpu.save(model, path)")


def replace_linears(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put each module of `layers` (by full name) in the place of the model's module there.

    A module that the model holds under several names is replaced under all of them.
    """
    places = _places(model, {name: model.get_submodule(name) for name in layers})
    for name, module in layers.items():
        _put(module, places[name])


_Place = tuple[nn.Module, str]


def _places(model: nn.Module, modules: Mapping[str, nn.Module]) -> dict[str, list[_Place]]:
    """Return where the model holds each module, without a hold on the modules."""
    names = {module: name for name, module in modules.items()}
    places: dict[str, list[_Place]] = {name: [] for name in modules}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child in names:
                places[names[child]].append((parent, key))
    return places


def _put(module: nn.Module, places: Iterable[_Place]) -> None:
    for parent, key in places:
        setattr(parent, key, module)


def _check_model(model: nn.Module, linears: Mapping[str, nn.Linear]) -> None:
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise SqCpuError("the model is quantized already; start from its float weights")
    if not linears:
        raise SqCpuError("nothing to quantize: the model has no Linear that is not ignored")
    if "" in linears:
        raise SqCpuError(
            "the model is itself a Linear, which cannot be replaced in place; "
            "use QuantLinear.from_float"
        )
    for name, linear in linears.items():
        if linear.in_features > _core.MAX_DEPTH:
            raise SqCpuError(
                f"{name} has {linear.in_features} input channels; int32 sums hold "
                f"{_core.MAX_DEPTH}: ignore it"
            )
        for kind, parameter in linear.named_parameters():
            if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
                raise SqCpuError(f"{name}.{kind} has NaN or Inf; repair the model or ignore it")


def _check_replaceable(model: nn.Module, ignore: tuple[str, ...]) -> None:
    """Raise for a linear that does more than its forward, or whose parent never calls it."""
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) or is_ignored(model, name, ignore):
            continue
        if is_parametrized(module):
            raise SqCpuError(
                f"{name} is parametrized, which int8 would lose: remove_parametrizations or "
                "ignore it"
            )
        if module._forward_hooks or module._forward_pre_hooks:
            raise SqCpuError(
                f"{name} has forward hooks, which int8 would lose: remove them or ignore it"
            )
        parent = model.get_submodule(name.rpartition(".")[0])
        if hasattr(parent, "base_layer") and hasattr(parent, "unmerge"):  # peft's adapters
            raise SqCpuError(
                f"{name} has an adapter beside it: merge that first (model.merge_and_unload())"
            )
        if isinstance(parent, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            raise SqCpuError(
                f"{name} is in a {type(parent).__name__}, which may read its weight without "
                "calling it: ignore it"
            )


def _check_calibration(
    linears: Mapping[str, nn.Linear], calibration: Calibration | None, needed: bool
) -> None:
    if not needed:
        return
    if calibration is None:
        raise SqCpuError(
            "smoothing, static activation scales and outlier_threshold need a calibration; pass "
            "calibrate(...), or a dynamic scheme without threshold and smooth=False"
        )
    for name, linear in linears.items():
        if name not in calibration.unreached:
            calibration.check_weight(name, linear)
    if calibration.unreached and not set(linears).difference(calibration.unreached):
        raise SqCpuError("no calibration batch reached any linear: calibrate on other batches")


def _input_ranges(
    scheme: Scheme,
    calibration: Calibration | None,
    names: Iterable[str],
    scales: Mapping[str, Tensor],
) -> _Ranges:
    """Return the range of each linear's smoothed input; s > 0 keeps the order of its values.

    Only a static scheme needs them; a linear that no batch reached has none.
    """
    ranges: _Ranges = {}
    if calibration is None or scheme.activations != "static":
        return ranges
    for name in names:
        if name in calibration.unreached:
            continue
        low, high = calibration.channels(name)
        rows = calibration.rows.get(name)
        if name in scales:
            low, high = low / scales[name], high / scales[name]
            rows = None if rows is None else rows / scales[name]
        if not (low.isfinite().all() and high.isfinite().all()):
            raise SqCpuError(
                f"the calibrated range of {name} is not finite: calibrate again, or ignore it"
            )
        ranges[name] = static_range(low, high, rows, scheme)
    return ranges


def _outliers(
    scheme: Scheme,
    calibration: Calibration | None,
    names: Iterable[str],
    scales: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Return which channels of a linear's smoothed input stay in float, if there are any."""
    outliers: dict[str, Tensor] = {}
    if calibration is None or scheme.outlier_threshold is None:
        return outliers
    for name in names:
        if name not in calibration.unreached:
            absmax = calibration.absmax(name) / scales.get(name, torch.ones(1))
            columns = outlier_columns(absmax, scheme.outlier_threshold)
            if len(columns):
                outliers[name] = columns
    return outliers


def _untie(model: nn.Module, linear: nn.Linear) -> None:
    """Say in the config that a quantized head no longer shares the embedding's weight."""
    config: Any = getattr(model, "config", None)
    head: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if linear is head and getattr(config, "tie_word_embeddings", False):
        config.tie_word_embeddings = False
