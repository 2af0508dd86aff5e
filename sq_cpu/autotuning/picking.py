"""The fastest scheme that holds an accuracy goal, each as it is: nothing is tuned."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any

from torch import nn

from sq_cpu.autotuning.evaluator import Evaluate, Goal, TuningJob
from sq_cpu.autotuning.latency import Costs, measured_costs
from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import TextPerplexity
from sq_cpu.models.checks import check_model
from sq_cpu.parsing import check_kind, check_whole
from sq_cpu.quantization.recipe import HeadKind, Recipe
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import AUTO, Hadamard

__all__ = ["PickedScheme", "TriedScheme", "pick_recipe", "pick_scheme"]


@dataclass(frozen=True, kw_only=True)
class TriedScheme:
    """What one scheme is worth; None stands for what was not found."""

    scheme: Scheme
    """`reduce_range="auto"` decided for this machine."""
    holds: bool
    """Whether its loss is within the goal."""
    metric: float | None = None
    loss_percent: float | None = None
    """By how much the metric is worse than the float model's, in percent of that."""
    standard_error: float | None = None
    """Of `loss_percent`, over windows that both models read; of a `TextPerplexity` alone."""
    milliseconds: float | None = None
    """Of all linears that can be int8, by the cost table."""
    why: str = ""
    """Why it has no metric."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        return asdict(self) | {"scheme": self.scheme.to_dict(), "name": self.scheme.name}


@dataclass(frozen=True, kw_only=True)
class PickedScheme:
    """The fastest scheme that holds the goal; what it is worth is as of a `TriedScheme`."""

    scheme: Scheme
    """For `quantize(model, calibration, scheme=...)`."""
    goal: str
    metric: float
    loss_percent: float | None
    standard_error: float | None
    milliseconds: float
    float_metric: float
    float_milliseconds: float
    tried: tuple[TriedScheme, ...]
    """In the order in which they were tried; slower ones than the picked one were not."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON types."""
        tried = [each.to_dict() for each in self.tried]
        own = {"scheme": self.scheme.to_dict(), "name": self.scheme.name, "tried": tried}
        return asdict(self) | own


def pick_scheme(
    model: nn.Module,
    calibration: Calibration,
    evaluate: Evaluate,
    goal: str | float = "1%",
    *,
    schemes: Sequence[str | Scheme] = ("O3", "O1"),
    smooth: bool = True,
    hadamard: Hadamard = AUTO,
    head: HeadKind = "float",
    higher_is_better: bool = False,
    tokens: int = 512,
    costs: Costs | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> PickedScheme:
    """Find the fastest scheme that keeps an accuracy goal.

    The model is not changed. Each scheme is carried out on a copy, which takes the model's memory
    once more, and evaluated, those first that are faster by the milliseconds of their linears here.
    The first that holds the goal is picked, unless what its linears do beside that (smoothing and
    rotating at run time) makes another one faster that holds it, too. Nothing is tuned: `tune`
    lowers the loss of a scheme, and `autotune` finds a mix of int8 and float.

    Parameters
    ----------
    calibration : as for `quantize`, made on other text than what is evaluated
    evaluate : model -> metric, deterministic, or an iterator whose last item counts. A
        `TextPerplexity` also gives the losses' standard errors.
    goal : greatest loss against the float model: "1%" of its metric, or a number, in the metric's
        unit
    schemes : those to try; they ignore the same linears
    smooth, hadamard, head : as for `quantize`, of each scheme
    higher_is_better : True for an accuracy, False for a perplexity
    tokens : rows of the linears' input that milliseconds are measured with: 512 for a prefill, 1
        for decoding
    costs : None: measured, or from this machine's cache
    say : takes a line for each scheme that is tried

    Raises
    ------
    SqCpuError
        When no scheme holds the goal, for what `quantize` refuses of every scheme, a metric of the
        float model that is no finite number, and arguments that cannot be.
    """
    if isinstance(schemes, str) or not isinstance(schemes, Sequence):
        raise SqCpuError(f"schemes is {schemes!r:.80}; give several, as in ('O3', 'O1')")
    return pick_recipe(
        model,
        calibration,
        evaluate,
        goal,
        [Recipe.of(each, smooth=smooth, hadamard=hadamard, head=head) for each in schemes],
        higher_is_better=higher_is_better,
        tokens=tokens,
        costs=costs,
        progress=progress,
        say=say,
    )[1]


def pick_recipe(
    model: nn.Module,
    calibration: Calibration,
    evaluate: Evaluate,
    goal: str | float,
    recipes: Sequence[Recipe],
    *,
    higher_is_better: bool = False,
    tokens: int = 512,
    costs: Costs | None = None,
    progress: bool | None = None,
    say: Callable[[str], object] = lambda _: None,
) -> tuple[Recipe, PickedScheme]:
    """Do what `pick_scheme` does, among recipes without a plan, and return the one it picks."""
    check_model(model)
    check_is_calibration(calibration)
    check_kind(Callable, "a function of the model", evaluate=evaluate)
    check_kind(Callable, "a function of a text", say=say)
    check_kind(Costs | None, "Costs", costs=costs)
    check_whole(1, tokens=tokens)
    parsed = Goal.of(goal)
    ignored = {recipe.scheme.ignore for recipe in recipes}
    if len(ignored) != 1:
        raise SqCpuError(
            "there is no scheme to try; give one or more"
            if not recipes
            else "the schemes to try ignore different linears; give all the same ignore"
        )
    job = TuningJob(model, calibration, evaluate, parsed, higher_is_better, ignored.pop())
    if not job.linears:
        raise SqCpuError("nothing to quantize: the calibration reached no linear beside ignored")
    if costs is None:
        dtype = next(iter(job.linears.values())).weight.dtype
        costs = measured_costs(job.linears.values(), tokens=tokens, dtype=dtype, progress=progress)
    job.costs = costs
    say("evaluating the float model")
    picking = _Picking(job, str(goal), say)
    return picking.among(recipes)


class _Picking:
    """One search: the float model's metric, and the schemes that were tried so far."""

    def __init__(self, job: TuningJob, goal: str, say: Callable[[str], object]) -> None:
        self.job, self.goal, self.say = job, goal, say
        self.running: list[float] = []
        """The float model's metric of more and more data."""
        job.float_metric = job.measure_float(lambda metric, _: self.running.append(metric))

    def among(self, recipes: Sequence[Recipe]) -> tuple[Recipe, PickedScheme]:
        """Try recipes, as `pick_scheme` says."""
        found: list[tuple[float, Recipe, TriedScheme]] = []
        tried: list[TriedScheme] = []
        least = math.inf
        for recipe in sorted(recipes, key=self._least_milliseconds):
            if self._least_milliseconds(recipe) >= least:
                break  # nor is any after it faster
            tried.append(one := self._try(recipe, least))
            if one.holds:
                assert one.milliseconds is not None
                least = one.milliseconds
                found.append((least, recipe, one))
        if not found:
            raise SqCpuError(self._none(tried))
        least, recipe, best = found[-1]
        assert best.metric is not None
        assert self.job.costs is not None
        return recipe, PickedScheme(
            scheme=best.scheme,
            goal=self.goal,
            metric=best.metric,
            loss_percent=best.loss_percent,
            standard_error=best.standard_error,
            milliseconds=least,
            float_metric=self.job.float_metric,
            float_milliseconds=self.job.costs.of(self.job.linears.values()),
            tried=tuple(tried),
        )

    def _least_milliseconds(self, recipe: Recipe) -> float:
        """Return what the linears cost when none is smoothed or rotated at run time."""
        kind = recipe.scheme.activations
        return sum(self.job.milliseconds(linear, kind) for linear in self.job.linears.values())

    def _try(self, recipe: Recipe, within: float) -> TriedScheme:
        job, name = self.job, _name(recipe.scheme)
        running: list[float] = []
        self.say(f"trying {name}")
        try:
            metric, milliseconds = job.measure(
                recipe, lambda partial, _: running.append(partial), within=within
            )
        except SqCpuError as refused:
            self.say(f"{name}: {refused}")
            return TriedScheme(scheme=recipe.scheme, holds=False, why=str(refused))
        if milliseconds >= within or not math.isfinite(metric):
            why = "not faster than one that holds" if milliseconds >= within else "no finite metric"
            self.say(f"{name}: {why}")
            return TriedScheme(
                scheme=recipe.scheme, holds=False, milliseconds=milliseconds, why=why
            )
        loss = job.goal.loss(metric, job.float_metric, job.higher_is_better)
        is_text = isinstance(job.evaluate, TextPerplexity)
        one = TriedScheme(
            scheme=recipe.scheme,
            holds=loss <= job.goal.limit,
            metric=metric,
            loss_percent=_finite(job.percent(metric, loss)),
            standard_error=_standard_error(self.running, running) if is_text else None,
            milliseconds=milliseconds,
        )
        self.say(f"{name}: {self._loss(one)}, goal {self.goal}; linears {milliseconds:.2f} ms")
        return one

    def _loss(self, one: TriedScheme) -> str:
        """Return a loss in the goal's unit, with its standard error."""
        job = self.job
        assert one.metric is not None
        text = job.goal.text(job.goal.loss(one.metric, job.float_metric, job.higher_is_better))
        if one.standard_error is None:
            return text
        if job.goal.relative:
            return f"{text} +- {one.standard_error:.2f}"
        return f"{text} +- {one.standard_error / 100 * abs(job.float_metric):.2g}"

    def _none(self, tried: Sequence[TriedScheme]) -> str:
        """Say that no scheme holds the goal, what was reached, and what to do."""
        worth = {one.metric: one for one in tried if one.metric is not None}
        if not worth:
            return f"no scheme could be measured; {_name(tried[0].scheme)}: {tried[0].why}"
        best = worth[max(worth) if self.job.higher_is_better else min(worth)]
        return (
            f"no scheme holds the goal of {self.goal}: the best, {_name(best.scheme)}, is at "
            f"{self._loss(best)}; lower its loss with tune, find a mix of int8 and float with "
            "autotune, or set a wider goal"
        )


def _name(scheme: Scheme) -> str:
    return scheme.name if scheme.name != "custom" else f"{scheme.activations} activations"


def _standard_error(reference: Sequence[float], subject: Sequence[float]) -> float | None:
    """Return the standard error, in percent, of the relative difference of two perplexities.

    Both are running, of as many tokens a window; the windows' paired losses count as independent.
    """
    pairs = zip(_window_losses(reference), _window_losses(subject), strict=True)
    more = [after - before for before, after in pairs]
    if len(more) < 2 or not all(map(math.isfinite, more)):
        return None
    ratio = math.exp(statistics.fmean(more))
    return 100 * ratio * statistics.stdev(more) / math.sqrt(len(more))


def _window_losses(running: Sequence[float]) -> list[float]:
    """Return each window's loss: perplexity k is exp of the mean of the first k."""
    totals = [0.0, *(count * math.log(each) for count, each in enumerate(running, start=1))]
    return [after - before for before, after in pairwise(totals)]


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
