"""What the commands share: option types, output, texts, models."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from torch import Tensor, nn

from sq_cpu import texts
from sq_cpu.checkpoint import sources
from sq_cpu.errors import SqCpuError, printable
from sq_cpu.evaluation.perplexity import TextPerplexity, token_windows
from sq_cpu.files import absolute, claimed_file
from sq_cpu.kernels.hadamard import BLOCK
from sq_cpu.samples.pairs import read_text
from sq_cpu.smoothing.plan import AUTO
from sq_cpu.smoothing.plan import Hadamard as HadamardChoice


class Dtype(str, Enum):
    """The float dtypes by the names that options take."""

    fp32, bf16, fp16 = "fp32", "bf16", "fp16"


class PrefixName(str, Enum):
    """What texts begin with whose keys and values stay in float."""

    auto, bos, off = "auto", "bos", "off"


class SchemeName(str, Enum):
    """The paper's schemes."""

    o1, o2, o3 = "O1", "O2", "O3"


TORCH_DTYPES = {
    Dtype.fp32: torch.float32,
    Dtype.bf16: torch.bfloat16,
    Dtype.fp16: torch.float16,
    None: None,  # as stored
}


Model = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A folder, a .gguf file or the name of a hub model."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run code that MODEL's folder or repository brings."),
]
Hadamard = Annotated[
    bool | None,
    typer.Option(
        "--hadamard/--no-hadamard",
        help="Rotate the inputs of all down projections, or nothing. [default: inputs of down and "
        "output projections, where it lowers the error]",
    ),
]
Prefix = Annotated[
    PrefixName,
    typer.Option(
        help="Tokens at the beginning of every text whose keys and values stay in float. auto: "
        "those that the tokenizer puts there; bos: its BOS, which it then always puts there; off: "
        "none."
    ),
]
Window = Annotated[int, typer.Option(min=2, help="Tokens per window.")]
StoredDtype = Annotated[
    Dtype | None, typer.Option(help="What is not int8 runs in this. [default: as stored]")
]
GOAL = "Greatest loss against the float model: 1% of its metric, or a number."
Text = Annotated[
    Path | None,
    typer.Option(
        help="Text to score, other than the one you report. [default: the shipped text, but "
        "not the windows that `sq-cpu eval` scores]"
    ),
]
TEXT_WINDOWS = 20
TextWindows = Annotated[int, typer.Option(min=1, help="Windows of --text.")]


def hadamard_choice(given: bool | None) -> HadamardChoice:
    """Return what `--hadamard`, `--no-hadamard` or neither says, as the functions take it."""
    return AUTO if given is None else BLOCK * given


def say(line: str) -> None:
    """Print progress, on stderr."""
    typer.echo(printable(line), err=True)


def emit(result: dict[str, Any], as_json: bool, line: str) -> None:
    """Print what a command has to say: the object as JSON, or the text."""
    typer.echo(json.dumps(result) if as_json else shown(line))


def shown(text: str) -> str:
    """Return a text whose control characters a terminal shows and does not obey."""
    return _CONTROL.sub(_escaped, text)


# But for line breaks and tabs, which a model's answer may have.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")


def _escaped(control: re.Match[str]) -> str:
    return printable(control[0])


def hold(ctx: typer.Context, path: Path) -> bool:
    """Have a file that the command is to write for itself until it ends; see `claimed_file`."""
    return ctx.with_resource(claimed_file(path))


def check_not_quantized(model: str) -> None:
    """Refuse a model that is quantized already, before it is loaded."""
    if sources.is_checkpoint(absolute(model)):
        raise SqCpuError(f"{model} is quantized already; give the float model")


def check_finite(value: float, what: str) -> None:
    """Refuse a perplexity that overflowed."""
    if not math.isfinite(value):
        raise SqCpuError(
            f"the loss of {what} is too large for a finite perplexity; check the model"
        )


def model_name(model: str) -> str:
    """Return the name of a model's folder (also of "."), file or hub repository."""
    path = absolute(model)
    return path.stem if path.suffix.lower() == ".gguf" else path.name


def read_all(paths: Sequence[Path]) -> list[str]:
    """Return each file's text."""
    return [read_text(path) for path in paths]


def check_shipped(windows: int, documents: int, option: str) -> None:
    """Refuse more windows than the shipped text has; `option` is where to give another."""
    if windows > documents:
        raise SqCpuError(
            f"the shipped text has {documents} windows, not {windows}; give a text with {option}"
        )


def shipped_windows(
    tokenizer: Any, documents: Sequence[str], window: int, windows: int, option: str
) -> list[Tensor]:
    """Cut windows of the shipped text; `option` is where to give another."""
    check_shipped(windows, len(documents), option)
    try:
        return token_windows(tokenizer, documents, window=window, windows=windows)
    except SqCpuError as error:  # they are all there, so one is too short
        raise SqCpuError(
            f"the documents of the shipped text are shorter than {window} tokens: give a smaller "
            f"--window, or a text with {option}"
        ) from error


def calibration_batches(
    tokenizer: Any, own: Sequence[str], window: int, windows: int
) -> list[Tensor]:
    """Cut `windows` windows, shared out evenly when there are several texts."""
    if not own:
        return shipped_windows(tokenizer, texts.calibration(), window, windows, "--calib")
    if windows < len(own):
        raise SqCpuError(f"{len(own)} calibration texts need at least as many --windows")
    batches = []
    for index, text in enumerate(own):
        share = windows // len(own) + (index < windows % len(own))
        batches += token_windows(tokenizer, text, window=window, windows=share)
    return batches


def scored_text(text: Path | None, windows: int) -> str | tuple[str, ...]:
    """Return the text that a search scores: the file's, or what is shipped for it."""
    if text is not None:
        return read_text(text)
    shipped = texts.selection()
    check_shipped(windows, len(shipped), "--text")
    return shipped


def text_perplexity(
    tokenizer: Any, scored: str | tuple[str, ...], window: int, windows: int
) -> TextPerplexity:
    """Return the perplexity of a `scored_text`; a text that is too short is refused at once."""
    if isinstance(scored, str):
        token_windows(tokenizer, scored, window=window, windows=windows)
    else:
        shipped_windows(tokenizer, scored, window, windows, "--text")
    return TextPerplexity(tokenizer, scored, window, windows)


def load_model(
    source: str | Path, dtype: Dtype | None, *, trust_remote_code: bool
) -> tuple[nn.Module, Any]:
    """Load a model, quantized or not, and its tokenizer."""
    quiet()
    return sources.load_source(
        source, dtype=TORCH_DTYPES[dtype], trust_remote_code=trust_remote_code, say=say
    )


def quiet() -> None:
    """Keep the libraries' own chatter off the terminal: ours says what a user can act on."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
