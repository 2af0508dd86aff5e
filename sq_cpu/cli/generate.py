"""`sq-cpu generate`: prompts to texts, many at once, shown while they come."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn

from sq_cpu.cli import demo
from sq_cpu.cli.common import (
    Json,
    Model,
    StoredDtype,
    TrustRemoteCode,
    emit,
    load_model,
    say,
    shown,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.inference.fusing import fuse
from sq_cpu.inference.generation import generate, stop_tokens_of
from sq_cpu.inference.sampling import Sampling
from sq_cpu.samples.pairs import read_text
from sq_cpu.serving.detokenize import TextStream

_STDIN = "-"


def generate_command(
    model: Model,
    prompt: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help='Texts to continue; "-": that of stdin.'),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help='A file with a prompt a line; "-": stdin.')
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens for each, at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 always takes the likeliest token.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(min=0, help="Of the likeliest so many; 0: all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Of the fewest likeliest that have this probability.")
    ] = 1.0,
    min_p: Annotated[
        float, typer.Option(help="Of those this times as likely as the likeliest.")
    ] = 0.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="What the logits of tokens that were there are divided by.")
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the random choice.")] = 0,
    chat: Annotated[bool, typer.Option("--chat", help="Ask prompts as chat messages.")] = False,
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
    """Continue each PROMPT with MODEL, quantized or not; a fused model does all at once."""
    sampling = Sampling(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
    )
    texts = _prompts(prompt or [], prompts)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code=trust_remote_code)
    given = [_ids(loaded, tokenizer, text, max_new_tokens, chat=chat) for text in texts]
    unfused = _fuse(loaded) if fused else "--no-fuse"
    continue_all = _with_transformers if unfused is not None else _at_once
    made = [
        _Continuation(text, tokenizer, ids, chat=chat)
        for text, ids in zip(texts, given, strict=True)
    ]
    stops = {*stop_tokens_of(loaded)}
    printer = _Printer(made, quiet=as_json)

    def on_token(index: int, token: int) -> None:
        one = made[index]
        one.push(token)
        if token in stops or one.tokens == max_new_tokens:
            one.end("stop" if token in stops else "length")
        printer.show()

    start = time.perf_counter()
    continue_all(loaded, given, max_new_tokens, sampling, on_token)
    for one in made:
        one.end("stop")  # transformers has more ways to stop
    printer.show()
    seconds = time.perf_counter() - start
    tokens = sum(one.tokens for one in made)
    if as_json:
        result = {
            "model": model,
            "results": [one.to_dict() for one in made],
            "tokens": tokens,
            "seconds": round(seconds, 3),
            "tokens_per_second": round(tokens / seconds, 1),
            "fused": unfused is None,
            "not_fused": unfused,
        }
        emit(result, as_json, "")
    else:
        say(f"{tokens} tokens in {seconds:.2f} s: {tokens / seconds:.1f} tokens/s")


@dataclass
class _Continuation:
    """What comes of a prompt."""

    prompt: str
    tokenizer: Any
    ids: list[int]
    chat: bool
    tokens: int = 0
    text: str = ""
    finish: str | None = None
    _stream: TextStream = field(init=False)

    def __post_init__(self) -> None:
        def decode(ids: list[int]) -> str:
            text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
            return text

        self._stream = TextStream(decode, self.ids)

    def push(self, token: int) -> None:
        """Take the next token."""
        self.tokens += 1
        self.text += self._stream.push(token)

    def end(self, why: str) -> None:
        """Take notice that it was the last."""
        if self.finish is None:
            self.finish = why
            self.text += self._stream.finish()

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        return {
            "prompt": self.prompt,
            "text": self.text,
            "tokens": self.tokens,
            "finish": self.finish,
        }


class _Printer:
    """Prints continuations in the order of their prompts, each as far as it has come."""

    def __init__(self, all_of_them: list[_Continuation], *, quiet: bool) -> None:
        self._left = [] if quiet else all_of_them[::-1]
        self._printed = -1  # letters of the first that is left; not begun

    def show(self) -> None:
        """Print what is new."""
        while self._left:
            now = self._left[-1]
            if self._printed < 0:
                self._write("" if now.chat else now.prompt)
                self._printed = 0
            self._write(now.text[self._printed :])
            self._printed = len(now.text)
            if now.finish is None:
                break
            self._left.pop()
            self._printed = -1
            self._write("\n\n" if self._left else "\n")
        sys.stdout.flush()

    @staticmethod
    def _write(text: str) -> None:
        typer.echo(shown(text), nl=False)


def _prompts(given: list[str], file: Path | None) -> list[str]:
    """Return all prompts."""
    if [*given, str(file)].count(_STDIN) > 1:
        raise SqCpuError("stdin is read once: give one -")
    texts = [_stdin() if text == _STDIN else text for text in given]
    if file is not None:
        lines = _stdin() if str(file) == _STDIN else read_text(file)
        texts += [line for line in lines.splitlines() if line.strip()]
    if not texts:
        raise typer.BadParameter("no prompt: give some, or a file of them with --prompts")
    return texts


def _stdin() -> str:
    try:
        text = sys.stdin.buffer.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SqCpuError(f"stdin is not UTF-8 text (byte {error.start}); convert it") from None
    return text.removesuffix("\n")


def _ids(model: Any, tokenizer: Any, text: str, new: int, *, chat: bool) -> list[int]:
    ids: list[int] = demo.answer_ids(tokenizer, text, chat=chat)[0].tolist()
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and len(ids) + new > positions:
        raise SqCpuError(
            f"{len(ids)} tokens of prompt and --max-new-tokens {new} exceed the model's "
            f"{positions} positions; ask for fewer"
        )
    return ids


def _fuse(model: nn.Module) -> str | None:
    """Fuse a decoder; returns why it cannot be."""
    try:
        fuse(model)
    except SqCpuError as error:
        return str(error)
    return None


_OnToken = Callable[[int, int], None]


def _at_once(
    model: nn.Module, given: list[list[int]], new: int, sampling: Sampling, on_token: _OnToken
) -> None:
    generate(model, given, max_new_tokens=new, sampling=sampling, on_token=on_token)


def _with_transformers(
    model: nn.Module, given: list[list[int]], new: int, sampling: Sampling, on_token: _OnToken
) -> None:
    generator: Any = model
    options: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        options = {
            "do_sample": True,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k or None,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p or None,
        }
    # Else it would be that of the model's generation config.
    options["repetition_penalty"] = sampling.repetition_penalty
    for index, ids in enumerate(given):
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            generator.generate(
                input_ids=torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
                max_new_tokens=new,
                streamer=_Streamer(functools.partial(on_token, index)),
                **options,
            )


class _Streamer:
    """What transformers gives its tokens to, the prompt first."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self._on_token = on_token
        self._begun = False

    def put(self, value: Tensor) -> None:
        """Take tokens."""
        if self._begun:
            for token in value.flatten().tolist():
                self._on_token(token)
        self._begun = True

    def end(self) -> None:
        """Do nothing."""
