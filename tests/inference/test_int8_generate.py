"""`generate` over an int8 cache, in all of its modes."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny import tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache
from transformers.generation.streamers import BaseStreamer

import sq_cpu
from sq_cpu import Int8Cache
from sq_cpu.inference.cache import Int8Layer
from sq_cpu.models.hf_private import attention_implementation

NEW = 24
GREEDY = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None}


@pytest.fixture(params=["llama", "gemma3_text", "mistral"])
def model(request: pytest.FixtureRequest) -> Any:
    made = tiny_model(request.param, sliding_window=20)
    sq_cpu.use_int8_attention(made)
    return made


def prompt(batch: int = 1, length: int = 30) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(5))


def step_by_step(model: Any, ids: Tensor, count: int = NEW) -> Tensor:
    """Return the ids of the most likely tokens, found one call after another."""
    cache = Int8Cache(model)
    new = ids
    with torch.no_grad():
        for _ in range(count):
            logits = model(new, past_key_values=cache).logits[:, -1]
            new = logits.argmax(dim=1, keepdim=True)
            ids = torch.cat((ids, new), dim=1)
    return ids


def test_greedy(model: Any) -> None:
    ids = prompt(2)
    expected = step_by_step(model, ids)
    assert torch.equal(model.generate(ids, **GREEDY), expected)
    made = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(made.sequences, expected)
    assert all(isinstance(layer, Int8Layer) for layer in made.past_key_values.layers)


def test_padded_batch(model: Any) -> None:
    ids = prompt(3)
    mask = torch.ones_like(ids)
    for i, count in enumerate((0, 11, 29)):
        mask[i, :count] = 0
    ids = ids.masked_fill(mask == 0, 0)
    together = model.generate(ids, attention_mask=mask, **GREEDY)
    for i, count in enumerate((0, 11, 29)):
        alone = model.generate(ids[i : i + 1, count:], **GREEDY)
        assert torch.equal(together[i, 30:], alone[0, 30 - count :])


def test_sampling(model: Any) -> None:
    ids = prompt(2)
    options = {"max_new_tokens": NEW, "do_sample": True, "top_k": 20, "eos_token_id": None}
    made = []
    for _ in range(2):
        torch.manual_seed(3)
        made.append(model.generate(ids, **options))
    assert torch.equal(*made)
    assert not torch.equal(made[0], model.generate(ids, **options))


def test_beams(model: Any) -> None:
    """Without a cache each step computes all anew; int8 attention does not see the difference."""
    ids = prompt(2)
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 3}
    cached = model.generate(ids, **options)
    assert torch.equal(cached, model.generate(ids, **options, use_cache=False))


def test_assisted(model: Any) -> None:
    ids = prompt()
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prompt_lookup_num_tokens=3), expected)
    draft = copy.deepcopy(model)
    with torch.no_grad():  # right now and then
        for parameter in draft.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    assert torch.equal(model.generate(ids, **GREEDY, assistant_model=draft), expected)


def test_streamer(model: Any) -> None:
    class Listener(BaseStreamer):  # type: ignore[misc]
        def __init__(self) -> None:
            self.ids: list[int] = []

        def put(self, value: Tensor) -> None:
            self.ids += value.flatten().tolist()

        def end(self) -> None:
            self.ids.append(-1)

    listener = Listener()
    made = model.generate(prompt(), **GREEDY, streamer=listener)
    assert listener.ids == [*made[0].tolist(), -1]


def test_the_same_cache_twice(model: Any) -> None:
    ids = prompt()
    for cache in (Int8Cache(model), DynamicCache(config=model.config), DynamicCache()):
        first = model.generate(ids, **GREEDY, past_key_values=cache)
        longer = torch.cat((first, prompt(length=7)), dim=1)
        again = model.generate(longer, **GREEDY, past_key_values=cache)
        assert all(isinstance(layer, Int8Layer) for layer in cache.layers)
        assert torch.equal(again, model.generate(longer, **GREEDY))


def test_a_prefix_copied(model: Any) -> None:
    ids, prefix = prompt(), Int8Cache(model)
    with torch.no_grad():
        model(ids[:, :20], past_key_values=prefix)
    made = model.generate(ids, **GREEDY, past_key_values=copy.deepcopy(prefix))
    assert torch.equal(made, model.generate(ids, **GREEDY))
    assert prefix.get_seq_length() == 20


def test_chunked_prefill(model: Any) -> None:
    ids = prompt(2)
    expected = model.generate(ids, **GREEDY)
    assert torch.equal(model.generate(ids, **GREEDY, prefill_chunk_size=7), expected)


def test_other_caches_stay_what_they_are(model: Any) -> None:
    ids = prompt()
    cache = StaticCache(config=model.config, max_cache_len=60)
    with pytest.warns(UserWarning, match="computed in floats"):
        made = model.generate(ids, **GREEDY, past_key_values=cache)
    assert not any(isinstance(layer, Int8Layer) for layer in cache.layers)
    assert made.shape == (1, 30 + NEW)


def test_no_page_stays_in_use(model: Any) -> None:
    cache = Int8Cache(model)
    options = GREEDY | {"num_beams": 3}
    model.generate(prompt(2), **options, past_key_values=cache)
    assert cache.pages_in_use > 0
    cache.reset()
    assert cache.pages_in_use == 0


def test_on_and_off() -> None:
    model = tiny_model("llama")
    before = attention_implementation(model.config)
    ids = prompt()
    plain = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    sq_cpu.use_int8_attention(model)
    sq_cpu.use_int8_attention(model)
    assert len(model._forward_pre_hooks) == 1
    with torch.no_grad():
        assert isinstance(model(ids).past_key_values.layers[0], Int8Layer)
        assert model(ids, use_cache=False).past_key_values is None
        model.set_attn_implementation("eager")
        assert not isinstance(model(ids).past_key_values.layers[0], Int8Layer)
    sq_cpu.use_int8_attention(model)
    sq_cpu.use_int8_attention(model, enabled=False)
    sq_cpu.use_int8_attention(model, enabled=False)
    assert attention_implementation(model.config) == before
    again = model.generate(ids, **GREEDY, return_dict_in_generate=True)
    assert torch.equal(again.sequences, plain.sequences)
    assert type(again.past_key_values.layers[0]) is type(plain.past_key_values.layers[0])
