"""Pieces of text: their sum is the whole, whatever the borders of the tokens."""

from __future__ import annotations

import random

import pytest
from byte_models import byte_tokenizer

from sq_cpu.serving.detokenize import Stops, TextStream

TOKENIZER = byte_tokenizer()


def decode(ids: list[int]) -> str:
    text: str = TOKENIZER.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return ids


def pieces(ids: list[int], prompt: list[int]) -> list[str]:
    stream = TextStream(decode, prompt)
    return [*map(stream.push, ids), stream.finish()]


@pytest.mark.parametrize("seed", range(40))
def test_pieces_are_the_text(seed: int) -> None:
    chance = random.Random(seed)
    # Bytes that are characters, bytes that are none, and both.
    kinds = [
        lambda: ids_of(chance.choice(["a", "é", "€", "😀", "\ufffd", "\n"])),
        lambda: [chance.randrange(259)],
        lambda: ids_of(chance.choice(["é", "€", "😀"]))[:-1],
    ]
    ids = [each for _ in range(60) for each in chance.choice(kinds)()]
    made = pieces(ids, ids_of("prompt"))
    assert "".join(made) == decode(ids)


def test_no_half_of_a_character() -> None:
    text = "aé€😀b"
    made = pieces(ids_of(text), [])
    assert [piece for piece in made if piece] == [*text]


def test_half_a_character_of_the_prompt_is_not_continued() -> None:
    prompt, rest = ids_of("😀")[:2], ids_of("😀")[2:]
    assert "".join(pieces(rest, prompt)) == decode(rest)


def test_bytes_that_never_become_a_character_are_let_go() -> None:
    half = ids_of("é")[0]
    stream = TextStream(decode, [])
    first = [stream.push(half) for _ in range(200)]
    assert any(first)
    assert max(map(len, first)) < 100
    assert "".join(first) + stream.finish() == "\ufffd" * 200


def test_a_token_may_lose_the_space_that_only_a_first_one_has() -> None:
    """As SentencePiece's decoders have it: the text begins with no space."""
    words = ["▁Hello", "▁wor", "ld", "▁!"]

    def strip(ids: list[int]) -> str:
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(strip, [0])
    assert [stream.push(i) for i in (1, 2, 3)] == [" wor", "ld", " !"]


def cut(text: str, stops: list[str]) -> str:
    """Return the text up to the stop that is complete first."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


@pytest.mark.parametrize("seed", range(40))
def test_stops_do_not_depend_on_the_pieces(seed: int) -> None:
    chance = random.Random(seed)
    text = "".join(chance.choice("ab€") for _ in range(40))
    stops = ["".join(chance.choice("ab€") for _ in range(chance.randrange(1, 6))) for _ in "123"]
    found, made, at = Stops(stops), "", 0
    while at < len(text):
        size = chance.randrange(0, 4)
        out, stopped = found.push(text[at : at + size])
        made, at = made + out, at + size
        if stopped:
            break
        # What is given away is not taken back.
        assert cut(text, stops).startswith(made)
    else:
        made += found.finish()
    assert made == cut(text, stops)


def test_a_stop_ends_where_a_character_is_half_there() -> None:
    stream, stops = TextStream(decode, []), Stops(["é€"])
    made = ""
    for token in ids_of("aé€😀"):
        out, stopped = stops.push(stream.push(token))
        made += out
        if stopped:
            break
    assert made == "a"
