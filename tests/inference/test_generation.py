"""`sq_cpu.generate`: the same tokens as step by step, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fusing import fused
from test_lowering import quantized

from sq_cpu import Sampling, Scheduler, SqCpuError, generate

NEW = 24


# gemma2 caps its logits.
@pytest.fixture(scope="module", params=["llama", "gemma2", "mistral", "qwen2-int8"])
def model(request: pytest.FixtureRequest) -> Any:
    name, _, head = request.param.partition("-")
    tied = {"head": "int8", "tie_word_embeddings": True} if head else {}
    return fused(name, sliding_window=20, **tied)


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [
        torch.randint(3, 64, (length,), generator=generator).tolist() for length in (1, 30, 7, 2)
    ]


def test_greedy(model: Any) -> None:
    made = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[])
    for prompt, new in zip(prompts(), made, strict=True):
        expected = model.generate(
            torch.tensor([prompt]), max_new_tokens=NEW, do_sample=False, eos_token_id=None
        )
        assert [*prompt, *new] == expected[0].tolist()


def test_stops(model: Any) -> None:
    whole = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[])
    stops = [whole[1][5], whole[2][9]]
    seen: list[tuple[int, int]] = []
    made = generate(
        model,
        prompts(),
        max_new_tokens=NEW,
        stop_tokens=stops,
        on_token=lambda sequence, token: seen.append((sequence, token)),
    )
    for i, (new, all_of_it) in enumerate(zip(made, whole, strict=True)):
        ends = [at + 1 for at, token in enumerate(all_of_it) if token in stops]
        assert new == all_of_it[: min(ends, default=NEW)]
        assert new == [token for sequence, token in seen if sequence == i]
    assert len(made[1]) <= 6


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.5}])
def test_samples_do_not_depend_on_the_batch(model: Any, options: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.3, seed=7, **options)
    made = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[], sampling=sampling)
    for prompt, whole in zip(prompts(), made, strict=True):
        twice = [prompt, prompt]
        again = generate(model, twice, max_new_tokens=NEW, stop_tokens=[], sampling=sampling)
        assert again[0] == whole
        assert again[1] != whole  # a copy draws its own
    other = Sampling(temperature=1.3, seed=8, **options)
    changed = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[], sampling=other)
    assert changed != made


def test_in_little_memory(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many at once as half of it holds."""
    whole = generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[])
    assert Scheduler(model).pages == 256
    page = Scheduler(model)._fused.page_bytes
    monkeypatch.setattr("sq_cpu.inference.pages.available_memory", lambda: 4 * page)
    assert Scheduler(model).pages == 2
    made: list[int] = []
    scheduler = Scheduler.__init__

    def watched(self: Scheduler, *args: Any, **options: Any) -> None:
        scheduler(self, *args, **options)
        made.append(self.pages)

    monkeypatch.setattr(Scheduler, "__init__", watched)
    assert generate(model, prompts(), max_new_tokens=NEW, stop_tokens=[]) == whole
    assert made == [2]


def test_refusals(model: Any) -> None:
    def refused(message: str, given: Any = None, **options: Any) -> None:
        with pytest.raises(SqCpuError, match=message):
            generate(model, given or prompts(), **{"max_new_tokens": 4} | options)

    refused("max_new_tokens is 0", max_new_tokens=0)
    refused("prompt 1: the prompt is empty", [[3], []])
    refused("prompt 0: the prompt has ids from 3 to 64", [[3, 64]])
    refused("prompt 0: the prompt has ids from -1 to 3", [[3, -1]])
    refused("61 tokens of the prompt and 4 new ones exceed the model's 64", [[3] * 61])
    with pytest.raises(SqCpuError, match="not fused"):
        generate(quantized("llama"), prompts(), max_new_tokens=4)
    refused("prompt 0: max_new_tokens is 4.5", max_new_tokens=4.5)
    refused("prompt 0: token ids are a list of integers", [3, 4])
    refused("prompt 0: token ids are a list of integers", ["ab"])
    refused("stop_tokens: token ids", stop_tokens=5)
    tensor = torch.tensor([[3, 4], [5, 6]])
    assert generate(model, tensor, max_new_tokens=2) == generate(
        model, tensor.tolist(), max_new_tokens=2
    )
    stop = generate(model, [[3, 4]], max_new_tokens=3, stop_tokens=[])[0][0]
    assert generate(model, [[3, 4]], max_new_tokens=3, stop_tokens=torch.tensor([stop])) == [[stop]]
    assert generate(model, [], max_new_tokens=4) == []
