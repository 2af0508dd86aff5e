"""The text that vLLM gives with our plug-in: that of sq_cpu."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer
from transformers import AutoTokenizer
from vllm_runs import WAYS, Answer, ask_vllm, our_text

import sq_cpu

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="scripts/vllm has vLLM")

TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there",
    "Water boils at a temperature of",
    "def fibonacci(n):",
)


def log_probabilities(model: Any, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """Return those of what follows `ids`, computed in pieces that end at `cuts`, with a cache."""
    past = None
    with torch.no_grad():
        for begin, end in itertools.pairwise([0, *cuts, len(ids)]):
            made = model(torch.tensor([ids[begin:end]]), past_key_values=past, use_cache=True)
            past = made.past_key_values
    return made.logits[0, -1].float().log_softmax(-1)


def check_same(model: Any, prompt: list[int], theirs: list[int], mine: list[int]) -> int:
    """Return how many tokens are the same; where texts part, sq_cpu itself must be of two minds.

    Float sums of another order move values across a step of the int8 grid, and what follows by more
    than that. How much is measured: sq_cpu computes the same tokens in one piece, in two, and one
    by one. The two tokens may be no further apart than these ways are.
    """
    if theirs == mine:
        return len(mine)
    at = next(i for i, (a, b) in enumerate(zip(theirs, mine, strict=True)) if a != b)
    ids = prompt + mine[:at]
    ways = [[], *([cut] for cut in range(1, len(ids), 1 + len(ids) // 6))]
    ways.append([*range(len(prompt), len(ids))])
    found = torch.stack([log_probabilities(model, ids, cuts) for cuts in ways])
    apart = found[:, mine[at]] - found[:, theirs[at]]
    noise = float(apart.max() - apart.min())
    assert float(apart.abs().min()) <= max(noise, 1e-3), (at, apart)
    return at


def check_texts(folder: Path, answer: Answer) -> None:
    """Hold vLLM's texts against ours, which agree in most tokens."""
    model = sq_cpu.load(folder)
    mine = [our_text(model, prompt, answer.tokens) for prompt in answer.prompts]
    for theirs in (answer.alone, answer.together):
        same = [check_same(model, *each) for each in zip(answer.prompts, theirs, mine, strict=True)]
        assert 2 * sum(same) > answer.tokens * len(mine), (theirs, mine)


@pytest.mark.parametrize("way", WAYS)
def test_a_real_model(way: str, real: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real(way)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    answer = ask_vllm(folder, prompts, tmp_path, compare=True)
    [layers] = answer.layers
    assert len(layers) == 4 * 30
    assert all(layers.values()), [name for name, same in layers.items() if not same]
    assert "int8 linears are computed by sq_cpu" in answer.log
    if way.startswith("compressed"):
        assert "Selected SqCpuInt8LinearKernel for CompressedTensorsW8A8Int8" in answer.log
    check_texts(folder, answer)


PROMPTS = [list(range(10, 40)), list(range(200, 240)), [7, 8, 9]]


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "compiled"])
def test_all_that_a_layer_can_have(tiny_folder: Path, tmp_path: Path, eager: bool) -> None:
    answer = ask_vllm(tiny_folder, PROMPTS, tmp_path, compare=True, enforce_eager=eager)
    [layers] = answer.layers
    assert len(layers) == 7  # of eight, one is in float
    assert all(layers.values()), layers
    check_texts(tiny_folder, answer)


def test_two_ranks(tiny: Callable[..., Path], tmp_path: Path) -> None:
    # Static scales are constants; a row's own, of `dynamic_fallback`, are of the rank's channels.
    folder = tiny(dynamic_fallback=False)
    answer = ask_vllm(folder, PROMPTS, tmp_path, compare=True, tensor_parallel_size=2)
    first, second = answer.layers
    assert len(first) == len(second) == 7
    for name, found in first.items():
        if isinstance(found, bool):
            assert found, name
            assert second[name], name
        else:
            added = torch.tensor(found[0]) + torch.tensor(second[name][0])
            whole = torch.tensor(found[1])
            # Integer sums are exact; each rank rounds its own to fp32, and so does their sum.
            torch.testing.assert_close(
                added, whole, rtol=1e-6, atol=1e-6 * float(whole.abs().max())
            )
    assert sum(isinstance(found, list) for found in first.values()) == 3
    check_texts(folder, answer)


def test_three_ranks_by_heads(real: Callable[[str], Path], tmp_path: Path) -> None:
    folder = real("O3")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text).input_ids for text in TEXTS]
    answer = ask_vllm(folder, prompts, tmp_path, tensor_parallel_size=3)
    check_texts(folder, answer)


def test_what_is_refused_ends_the_engine_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "O2"
    sq_cpu.save(sq_cpu.quantize(byte_model(), scheme="O2", smooth=False), folder, byte_tokenizer())
    with pytest.raises(RuntimeError, match="O2 takes one scale for all tokens of a call"):
        ask_vllm(folder, PROMPTS, tmp_path)


def test_vllms_own_kernel_on_request(real: Callable[[str], Path], tmp_path: Path) -> None:
    disabled = {"VLLM_DISABLED_KERNELS": "SqCpuInt8LinearKernel"}
    answer = ask_vllm(
        real("compressed per token"), [[1, 2, 3]], tmp_path, tokens=1, environment=disabled
    )
    assert "Selected CPUInt8ScaledMMLinearKernel for CompressedTensorsW8A8Int8" in answer.log
    assert "int8 linears are computed by sq_cpu" not in answer.log
