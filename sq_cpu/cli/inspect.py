"""`sq-cpu inspect`: what is in a quantized model, or what quantizing does to a float one."""

from __future__ import annotations

from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from sq_cpu import texts
from sq_cpu.analysis.analysis import Analysis, analyze
from sq_cpu.analysis.report import report as write_report
from sq_cpu.analysis.report import require_report
from sq_cpu.analysis.saturation import count_saturation
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint import sources
from sq_cpu.cli import show
from sq_cpu.cli.common import (
    Dtype,
    Json,
    Model,
    PrefixName,
    SchemeName,
    TrustRemoteCode,
    calibration_batches,
    check_not_quantized,
    check_shipped,
    emit,
    hold,
    load_model,
    model_name,
    read_all,
    say,
    shipped_windows,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.files import absolute
from sq_cpu.kernels.runtime import isa
from sq_cpu.models.linears import linearized, quantizable_linears
from sq_cpu.models.tokenizers import lead_with
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.samples.pairs import read_text
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.plan import SmoothPlan, scheme_of
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.streaming.convert import find_prefix

_CALIBRATION_WINDOWS = 16
_SATURATION_WINDOWS = 4
_WINDOW = 512


def inspect_command(
    ctx: typer.Context,
    model: Model,
    plan: Annotated[
        Path | None,
        typer.Option(metavar="PLAN.json", help="Float MODEL: plan to measure."),
    ] = None,
    scheme: Annotated[
        SchemeName | None,
        typer.Option(help="Float MODEL: scheme to measure. [default: the plan's, or O1]"),
    ] = None,
    alpha: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help=f"Float MODEL without --plan: migration strength. [default: {DEFAULT_ALPHA}]",
        ),
    ] = None,
    calib: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text, repeatable. [default: the shipped text]"),
    ] = None,
    prefix: Annotated[
        PrefixName | None,
        typer.Option(
            help="Float MODEL: tokens at the beginning of every text whose keys and values stay in "
            "float, as for quantize. [default: auto]"
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE.html", help="Write a report, and its figures as PNG beside it."),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Folder for the PNGs. [default: FILE_files]"),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL", help="Int8 MODEL with --report: the float model it was made from."
        ),
    ] = None,
    saturation: Annotated[
        bool,
        typer.Option(
            "--saturation", help="Int8 MODEL: count the int16 sums that vpmaddubsw would clip."
        ),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for --saturation. [default: the shipped text]"),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option(min=1, help="Windows of text. [default: 16 to calibrate, 4 for --saturation]"),
    ] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="Tokens per window. [default: 512]")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Show what is in each int8 linear of MODEL, or what int8 would do to a float MODEL.

    For a folder that sq-cpu quantize wrote, it shows shape, bytes and scales of each int8 linear,
    and with --saturation how many of its sums would saturate.

    For a float model, which it calibrates first, it shows the outliers of each group of linears
    with one input, before and after smoothing, and the error of int8 outputs, without and with the
    plan.

    --report writes the latter, for either, as one HTML file with pictures.
    """
    options = {
        "--plan": plan,
        "--scheme": scheme,
        "--alpha": alpha,
        "--calib": calib or None,
        "--prefix": prefix,
        "--png": png,
        "--source": source,
        "--text": text,
        "--windows": windows,
        "--window": window,
    }
    given = {name for name, value in options.items() if value is not None}
    is_int8 = sources.is_checkpoint(absolute(model))
    _check_options(
        given, is_int8=is_int8, model=model, report=report is not None, saturation=saturation
    )
    tokens = _WINDOW if window is None else window
    if report is not None:
        require_report()
        hold(ctx, report)
    if source is not None:
        check_not_quantized(source)
    own_texts = read_all(calib or [])

    def measured(
        source: str,
        planned: SmoothPlan | None,
        settings: Scheme,
        layers: Sequence[str] = (),
        known: Sequence[int] | None = None,
    ) -> Analysis:
        loaded, tokenizer = load_model(source, Dtype.fp32, trust_remote_code=trust_remote_code)
        with linearized(loaded):
            if lacking := sorted(set(layers) - quantizable_linears(loaded).keys()):
                raise SqCpuError(
                    f"{source} is not the model that {model} was made from: it has no linear "
                    f"{lacking[0]}"
                )
        if known is None:
            choice = PrefixName.auto if prefix is None else prefix
            ids: Sequence[int] = find_prefix(loaded, tokenizer, choice.value, say)
        elif ids := known:
            lead_with(tokenizer, ids)
        count = windows or _CALIBRATION_WINDOWS
        batches = calibration_batches(tokenizer, own_texts, tokens, count)
        say(f"calibrating on {count} windows of {tokens} tokens")
        calibration = calibrate(loaded, batches, ignore=settings.ignore, prefix=ids)
        if planned is None:
            strength = DEFAULT_ALPHA if alpha is None else alpha
            planned = SmoothPlan.uniform(loaded, calibration, strength, ignore=settings.ignore)
        return analyze(loaded, calibration, planned, scheme=settings)

    analysis = None
    if is_int8:
        scored = _Scored(text, windows or _SATURATION_WINDOWS, tokens) if saturation else None
        record, result, lines = _int8(model, scored, trust_remote_code)
        title = f"{model}: {record.scheme.name}, {len(record.layers)} int8 linears"
        if source is not None:
            planned = record.plan or SmoothPlan(())
            analysis = measured(source, planned, record.scheme, record.layers, record.prefix)
    else:
        given_plan = None if plan is None else SmoothPlan.load(plan)
        settings = scheme_of(None if scheme is None else scheme.value, given_plan)
        analysis = measured(model, given_plan, settings)
        result = {"model": model, **analysis.to_dict(channels=False)}
        lines = show.analysis_lines(analysis)
        title = f"{model}: {settings.name}"
    if report is not None and analysis is not None:
        write_report(report, analysis, name=model_name(model), png=png)
        result["report"] = str(report)
        lines.append(f"report: {report}")
    if as_json:
        emit(result, as_json, "")
        return
    if is_int8:
        show.print_layers(title, result["layers"])
    elif analysis is not None:
        show.print_groups(title, analysis)
    emit(result, as_json, "\n".join(lines))


def _check_options(
    given: AbstractSet[str], *, is_int8: bool, model: str, report: bool, saturation: bool
) -> None:
    """Refuse options that would have no effect, and name what they need."""

    def refuse(names: AbstractSet[str], need: str) -> None:
        if useless := sorted(given & names):
            raise typer.BadParameter(f"{' and '.join(useless)} {need}")

    if saturation and not is_int8:
        if not absolute(model).exists():
            raise SqCpuError(f"{model}: no such folder; give one that sq-cpu quantize wrote")
        raise SqCpuError(
            f"{model} is not a quantized model; make one with: sq-cpu quantize {model} -o OUT"
        )
    if not saturation:
        refuse({"--text"}, "is the text of --saturation; add it, or give --calib")
    if not report:
        refuse({"--png", "--source"}, "is for a report; add --report FILE.html")
    if not is_int8:
        refuse({"--source"}, f"is the float model of an int8 one, and {model} is itself float")
        if {"--plan", "--alpha"} <= given:
            raise typer.BadParameter("--plan says what alpha is; drop it or --alpha")
        return
    refuse(
        {"--plan", "--scheme", "--alpha", "--prefix"}, f"is for a float model, and {model} is int8"
    )
    if report and "--source" not in given:
        raise typer.BadParameter(
            f"--report compares {model} with the float model it was made from; add --source MODEL"
        )
    if not report:
        refuse({"--calib"}, "is for a report; add --report FILE.html and --source MODEL")
        if not saturation:
            refuse({"--windows", "--window"}, "needs --saturation or --report; add one")


class _Scored(NamedTuple):
    """The text of `--saturation`."""

    text: Path | None
    windows: int
    window: int


def _int8(
    model: str, scored: _Scored | None, trust_remote_code: bool
) -> tuple[QuantizationRecord, dict[str, Any], list[str]]:
    """Return an int8 model's record, the facts as JSON types, and the lines below the table."""
    shown: str | Sequence[str] = ""
    if scored is not None and scored.text is not None:
        shown = read_text(scored.text)
    elif scored is not None:
        shown = texts.evaluation()
        check_shipped(scored.windows, len(shown), "--text")
    loaded, tokenizer = load_model(model, None, trust_remote_code=trust_remote_code)
    marked: Any = loaded
    record: QuantizationRecord = marked.sq_cpu_config
    layers = show.layer_facts(loaded)
    result: dict[str, Any] = {
        "model": model,
        "scheme": record.scheme.to_dict(),
        "layers": layers,
        "plan": None if record.plan is None else record.plan.to_dict(),
        "kept": dict(record.kept),
        "prefix": list(record.prefix),
        "misfits": dict(record.misfits),
    }
    lines = show.plan_lines(record)
    if scored is not None:
        windows, window = scored.windows, scored.window
        if isinstance(shown, str):
            batches = token_windows(tokenizer, shown, window=window, windows=windows)
        else:
            batches = shipped_windows(tokenizer, shown, window, windows, "--text")
        count = count_saturation(loaded, batches)
        for name, of_layer in count.layers.items():
            layers[name]["saturation"] = of_layer.to_dict()
        result["saturation"] = {
            **count.total.to_dict(),
            "windows": windows,
            "window": window,
            "text": None if scored.text is None else str(scored.text),
            "vnni": isa()["vnni"],
        }
        lines += show.saturation_lines(count, record.scheme)
    return record, result, lines
