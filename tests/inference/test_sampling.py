"""The choice of a token: its distribution, its limits, and what changes logits before it."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from sq_cpu import Sampling, SqCpuError
from sq_cpu.inference.sampling import Penalties, Sampler


def choose(
    logits: Tensor,
    sampling: Sampling,
    *,
    streams: list[int] | None = None,
    penalties: Penalties | None = None,
    allowed: Tensor | None = None,
) -> list[int]:
    """Return a choice for each row, whose streams of random numbers are 0, 1, ..."""
    rows = len(logits)
    sampler = Sampler([sampling] * rows, streams or [*range(rows)])
    return sampler.choose(
        logits.clone(),
        torch.zeros(rows).long(),
        torch.empty(rows).long(),
        None if penalties is None else [penalties] * rows,
        None if allowed is None else [allowed] * rows,
    )


def kept(weights: Tensor, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> Tensor:
    """Return which tokens may be chosen, in the words of sampling.h."""
    order = sorted(range(len(weights)), key=lambda i: (-weights[i], i))
    order = [i for i in order if weights[i] >= min_p * weights.max()][: top_k or None]
    total, sum_, left = sum(weights[i] for i in order), 0.0, []
    for i in order:
        if left and sum_ >= top_p * total:
            break
        left.append(i)
        sum_ += weights[i]
    return torch.tensor(sorted(left))


OPTIONS = [
    {},
    {"top_k": 2},
    {"top_p": 0.6},
    {"top_p": 0.9},
    {"min_p": 0.2},
    {"top_k": 5, "top_p": 0.8},
    {"top_p": 0.97, "min_p": 0.02},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("vocabulary", [1, 2, 7, 33, 3000])
def test_chosen_by_their_weights(options: dict[str, Any], vocabulary: int) -> None:
    rows = 4000
    logits = torch.randn(vocabulary, generator=torch.Generator().manual_seed(1)) * 2
    found = torch.tensor(choose(logits.repeat(rows, 1), Sampling(temperature=0.7, **options)))
    weights = (logits.double() / 0.7).softmax(0)
    left = kept(weights, **options)
    expected = torch.zeros(vocabulary).double()
    expected[left] = weights[left] / weights[left].sum()
    shares = torch.bincount(found, minlength=vocabulary) / rows
    deviation = (expected * (1 - expected) / rows).sqrt()
    # Five standard deviations, and the few of tokens that hardly ever come.
    assert ((shares - expected).abs() <= 5 * deviation + 3 / rows).all()
    assert (shares[expected == 0] == 0).all()


def test_the_likeliest_and_ties() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, -1.0]])
    assert choose(logits, Sampling()) == [1]
    assert choose(logits, Sampling(temperature=1e-40)) in ([1], [2])
    for stream in range(20):
        assert choose(logits, Sampling(temperature=1.0, top_k=1), streams=[stream]) == [1]
        assert choose(logits, Sampling(temperature=1.0, top_p=1e-9), streams=[stream]) == [1]
    peak = torch.full((1, 50000), -300.0)
    peak[0, 49999] = 0
    assert choose(peak, Sampling(temperature=1.0)) == [49999]
    assert choose(peak, Sampling(temperature=1.0, top_p=0.5, top_k=40)) == [49999]
    flat = torch.zeros(1, 100000)  # 512 times more than are put in order at first
    for stream in range(5):
        assert choose(flat, Sampling(temperature=1.0, top_p=0.3), streams=[stream])[0] <= 30000


def test_the_same_in_any_batch_and_with_any_threads() -> None:
    logits = torch.randn(9, 5001, generator=torch.Generator().manual_seed(3))
    sampling = Sampling(temperature=1.1, top_p=0.9)
    together = choose(logits, sampling)
    alone = [choose(logits[i : i + 1], sampling, streams=[i])[0] for i in range(9)]
    assert alone == together
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert choose(logits, sampling) == together
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, 36])
def test_logits_that_are_not_finite(bad: float, at: int) -> None:
    logits = torch.zeros(3, 37)
    logits[1, at] = bad
    for sampling in (Sampling(), Sampling(temperature=1.0)):
        made = choose(logits, sampling)
        assert made[1] == -1
        assert made[0] >= 0
        assert made[2] >= 0


def test_penalties() -> None:
    logits = torch.tensor([[2.0, -2.0, 1.0, 0.5, 0.0]])
    sampling = Sampling(
        repetition_penalty=4.0,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        logit_bias={3: 1.0, 4: -3.0},
    )
    penalties = Penalties(sampling, [0, 1])
    penalties.add(2)
    penalties.add(2)
    ids, divisors, addends = penalties.edits()
    changed = logits[0].clone()
    for token, divisor, addend in zip(ids.tolist(), divisors, addends, strict=True):
        x = changed[token]
        changed[token] = (x / divisor if x > 0 else x * divisor) + addend
    # Twice generated: 1 / 4 - 0.5 - 2 * 0.25.
    assert torch.equal(changed, torch.tensor([0.5, -8.0, -0.75, 1.5, -3.0]))
    assert choose(logits, sampling, penalties=penalties) == [3]
    assert choose(logits, sampling) == [0]


def test_what_is_allowed() -> None:
    logits = torch.arange(70.0)[None]
    words = torch.zeros(3, dtype=torch.int32)
    assert choose(logits, Sampling(), allowed=words) == [-2]
    words[1] = -(2**31)  # bit 31: token 63
    assert choose(logits, Sampling(), allowed=words) == [63]
    words[0] = 5
    assert choose(logits, Sampling(temperature=100.0), streams=[4], allowed=words)[0] in (0, 2, 63)
    with pytest.raises(SqCpuError, match="allowed"):
        choose(logits, Sampling(), allowed=words[:2])


@pytest.mark.parametrize("least", [True, False])
def test_the_ends_of_the_ranges(least: bool) -> None:
    """What `Sampling` takes the library takes too: else a step of many requests would fail."""
    sign, tiny = (-1, 1e-30) if least else (1, 1e30)
    sampling = Sampling(
        temperature=0.0 if least else 1e30,
        top_p=1e-30 if least else 1.0,
        repetition_penalty=tiny,
        presence_penalty=sign * 1e30,
        frequency_penalty=sign * 1e30,
        logit_bias={1: -sign * 1e30},
    )
    edits = Penalties(sampling, [0, 1], [1] * 10_000)
    assert choose(torch.randn(1, 40), sampling, penalties=edits)[0] in range(40)


@pytest.mark.parametrize("options", OPTIONS)
def test_a_logit_that_is_edited_beyond_fp32(options: dict[str, Any]) -> None:
    sampling = Sampling(temperature=1.0, repetition_penalty=0.1, **options)
    logits = torch.zeros(1, 40)
    logits[0, 33] = 1e38
    assert choose(logits, sampling, penalties=Penalties(sampling, [33])) == [33]


def test_refusals() -> None:
    for options in (
        {"temperature": -1.0},
        {"temperature": math.inf},
        {"temperature": 1e39},
        {"temperature": "1"},
        {"temperature": True},
        {"top_k": -1},
        {"top_k": 2.5},
        {"top_k": 2**63},
        {"top_p": 0.0},
        {"top_p": 1e-50},
        {"top_p": 1.1},
        {"min_p": math.nan},
        {"seed": 0.5},
        {"repetition_penalty": 0},
        {"repetition_penalty": 1e-46},
        {"frequency_penalty": -1e39},
        {"presence_penalty": None},
        {"logit_bias": {-1: 0.0}},
        {"logit_bias": {1: math.inf}},
        {"logit_bias": {1: 1e39}},
        {"logit_bias": [1]},
        {"logit_bias": {"a": 1.0}},
    ):
        with pytest.raises(SqCpuError, match=next(iter(options))):
            Sampling(**options)
    edited = Penalties(Sampling(logit_bias={5: 1.0}), [])
    with pytest.raises(SqCpuError, match="token 5 of 4"):
        choose(torch.zeros(1, 4), Sampling(), penalties=edited)
