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
import re
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import transformers
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from typer.core import TyperGroup

from sq_cpu import checkpoint, demo, hf, texts
from sq_cpu.convert import Job, convert, load
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluate import perplexity, token_windows
from sq_cpu.linear import QuantLinear
from sq_cpu.quantize import QuantizationRecord
from sq_cpu.runtime import isa
from sq_cpu.saturation import Saturation, count_saturation
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


_BLOCK = re.compile(r"\.\d+\.")

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
    record, sizes = made.record, {"float": made.float_bytes, "int8": made.int8_bytes}
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
        "linear_bytes": sizes,
        "streamed": made.streamed,
        "seconds": round(time.perf_counter() - start, 1),
    }
    lines = [
        f"{out}: {result['layers']} linears in int8 ({settings.name}), "
        f"{_mb(sizes['float'])} -> {_mb(sizes['int8'])} MB, in {result['seconds']:.0f} s",
        *_plan_lines(record),
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
    layers = _layer_facts(loaded)
    result: dict[str, Any] = {
        "model": str(model),
        "scheme": scheme.to_dict(),
        "layers": layers,
        "plan": None if record.plan is None else record.plan.to_dict(),
        "kept": dict(record.kept),
    }
    lines = _plan_lines(record)
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
        lines += _saturation_lines(count, scheme)
    if as_json:
        _emit(result, as_json, "")
        return
    _print_layers(f"{model}: {scheme.name}, {len(layers)} int8 linears", layers)
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
    _print_report(Path(source).name, report, seconds)


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


def _mb(size: int) -> str:
    return f"{size / 1e6:.1f}"


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


def _wide_console() -> Console:
    """Make a console for a table: a pipe has no width, it gets its own instead of a guess of 80."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = 120
    return console


def _layer_facts(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Return what each int8 linear holds, by its full name."""
    facts: dict[str, dict[str, Any]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            facts[name] = {
                "shape": [layer.out_features, layer.in_features],
                "bytes": layer.nbytes,
                "input_scale": layer.input_scale,
                "input_zero_point": None if layer.input_scale is None else layer.input_zero_point,
            }
    return facts


def _plan_lines(record: QuantizationRecord) -> list[str]:
    """Say which smoothing was folded, what was not and why, and what stayed in float."""
    lines = []
    if record.plan is not None:
        divided = Counter(group.note for group in record.plan.groups if not group.fold)
        folded = len(record.plan.groups) - divided.total()
        lines.append(f"smoothing: {folded} groups folded, {divided.total()} divided in the pass")
        # Names in a reason differ from block to block: one line for all of a kind.
        kinds = Counter({_BLOCK.sub(".N.", note): 0 for note in divided})
        for note, count in divided.items():
            kinds[_BLOCK.sub(".N.", note)] += count
        lines += [f"  {count} divided: {note}" for note, count in kinds.most_common()]
    reasons = Counter(record.kept.values())
    lines += [f"  {count} linears in float: {reason}" for reason, count in reasons.most_common()]
    return lines


def _saturation_lines(count: Saturation, scheme: Scheme) -> list[str]:
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


def _layer_cells(facts: dict[str, Any]) -> dict[str, str]:
    """Return a layer's row of the table, by heading."""
    cells = {"out x in": " x ".join(map(str, facts["shape"])), "MB": f"{facts['bytes'] / 1e6:.2f}"}
    if facts["input_scale"] is not None:
        cells["input scale"] = f"{facts['input_scale']:.4g}"
        cells["zero point"] = str(facts["input_zero_point"])
    if "saturation" in facts:
        counted = facts["saturation"]
        cells |= {"pairs": str(counted["pairs"]), "saturated": str(counted["saturated"])}
        cells["share"] = _percent(counted["share"])
    return cells


def _print_layers(title: str, layers: dict[str, dict[str, Any]]) -> None:
    rows = {name: _layer_cells(facts) for name, facts in layers.items()}
    table = Table(title=title, title_justify="left")
    table.add_column("")
    for heading in next(iter(rows.values())):  # one scheme, so the same headings for all
        table.add_column(heading, justify="right")
    for name, cells in rows.items():
        table.add_row(name, *cells.values())
    _wide_console().print(table)


def _print_report(model: str, report: demo.Report, seconds: float) -> None:
    first = report.rows[0]
    table = Table(title=f"{model}, alpha {demo.ALPHA}", title_justify="left")
    table.add_column("")
    for heading in ("perplexity", "vs fp32", "linears MB", "prefill tok/s", "decode tok/s"):
        table.add_column(heading, justify="right")
    for row in report.rows:
        prefill, decode = row.prefill / first.prefill, row.decode / first.decode
        table.add_row(
            row.name,
            f"{row.perplexity:.2f}",
            f"{(row.perplexity / first.perplexity - 1) * 100:+.1f} %",
            f"{_mb(row.linear_bytes)} ({row.linear_bytes / first.linear_bytes:.3f})",
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
