"""Perplexity and the windows it is taken over."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer
from tiny import VOCABULARY, tiny_model
from torch import Tensor, nn

from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.perplexity import perplexity, token_windows
from sq_cpu.models.tokenizers import lead_with


class Numbers:
    """A tokenizer whose text is its ids: "3 1 4"."""

    def __init__(self, bos: int | None = None, *, adds_bos: bool = False) -> None:
        self.bos_token_id = bos
        self.adds_bos = adds_bos

    def __call__(
        self, text: str, add_special_tokens: bool = True, verbose: bool = True
    ) -> dict[str, list[int]]:
        ids = [int(word) for word in text.split() if word.isdigit()]
        begin = [self.bos_token_id or 0] if add_special_tokens and self.adds_bos else []
        return {"input_ids": begin + ids}


def numbers(count: int) -> str:
    return " ".join(str(i % VOCABULARY) for i in range(count))


class Fixed(nn.Module):
    """Gives every token of the vocabulary the same score but one, which it prefers."""

    def __init__(self, bonus: float) -> None:
        super().__init__()
        self.bonus = bonus
        self.shapes: list[tuple[int, ...]] = []

    def forward(self, ids: Tensor) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.shapes.append(tuple(ids.shape))
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., 7] = self.bonus
        return SimpleNamespace(logits=logits)


def test_windows_are_spread_over_the_text() -> None:
    windows = token_windows(Numbers(), numbers(50), window=8, windows=4)
    starts = [0, 10, 20, 30]  # k * ((50 - 8) // 4)
    assert [w[0].tolist() for w in windows] == [list(range(s, s + 8)) for s in starts]
    assert all(w.shape == (1, 8) and w.dtype == torch.int64 for w in windows)


def test_a_whole_text_may_be_one_window() -> None:
    assert token_windows(Numbers(), numbers(8), window=8, windows=1)[0].shape == (1, 8)


def test_documents_give_their_first_ids() -> None:
    windows = token_windows(Numbers(), ["1 2 3 4", "5 6 7", "8 9 10"], window=3, windows=2)
    assert [w[0].tolist() for w in windows] == [[1, 2, 3], [5, 6, 7]]


def test_bos_leads_every_window_only_if_the_tokenizer_adds_it() -> None:
    windows = token_windows(Numbers(63, adds_bos=True), numbers(20), window=4, windows=2)
    assert [w[0].tolist() for w in windows] == [[63, 0, 1, 2], [63, 8, 9, 10]]
    windows = token_windows(Numbers(63), numbers(20), window=4, windows=2)
    assert [w[0].tolist() for w in windows] == [[0, 1, 2, 3], [8, 9, 10, 11]]


def test_a_window_begins_with_all_that_the_tokenizer_puts_in_front() -> None:
    tokenizer = byte_tokenizer()
    lead_with(tokenizer, [1, 70, 71])
    text = tokenizer("abcdef", add_special_tokens=False)["input_ids"]
    windows = token_windows(tokenizer, ["abcdef", "defabc"], window=6, windows=2)
    assert [w[0].tolist() for w in windows] == [
        [1, 70, 71, *text[:3]],
        [1, 70, 71, *text[3:]],
    ]
    with pytest.raises(SqCpuError, match="a window of 3 tokens is filled by the 3 that"):
        token_windows(tokenizer, "abcdef", window=3, windows=1)


@pytest.mark.parametrize(
    ("text", "window", "windows", "message"),
    [
        (numbers(7), 8, 1, "has 7 tokens; 1 windows of 8 need 8"),
        (numbers(11), 8, 4, "has 11 tokens; 4 windows of 8 need 12"),
        ("", 8, 4, "has 0 tokens"),
        (["1 2 3 4", "1 2"], 3, 4, "document 1 has 2 tokens and a window takes 3"),
        ([], 3, 4, "list of documents is empty"),
        (numbers(9), 1, 4, "window is 1, not a whole number >= 2"),
        (numbers(9), 4, 0, "windows is 0, not a whole number >= 1"),
    ],
)
def test_too_little_text_is_refused(text: Any, window: int, windows: int, message: str) -> None:
    with pytest.raises(SqCpuError, match=message):
        token_windows(Numbers(), text, window=window, windows=windows)


def test_a_uniform_model_has_the_vocabulary_as_perplexity() -> None:
    model = Fixed(0.0).train()
    value = perplexity(model, Numbers(), numbers(100), window=10, windows=3)
    assert value == pytest.approx(VOCABULARY, rel=1e-6)
    assert model.shapes == [(1, 10)] * 3
    assert model.training


def test_the_mean_is_over_scored_tokens_of_all_windows() -> None:
    # Targets 7 7 | 7 1: the first token of a window is not scored.
    bonus = 3.0
    value = perplexity(Fixed(bonus), Numbers(), ["1 7 7", "7 7 1"], window=3)
    log_sum = math.log(math.exp(bonus) + VOCABULARY - 1)
    assert value == pytest.approx(math.exp(((log_sum - bonus) * 3 + log_sum) / 4), rel=1e-6)


def test_absurd_and_broken_models() -> None:
    assert perplexity(Fixed(2e3), Numbers(), ["1 2 3"], window=3) == math.inf
    with pytest.raises(SqCpuError, match="NaN or Inf on window 0"):
        perplexity(Fixed(math.nan), Numbers(), ["1 2 3"], window=3)


def test_a_random_language_model_is_near_chance() -> None:
    value = perplexity(tiny_model("opt"), Numbers(), numbers(300), window=32, windows=5)
    assert VOCABULARY / 4 < value < VOCABULARY * 40


def test_windows_longer_than_the_context_are_refused() -> None:
    model = tiny_model("opt")
    assert perplexity(model, Numbers(), numbers(300), window=64, windows=1) > 1
    with pytest.raises(SqCpuError, match="a window has 65 tokens and the model 64 positions"):
        perplexity(model, Numbers(), numbers(300), window=65, windows=1)


@pytest.mark.slow
def test_smollm2_reads_its_own_language(smollm2: Callable[[], tuple[Any, Any]]) -> None:
    model, tokenizer = smollm2()
    text = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4
    assert perplexity(model, tokenizer, text, window=64, windows=1) < 10
