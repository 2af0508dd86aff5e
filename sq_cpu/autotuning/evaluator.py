"""What one configuration of an autotuning is worth: its plan, its metric, its milliseconds."""

from __future__ import annotations

import copy
import gc
import hashlib
import math
import weakref
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.latency import Costs, Precision
from sq_cpu.autotuning.ranking import Errors, estimated_errors
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.linears import check_ignore, linearized, quantizable_linears
from sq_cpu.quantization.quantize import carry_out
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.smoothing.plan import LayerPlan, SmoothPlan
from sq_cpu.smoothing.proof import FoldProof, prove_with
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.smoothing.scales import WeightStatistics
from sq_cpu.tuning.tune import tune

__all__ = ["Evaluate", "Goal", "Report", "TuningJob"]

Evaluate = Callable[[nn.Module], float | Iterator[float]]
Report = Callable[[float, int], None]

_NOTE = "autotune"
_NUMERICS = 2  # of what settings mean: trials of another number are not comparable
# The greatest median over linears of the relative difference of mean ranges. On SmolLM2-135M it is
# 0 in fp32 and 2e-4 in bf16 between AVX-512 and none, and 5e-3 with one of eight windows reversed.
_MOVED, _MOVED_HALF = 1e-5, 1e-3
_BASES: tuple[Precision, ...] = ("static", "per_token", "per_tensor", "float")


@dataclass(frozen=True)
class Goal:
    """The greatest loss of accuracy against the float model."""

    limit: float
    relative: bool

    @classmethod
    def of(cls, goal: str | float) -> Goal:
        """Read "1%" as a relative loss of 0.01 and a number as an absolute one.

        Raises `SqCpuError` for anything else.
        """
        text = str(goal).strip()
        relative = text.endswith("%")
        try:
            limit = float(text.removesuffix("%")) / (100 if relative else 1)
        except ValueError:
            limit = math.nan
        if not 0 <= limit < math.inf:
            raise SqCpuError(
                f"goal is {goal!r}; give a relative loss as in '1%', or an absolute one as in 0.2"
            )
        return cls(limit, relative)

    def loss(self, metric: float, float_metric: float, higher_is_better: bool) -> float:
        """Return by how much a metric is worse, as a fraction of the float model's if relative."""
        worse = float_metric - metric if higher_is_better else metric - float_metric
        if self.relative:
            worse /= abs(float_metric)
        return math.inf if math.isnan(worse) else worse

    def text(self, loss: float) -> str:
        """Return a loss in the goal's unit."""
        return f"{100 * loss:+.2f} %" if self.relative else f"{loss:+.4g}"


@dataclass(eq=False)
class TuningJob:
    """Evaluates configurations of one model, which it never changes.

    `kept` looks up a value that another worker may have made, or makes it: (name, make) -> value.
    """

    model: nn.Module
    calibration: Calibration
    evaluate: Evaluate
    goal: Goal
    higher_is_better: bool
    ignore: tuple[str, ...]
    kept: Callable[[str, Callable[[], Any]], Any] = lambda _, make: make()
    costs: Costs | None = None
    float_metric: float = math.nan
    _plans: dict[str, SmoothPlan] = field(default_factory=dict)
    _errors: dict[str, Errors] = field(default_factory=dict)
    _weights: WeightStatistics = field(default_factory=WeightStatistics)
    """The model's, and so of the copies that are quantized."""

    @cached_property
    def linears(self) -> dict[str, nn.Linear]:
        """The linears that can be int8, by full name: calibrated and not ignored."""
        with linearized(self.model):
            check_ignore(self.model, self.ignore)
            found = quantizable_linears(self.model, self.ignore)
        reached = self.calibration.channel_min
        return {name: linear for name, linear in found.items() if name in reached}

    @cached_property
    def proof(self) -> FoldProof:
        """Which folds keep the model's function: proven once, for the copies that are quantized."""
        with linearized(self.model):
            groups = smoothing_groups(self.model)
            rotated = [group for group in groups if group.head_block]
            return prove_with(self.model, groups, self.calibration.example, rotated=rotated)

    def identity(self) -> dict[str, Any]:
        """Return what tells this job from others, as JSON types; `check_ranges` tells the rest.

        Two machines that calibrate alike have the same.
        """
        weights = sorted(self.calibration.fingerprints.items())
        example = [x for x in tree_leaves(self.calibration.example) if isinstance(x, Tensor)]
        digest = 0
        for tensor in example:
            digest = zlib.crc32(tensor.cpu().contiguous().float().numpy().tobytes(), digest)
        return {
            "model": hashlib.sha256(repr(weights).encode()).hexdigest()[:16],
            "calibration": [self.calibration.tokens, self.calibration.batches, digest],
            "rows": max(map(len, self.calibration.rows.values()), default=0),
            "gradient_rows": max(map(len, self.calibration.gradients.values()), default=0),
            "goal": [self.goal.limit, "relative" if self.goal.relative else "absolute"],
            "higher_is_better": self.higher_is_better,
            "ignore": list(self.ignore),
            "prefix": list(self.calibration.prefix),
            "numerics": _NUMERICS,
        }

    def ranges(self) -> list[float]:
        """Return each linear's mean width of its channels' calibrated ranges."""
        low, high = self.calibration.channel_min, self.calibration.channel_max
        return [float((high[name] - low[name]).mean()) for name in sorted(low)]

    def check_ranges(self, ranges: Sequence[float]) -> None:
        """Raise `SqCpuError` unless another calibration, which had these `ranges`, saw our data.

        Other processors and thread counts add in another order. That moves the ranges of channels:
        in most linears by rounding, in a few by more (an expert that a token reaches by a hair). So
        the median over the linears decides.
        """
        here = self.ranges()
        pairs = zip(here, ranges, strict=False)
        moved = sorted(abs(a - b) / max(abs(a), abs(b), 1e-30) for a, b in pairs)
        wide = all(linear.weight.dtype == torch.float32 for linear in self.linears.values())
        if len(here) != len(ranges) or moved[len(moved) // 2] > (_MOVED if wide else _MOVED_HALF):
            raise SqCpuError(
                "the study of the storage was begun with a calibration on other data: use that "
                "one, or another storage or study name"
            )

    def measure_float(self, report: Report | None = None) -> float:
        """Return the float model's metric; `SqCpuError` when it is no finite number, or 0."""
        with evaluating(self.model):
            metric = self._metric(self.model, report)
        if not math.isfinite(metric):
            raise SqCpuError(f"evaluate gives {metric} for the float model; check model and text")
        if self.goal.relative and metric == 0:
            raise SqCpuError(
                "evaluate gives 0 for the float model, and no loss is a percentage of that: set an "
                "absolute goal, a number"
            )
        return metric

    def _metric(self, model: nn.Module, report: Report | None) -> float:
        value = self.evaluate(model)
        if isinstance(value, Iterator):
            last = math.nan
            for step, partial in enumerate(value):
                last = _number(partial)
                if report is not None:
                    report(last, step)
            return last
        return _number(value)

    def plan(self, configuration: Configuration) -> SmoothPlan:
        """Return what `quantize` carries out for a configuration."""
        base = self._smoothing(configuration)
        layers = {layer.name: layer for layer in base.layers}
        for name in self.linears:
            precision = configuration.precision(name)
            if precision == "float":
                layers[name] = LayerPlan(name=name, in_float=True, note=f"{_NOTE}: in float")
                continue
            layer = layers.get(name, LayerPlan(name=name))
            clip = min(layer.weight_clip, configuration.weight_clip)
            layer = replace(layer, in_float=False, activations=None, weight_clip=clip)
            if precision != configuration.activations:
                note = "; ".join(filter(None, [layer.note, f"{_NOTE}: {precision} activations"]))
                layer = replace(layer, activations=precision, note=note)
            layers[name] = layer
        overriding = (layer for layer in layers.values() if layer != LayerPlan(name=layer.name))
        scheme = configuration.scheme(self.ignore)
        return replace(base, layers=tuple(overriding), scheme=scheme)

    def _smoothing(self, configuration: Configuration) -> SmoothPlan:
        # tune knows neither weight clips nor linears that override the settings.
        settings = replace(configuration.settings(), weight_clip=1.0)
        key = settings.key
        if key not in self._plans:
            name = f"plan {hashlib.sha256(key.encode()).hexdigest()[:16]}"
            made = self.kept(name, lambda: self._made_smoothing(settings).to_dict())
            self._plans[key] = SmoothPlan.from_dict(made)
        return self._plans[key]

    def _made_smoothing(self, settings: Configuration) -> SmoothPlan:
        if settings.smoothing == "tuned":
            if len(settings.alpha) != 2:
                raise SqCpuError(f"tuned smoothing has a least and a greatest alpha: {settings}")
            low, high = settings.alpha
            return tune(
                self.model,
                self.calibration,
                scheme=settings.scheme(self.ignore),
                alphas=(low, high, 0.05),
                progress=False,
            )
        alpha = settings.alpha[0] if settings.alpha else DEFAULT_ALPHA
        plan = SmoothPlan.uniform(
            self.model, self.calibration, alpha, rule=settings.smoothing, ignore=self.ignore
        )
        # What is found is to be what was measured, whatever it is quantized with.
        scheme = settings.scheme(self.ignore).resolve(has_vnni())
        with linearized(self.model):
            groups = smoothing_groups(self.model)
            return decided(
                self.model, plan, self.calibration, scheme, groups, weights=self._weights
            )

    def gains(
        self,
        configuration: Configuration,
        precision: Precision,
        before: Callable[[], object] = lambda: None,
    ) -> dict[str, float]:
        """Estimate by how much the loss falls with each linear's precision changed to `precision`.

        The unit is that of `estimated_errors`. `before` is called where that has yet to run. No
        other place ranks linears without an evaluation.
        """
        settings = configuration.settings()

        def made() -> Errors:
            before()
            return estimated_errors(
                self.model,
                self.calibration,
                self.plan(settings),
                settings.scheme(self.ignore),
                _BASES,
                weights=self._weights,
                progress=False,
            )

        if settings.key not in self._errors:
            name = f"errors {hashlib.sha256(settings.key.encode()).hexdigest()[:16]}"
            kept = self.kept(name, made)
            if not _covers(kept, self.linears):
                raise SqCpuError(
                    "the errors that the study keeps are not of this model's linears; use another "
                    "storage or study name"
                )
            self._errors[settings.key] = kept
        errors = self._errors[settings.key]
        return {
            name: errors[name][configuration.precision(name)] - errors[name][precision]
            for name in self.linears
        }

    def milliseconds(self, linear: nn.Module, precision: Precision) -> float:
        """Return the milliseconds of a linear, without what smoothing at run time adds."""
        assert self.costs is not None
        return self.costs.milliseconds(linear, precision)

    def result(
        self, configuration: Configuration, report: Report | None = None
    ) -> EvaluatedConfiguration:
        """Quantize a copy of the model, evaluate it, and return what the configuration is worth.

        One that cannot be carried out or scored has an infinite loss, and the reason in `error`.
        """
        assert self.costs is not None
        names = list(self.linears)
        kept = len(configuration.overrides("float"))
        metric, error = self.float_metric, ""
        if kept == len(names):  # the float model
            milliseconds = self.costs.of(self.linears.values())
        else:
            try:
                metric, milliseconds = self.measure(
                    Recipe.of(plan=self.plan(configuration)), report
                )
            except SqCpuError as refused:
                metric, milliseconds, error = math.nan, math.inf, str(refused)
        loss = self.goal.loss(metric, self.float_metric, self.higher_is_better)
        return EvaluatedConfiguration(
            configuration=configuration,
            metric=metric if math.isfinite(metric) else math.nan,
            loss=loss if math.isfinite(loss) else math.inf,
            loss_percent=self.percent(metric, loss),
            milliseconds=milliseconds,
            in_float=kept,
            dynamic=sum(c == "per_token" for c in map(configuration.precision, names)),
            value=self._value(loss, milliseconds, kept, len(names)),
            error=error,
        )

    def percent(self, metric: float, loss: float) -> float:
        """Return the loss in percent of the float model's metric, whatever the goal's unit."""
        if not (math.isfinite(loss) and self.float_metric):
            return math.nan
        sign = 1 if loss >= 0 else -1
        return sign * 100 * abs(metric - self.float_metric) / abs(self.float_metric)

    def measure(
        self, recipe: Recipe, report: Report | None = None, *, within: float = math.inf
    ) -> tuple[float, float]:
        """Return the metric and the milliseconds of a copy of the model that is quantized so.

        One that takes as many milliseconds as `within`, or more, is not scored: its metric is NaN.
        """
        assert self.costs is not None
        model = copy.deepcopy(self.model)
        proof = self.proof if recipe.smooth else None
        carry_out(model, self.calibration, recipe, proof, self._weights, progress=False)
        milliseconds = self.costs.of(model.get_submodule(name) for name in self.linears)
        metric = self._metric(model, report) if milliseconds < within else math.nan
        freed = weakref.ref(model)
        del model
        if freed() is not None:
            gc.collect()  # its code has cycles; the next copy needs the memory
        return metric, milliseconds

    def _value(self, loss: float, milliseconds: float, kept: int, count: int) -> float:
        """Return what the search minimizes.

        Of those that meet the goal the fewest linears in float are best, then the least
        milliseconds, then the least loss: in [0, 1). Of the others the least loss: in [1, 2].
        """
        assert self.costs is not None
        limit = self.goal.limit
        if loss > limit:
            excess = (loss - limit) / (limit or 1.0)
            return 1 + (excess / (1 + excess) if math.isfinite(excess) else 1.0)
        ratio = milliseconds / self.costs.of(self.linears.values())
        headroom = min(1.0, max(0.0, loss / limit if limit else 0.0))
        return (kept + 0.999 * ratio / (1 + ratio) + 0.001 * headroom) / (count + 1)


def _number(metric: Any) -> float:
    try:
        return float(metric)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise SqCpuError(
            f"evaluate gives a {type(metric).__name__} that is no number ({first_line(error)}); "
            "have it return one, or an iterator of such"
        ) from error


def _covers(kept: Any, linears: Iterable[str]) -> bool:
    """Return whether what a study keeps is `Errors` of all these linears; they may be infinite."""
    rows = [kept.get(name) if isinstance(kept, dict) else None for name in linears]
    return all(
        isinstance(row, dict) and all(type(row.get(p)) in (int, float) for p in _BASES)
        for row in rows
    )
