"""The one stage that changes a model: fold the smoothing, then swap Linear for QuantLinear."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.calibration.calibration import Calibration, check_is_calibration
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.prefix import make_prefix, use_prefix
from sq_cpu.models.checks import check_model
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.models.linears import (
    check_ignore,
    contiguous_linears,
    float_linears,
    free_experts,
    linearize,
    quantizable_linears,
    restore_modules,
)
from sq_cpu.models.padding import Padding
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear
from sq_cpu.progress import track
from sq_cpu.quantization.checks import (
    check_calibration,
    check_layers,
    check_linears,
    check_quantizes,
    check_reached,
    check_replaceable,
)
from sq_cpu.quantization.dtypes import dtypes_of
from sq_cpu.quantization.head import Head, find_head, plan_head, plan_head_group
from sq_cpu.quantization.kept import kept_linears
from sq_cpu.quantization.recipe import HeadKind, Recipe
from sq_cpu.quantization.record import QuantizedPart
from sq_cpu.quantization.replace import mark_quantized, places_of, put
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import AUTO, GroupPlan, Hadamard, SmoothPlan, check_rotates, uniform_plan
from sq_cpu.smoothing.proof import FoldProof, Run, prove_folds, prove_with
from sq_cpu.smoothing.rotation import decided
from sq_cpu.smoothing.scales import WeightStatistics, linear_sample, own_scales, plan_scales
from sq_cpu.smoothing.smooth import Smoothed, rotated_groups, settled

__all__ = ["carry_out", "quantize", "quantize_part"]


def quantize(
    model: nn.Module,
    calibration: Calibration | None = None,
    plan: SmoothPlan | None = None,
    *,
    scheme: str | Scheme | None = None,
    smooth: bool = True,
    hadamard: Hadamard = AUTO,
    head: HeadKind = "float",
    target_length: int | None = None,
    progress: bool | None = None,
) -> nn.Module:
    """Quantize the linears of `model` in place to int8 and return it, ready to run.

    `scheme=None` is the plan's scheme, or O1 where it has none. With `plan=None` every linear to
    quantize is smoothed at alpha 0.8. `smooth=False` leaves the weights as they are (naive W8A8);
    only there, or with a plan without groups, and where no linear is static or decomposed, may the
    calibration be omitted. A group of which no linear is quantized is not smoothed, and not in the
    plan that is recorded. Linears that no batch reached (an expert that no token was routed to)
    stay in float, or as `scheme.unreached` says; those whose weight the model's own code uses stay
    in float wherever a calibration found them. Without a calibration neither is known: every linear
    is quantized blind, and a model that reads the weight of one (Mamba) fails when it runs.
    A linear that the plan gives `outliers`, or whose smoothed input reaches
    `scheme.outlier_threshold` in some channels, becomes a `DecomposedLinear`.

    Where a group's plan has `hadamard`, its input is rotated while it is quantized; where it has
    `hadamard_fold`, the weights are. "auto" does so where that lowers the output's error on the
    calibration's sampled rows, for this scheme; the plan that is recorded says where, and why not
    elsewhere. With `plan=None`, `hadamard` is that of `SmoothPlan.uniform`: "auto", 64 for the
    inputs of all down projections, 0 for nothing.

    `head="int8"` also quantizes the head of a model of transformers (`get_output_embeddings`),
    which schemes ignore: its activations in two int8 terms (`"per_token_x2"`), smoothed at alpha
    0.15. An embedding that is tied to it becomes a `QuantEmbedding`, which reads the head's weight:
    the model holds one copy. A head that cannot be int8 stays in float, and the record says why.
    It is not the default: alone it costs SmolLM2-135M 0.100 % +- 0.047 of perplexity, where 0.1 %
    is the bound, and Gemma-3-270M 0.004 % (median KL 9.0e-4 and 4.6e-4 nats; bench/results).

    With `target_length`, in tokens, all is chosen by `calibration.for_length(target_length)`: what
    texts of that length showed.

    A calibration with a `prefix` gives the model a `Prefix`: the first tokens of texts, whose keys
    and values the float model makes once.

    Afterwards the model is in evaluation mode, has no gradients, and carries a `QuantizationRecord`
    as `model.sq_cpu_config`: what was folded and what was not, which linears stayed in float, and
    why. transformers' Conv1D, FalconLinear and 3-D experts are then linears of their own (see
    `sq_cpu.models.linears`). Extra memory is that of the folds' proof, then that of one linear.

    Raises `SqCpuError` before anything is changed: for an unknown scheme, an entry of `ignore` that
    matches no linear, a `hadamard` that rotates nothing, a group or layer of the plan that the
    model lacks, a model that is quantized already or has no linear, linears with hooks or
    parametrizations or in a module that reads their weight itself, weights that are NaN, Inf or too
    long for int32 sums, and a calibration that is older than the weights, not finite, or without
    the rows that the scheme's range needs or the batches of the `target_length`.
    """
    recipe = Recipe.of(
        scheme, plan, smooth=smooth, hadamard=hadamard, head=head, target_length=target_length
    )
    return carry_out(model, calibration, recipe, progress=progress)


def carry_out(
    model: nn.Module,
    calibration: Calibration | None,
    recipe: Recipe,
    proof: FoldProof | None = None,
    weights: WeightStatistics | None = None,
    *,
    progress: bool | None = None,
) -> nn.Module:
    """Do what `quantize` does, as `recipe` says.

    `proof` is of the folds of all groups of this model, or of one that it is a copy of, and
    `weights` are of either; None: made here.
    """
    scheme, plan = recipe.scheme, recipe.plan
    check_model(model)
    if calibration is not None:
        check_is_calibration(calibration)
    if recipe.target_length is not None:
        if calibration is None:
            raise SqCpuError("target_length chooses of a calibration: give one, or leave it out")
        calibration = calibration.for_length(recipe.target_length)
    replaced = linearize(model)
    try:
        check_ignore(model, scheme.ignore)
        head = _head(model, recipe, calibration)
        name = None if head is None or head.in_float else head.name
        linears = quantizable_linears(model, scheme.ignore, but=name)
        check_layers(linears, plan)
        if name is not None:
            plan = plan_head(plan, name)
            calibration = None if calibration is None else calibration.with_head()
        in_float = kept_linears(linears, calibration, scheme, plan)
        if calibration is not None and recipe.needs_calibration:
            check_reached(not linears or bool(linears.keys() - set(calibration.unreached)))
        for each in in_float:
            del linears[each]
        kept = float_linears(model, scheme.ignore, but=name) | in_float
        if head is not None and head.in_float:
            kept[head.name] = head.in_float
        check_replaceable(model, scheme.ignore, in_float, but=name)
        check_quantizes(linears, kept)

        def prove(
            groups: Iterable[SmoothingGroup], rotated: Collection[SmoothingGroup]
        ) -> FoldProof:
            example = None if calibration is None else calibration.example
            return proof or prove_with(model, groups, example, rotated=rotated)

        ids = () if calibration is None else calibration.prefix
        if ids:
            make_prefix(model, ids)  # which tells whether there can be one
        prepared = _prepare(model, linears, calibration, recipe, None, prove, weights, head=head)
    except BaseException:
        restore_modules(replaced)
        raise
    # Of the folded model, still in float: a fold may change what its values are.
    prefix = make_prefix(model, ids, prove=False) if ids else None
    part = _swap(model, linears, prepared, progress)
    free_experts(model)
    contiguous_linears(model)
    mark_quantized(model, replace(part.record(scheme, kept), prefix=ids))
    if prefix is not None:
        use_prefix(model, prefix)
    return model


def quantize_part(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    calibration: Calibration | None,
    recipe: Recipe,
    groups: Sequence[SmoothingGroup],
    run: Run | None,
    padding: Padding | None = None,
    folded: Callable[[], object] = lambda: None,
) -> QuantizedPart:
    """Quantize some linears of a linearized model as `quantize` does all of them.

    `groups` and the recipe's plan, if any, are those of these linears, `run` calls what holds them
    and returns its outputs, and `padding` is of that call. `folded` is called when the linears are
    folded, and still in float. `linears` is emptied, so that each can be freed.
    """
    head = _head(model, recipe, calibration)
    plan = recipe.plan
    if head is not None and head.name in linears:
        plan = plan_head(plan, head.name)
    kept = kept_linears(linears, calibration, recipe.scheme, plan)
    for name in kept:
        del linears[name]

    def prove(groups: Iterable[SmoothingGroup], rotated: Collection[SmoothingGroup]) -> FoldProof:
        return prove_folds(model, groups, run, padding, rotated=rotated)

    prepared = _prepare(model, linears, calibration, recipe, groups, prove, head=head)
    folded()
    return replace(_swap(model, linears, prepared, progress=False), kept=kept)


def _head(model: nn.Module, recipe: Recipe, calibration: Calibration | None) -> Head | None:
    """Return the head if it is to be int8; with the reason, where it cannot."""
    head = find_head(model, recipe.scheme.ignore) if recipe.head == "int8" else None
    if head is None or head.in_float or calibration is None or not recipe.smooth:
        return head
    seen = calibration.with_head()
    if head.name in {*seen.channel_min, *seen.unreached, *seen.in_float}:
        return head
    return replace(head, in_float="the calibration does not cover it: calibrate again")


_Ranges = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class _Prepared:
    """What `_swap` needs beside the folded linears."""

    plan: SmoothPlan | None
    schemes: Mapping[str, Scheme]
    scales: Mapping[str, Tensor]
    at_run_time: frozenset[str]
    ranges: _Ranges
    outliers: Mapping[str, Tensor]
    hadamard: Mapping[str, int]
    """Of those that are rotated: full name -> columns of a block."""
    embeddings: Mapping[str, str]
    """Those that will read the weight of a quantized linear: full name -> the linear's."""
    misfits: Mapping[str, float]
    """`QuantizationRecord.misfits`."""


def _prepare(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    calibration: Calibration | None,
    recipe: Recipe,
    groups: Sequence[SmoothingGroup] | None,
    prove: Callable[[Iterable[SmoothingGroup], Collection[SmoothingGroup]], FoldProof],
    weights: WeightStatistics | None = None,
    *,
    head: Head | None,
) -> _Prepared:
    """Check, find all scales, and fold last: what raises leaves the weights as they were."""
    scheme, plan = recipe.scheme, recipe.plan
    check_linears(linears)
    check_calibration(linears, calibration, recipe.needs_calibration)
    whole = groups is None
    if groups is None:
        groups = smoothing_groups(model) if recipe.smooth else ()
    if head is not None and (head.name not in linears or head.in_float):
        head = None
    if recipe.is_uniform:
        assert calibration is not None  # check_calibration raised otherwise
        ignore = scheme.ignore if head is None else (*scheme.ignore, head.name)
        plan = uniform_plan(
            model,
            groups,
            calibration,
            recipe.alpha,
            rule=recipe.rule,
            ignore=ignore,
            hadamard=recipe.hadamard,
        )
    if head is not None:
        plan = plan_head(plan, head.name)
        if recipe.smooth and calibration is not None:
            plan = plan_head_group(plan, head.name, groups)
    smoothed = Smoothed(SmoothPlan(()), {}, frozenset(), {})
    schemes = dict.fromkeys(linears, scheme)
    group_of: dict[str, GroupPlan] = {}
    if plan is not None:
        plan = _of_quantized(plan, groups, linears)
        schemes = {name: plan.layer_scheme(scheme, name) for name in linears}
    if plan is not None and plan.groups:
        assert calibration is not None  # likewise
        plan = decided(
            model, plan, calibration, scheme, groups, linears=set(linears), weights=weights
        )
        scales = plan_scales(model, plan, calibration, scheme=scheme, among=groups, weights=weights)
        proof = prove(scales, rotated_groups(plan, scales)).without(calibration.in_float)
        smoothed = settled(model, plan, scales, proof)
        plan = smoothed.plan
        planned = {group.name: group for group in plan.groups}
        group_of = {name: planned[group.name] for group in scales for name in group.consumers}
    hadamard = {n: g.rotation for n, g in group_of.items() if g.hadamard and n in linears}
    if whole:
        check_rotates(recipe.hadamard, hadamard)
    embeddings: dict[str, str] = {}
    if head is not None:
        if head.embeddings and head.name in hadamard:
            raise SqCpuError(
                f"embeddings read the weight of {head.name}, which cannot be rotated then: drop "
                "hadamard from its group"
            )
        embeddings = dict.fromkeys(head.embeddings, head.name)
    own = own_scales(plan) if plan is not None else {}
    by_linear, at_run_time = smoothed.scales | own, smoothed.at_run_time | own.keys()
    ranges, outliers, misfits = _what_inputs_tell(
        linears, plan, scheme, calibration, by_linear, group_of
    )
    smoothed.apply(model)
    if head is not None and head.name in outliers:
        embeddings = {}
    return _Prepared(
        plan, schemes, by_linear, at_run_time, ranges, outliers, hadamard, embeddings, misfits
    )


def _of_quantized(
    plan: SmoothPlan, groups: Iterable[SmoothingGroup], linears: Mapping[str, nn.Linear]
) -> SmoothPlan:
    """Return the plan without the groups that have no linear to quantize."""
    idle = {group.name for group in groups if not any(name in linears for name in group.consumers)}
    return replace(plan, groups=tuple(group for group in plan.groups if group.name not in idle))


def _swap(
    model: nn.Module,
    linears: dict[str, nn.Linear],
    prepared: _Prepared,
    progress: bool | None,
) -> QuantizedPart:
    ranges, outliers, schemes = prepared.ranges, prepared.outliers, prepared.schemes
    layers = tuple(linears)
    places = places_of(model, linears)
    tied: dict[str, Any] = {name: model.get_submodule(name) for name in prepared.embeddings}
    places_of_tied = places_of(model, tied)
    for name in track(layers, "quantizing", progress):
        # One at a time, so that each float weight is freed before the next int8 one is made.
        linear = linears.pop(name)
        s = prepared.scales[name] if name in prepared.at_run_time else None
        clip = 1.0 if prepared.plan is None else prepared.plan.layer(name).weight_clip
        block = prepared.hadamard.get(name, 0)
        layer: nn.Module
        if name in outliers:
            layer = DecomposedLinear.from_float(
                linear,
                schemes[name],
                outliers[name],
                ranges.get(name),
                smoothing=s,
                weight_clip=clip,
                hadamard=block,
            )
        else:
            layer = QuantLinear.from_float(
                linear,
                schemes[name],
                ranges.get(name),
                smoothing=s,
                weight_clip=clip,
                hadamard=block,
            )
        put(layer, places[name])
        if isinstance(layer, QuantLinear):
            for each in [each for each, head in prepared.embeddings.items() if head == name]:
                put(QuantEmbedding(layer, tied.pop(each)), places_of_tied[each])
    at_run_time = prepared.at_run_time.difference(outliers)
    return QuantizedPart(
        plan=prepared.plan,
        layers=layers,
        smoothed=tuple(name for name in layers if name in at_run_time),
        decomposed={name: len(outliers[name]) for name in layers if name in outliers},
        hadamard=prepared.hadamard,
        dtypes=dtypes_of(model, (*layers, *prepared.embeddings)),
        embeddings=prepared.embeddings,
        misfits=prepared.misfits,
    )


def _what_inputs_tell(
    linears: Mapping[str, nn.Linear],
    plan: SmoothPlan | None,
    base: Scheme,
    calibration: Calibration | None,
    scales: Mapping[str, Tensor],
    group_of: Mapping[str, GroupPlan],
) -> tuple[_Ranges, dict[str, Tensor], dict[str, float]]:
    """Return what each static scale covers, which channels stay in float, and what does not fit.

    The channels are int64, ascending; a linear without any has no entry. What does not fit is the
    share of the sampled rows. All are what the searches see of a linear.
    """
    plan = plan or SmoothPlan(())
    ranges: _Ranges = {}
    outliers: dict[str, Tensor] = {}
    misfits: dict[str, float] = {}
    for name, linear in linears.items():
        scheme = plan.layer_scheme(base, name)
        seen = calibration if scheme.needs_calibration else None
        if seen is not None and name in seen.unreached:
            seen = None
        group = group_of.get(name, GroupPlan(name=name))
        # Its weight is the model's own: none is held.
        fake = FakeQuantizedLinear(
            linear_sample(name, linear.weight, base, plan, seen),
            scales.get(name, torch.ones(linear.in_features, dtype=torch.float32, device="cpu")),
            scheme,
            group.clip,
            group.rotation,
        )
        if fake.outliers.any():
            outliers[name] = fake.outliers.nonzero().flatten()
        if seen is not None and scheme.activations == "static":
            ranges[name] = fake.range
            rows = fake.sample.rows
            if rows is not None and len(rows):
                clips, underflows = fake.row_fits(rows)  # never both
                misfits[name] = int((clips | underflows).sum()) / len(rows)
    return ranges, outliers, misfits
