"""Alphas and clips that gradients found: the whole quantized model against the float one.

A search scores each group alone. Here all groups' alphas and clips descend together, along the
gradient of the divergence of the quantized model's prediction from the float model's, through
rounding as if it were the identity (`numerics.straight_through`). MobileQuant (arXiv 2408.13933)
learns smoothing and ranges so, per channel; two numbers a group are what a plan holds, and what a
few thousand tokens determine. A range that most rows fit follows alpha, and has no clip. With any
other, no row has its own scale meanwhile (`Scheme.dynamic_fallback`): ranges that no row fits would
be best otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import make_prefix, prefix_of, use_prefix
from sq_cpu.kernels.runtime import has_vnni
from sq_cpu.models.calls import Batch, Example, called, evaluating, frozen, model_inputs
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.models.hooks import hooked
from sq_cpu.models.linears import linearized
from sq_cpu.models.padding import padding_of
from sq_cpu.models.unchanged import unchanged
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear
from sq_cpu.numerics.ranges import covered_range, fits_rows
from sq_cpu.numerics.straight_through import quantized_rows, quantized_weight
from sq_cpu.parsing import check_kind, check_whole
from sq_cpu.progress import track
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import GroupPlan, SmoothPlan, scheme_of
from sq_cpu.smoothing.plan_checks import check_clips, check_groups
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.rules import without_quiet
from sq_cpu.smoothing.scales import (
    WeightStatistics,
    as_planned,
    group_statistics,
    planned_scale,
)
from sq_cpu.smoothing.statistics import GroupStatistics
from sq_cpu.tuning.simulation import simulating

__all__ = ["Learned", "learn"]

_RATE = 0.01  # of Adam: what alpha, or the logarithm of a clip, moves by in a step at first
_MOST_STEPS = 10_000
_CHECKS = 4  # times that the held-out batches are looked at
_HELD_OUT = 4  # every so manieth batch


@dataclass(frozen=True)
class Learned:
    """What `learn` found."""

    plan: SmoothPlan
    before: float
    """Divergence of the plan that it was given on the held-out batches, nats a prediction."""
    after: float
    """Of `plan`; the same where nothing was better, and it is the one given."""


def learn(
    model: nn.Module,
    calibration: Calibration,
    plan: SmoothPlan,
    batches: Iterable[Batch],
    *,
    scheme: str | Scheme | None = None,
    steps: int = 100,
    progress: bool | None = None,
) -> Learned:
    """Return a plan's alphas and clips as gradients move them, if that is better; keep the model.

    Each step takes one batch in turn, but for every fourth, which is held out: at every quarter of
    the steps the plan is scored on these in the numerics of the kernels, and the best is kept. The
    model runs twice a step, once of these with a graph; memory is that of training it on one batch,
    and the quantized weights in fp32.

    Parameters
    ----------
    plan : where it begins. alpha moves where the rule is "smoothquant", clip where activations
        are static, but not with a range that most rows fit (`Scheme.static_range="auto"`).
    batches : as for `calibrate`, two or more
    scheme : as for `quantize`

    Raises
    ------
    SqCpuError
        For fewer than two batches, a plan with nothing to move, groups that the model lacks or the
        calibration does not cover, weights that changed since, and a model whose outputs do not
        depend on its linears, have no gradient or are not finite.
    """
    check_model(model)
    check_is_calibration(calibration)
    check_kind(SmoothPlan, "a SmoothPlan; read a file with SmoothPlan.load", plan=plan)
    check_whole(1, steps=steps)
    if steps > _MOST_STEPS:
        raise SqCpuError(f"steps is {steps}; it is at most {_MOST_STEPS}, and 100 is much")
    scheme = scheme_of(scheme, plan).resolve(has_vnni())
    check_clips(plan, scheme)
    if not fits_rows(scheme):
        scheme = replace(scheme, dynamic_fallback=False)
    given = list(model_inputs(model, batches, "learning", "reading batches", False))
    if len(given) < 2:
        raise SqCpuError("learning needs two batches or more: it holds every fourth out")
    trained = [each for index, each in enumerate(given) if index % _HELD_OUT]
    with (
        linearized(model),
        unchanged(model),
        evaluating(model),
        frozen(model),
        _prefixed(model, calibration.prefix),
    ):
        found = smoothing_groups(model)
        check_groups(plan, found)
        by_name = {group.name: group for group in found}
        weights = WeightStatistics()
        plan = decided(model, plan, calibration, scheme, found, weights=weights)
        statistics = {
            planned.name: group_statistics(
                model, by_name[planned.name], calibration, scheme, plan, weights
            )
            for planned in plan.groups
        }
        groups = [_Group(statistics[planned.name], planned) for planned in plan.groups]
        moving = [each for group in groups for each in group.parameters()]
        if not moving:
            raise SqCpuError(
                "nothing to learn: no group has the rule smoothquant, or static activations with "
                'another static_range than "auto"'
            )
        judge = _Judge(model, statistics, given[::_HELD_OUT], calibration.prefix)
        best, before = plan, judge.divergence(plan.groups)
        after = before
        optimizer = torch.optim.Adam(moving, lr=_RATE)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, _RATE / 10)
        checks = {-(-steps * check // _CHECKS) for check in range(1, _CHECKS + 1)}
        for step in track(range(1, steps + 1), "learning ranges", progress):
            example = trained[(step - 1) % len(trained)]
            expected = _predict(model, example, calibration.prefix)
            optimizer.zero_grad()
            with torch.enable_grad(), _learning(model, groups):
                made = _predict(model, example, calibration.prefix)
                lost = made.divergence(expected) / made.count()
            if not lost.requires_grad:
                raise SqCpuError("the model's outputs have no gradient: it cannot be learned from")
            torch.autograd.backward(lost)
            optimizer.step()
            schedule.step()
            for group in groups:
                group.keep_within()
            if step in checks:
                candidate = replace(plan, groups=tuple(group.plan() for group in groups))
                if (divergence := judge.divergence(candidate.groups)) < after:
                    best, after = candidate, divergence
    return Learned(best, before, after)


@contextmanager
def _prefixed(model: nn.Module, ids: Sequence[int]) -> Iterator[None]:
    """Run a block in which a float model uses its prefix, as it will when it is quantized."""
    if not ids:
        yield
        return
    before = prefix_of(model)
    use_prefix(model, make_prefix(model, ids))
    try:
        yield
    finally:
        use_prefix(model, before)


class _Judge:
    """What plans lose on batches that nothing is learned from."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, GroupStatistics],
        examples: Sequence[Example],
        prefix: Sequence[int],
    ) -> None:
        self._model, self._statistics, self._examples = model, statistics, examples
        self._prefix = prefix

    def divergence(self, plans: Iterable[GroupPlan]) -> float:
        """Return the nats that a prediction moves by, in the numerics of the kernels."""
        plans, lost, count = tuple(plans), 0.0, 0
        for example in self._examples:  # the predictions of one at a time
            expected = _predict(self._model, example, self._prefix)
            with simulating(self._model, self._statistics, plans, hold=True):
                made = _predict(self._model, example, self._prefix)
            lost += float(made.divergence(expected))
            count += made.count()
        return lost / count


class _Group:
    """A group whose alpha and clip have gradients."""

    def __init__(self, statistics: GroupStatistics, planned: GroupPlan) -> None:
        self._planned = planned
        # A rule that reads the clip shall see the planned one.
        at_start = as_planned(statistics, planned)
        self._s = planned_scale(planned, at_start)
        self._statistics = replace(at_start, clip=1.0)
        self._moves = planned.rule == "smoothquant" and bool(statistics.samples)
        x, w = without_quiet(statistics.act_absmax), statistics.weight_absmax
        alive = (x > 0) & (w > 0)
        # d log s / d alpha, by eq. 4 of SmoothQuant.
        self._slope = torch.where(alive, x.where(alive, 1.0).log() + w.where(alive, 1.0).log(), 0.0)
        self._clips = bool(statistics.samples) and any(
            fake.scheme.activations == "static" and not fits_rows(fake.scheme)
            for fake in statistics.fake_quantized(self._s)
        )
        self.alpha = torch.tensor(planned.alpha, requires_grad=self._moves)
        self.log_clip = torch.tensor(math.log(planned.clip), requires_grad=self._clips)
        # Ranges by percentile or squared error stay where they are, but for the clip.
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def parameters(self) -> list[Tensor]:
        return [each for each in (self.alpha, self.log_clip) if each.requires_grad]

    def keep_within(self) -> None:
        """Bring alpha and clip back to what a plan may hold."""
        with torch.no_grad():
            self.alpha.clamp_(0.0, 1.0)
            self.log_clip.clamp_(math.log(0.05), math.log(2.0))

    def plan(self) -> GroupPlan:
        alpha = round(float(self.alpha), 4) if self._moves else self._planned.alpha
        clip = round(math.exp(float(self.log_clip)), 4) if self._clips else self._planned.clip
        return replace(self._planned, alpha=alpha, clip=clip)

    def linears(self) -> Iterator[FakeQuantizedLinear]:
        """Yield the group's linears at the present alpha; s has its gradient."""
        if self._statistics.samples:
            s = self._s * torch.exp((self.alpha - self._planned.alpha) * self._slope)
            yield from self._statistics.fake_quantized(s)

    def ends(self, fake: FakeQuantizedLinear) -> tuple[Tensor, Tensor] | None:
        """Return what a linear's static scale covers; None where it is dynamic."""
        if fake.scheme.activations != "static":
            return None
        given = fake.sample.input_range is not None
        if not given and fake.scheme.static_range in ("auto", "minmax"):
            # Made again for the gradient, as the weights are: these may be many rows.
            ends = checkpoint(_ends_at, fake, fake.s, use_reentrant=False)
        else:
            name = fake.sample.name
            if name not in self._found:
                least, greatest = replace(fake, s=fake.s.detach()).range
                self._found[name] = torch.tensor(least), torch.tensor(greatest)
            ends = self._found[name]
        clip = self.log_clip.exp()
        return clip * ends[0], clip * ends[1]


def _ends_at(fake: FakeQuantizedLinear, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return what `static_range` finds for min/max, or for most rows; with the gradient of s."""
    fake = replace(fake, s=s)
    return covered_range(*fake.channel_ends(), fake.range_rows(), fake.scheme)


@contextmanager
def _learning(model: nn.Module, groups: Iterable[_Group]) -> Iterator[None]:
    """Run a block in which the groups' linears compute as if quantized, with gradients."""

    def hook(group: _Group, fake: FakeQuantizedLinear) -> Callable[..., Tensor]:
        def quantized(s: Tensor) -> Tensor:
            weight = replace(fake, s=s).coded_weight()
            return quantized_weight(weight, fake.scheme, fake.sample.weight_clip)

        # What lies between s and the quantized weight is made again for the gradient, not kept.
        weight: Tensor = checkpoint(quantized, fake.s, use_reentrant=False)
        ends, kept = group.ends(fake), fake.outliers

        def compute(linear: nn.Linear, args: Any, kwargs: Any, y: Tensor) -> Tensor:
            x = args[0] if args else kwargs["input"]
            rows = x.reshape(-1, x.shape[-1]).float()
            made = quantized_rows(fake.coded(rows), fake.scheme, ends) @ weight.T
            if kept.any():
                made = made + rows[:, kept] @ linear.weight[:, kept].float().T
            if linear.bias is not None:
                made = made + linear.bias.float()
            return made.to(y.dtype).reshape(y.shape)

        return compute

    hooks = [
        (model.get_submodule(fake.sample.name), hook(group, fake))
        for group in groups
        for fake in group.linears()
    ]
    with hooked(after=hooks):
        yield


@dataclass(frozen=True, eq=False)
class _Prediction:
    rows: list[Tensor]
    """fp32 [rows, features] each, without padding and a prefix."""
    is_logits: bool

    def count(self) -> int:
        return max(1, len(self.rows[0]))

    def divergence(self, expected: _Prediction) -> Tensor:
        """Return the nats that it lies from what was expected, summed over the rows.

        Outputs other than logits count as means of Gaussians of variance 1.
        """
        if self.is_logits:
            log_p, log_q = expected.rows[0].log_softmax(dim=-1), self.rows[0].log_softmax(dim=-1)
            return (log_p.exp() * (log_p - log_q)).sum()
        pairs = zip(expected.rows, self.rows, strict=True)
        return torch.stack([(a - b).square().sum() / 2 for a, b in pairs]).sum()


def _predict(model: nn.Module, example: Example, prefix: Sequence[int]) -> _Prediction:
    padding = padding_of(model, *example).with_prefix(prefix)
    with padding.tracing():
        outputs = called(model, example, "learning")
        logits = getattr(outputs, "logits", None)
        leaves = [logits] if isinstance(logits, Tensor) else tree_leaves(outputs)
        made = []
        for leaf in leaves:
            if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.dim():
                kept = padding.kept(leaf)
                rows = leaf.float().reshape(-1, leaf.shape[-1] if leaf.dim() > 1 else 1)
                made.append(rows if kept is None else rows[kept])
    if not made:
        raise SqCpuError("the model gives no float output to learn from")
    if not all(each.isfinite().all() for each in made):
        raise SqCpuError("the model's outputs are NaN or infinite: there is nothing to learn from")
    return _Prediction(made, isinstance(logits, Tensor))
