"""Runtimes that fail beside others that do not: what is refused, and that nothing hangs."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_peer
import pytest
import whole_model
from model_files import Files
from run_model_cases import SETTINGS
from turns import FP32, Turn, verify
from whole_model import Running, work_items
from worker import Worker, WorkerError


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
