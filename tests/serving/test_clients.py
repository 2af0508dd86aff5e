"""OpenAI's own client."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from servers import NAME, Served
from test_same_as_offline import offline

MESSAGES: Any = [{"role": "user", "content": "Hi"}]
RENDERED = "<user>Hi\n<assistant>"
TOOLS: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [NAME]


def test_a_chat(client: openai.OpenAI, model: Any) -> None:
    made = client.chat.completions.create(
        model=NAME, messages=MESSAGES, seed=2, max_completion_tokens=16, n=2
    )
    found = [choice.message.content for choice in made.choices]
    assert found == offline(model, RENDERED, 2, new=16, temperature=1.0, seed=2)
    assert made.usage is not None
    assert made.usage.prompt_tokens == len(RENDERED)
    # The answer goes back as it is.
    messages = [*MESSAGES, made.choices[0].message.model_dump(), *MESSAGES]
    again = client.chat.completions.create(model=NAME, messages=messages, max_tokens=1)
    assert again.choices[0].finish_reason == "length"


def test_a_stream(client: openai.OpenAI, model: Any) -> None:
    stream = client.chat.completions.create(
        model=NAME,
        messages=MESSAGES,
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = [*stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1])
    assert [text] == offline(model, RENDERED, new=16)
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == len(RENDERED)


def test_completions(client: openai.OpenAI, model: Any) -> None:
    made = client.completions.create(model=NAME, prompt="Hello", temperature=0, logprobs=2)
    assert [made.choices[0].text] == offline(model, "Hello", new=16)
    assert made.choices[0].logprobs is not None
    assert len(made.choices[0].logprobs.tokens or []) == 16


def test_many_at_once(server: Served, model: Any) -> None:
    async def ask(client: openai.AsyncOpenAI, seed: int) -> str:
        stream = await client.completions.create(
            model=NAME, prompt="Ask", seed=seed, max_tokens=16, stream=True
        )
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        url = server.url + "/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            return await asyncio.gather(*(ask(client, seed) for seed in range(16)))

    expected = [offline(model, "Ask", new=16, temperature=1.0, seed=s)[0] for s in range(16)]
    assert asyncio.run(ask_all()) == expected


def test_what_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="tools is not supported") as caught:
        client.chat.completions.create(model=NAME, messages=MESSAGES, tools=TOOLS)
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError, match="there is no model") as missing:
        client.chat.completions.create(model="other", messages=MESSAGES)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError, match="exceed the context of 1024"):
        client.completions.create(model=NAME, prompt="a", max_tokens=5000)
    picture: Any = [{"type": "image_url", "image_url": {"url": "data:,"}}]
    with pytest.raises(openai.BadRequestError, match="only 'text' is supported"):
        client.chat.completions.create(model=NAME, messages=[{"role": "user", "content": picture}])
