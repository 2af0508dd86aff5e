"""`sq-cpu inspect`: what is in a quantized model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from sq_cpu import hf, show, texts
from sq_cpu.cli.common import (
    Json,
    Window,
    check_shipped,
    emit,
    load_model,
    read,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluate import token_windows
from sq_cpu.runtime import isa
from sq_cpu.saturation import count_saturation
from sq_cpu.scheme import Scheme


def inspect_command(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", help="A folder that `sq-cpu quantize` wrote.")
    ],
    saturation: Annotated[
        bool,
        typer.Option("--saturation", help="Count the int16 sums that vpmaddubsw would clip."),
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(help="Text for --saturation. [default: the shipped text]"),
    ] = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="Windows of text for --saturation. [default: 4]")
    ] = None,
    window: Window = 512,
    as_json: Json = False,
) -> None:
    """Show what is in each int8 linear of OUT, and with --saturation what text does to it."""
    if not saturation and (text is not None or windows is not None):
        raise typer.BadParameter("--text and --windows need --saturation; add it")
    windows = 4 if windows is None else windows
    if not hf.is_checkpoint(model.expanduser()):
        if not model.expanduser().exists():
            raise SqCpuError(f"{model}: no such folder; give one that sq-cpu quantize wrote")
        raise SqCpuError(
            f"{model} is not a quantized model; make one with: sq-cpu quantize {model} -o OUT"
        )
    scored: str | Sequence[str] = ""
    if saturation and text is None:
        scored = texts.evaluation()
        check_shipped(windows, len(scored), "--text")
    elif text is not None:
        scored = read(text)
    loaded, tokenizer = load_model(model, None)
    record: Any = loaded.sq_cpu_config
    scheme: Scheme = record.scheme
    layers = show.layer_facts(loaded)
    result: dict[str, Any] = {
        "model": str(model),
        "scheme": scheme.to_dict(),
        "layers": layers,
        "plan": None if record.plan is None else record.plan.to_dict(),
        "kept": dict(record.kept),
    }
    lines = show.plan_lines(record)
    if saturation:
        batches = token_windows(tokenizer, scored, window=window, windows=windows)
        count = count_saturation(loaded, batches)
        for name, of_layer in count.layers.items():
            layers[name]["saturation"] = of_layer.to_dict()
        result["saturation"] = {
            **count.total.to_dict(),
            "windows": windows,
            "window": window,
            "text": None if text is None else str(text),
            "vnni": isa()["vnni"],
        }
        lines += show.saturation_lines(count, scheme)
    if as_json:
        emit(result, as_json, "")
        return
    show.print_layers(f"{model}: {scheme.name}, {len(layers)} int8 linears", layers)
    for line in lines:
        typer.echo(line)
