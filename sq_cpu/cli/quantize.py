"""`sq-cpu quantize`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from torch import nn

from sq_cpu.autotuning.evaluator import Goal
from sq_cpu.autotuning.picking import PickedScheme, pick_recipe
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint.card import Measured
from sq_cpu.cli import show
from sq_cpu.cli.calibration import CALIB, calibration_data
from sq_cpu.cli.common import (
    GOAL,
    TEXT_WINDOWS,
    TORCH_DTYPES,
    Dtype,
    Hadamard,
    Json,
    Model,
    Prefix,
    PrefixName,
    Text,
    TextWindows,
    TrustRemoteCode,
    Window,
    check_not_quantized,
    emit,
    hadamard_choice,
    quiet,
    say,
    scored_text,
    text_perplexity,
)
from sq_cpu.cli.quantize_checks import check_auto, check_recipe, check_smoothing, is_given
from sq_cpu.cli.tuning import Windows
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.closeness import Closeness
from sq_cpu.models.calls import Batch
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan, scheme_of
from sq_cpu.smoothing.qconf import QCONF_SCHEME, Qconf
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.streaming.convert import Job, convert


class _Scheme(str, Enum):
    o1, o2, o3, auto = "O1", "O2", "O3", "auto"


# Of auto: those to try.
_TRIED = ("O3", "O1")


class _Weights(str, Enum):
    per_channel, per_tensor, per_rows = "per_channel", "per_tensor", "per_rows"


class _Range(str, Enum):
    auto, minmax, percentile, mse = "auto", "minmax", "percentile", "mse"


class _Unreached(str, Enum):
    float, quantize = "float", "quantize"


class _Head(str, Enum):
    int8, float = "int8", "float"


class _Rule(str, Enum):
    smoothquant, spiq = "smoothquant", "spiq"
    outlier_suppression, aqas = "outlier_suppression", "aqas"


class _Format(str, Enum):
    ours, compressed_tensors = "sq_cpu", "compressed-tensors"


class _ReduceRange(str, Enum):
    no, yes, auto = "no", "yes", "auto"

    def setting(self) -> bool | Literal["auto"]:
        return "auto" if self is _ReduceRange.auto else self is _ReduceRange.yes


def quantize_command(
    ctx: typer.Context,
    model: Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Plan to carry out, as SmoothPlan.save writes it."),
    ] = None,
    recipe_file: Annotated[
        Path | None,
        typer.Option(
            "--recipe",
            metavar="QCONF.json",
            help="Scales and ranges that IPEX or Neural Compressor found (best_configure.json, "
            "qconfig.json), as a plan.",
        ),
    ] = None,
    scheme: Annotated[
        _Scheme | None,
        typer.Option(
            help="Activation scales: O1 per token, O2 per tensor, O3 static; auto: O3 or O1, the "
            "fastest here that holds --goal. [default: the plan's, or O1]"
        ),
    ] = None,
    goal: Annotated[str, typer.Option(help=f"{GOAL} Of --scheme auto.")] = "1%",
    text: Text = None,
    text_windows: TextWindows = TEXT_WINDOWS,
    alpha: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help=f"Migration strength. [default: {DEFAULT_ALPHA}]"),
    ] = None,
    rule: Annotated[
        _Rule | None,
        typer.Option(help="Smoothing rule. [default: smoothquant, the one that takes --alpha]"),
    ] = None,
    smooth: Annotated[bool, typer.Option(help="Smooth before quantizing.")] = True,
    hadamard: Hadamard = None,
    calib: Annotated[
        list[Path] | None,
        typer.Option(help=CALIB),
    ] = None,
    windows: Windows = 16,
    window: Window = 512,
    target_length: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of the texts that the model is for: calibrate on windows of so many, in "
            "the place of --window.",
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Activation range.")
    ] = True,
    weights: Annotated[_Weights, typer.Option(help="Weight scales.")] = _Weights.per_channel,
    rows_per_scale: Annotated[
        int, typer.Option(help="Output channels that share a scale, with per_rows weights.")
    ] = Scheme.rows_per_scale,
    static_range: Annotated[
        _Range,
        typer.Option(
            "--range",
            help="What O3's scale covers: all, a percentile, the least error, or auto: 19 of 20 "
            "rows, as the others get their own.",
        ),
    ] = _Range.auto,
    percentile: Annotated[
        float, typer.Option(help="Percentage of the values that --range percentile keeps.")
    ] = Scheme.percentile,
    dynamic_fallback: Annotated[
        bool,
        typer.Option(
            "--dynamic-fallback/--no-dynamic-fallback",
            help="O3: a token that the static scale does not fit gets its own.",
        ),
    ] = Scheme.dynamic_fallback,
    reduce_range: Annotated[
        _ReduceRange,
        typer.Option(help="7-bit activations; auto: on processors without VNNI."),
    ] = _ReduceRange.no,
    outlier_threshold: Annotated[
        float | None,
        typer.Option(help="O1: input channels that reach this stay in float (LLM.int8() has 6)."),
    ] = None,
    ignore: Annotated[
        list[str] | None,
        typer.Option(
            help="Linear, or module with all below it, to leave in float, repeatable. "
            "[default: lm_head]"
        ),
    ] = None,
    head: Annotated[
        _Head,
        typer.Option(
            help="The output head, with the embeddings that are tied to it: int8 with 15-bit "
            "activations, or float."
        ),
    ] = _Head.float,
    unreached: Annotated[
        _Unreached, typer.Option(help="Linears that no calibration window reaches.")
    ] = _Unreached.float,
    prefix: Prefix = PrefixName.auto,
    dtype: Annotated[Dtype, typer.Option(help="What is not int8 is kept in this.")] = Dtype.fp32,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="One decoder block in memory at a time; interrupted, the same command resumes. "
            "[default: when MODEL, a folder, does not fit]",
        ),
    ] = None,
    format: Annotated[  # noqa: A002
        _Format,
        typer.Option(
            help="Of OUT. compressed-tensors, for vLLM, has no rotations, prefix and scales of "
            "rows' own: they are left out unless asked for, which is refused."
        ),
    ] = _Format.ours,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace an sq_cpu checkpoint in OUT; discard unfinished other work."),
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Quantize MODEL to int8 and save it to OUT.

    With --scheme auto, schemes are tried on a copy in memory, the fastest first, and one that holds
    the goal is carried out. Where none does, the exit code is 1 and OUT is not written.
    """
    check_auto(ctx, scheme is _Scheme.auto, plan, stream)
    if recipe_file is not None:
        check_recipe(ctx)
        if not is_given(ctx, "prefix"):
            prefix = PrefixName.off  # which the recipe's ranges know nothing of
    check_smoothing(plan, alpha, rule, hadamard, smooth)
    if target_length is not None:
        if is_given(ctx, "window"):
            raise typer.BadParameter(
                "--target-length says how long the windows are; drop it, or --window"
            )
        window = target_length
    exported = format is not _Format.ours
    if exported:
        if prefix is PrefixName.bos:
            raise typer.BadParameter(f"--format {format.value} has no prefix; drop --prefix bos")
        prefix = PrefixName.off
        if hadamard is None and plan is None and smooth:
            hadamard = False
        if not is_given(ctx, "dynamic_fallback"):
            dynamic_fallback = False
    overrides: dict[str, Any] = {
        "symmetric": symmetric,
        "weights": weights.value,
        "rows_per_scale": rows_per_scale,
        "static_range": static_range.value,
        "percentile": percentile,
        "dynamic_fallback": dynamic_fallback,
        "reduce_range": reduce_range.setting(),
        "outlier_threshold": outlier_threshold,
        "unreached": unreached.value,
    }
    if ignore:
        overrides["ignore"] = tuple(ignore)
    planned = None if plan is None else SmoothPlan.load(plan)
    # A default is not to change the plan's scheme.
    given = {name: value for name, value in overrides.items() if is_given(ctx, name)}
    if exported:
        given["dynamic_fallback"] = dynamic_fallback
    how: dict[str, Any] = {
        "smooth": smooth,
        "rule": Recipe.rule if rule is None else rule.value,
        "hadamard": hadamard_choice(hadamard),
        "head": head.value,
        "target_length": target_length,
    }
    if alpha is not None:
        how["alpha"] = alpha
    qconf = None if recipe_file is None else Qconf.load(recipe_file)
    named: tuple[str | Scheme | None, ...]
    if qconf is not None:
        named = (QCONF_SCHEME,)
    else:
        named = _TRIED if scheme is _Scheme.auto else (None if scheme is None else scheme.value,)
    recipes = [
        Recipe.of(Scheme.of(scheme_of(each, planned), **given), planned, **how) for each in named
    ]
    recipe = recipes[0]
    picked: PickedScheme | None = None
    close: Closeness | None = None
    scored: str | tuple[str, ...] = ()
    if scheme is _Scheme.auto:
        Goal.of(goal)
        scored = scored_text(text, text_windows)
    check_not_quantized(model)
    data = calibration_data(model, calib, windows, window, is_streamed=bool(stream))
    if data.is_other and scheme is _Scheme.auto:
        raise SqCpuError(
            f"--scheme auto holds a goal of perplexity, and {model} is no causal language model: "
            "give O1, O2 or O3"
        )

    job = Job(
        source=model,
        out=out,
        recipe=recipe,
        dtype=TORCH_DTYPES[dtype],
        overwrite=overwrite,
        trust_remote_code=trust_remote_code,
        prefix=prefix.value,
        format=format.value,
    )

    def choose(loaded: nn.Module, tokenizer: Any, calibration: Calibration) -> Recipe:
        nonlocal recipe, picked
        evaluate = text_perplexity(tokenizer, scored, window, text_windows)
        recipe, picked = pick_recipe(loaded, calibration, evaluate, goal, recipes, say=say)
        return recipe

    def carry_over(loaded: nn.Module, _tokenizer: Any, _calibration: Calibration) -> Recipe:
        nonlocal recipe
        assert qconf is not None
        recipe = Recipe.of(recipe.scheme, qconf.plan(loaded))
        return recipe

    def batches_of(loaded: nn.Module | None, tokenizer: Any) -> Sequence[Batch]:
        if scored:  # refused here, before the calibration, where it is too short
            text_perplexity(tokenizer, scored, window, text_windows)
        batches = data.batches(loaded, tokenizer)
        if data.is_other and loaded is not None:
            data.remember(loaded)
        return batches

    start = time.perf_counter()
    quiet()
    if exported:
        say(f"for {format.value}: no rotations, no prefix, no rows with static scales of their own")
    chosen = choose if scheme is _Scheme.auto else None if qconf is None else carry_over
    copies = int(scheme is _Scheme.auto)

    def measured(int8: nn.Module) -> Measured:
        nonlocal close
        close = data.closeness(int8)
        if close is not None:
            return show.closeness_rows(close)
        return () if picked is None else show.card_rows(picked, text, text_windows, window)

    made = convert(
        job,
        batches_of,
        stream=stream,
        choose=chosen,
        copies=copies,
        measured=measured,
        say=say,
    )
    record = made.record
    groups = record.plan.groups if record.plan else ()
    folded = {group.name: group.fold for group in groups}
    result = {
        "output": str(out),
        "format": format.value,
        "scheme": record.scheme.to_dict(),
        "closeness": None if close is None else close.to_dict(),
        "picked": None if picked is None else picked.to_dict(),
        "smooth": smooth,
        "plan": None if plan is None else str(plan),
        "recipe": None if recipe_file is None else str(recipe_file),
        "rule": recipe.rule if recipe.is_uniform else None,
        "alpha": recipe.alpha if recipe.is_uniform and recipe.rule == "smoothquant" else None,
        "hadamard": len(record.hadamard),
        "hadamard_fold": sum(group.hadamard_fold != 0 for group in groups),
        "head": head.value,
        "prefix": list(record.prefix),
        "target_length": target_length,
        "layers": len(record.layers),
        "groups": {
            "folded": sum(folded.values()),
            "at_run_time": len(folded) - sum(folded.values()),
        },
        "kept": dict(record.kept),
        "calibration_tokens": made.calibration_tokens,
        "linear_bytes": {"float": made.float_bytes, "int8": made.int8_bytes},
        "streamed": made.streamed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    before, after = show.megabytes(made.float_bytes), show.megabytes(made.int8_bytes)
    lines = [
        f"{out}: {result['layers']} linears in int8 ({record.scheme.name}), "
        f"{before} -> {after} MB, in {result['seconds']:.0f} s",
        *([] if picked is None else [_picked_line(picked)]),
        *([] if close is None else [show.closeness_line(close)]),
        *show.plan_lines(record),
    ]
    emit(result, as_json, "\n".join(lines))


def _picked_line(picked: PickedScheme) -> str:
    error = "" if picked.standard_error is None else f" +- {picked.standard_error:.2f}"
    return (
        f"{picked.scheme.activations} activations hold the goal of {picked.goal}: perplexity "
        f"{picked.metric:.5g} is {picked.loss_percent:+.2f} %{error} over float; linears: "
        f"{picked.milliseconds:.2f} ms against {picked.float_milliseconds:.2f} in float"
    )
