"""Answers as OpenAI's clients read them: objects, and the chunks of streams."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from sq_cpu.serving.answers import Answer, Piece, TokenText

__all__ = ["DONE", "ChatFormat", "CompletionFormat", "Format", "event"]

DONE = "data: [DONE]\n\n"


def event(value: object) -> str:
    """Return a server-sent event, in ASCII: some clients end a line at U+0085 or U+2028, too."""
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class Format(ABC):
    """How one answer is written.

    Parameters
    ----------
    model : the name that the answer carries
    logprobs : whether they are asked for
    include_usage : whether a stream ends with the count of tokens
    """

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, model: str, *, logprobs: bool, include_usage: bool) -> None:
        self._head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time())}
        self._model = model
        self._logprobs = logprobs
        self._include_usage = include_usage
        self._begun: set[int] = set()

    def whole(self, answer: Answer, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Return an answer of which all pieces are there."""
        choices = []
        for choice in answer.choices:
            own = [piece for piece in pieces if piece.choice == choice.index]
            text = "".join(piece.text for piece in own)
            tokens = [token for piece in own for token in piece.tokens]
            choices.append(
                {
                    "index": choice.index,
                    **self._text(text),
                    "logprobs": self._written(tokens),
                    "finish_reason": choice.finish,
                }
            )
        return self._object(self.whole_object, choices) | {"usage": _usage(answer)}

    def chunks(self, pieces: Sequence[Piece]) -> str:
        """Return the events of a step's pieces."""
        return "".join(self._chunk(piece) for piece in pieces)

    def last(self, answer: Answer) -> str:
        """Return the events after the last piece."""
        if not self._include_usage:
            return DONE
        return event(self._object(self.chunk_object, []) | {"usage": _usage(answer)}) + DONE

    def _chunk(self, piece: Piece) -> str:
        first = piece.choice not in self._begun
        self._begun.add(piece.choice)
        if not (first or piece.text or piece.tokens or piece.finish):
            return ""
        choice = {
            "index": piece.choice,
            **self._delta(piece, first),
            "logprobs": self._written(piece.tokens),
            "finish_reason": piece.finish,
        }
        usage = {"usage": None} if self._include_usage else {}
        return event(self._object(self.chunk_object, [choice]) | usage)

    def _object(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._head, "object": kind, "model": self._model, "choices": choices}

    def _written(self, tokens: Sequence[TokenText]) -> dict[str, Any] | None:
        return self._logprob_object(tokens) if self._logprobs else None

    @abstractmethod
    def _text(self, text: str) -> dict[str, Any]: ...

    @abstractmethod
    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]: ...

    @abstractmethod
    def _logprob_object(self, tokens: Sequence[TokenText]) -> dict[str, Any]: ...


class CompletionFormat(Format):
    """Of /v1/completions."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def _text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        return {"text": piece.text}

    def _logprob_object(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [dict(reversed(token.top)) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }


class ChatFormat(Format):
    """Of /v1/chat/completions."""

    prefix, whole_object = "chatcmpl", "chat.completion"
    chunk_object = "chat.completion.chunk"

    def _text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def _delta(self, piece: Piece, first: bool) -> dict[str, Any]:
        role = {"role": "assistant"} if first else {}
        content = {"content": piece.text} if first or piece.text else {}
        return {"delta": role | content}

    def _logprob_object(self, tokens: Sequence[TokenText]) -> dict[str, Any]:
        return {"content": [_of_chat(token) for token in tokens], "refusal": None}


def _of_chat(token: TokenText) -> dict[str, Any]:
    top = [_token(text, logprob) for text, logprob in token.top]
    return _token(token.text, token.logprob) | {"top_logprobs": top}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # A token of a part of a character has no text that says its bytes.
    whole = None if "\ufffd" in text else [*text.encode()]
    return {"token": text, "logprob": logprob, "bytes": whole}


def _usage(answer: Answer) -> dict[str, int]:
    prompt = answer.prompt_tokens
    made = sum(choice.tokens for choice in answer.choices)
    return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}
