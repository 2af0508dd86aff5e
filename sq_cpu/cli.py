"""The command line `sq-cpu`: thin, it turns arguments into calls and results into text or JSON.

Exit codes: 0 done, 1 failed (one line on stderr), 2 wrong usage, 130 interrupted, 143 terminated.
What a command has to say goes to stdout, `--json` makes that one JSON object; progress goes to
stderr.
"""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import tempfile
import time
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from torch import Tensor, nn
from typer.core import TyperGroup

from sq_cpu import checkpoint, demo, hf, show, texts
from sq_cpu.convert import Job, convert, load
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluate import perplexity, token_windows
from sq_cpu.runtime import isa
from sq_cpu.saturation import count_saturation
from sq_cpu.scheme import Scheme

__all__ = ["app", "main"]


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which cleans up as Ctrl-C does."""


class _Commands(TyperGroup):
    """Commands whose expected failures are one line on stderr and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SqCpuError as error:
            _fail(str(error))
        except OSError as error:
            if error.errno == errno.EPIPE:  # the reader went away: typer ends quietly
                raise
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except (MemoryError, RuntimeError) as error:
            # torch's allocator raises a plain RuntimeError, in either of two wordings.
            wordings = ("not enough memory", "can't allocate memory")
            if not isinstance(error, MemoryError) and not any(w in str(error) for w in wordings):
                raise
            _fail("not enough memory; use a smaller model, --dtype bf16 or a smaller --window")
        except _Terminated:
            _fail("terminated", code=143)
        except KeyboardInterrupt:
            _fail("interrupted", code=130)


app = typer.Typer(
    cls=_Commands,
    help="SmoothQuant for Xeon: quantize language models to int8 and run them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Scheme(str, Enum):
    o1, o2, o3 = "O1", "O2", "O3"


class _Weights(str, Enum):
    per_channel, per_tensor, per_group = "per_channel", "per_tensor", "per_group"


class _Range(str, Enum):
    minmax, percentile, mse = "minmax", "percentile", "mse"


class _Rule(str, Enum):
    smoothquant, spiq = "smoothquant", "spiq"
    outlier_suppression, aqas = "outlier_suppression", "aqas"


class _ReduceRange(str, Enum):
    no, yes, auto = "no", "yes", "auto"

    def setting(self) -> bool | Literal["auto"]:
        return "auto" if self is _ReduceRange.auto else self is _ReduceRange.yes


class _Dtype(str, Enum):
    fp32, bf16, fp16 = "fp32", "bf16", "fp16"


_TORCH_DTYPES = {
    _Dtype.fp32: torch.float32,
    _Dtype.bf16: torch.bfloat16,
    _Dtype.fp16: torch.float16,
    None: None,  # as stored
}


_Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a .gguf file or the name of a hub model."),
]
_Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
_StoredDtype = Annotated[
    _Dtype | None, typer.Option(help="What is not int8 runs in this. [default: as stored]")
]


@app.command("quantize")
def quantize_command(
    model: _Model,
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    scheme: Annotated[
        _Scheme,
        typer.Option(help="Activation scales: O1 per token, O2 per tensor, O3 static."),
    ] = _Scheme.o1,
    alpha: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Migration strength. [default: 0.5]"),
    ] = None,
    rule: Annotated[
        _Rule | None,
        typer.Option(help="Smoothing rule. [default: smoothquant, the one that takes --alpha]"),
    ] = None,
    smooth: Annotated[bool, typer.Option(help="Smooth before quantizing.")] = True,
    calib: Annotated[
        list[Path] | None,
        typer.Option(help="Calibration text, repeatable. [default: the shipped text]"),
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Calibration windows in all.")] = 16,
    window: _Window = 512,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="Activation range.")
    ] = True,
    weights: Annotated[_Weights, typer.Option(help="Weight scales.")] = _Weights.per_channel,
    weight_group_rows: Annotated[
        int, typer.Option(help="Output channels that share a scale, with per_group weights.")
    ] = Scheme.weight_group_rows,
    static_range: Annotated[
        _Range,
        typer.Option("--range", help="What O3's scale covers: all, a percentile, the least error."),
    ] = _Range.minmax,
    percentile: Annotated[
        float, typer.Option(help="Percentage of the values that --range percentile keeps.")
    ] = Scheme.percentile,
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
        typer.Option(help="Linear to leave in float, repeatable. [default: lm_head]"),
    ] = None,
    dtype: Annotated[_Dtype, typer.Option(help="What is not int8 is kept in this.")] = _Dtype.fp32,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="One decoder block in memory at a time; interrupted, the same command resumes. "
            "[default: when MODEL, a folder, does not fit]",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(help="Replace an sq_cpu checkpoint in OUT; discard unfinished other work."),
    ] = False,
    as_json: _Json = False,
) -> None:
    """Quantize MODEL to int8 and save it to OUT."""
    if alpha is not None and not smooth:
        raise typer.BadParameter("--alpha has no effect with --no-smooth; drop one of them")
    if rule is not None and not smooth:
        raise typer.BadParameter("--rule has no effect with --no-smooth; drop one of them")
    if rule not in (None, _Rule.smoothquant) and alpha is not None:
        raise typer.BadParameter(
            f"--alpha has no effect with --rule {rule.value}; drop one of them"
        )
    overrides: dict[str, Any] = {
        "symmetric": symmetric,
        "weights": weights.value,
        "weight_group_rows": weight_group_rows,
        "static_range": static_range.value,
        "percentile": percentile,
        "reduce_range": reduce_range.setting(),
        "outlier_threshold": outlier_threshold,
    }
    if ignore:
        overrides["ignore"] = tuple(ignore)
    settings = Scheme.of(scheme.value, **overrides)
    if hf.is_checkpoint(Path(model).expanduser()):
        raise SqCpuError(f"{model} is quantized already; give the float model")
    _check_output(out, overwrite)
    calibration_texts = _read_all(calib or [])

    job = Job(
        source=model,
        out=out,
        scheme=settings,
        alpha=0.5 if alpha is None else alpha,
        rule="smoothquant" if rule is None else rule.value,
        smooth=smooth,
        dtype=_TORCH_DTYPES[dtype],
        overwrite=overwrite,
    )

    def batches_of(tokenizer: Any) -> list[Tensor]:
        batches = _calibration_batches(tokenizer, calibration_texts, window, windows)
        _say(f"calibrating on {len(batches)} windows of {window} tokens")
        return batches

    start = time.perf_counter()
    _quiet()
    made = convert(job, batches_of, stream=stream, say=_say)
    record = made.record
    folded = {group.name: group.fold for group in record.plan.groups} if record.plan else {}
    result = {
        "output": str(out),
        "scheme": record.scheme.to_dict(),
        "smooth": smooth,
        "rule": job.rule if smooth else None,
        "alpha": job.alpha if smooth and job.rule == "smoothquant" else None,
        "layers": len(record.layers),
        "groups": {"folded": sum(folded.values()), "in_pass": len(folded) - sum(folded.values())},
        "kept": dict(record.kept),
        "calibration_tokens": made.calibration_tokens,
        "linear_bytes": {"float": made.float_bytes, "int8": made.int8_bytes},
        "streamed": made.streamed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    before, after = show.megabytes(made.float_bytes), show.megabytes(made.int8_bytes)
    lines = [
        f"{out}: {result['layers']} linears in int8 ({settings.name}), "
        f"{before} -> {after} MB, in {result['seconds']:.0f} s",
        *show.plan_lines(record),
    ]
    _emit(result, as_json, "\n".join(lines))


@app.command("eval")
def eval_command(
    model: _Model,
    text: Annotated[
        Path | None, typer.Option(help="Text to score. [default: the shipped text]")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of text.")] = 20,
    window: _Window = 512,
    dtype: _StoredDtype = None,
    as_json: _Json = False,
) -> None:
    """Print the perplexity of MODEL, quantized or not."""
    scored: str | Sequence[str]
    if text is None:
        scored = texts.evaluation()
        _check_shipped(windows, len(scored), "--text")
    else:
        scored = _read(text)
    loaded, tokenizer = _load(model, dtype)
    value = perplexity(loaded, tokenizer, scored, window=window, windows=windows)
    _check_finite(value, model)
    origin = "the shipped text" if text is None else str(text)
    _emit(
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


@app.command("generate")
def generate_command(
    model: _Model,
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask PROMPT as a chat message.")] = False,
    dtype: _StoredDtype = None,
    as_json: _Json = False,
) -> None:
    """Continue PROMPT with MODEL, quantized or not."""
    loaded, tokenizer = _load(model, dtype)
    ids = demo.answer_ids(tokenizer, prompt, chat=chat)
    positions = getattr(loaded.config, "max_position_embeddings", None)
    if positions is not None and ids.shape[1] + max_new_tokens > positions:
        raise SqCpuError(
            f"{ids.shape[1]} tokens of prompt and --max-new-tokens {max_new_tokens} exceed the "
            f"model's {positions} positions; ask for fewer"
        )
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
    }
    _emit(result, as_json, answer if chat else prompt + answer)


@app.command("info")
def info_command(as_json: _Json = False) -> None:
    """Show which instruction sets run here, and why the others do not."""
    here = isa()
    if as_json:
        _emit(here, as_json, "")
        return
    show.print_isa(here)


@app.command("inspect")
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
    window: _Window = 512,
    as_json: _Json = False,
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
        _check_shipped(windows, len(scored), "--text")
    elif text is not None:
        scored = _read(text)
    loaded, tokenizer = _load(model, None)
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
        _emit(result, as_json, "")
        return
    show.print_layers(f"{model}: {scheme.name}, {len(layers)} int8 linears", layers)
    for line in lines:
        typer.echo(line)


@app.command("demo")
def demo_command(
    model: Annotated[
        str | None, typer.Option(help="Folder, .gguf file or hub name. [default: SmolLM2-135M]")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("-o", "--out", help="Folder to write. [default: NAME-int8]")
    ] = None,
    as_json: _Json = False,
) -> None:
    """Quantize a small model three ways, measure all beside fp32, save SmoothQuant O3.

    Replaces what an earlier run saved. Takes minutes.
    """
    source = demo.find_model(model)
    if out is None:
        out = Path("smollm2-135m-int8" if model is None else f"{_name(model)}-int8")
    _check_output(out, overwrite=True)
    start = time.perf_counter()
    base, tokenizer = _load(source, _Dtype.fp32)
    report = demo.run(base, tokenizer, out, say=_say)
    seconds = time.perf_counter() - start
    for row in report.rows:
        _check_finite(row.perplexity, row.name)
    if as_json:
        _emit({"model": str(source), **report.to_dict(), "seconds": round(seconds, 1)}, as_json, "")
        return
    show.print_report(Path(source).name, report, seconds)


def main() -> None:
    """Run the command line (the console script `sq-cpu`)."""
    signal.signal(signal.SIGTERM, _terminate)
    app(prog_name="sq-cpu")


# --- what the commands share --------------------------------------------------------------------


def _terminate(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not stop the cleaning up
    raise _Terminated


def _fail(message: str, code: int = 1) -> None:
    typer.echo(f"error: {' '.join(message.split())}", err=True)
    raise typer.Exit(code)


def _say(line: str) -> None:
    typer.echo(line, err=True)


def _emit(result: dict[str, Any], as_json: bool, line: str) -> None:
    typer.echo(json.dumps(result) if as_json else line)


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuse what cannot be written, before the long work."""
    checkpoint.check_replaceable(folder)
    if not overwrite and folder.is_dir() and any(folder.iterdir()):
        raise SqCpuError(f"{folder} holds a checkpoint; use --overwrite or another folder")
    place = folder.resolve()
    if place.exists() and any(place.iterdir()):
        place = place.parent  # a checkpoint is replaced as a whole, an empty folder filled
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise SqCpuError(
            f"cannot write to {place} ({error.strerror}); give -o another folder"
        ) from error


def _check_finite(value: float, what: str) -> None:
    if not math.isfinite(value):
        raise SqCpuError(
            f"the loss of {what} is too large for a finite perplexity; check the model"
        )


def _name(model: str) -> str:
    """Return the name of a model's folder (also of "."), file or hub repository."""
    path = Path(os.path.abspath(Path(model).expanduser()))
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SqCpuError(f"{path} is not UTF-8 text (byte {error.start}); convert it") from error
    if not text.strip():
        raise SqCpuError(f"{path} holds no text")
    return text


def _read_all(paths: Sequence[Path]) -> list[str]:
    return [_read(path) for path in paths]


def _check_shipped(windows: int, documents: int, option: str) -> None:
    if windows > documents:
        raise SqCpuError(
            f"the shipped text has {documents} windows, not {windows}; give a text with {option}"
        )


def _calibration_batches(
    tokenizer: Any, own: Sequence[str], window: int, windows: int
) -> list[Tensor]:
    """Cut `windows` windows, shared out evenly when there are several texts."""
    if not own:
        documents = texts.calibration()
        _check_shipped(windows, len(documents), "--calib")
        return token_windows(tokenizer, documents, window=window, windows=windows)
    if windows < len(own):
        raise SqCpuError(f"{len(own)} calibration texts need at least as many --windows")
    batches = []
    for index, text in enumerate(own):
        share = windows // len(own) + (index < windows % len(own))
        batches += token_windows(tokenizer, text, window=window, windows=share)
    return batches


def _load(source: str | Path, dtype: _Dtype | None) -> tuple[nn.Module, Any]:
    _quiet()
    return load(str(source), _TORCH_DTYPES[dtype], _say)


def _quiet() -> None:
    # Keep the libraries' own chatter off the terminal: ours says what a user can act on.
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


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
