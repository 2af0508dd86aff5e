"""`sq-cpu eval`, `info` and `demo`: what runs a model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer
from sq_cpu_machine import Topology, choose

from sq_cpu import texts
from sq_cpu.checkpoint.folder import staged
from sq_cpu.cli import demo, show
from sq_cpu.cli.closeness import emit_closeness
from sq_cpu.cli.common import (
    Dtype,
    Json,
    Model,
    StoredDtype,
    TrustRemoteCode,
    Window,
    check_finite,
    check_shipped,
    emit,
    load_model,
    model_name,
    say,
    shipped_windows,
)
from sq_cpu.evaluation.perplexity import perplexity
from sq_cpu.kernels.runtime import isa
from sq_cpu.models.tokenizers import lead_with
from sq_cpu.samples.pairs import read_text


def eval_command(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text to score. [default: the shipped text]")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 20,
    window: Window = 512,
    lead: Annotated[
        bool,
        typer.Option(
            "--lead-with-bos",
            help="Begin windows with BOS, as a checkpoint of --prefix bos does by itself.",
        ),
    ] = False,
    source: Annotated[
        str | None,
        typer.Option(
            metavar="FLOAT",
            help="The float model that MODEL was made from, where it is no causal language model: "
            "how far its outputs are from that one's.",
        ),
    ] = None,
    samples: Annotated[
        list[Path] | None,
        typer.Option(
            help="With --source: texts, pairs, sound or images, as --calib of quantize takes them, "
            "but others. [default: the shipped text]"
        ),
    ] = None,
    dtype: StoredDtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Print the perplexity of MODEL, quantized or not, or how far it is from its float model."""
    if source is not None:
        if text is not None or lead:
            raise typer.BadParameter(
                "--source compares outputs; drop it, or --text and --lead-with-bos"
            )
        emit_closeness(
            model, source, samples or [], windows, window, dtype, trust_remote_code, as_json
        )
        return
    if samples:
        raise typer.BadParameter("--samples goes with --source; drop it, or give both")
    scored: str | Sequence[str]
    if text is None:
        scored = texts.evaluation()
        check_shipped(windows, len(scored), "--text")
    else:
        scored = read_text(text)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    if lead:
        lead_with(tokenizer)
    if text is None:
        shipped_windows(tokenizer, scored, window, windows, "--text")  # says what does not fit
    value = perplexity(loaded, tokenizer, scored, window=window, windows=windows)
    check_finite(value, model)
    origin = "the shipped text" if text is None else str(text)
    emit(
        {
            "model": model,
            "perplexity": value,
            "windows": windows,
            "window": window,
            "text": None if text is None else str(text),
        },
        as_json,
        f"perplexity {value:.3f} ({windows} windows of {window} tokens of {origin})",
    )


def info_command(as_json: Json = False) -> None:
    """Show which instruction sets run here, and how a command is best run (`xeon-run`)."""
    here = isa()
    advice = choose(Topology.read(), os.environ)
    if as_json:
        emit({**here, "advice": advice.to_dict()}, as_json, "")
        return
    show.print_isa(here)
    show.print_advice(advice)


def demo_command(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name. [default: SmolLM2-135M]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write. [default: NAME-int8]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Quantize a small model three ways, measure all beside fp32, save SmoothQuant O3.

    Replaces what an earlier run saved. Takes minutes.
    """
    source = demo.find_model(model)
    if out is None:
        out = Path("smollm2-135m-int8" if model is None else f"{model_name(model)}-int8")
    start = time.perf_counter()
    with staged(out) as staging:
        base, tokenizer = load_model(source, Dtype.fp32, trust_remote_code=False)
        report = demo.run(base, tokenizer, staging, say=say)
    seconds = time.perf_counter() - start
    for row in report.rows:
        check_finite(row.perplexity, row.name)
    if as_json:
        emit({"model": str(source), **report.to_dict(), "seconds": round(seconds, 1)}, as_json, "")
        return
    show.print_report(Path(source).name, report, seconds)
