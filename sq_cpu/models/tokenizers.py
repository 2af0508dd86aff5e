"""What a tokenizer puts in front of every text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.parsing import check_kind

__all__ = ["encoded", "lead_with", "leading_ids", "surrounding_ids"]

_NAME = "prefix"


def leading_ids(tokenizer: Any) -> list[int]:
    """Return the ids that a tokenizer puts in front of a text by itself, BOS first.

    Empty where it puts none, or no BOS: a [CLS] is no part of a text that goes on.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    whole = encoded(tokenizer, "a")
    if bos is None or whole[:1] != [bos]:
        return []
    text = encoded(tokenizer, "a", add_special_tokens=False)
    ends = (k for k in range(1, len(whole)) if whole[k : k + len(text)] == text)
    return whole[: next(ends, 1)]


def lead_with(tokenizer: Any, ids: Sequence[int] | None = None) -> None:
    """Have a tokenizer put these ids in front of every text; None: its BOS.

    It does so wherever special tokens are added, and when it was saved and loaded. A model that was
    not trained so gives other logits, float as int8: compare it with itself on such texts.

    Parameters
    ----------
    tokenizer : of transformers, with a backend of tokenizers ("fast")
    ids : BOS first

    Raises
    ------
    SqCpuError
        For a tokenizer of another kind, one that has no BOS or puts other ids in front already,
        and ids that do not begin with its BOS.
    """
    bos = getattr(tokenizer, "bos_token_id", None)
    check_kind(Sequence | None, "a list of ids", ids=ids)
    given = [bos] if ids is None else [*ids]
    if bos is None or given[:1] != [bos] or not all(type(each) is int for each in given):
        raise SqCpuError(f"the ids are {given}, and the tokenizer's BOS is {bos}: begin with that")
    present = leading_ids(tokenizer)
    if present == given:
        return
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if present or backend is None:
        why = f"puts {present} in front" if present else "has no backend of tokenizers"
        raise SqCpuError(f"the tokenizer {why}: give another one, or its own ids")
    from tokenizers import processors

    template = processors.TemplateProcessing(
        single=f"{_NAME} $A",
        pair=f"{_NAME} $A $B",
        special_tokens=[
            {"id": _NAME, "ids": given, "tokens": tokenizer.convert_ids_to_tokens(given)}
        ],
    )
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])
    if leading_ids(tokenizer) != given:
        backend.post_processor = before
        raise SqCpuError(f"{type(tokenizer).__name__} does not put {given} in front: give another")


def encoded(tokenizer: Any, text: str, **options: bool) -> list[int]:
    """Return a text's ids; what the tokenizer raises is an `SqCpuError`."""
    try:
        return list(tokenizer(text, **options)["input_ids"])
    except Exception as error:  # the base class itself is what tokenizers raises
        raise SqCpuError(
            f"the tokenizer fails on a text ({type(error).__name__}: {first_line(error)}); give "
            "one of transformers, and texts"
        ) from error


def surrounding_ids(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Return the special ids that a tokenizer puts in front of a text and behind it."""
    whole = encoded(tokenizer, "a")
    text = encoded(tokenizer, "a", add_special_tokens=False)
    places = range(len(whole) - len(text) + 1)
    k = next((k for k in places if whole[k : k + len(text)] == text), None)
    return ([], []) if k is None else (whole[:k], whole[k + len(text) :])
