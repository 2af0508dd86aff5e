"""`sq-cpu eval`, `generate`, `info` and `demo`: what runs a model."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from sq_cpu_machine import Topology, choose
from torch import Tensor, nn

from sq_cpu import texts
from sq_cpu.checkpoint.folder import staged
from sq_cpu.cli import demo, show
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
    read,
    say,
    shipped_windows,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import perplexity
from sq_cpu.inference.fusing import fuse
from sq_cpu.kernels.runtime import isa


def eval_command(
    model: Model,
    text: Annotated[
        Path | None, typer.Option(help="Text to score. [default: the shipped text]")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 20,
    window: Window = 512,
    dtype: StoredDtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Print the perplexity of MODEL, quantized or not."""
    scored: str | Sequence[str]
    if text is None:
        scored = texts.evaluation()
        check_shipped(windows, len(scored), "--text")
    else:
        scored = read(text)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
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


def generate_command(
    model: Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask PROMPT as a chat message.")] = False,
    fused: Annotated[
        bool,
        typer.Option(
            "--fuse/--no-fuse",
            help="Run a quantized decoder as one native call, with int8 attention, if it can be.",
        ),
    ] = True,
    dtype: StoredDtype = None,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Continue PROMPT with MODEL, quantized or not."""
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    ids = demo.answer_ids(tokenizer, prompt, chat=chat)
    positions = getattr(loaded.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise SqCpuError(
            f"{ids.shape[1]} tokens of prompt and --max-new-tokens {max_new_tokens} exceed the "
            f"model's {positions} positions; ask for fewer"
        )
    unfused = _fuse(loaded) if fused else "--no-fuse"
    torch.manual_seed(seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature}
    start = time.perf_counter()
    with torch.inference_mode():
        made = _new_tokens(loaded, ids, max_new_tokens, sampling)
    seconds = time.perf_counter() - start
    answer = tokenizer.decode(made, skip_special_tokens=True)
    result = {
        "model": model,
        "prompt": prompt,
        "text": answer,
        "tokens": len(made),
        "seconds": round(seconds, 3),
        "fused": unfused is None,
        "not_fused": unfused,
    }
    emit(result, as_json, answer if chat else prompt + answer)


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


def _fuse(model: nn.Module) -> str | None:
    """Fuse a decoder; returns why it cannot be."""
    try:
        fuse(model)
    except SqCpuError as error:
        return str(error)
    return None


def _new_tokens(
    model: nn.Module, ids: Tensor, max_new_tokens: int, sampling: dict[str, Any]
) -> list[int]:
    generator: Any = model
    made = generator.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        **sampling,
    )
    return made[0, ids.shape[1] :].tolist()  # type: ignore[no-any-return]
