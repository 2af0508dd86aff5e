"""What tokenizers put in front of a text, and how one is made to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_tokenizer
from transformers import AutoTokenizer

from sq_cpu import lead_with, leading_ids
from sq_cpu.errors import SqCpuError


class Stub:
    """A tokenizer of digits, with what it adds before and behind."""

    def __init__(self, bos: int | None, before: list[int], behind: list[int]) -> None:
        self.bos_token_id = bos
        self._added = before, behind

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        before, behind = self._added if add_special_tokens else ([], [])
        return {"input_ids": [*before, *map(ord, text), *behind]}


@pytest.mark.parametrize(
    ("bos", "before", "behind", "front"),
    [
        (1, [1], [], [1]),
        (1, [1], [2], [1]),
        (1, [1, 5], [2], [1, 5]),
        (1, [], [], []),
        (1, [], [1], []),
        (None, [1], [], []),
        (7, [1], [2], []),
    ],
)
def test_what_is_in_front(bos: Any, before: list[int], behind: list[int], front: list[int]) -> None:
    assert leading_ids(Stub(bos, before, behind)) == front


@pytest.mark.parametrize("ids", [None, [1], [1, 70, 2]])
def test_led_and_saved(tmp_path: Path, ids: list[int] | None) -> None:
    tokenizer = byte_tokenizer()
    front = ids or [tokenizer.bos_token_id]
    text = tokenizer("text é")["input_ids"]
    assert leading_ids(tokenizer) == []
    lead_with(tokenizer, ids)
    lead_with(tokenizer, ids)  # it does already
    assert tokenizer("text é")["input_ids"] == front + text
    assert tokenizer("text é", add_special_tokens=False)["input_ids"] == text
    assert tokenizer("a", "b")["input_ids"] == [
        *front,
        *tokenizer("ab", add_special_tokens=False)["input_ids"],
    ]
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert leading_ids(loaded) == front
    assert loaded("text é")["input_ids"] == front + text


@pytest.mark.parametrize(
    ("tokenizer", "ids", "message"),
    [
        (byte_tokenizer(), [2], r"the ids are \[2\], and the tokenizer's BOS is 1"),
        (byte_tokenizer(), [], "begin with that"),
        (Stub(None, [], []), None, "the tokenizer's BOS is None"),
        (Stub(1, [1], []), [1, 2], r"puts \[1\] in front: give another"),
        (Stub(1, [], []), None, "has no backend of tokenizers"),
    ],
)
def test_one_that_cannot(tokenizer: Any, ids: list[int] | None, message: str) -> None:
    with pytest.raises(SqCpuError, match=message):
        lead_with(tokenizer, ids)
