"""What the command line prints: tables and lines, from the values that the library returns."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from sq_cpu_machine import Choice
from torch import nn

from sq_cpu.analysis.analysis import Analysis, GroupAnalysis
from sq_cpu.analysis.saturation import Saturation
from sq_cpu.autotuning.picking import PickedScheme
from sq_cpu.cli import demo
from sq_cpu.errors import printable
from sq_cpu.evaluation.closeness import Closeness
from sq_cpu.kernels.runtime import isa
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.rules import DEFAULT_ALPHA

__all__ = [
    "analysis_lines",
    "card_rows",
    "closeness_line",
    "closeness_rows",
    "layer_facts",
    "megabytes",
    "plan_lines",
    "print_advice",
    "print_groups",
    "print_isa",
    "print_layers",
    "print_report",
    "saturation_lines",
]

_BLOCK = re.compile(r"\.\d+\.")


def print_isa(here: dict[str, Any]) -> None:
    """Print which instruction sets run here, and why the others do not."""
    table = Table(title=here["cpu"], title_justify="left")
    for heading in ("instruction set", "built", "detected", "granted", "usable", ""):
        table.add_column(heading)
    for name, facts in here["isas"].items():
        flags = ["yes" if facts[key] else "no" for key in ("built", "detected", "granted")]
        mark = "in use" if name == here["in_use"] else facts["reason"]
        table.add_row(name, *flags, "yes" if facts["usable"] else "no", mark)
    console = Console()
    console.print(table)
    forced = ", forced by SQ_CPU_ISA" if here["forced"] else ""
    console.print(f"in use: {here['in_use']}{forced}; threads: {here['threads']}")


def print_advice(choice: Choice) -> None:
    """Print how a command is best run here, and why."""
    console = _wide_console()
    console.print("xeon-run COMMAND would give it:", soft_wrap=True)
    for line in choice.lines():
        console.print(f"  {line}", soft_wrap=True)


def megabytes(size: int) -> str:
    """Return a size in MB with one decimal."""
    return f"{size / 1e6:.1f}"


def _wide_console() -> Console:
    """Make a console for a table; a pipe, which has no width, gets 160 columns instead of 80."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 160
    return console


def layer_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what each int8 linear holds, by its full name."""
    facts: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            facts[name] = {
                "shape": [layer.out_features, layer.in_features],
                "activations": layer.scheme.activations,
                "hadamard": layer.hadamard,
                "bytes": layer.nbytes,
                "input_scale": layer.input_scale,
                "input_zero_point": None if layer.input_scale is None else layer.input_zero_point,
            }
    return facts


def plan_lines(record: QuantizationRecord) -> list[str]:
    """Say which smoothing was folded, what was not and why, and which linears override the rest."""
    lines = []
    if record.plan is not None:
        divided = Counter(group.note for group in record.plan.groups if not group.fold)
        folded = len(record.plan.groups) - divided.total()
        lines.append(f"smoothing: {folded} groups folded, {divided.total()} divided at run time")
        # Names in a reason differ from block to block: one line for all of a kind.
        kinds = Counter({_BLOCK.sub(".N.", note): 0 for note in divided})
        for note, count in divided.items():
            kinds[_BLOCK.sub(".N.", note)] += count
        lines += [f"  {count} divided: {note}" for note, count in kinds.most_common()]
        quantized = set(record.layers)
        planned = [layer for layer in record.plan.layers if layer.name in quantized]
        others = Counter(layer.activations for layer in planned if layer.activations)
        lines += [f"  {_linears(n)} with {kind} activations" for kind, n in others.most_common()]
        if clipped := sum(layer.weight_clip != 1 for layer in planned):
            lines.append(f"  {_linears(clipped)} with a weight clip")
    if record.hadamard:
        lines.append(
            f"  {_linears(len(record.hadamard))} rotated by Hadamard matrices of 64 columns"
        )
    groups = record.plan.groups if record.plan is not None else ()
    if folded := sum(group.hadamard_fold != 0 for group in groups):
        lines.append(f"  {folded} output projections rotated in the weights, head by head")
    if record.prefix:
        ids = ", ".join(map(str, record.prefix))
        lines.append(f"prefix: keys and values of texts that begin with {ids} in float")
    if record.decomposed:
        channels = sum(record.decomposed.values())
        lines.append(f"  {_linears(len(record.decomposed))} with {channels} channels in float")
    if any(record.misfits.values()):
        mean = sum(record.misfits.values()) / len(record.misfits)
        name, most = max(record.misfits.items(), key=lambda each: each[1])
        lines.append(
            f"  {100 * mean:.3g} % of the calibration's rows do not fit the static scales, most in "
            f"{printable(name)} ({100 * most:.3g} %)"
        )
    reasons = Counter(record.kept.values())
    for reason, count in reasons.most_common():
        lines.append(f"  {_linears(count)} in float: {reason}")
    return lines


def card_rows(
    picked: PickedScheme, text: Path | None, windows: int, window: int
) -> list[dict[str, str]]:
    """Return the rows of the model card: float, and what was picked."""
    error = "" if picked.standard_error is None else f" +- {picked.standard_error:.2f}"
    scored = "the shipped text" if text is None else text.name
    perplexity = f"perplexity ({windows} windows of {window} tokens of {scored})"
    here = isa()
    linears = f"linears ({here['cpu']}, {here['in_use']}, {here['threads']} threads)"
    return [
        {
            "": "float",
            perplexity: f"{picked.float_metric:.5g}",
            "over float": "",
            linears: f"{picked.float_milliseconds:.2f} ms",
        },
        {
            "": "int8",
            perplexity: f"{picked.metric:.5g}",
            "over float": f"{picked.loss_percent:+.2f} %{error}",
            linears: f"{picked.milliseconds:.2f} ms",
        },
    ]


def _linears(count: int) -> str:
    return f"{count} linear{'s' * (count > 1)}"


def saturation_lines(count: Saturation, scheme: Scheme) -> list[str]:
    """Say how many sums saturate, and what that means on this machine."""
    total, here = count.total, isa()
    if scheme.reduce_range:
        meaning = "reduce_range keeps every sum within int16: vpmaddubsw is exact"
    elif here["vnni"]:
        meaning = (
            "vpmaddubsw (AVX2, AVX-512 without VNNI) would clip these sums, --reduce-range yes "
            "avoids it; this machine is exact without"
        )
    else:
        meaning = (
            "vpmaddubsw would clip these sums, so this machine takes a slower exact sequence; "
            "--reduce-range yes avoids both"
        )
    return [
        f"total: {total.saturated} of {total.pairs} pairs saturate ({_percent(total.share)})",
        f"{meaning} (in use: {here['in_use']})",
    ]


def _percent(share: float) -> str:
    return "0 %" if share == 0 else f"{share * 100:.2g} %"


_HEADINGS = (
    *("out x in", "MB", "activations", "hadamard", "input scale", "zero point"),
    *("pairs", "saturated", "share"),
)


def _layer_cells(facts: dict[str, Any], mixed: bool) -> dict[str, str]:
    """Return a layer's row of the table, by heading."""
    cells = {"out x in": " x ".join(map(str, facts["shape"])), "MB": f"{facts['bytes'] / 1e6:.2f}"}
    if mixed:
        cells["activations"] = facts["activations"]
    if facts["hadamard"]:
        cells["hadamard"] = str(facts["hadamard"])
    if facts["input_scale"] is not None:
        cells["input scale"] = f"{facts['input_scale']:.4g}"
        cells["zero point"] = str(facts["input_zero_point"])
    if "saturation" in facts:
        counted = facts["saturation"]
        cells |= {"pairs": str(counted["pairs"]), "saturated": str(counted["saturated"])}
        cells["share"] = _percent(counted["share"])
    return cells


def print_layers(title: str, layers: dict[str, dict[str, Any]]) -> None:
    """Print what `layer_facts` gave, a layer a row; a cell is empty where a layer has none."""
    mixed = len({facts["activations"] for facts in layers.values()}) > 1
    rows = {name: _layer_cells(facts, mixed) for name, facts in layers.items()}
    found = {heading for cells in rows.values() for heading in cells}
    table = Table(title=printable(title), title_justify="left")
    table.add_column("")
    headings = [heading for heading in _HEADINGS if heading in found]
    for heading in headings:
        table.add_column(heading, justify="right")
    for name, cells in rows.items():
        table.add_row(printable(name), *(cells.get(heading, "") for heading in headings))
    _wide_console().print(table)


def print_groups(title: str, analysis: Analysis) -> None:
    """Print what `analyze` found, a group a row."""
    table = Table(title=printable(title), title_justify="left")
    for heading in ("", "linears"):
        table.add_column(heading, overflow="fold")
    for heading in ("alpha", "severity", "smoothed", "error", "with plan"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in analysis.groups:
        table.add_row(
            printable(group.name),
            printable(group.kind) + " (in float)" * group.in_float,
            _alpha(group),
            f"{group.severity:.1f}",
            f"{group.severity_smoothed:.1f}",
            _percent(group.error_naive),
            _percent(group.error),
        )
    _wide_console().print(table)


def _alpha(group: GroupAnalysis) -> str:
    return f"{group.alpha:.2f}" if group.alpha is not None else group.rule or "none"


def analysis_lines(analysis: Analysis) -> list[str]:
    """Say what the columns of `print_groups` are, the mean errors, and what stays in float."""
    groups = analysis.groups
    naive, planned = (
        sum(getattr(group, key) for group in groups) / len(groups)
        for key in ("error_naive", "error")
    )
    reasons = Counter(analysis.kept.values())
    clipped, underflowed = (
        sum(getattr(one, key) for one in analysis.linears) / len(analysis.linears)
        for key in ("rows_clipped", "rows_underflowed")
    )
    static = any(one.activations == "static" for one in analysis.linears)
    own = ", which get their own scale" if analysis.scheme.dynamic_fallback else ""
    rows = f"rows beyond the static grid {_percent(clipped)}, too small {_percent(underflowed)}"
    return [
        "severity: largest input channel over the median one; "
        "error: |int8 - float|^2 / |float|^2 of the outputs",
        f"mean error: naive {_percent(naive)}, with the plan {_percent(planned)} "
        f"({analysis.sampled_rows} sampled rows of {analysis.tokens} tokens)",
        *([rows + own] if static else []),
        *(f"  {_linears(count)} in float: {reason}" for reason, count in reasons.most_common()),
    ]


def print_report(model: str, report: demo.Report, seconds: float) -> None:
    """Print what the demo measured."""
    first = report.rows[0]
    table = Table(title=f"{model}, alpha {DEFAULT_ALPHA}", title_justify="left")
    table.add_column("")
    for heading in ("perplexity", "vs fp32", "linears MB", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        prefill, decode = row.prefill / first.prefill, row.decode / first.decode
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{(row.perplexity / first.perplexity - 1) * 100:+.1f} %",
            f"{megabytes(row.linear_bytes)} ({row.linear_bytes / first.linear_bytes:.3f})",
            f"{row.prefill:.1f} ({prefill:.2f}x)",
            f"{row.decode:.1f} ({decode:.2f}x)",
        )
    _wide_console().print(table)
    turns = "in turns" if report.interleaved else "one after another (too little memory for turns)"
    lines = [
        f"{report.cpu}; {report.isa}; {report.threads} threads; medians, variants timed {turns};",
        f"perplexity on the shipped text; {seconds:.0f} s in all",
        "",
        demo.QUESTION,
        *(f"  {row.name}: {row.answer}" for row in report.rows),
        "",
        f"{report.saved_variant} is saved in {report.saved}; load it with",
        "  import sq_cpu",
        f"  model = sq_cpu.load({report.saved!r})",
    ]
    typer.echo("\n".join(lines))


def closeness_rows(close: Closeness) -> list[dict[str, str]]:
    """Return what the model card says of outputs beside those in float."""
    return [
        {"held-out outputs beside float": "relative error", "": f"{close.relative_error:.4f}"},
        {"held-out outputs beside float": "cosine", "": f"{close.cosine:.5f}"},
    ]


def closeness_line(close: Closeness) -> str:
    """Return a line on outputs beside those in float."""
    return (
        f"held-out outputs beside float: relative error {close.relative_error:.4f}, cosine "
        f"{close.cosine:.5f}, over {close.rows} rows"
    )
