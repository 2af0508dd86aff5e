"""Every answer equals that of `sq_cpu.generate`."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from byte_models import byte_model, byte_tokenizer
from servers import NAME, Served, serving
from test_detokenize import cut

import sq_cpu
from sq_cpu.inference.generation import generate
from sq_cpu.inference.sampling import Sampling

TOKENIZER = byte_tokenizer()
PROMPTS = ["Hello", "a", "The quick brown fox jumps over the lazy dog. " * 5, "é€😀"]
SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 1.0, "seed": 3},
    {"temperature": 0.8, "seed": -5, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"temperature": 1.2, "seed": 1, "presence_penalty": 1.5, "frequency_penalty": -0.5},
    {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {"70": 5, "2": -100}},
]


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text)["input_ids"]
    return ids


def offline(model: Any, prompt: str, n: int = 1, new: int = 24, **given: Any) -> list[str]:
    """Return the texts of n choices."""
    settings = dict(given)
    if "logit_bias" in settings:
        settings["logit_bias"] = {int(k): float(v) for k, v in settings["logit_bias"].items()}
    made = generate(model, [ids_of(prompt)] * n, max_new_tokens=new, sampling=Sampling(**settings))
    return [TOKENIZER.decode(ids, skip_special_tokens=True) for ids in made]


def events(text: str) -> list[Any]:
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_completions(server: Served, model: Any, prompt: str, settings: dict[str, Any]) -> None:
    body = {"model": NAME, "prompt": prompt, "max_tokens": 24, "n": 3, **settings}
    expected = offline(model, prompt, 3, **settings)
    answer = server.post("/v1/completions", body).json()
    assert [choice["text"] for choice in answer["choices"]] == expected
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(ids_of(prompt))
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]

    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = events(server.post("/v1/completions", body | options).text)
    texts = ["", "", ""]
    for chunk in chunks[:-1]:
        assert chunk["usage"] is None
        for choice in chunk["choices"]:
            texts[choice["index"]] += choice["text"]
    assert texts == expected
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"] == usage
    reasons = [c["choices"][0]["finish_reason"] for c in chunks[:-1]]
    assert sorted(r for r in reasons if r) == sorted(c["finish_reason"] for c in answer["choices"])


@pytest.mark.parametrize("stream", [False, True])
def test_chats(server: Served, model: Any, stream: bool) -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
        {"role": "assistant", "content": "Yes?", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "Go on", "name": "Ann"},
    ]
    rendered = "<system>Be brief.\n<user>Hi\n<assistant>Yes?\n<user>Go on\n<assistant>"
    body: dict[str, Any] = {"model": NAME, "messages": messages, "seed": 11, "n": 2}
    body |= {"max_completion_tokens": 24, "stream": stream}
    answer = server.post("/v1/chat/completions", body)
    expected = offline(model, rendered, 2, temperature=1.0, seed=11)
    if not stream:
        found = [choice["message"]["content"] for choice in answer.json()["choices"]]
        assert answer.json()["usage"]["prompt_tokens"] == len(ids_of(rendered))
    else:
        found = ["", ""]
        roles = []
        for chunk in events(answer.text):
            (choice,) = chunk["choices"]
            found[choice["index"]] += choice["delta"].get("content", "")
            roles += [choice["index"]] if "role" in choice["delta"] else []
        assert sorted(roles) == [0, 1]
    assert found == expected


def test_several_prompts_as_texts_and_as_ids(server: Served, model: Any) -> None:
    body = {"model": NAME, "max_tokens": 24, "temperature": 0, "n": 2}
    expected = [text for prompt in PROMPTS for text in offline(model, prompt, 2)]
    texts = server.post("/v1/completions", body | {"prompt": PROMPTS}).json()
    assert [choice["text"] for choice in texts["choices"]] == expected
    ids = server.post("/v1/completions", body | {"prompt": [*map(ids_of, PROMPTS)]}).json()
    assert [choice["text"] for choice in ids["choices"]] == expected
    assert ids["usage"] == texts["usage"]
    one = server.post("/v1/completions", body | {"prompt": ids_of(PROMPTS[0])}).json()
    assert [choice["text"] for choice in one["choices"]] == expected[:2]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_stops(server: Served, model: Any, seed: int, stream: bool) -> None:
    """Texts of several tokens, some of them a part of a character."""
    (whole,) = offline(model, "Stop", new=60, temperature=1.3, seed=seed)
    stops = [whole[at : at + size] for at, size in ((30, 2), (41, 3), (44, 1))]
    stops = [stop for stop in stops if stop]
    body = {"model": NAME, "prompt": "Stop", "max_tokens": 60, "temperature": 1.3, "seed": seed}
    answer = server.post("/v1/completions", body | {"stop": stops, "stream": stream})
    if stream:
        chunks = events(answer.text)
        found = "".join(chunk["choices"][0]["text"] for chunk in chunks)
        reason = chunks[-1]["choices"][0]["finish_reason"]
    else:
        choice = answer.json()["choices"][0]
        found, reason = choice["text"], choice["finish_reason"]
    assert found == cut(whole, stops)
    assert reason == ("stop" if found != whole else reason)


def test_logprobs(server: Served, model: Any) -> None:
    """Of greedy tokens: the chosen one is the likeliest, and texts lie where they say."""
    body: dict[str, Any] = {"model": NAME, "prompt": "Log", "max_tokens": 24, "temperature": 0}
    answer = server.post("/v1/completions", body | {"logprobs": 3}).json()["choices"][0]
    found = answer["logprobs"]
    assert len({len(values) for values in found.values()}) == 1
    for text, logprob, top, offset in zip(
        *(found[key] for key in ("tokens", "token_logprobs", "top_logprobs", "text_offset")),
        strict=True,
    ):
        assert logprob == max(top.values()) < 0
        if "\ufffd" not in text:
            assert answer["text"][offset : offset + len(text)] == text
    chat = {"model": NAME, "messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    chat |= {"temperature": 0, "logprobs": True, "top_logprobs": 2}
    whole = server.post("/v1/chat/completions", chat).json()["choices"][0]["logprobs"]["content"]
    assert [len(token["top_logprobs"]) for token in whole] == [2] * 5
    assert all(token["logprob"] == token["top_logprobs"][0]["logprob"] for token in whole)
    chunks = events(server.post("/v1/chat/completions", chat | {"stream": True}).text)
    streamed = [t for c in chunks for t in c["choices"][0]["logprobs"]["content"]]
    assert streamed == whole


def test_an_answer_may_fill_the_context(server: Served, model: Any) -> None:
    prompt = "x" * 1000
    body = {"model": NAME, "messages": [{"role": "user", "content": "x" * 979}], "seed": 4}
    answer = server.post("/v1/chat/completions", body).json()
    assert answer["usage"]["prompt_tokens"] == 979 + len("<user>\n<assistant>")
    assert answer["usage"]["total_tokens"] <= 1024
    beyond = {"model": NAME, "prompt": prompt, "max_tokens": 25}
    assert server.post("/v1/completions", beyond).status_code == 400
    beyond["max_tokens"] = 24
    assert server.post("/v1/completions", beyond).status_code == 200


def test_many_at_once(server: Served, model: Any) -> None:
    """Streams beside each other, each with the text that it has alone."""
    seeds = range(24)
    expected = [offline(model, f"Ask {s}", temperature=1.0, seed=s)[0] for s in seeds]

    def ask(seed: int) -> str:
        body = {"model": NAME, "prompt": f"Ask {seed}", "max_tokens": 24, "seed": seed}
        made = ""
        with httpx2.stream(
            "POST", server.url + "/v1/completions", json=body | {"stream": True}, timeout=60
        ) as answer:
            text = "".join(answer.iter_text())
        for chunk in events(text):
            made += chunk["choices"][0]["text"]
        return made

    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(ask, seeds)] == expected


def test_a_model_with_a_prefix(tmp_path: Path) -> None:
    float_model, tokenizer = byte_model(), byte_tokenizer()
    sq_cpu.lead_with(tokenizer)
    windows = sq_cpu.token_windows(tokenizer, "Some text. " * 40, window=32, windows=4)
    calibration = sq_cpu.calibrate(float_model, windows, prefix=sq_cpu.leading_ids(tokenizer))
    model = sq_cpu.quantize(float_model, calibration, scheme="O3", progress=False)
    folder = sq_cpu.save(model, tmp_path / "int8", tokenizer)
    sq_cpu.fuse(model)
    with serving(folder) as served:
        for prompt in ["", *PROMPTS]:
            body = {"model": NAME, "prompt": prompt, "max_tokens": 24, "temperature": 0}
            answer = served.post("/v1/completions", body).json()
            ids = tokenizer(prompt)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            (made,) = generate(model, [ids], max_new_tokens=24)
            text = tokenizer.decode(made, skip_special_tokens=True)
            assert answer["choices"][0]["text"] == text
            assert answer["usage"]["prompt_tokens"] == len(ids)
