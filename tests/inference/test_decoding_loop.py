"""`generate` with our loop: the ids that it gives without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_fusing import fused
from test_lowering import quantized
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
)

from sq_cpu import decoding_loop
from sq_cpu.inference import decoding_loop as module

NEW = 12


@pytest.fixture(scope="module")
def model() -> Any:
    return fused("llama", head="int8")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many prompts the scheduler got in each call."""
    counts: list[int] = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        counts.append(len(args[1]))
        return generate_batch(*args, **kwargs)

    generate_batch = module.generate_batch
    monkeypatch.setattr(module, "generate_batch", counted)
    return counts


def prompts() -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 64, (3, 17), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, :16] = 0
    return ids, mask


def test_greedy(model: Any, calls: list[int]) -> None:
    ids, mask = prompts()
    free = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, eos_token_id=None)
    stop = int(free[0, 20])
    for options in (
        {"eos_token_id": None},
        {"eos_token_id": stop, "pad_token_id": 2},
        {"eos_token_id": [stop, 5], "pad_token_id": 0, "repetition_penalty": 1.4},
    ):
        given = {"attention_mask": mask, "max_new_tokens": NEW, "do_sample": False, **options}
        expected = model.generate(ids, **given)
        assert torch.equal(model.generate(ids, custom_generate=decoding_loop, **given), expected)
    # Whether a penalty leaves out padding, older versions of transformers do not say.
    assert calls in ([3, 3, 3], [3, 3])


def test_sampling(model: Any, calls: list[int]) -> None:
    ids, mask = prompts()

    def sample(seed: int, **options: Any) -> Tensor:
        torch.manual_seed(seed)
        made: Tensor = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=NEW,
            do_sample=True,
            eos_token_id=None,
            custom_generate=decoding_loop,
            **options,
        )
        return made

    first = sample(1, temperature=1.5, top_k=30)
    assert torch.equal(sample(1, temperature=1.5, top_k=30), first)
    assert not torch.equal(sample(2, temperature=1.5, top_k=30), first)
    assert len(calls) == 3
    likeliest = model.generate(
        ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, eos_token_id=None
    )
    assert torch.equal(sample(3, top_k=1), likeliest)


class Keeping:
    """A streamer that keeps what it gets."""

    def __init__(self) -> None:
        self.got: list[int] = []
        self.ended = False

    def put(self, value: Tensor) -> None:
        self.got += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streamer(model: Any, calls: list[int]) -> None:
    """transformers' `generate` does not pass it on to a loop that it is given."""
    streamer = Keeping()
    ids = prompts()[0][:1]
    made = decoding_loop(
        model,
        ids,
        LogitsProcessorList(),
        StoppingCriteriaList([MaxLengthCriteria(ids.shape[1] + NEW)]),
        GenerationConfig(do_sample=False, num_beams=1),
        streamer=streamer,
    )
    assert made.shape == (1, ids.shape[1] + NEW)
    assert ids[0].tolist() + streamer.got == made[0].tolist()
    assert streamer.ended
    assert calls == [1]


class Forbid(LogitsProcessor):  # type: ignore[misc]
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, :40] = -float("inf")
        return scores


def test_what_it_does_not_know_goes_through_the_usual_loop(model: Any, calls: list[int]) -> None:
    ids, mask = prompts()
    gaps = mask.clone()
    gaps[0, 4] = 0
    base = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    for options in (
        {"logits_processor": LogitsProcessorList([Forbid()])},
        {"return_dict_in_generate": True, "output_logits": True},
        {"attention_mask": gaps},
        {"max_time": 60.0},
        {"no_repeat_ngram_size": 2},
    ):
        expected = model.generate(ids, **base | options)
        made = model.generate(ids, custom_generate=decoding_loop, **base | options)
        if isinstance(expected, Tensor):
            assert torch.equal(made, expected)
        else:
            assert torch.equal(made.sequences, expected.sequences)
            assert len(made.logits) == 4
    plain = quantized("llama")
    expected = plain.generate(ids, **base)
    assert torch.equal(plain.generate(ids, custom_generate=decoding_loop, **base), expected)
    assert calls == []
