"""The benchmark of tasks, on a tiny model and made-up requests."""

import gzip
import json
import statistics
from pathlib import Path
from string import ascii_letters
from typing import Any

import pytest
import run_tasks
import torch
import typer
from byte_models import byte_model, byte_tokenizer, save_float
from typer.testing import CliRunner

from sq_cpu.errors import SqCpuError

WORDS = [" one", " nine", " of them"]
DOCUMENTS = 6


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Give requests of two tasks, of which the byte model has every other document right."""
    folder = tmp_path / "package"
    model, tokenizer = byte_model(), byte_tokenizer()
    rows = []
    for number in range(DOCUMENTS):
        context = f"Question {number}: how many?"
        scores = [score(model, tokenizer, context, word)[0] for word in WORDS]
        best = scores.index(max(scores))
        label = best if number % 2 == 0 else (best + 1) % len(WORDS)
        rows += [request(number, k, context, word, label) for k, word in enumerate(WORDS)]
        # What the continuations are worth without a context, as some tasks ask.
        rows += [request(100 + number, k, "So:", word, label) for k, word in enumerate(WORDS)]
    write(folder / "choice/rc_0shot", rows, {"uncond_docid_offset": 100})
    lone: list[Any] = []
    for number in range(200):
        context = f"Sentence {number} ends with the letter"
        with torch.no_grad():
            logits = model(torch.tensor([tokenizer(context)["input_ids"]])).logits[0, -1]
        likeliest = tokenizer.decode([int(logits.argmax())])
        if likeliest in ascii_letters and len(lone) < DOCUMENTS:
            letter = likeliest if len(lone) < 2 else "a" if likeliest != "a" else "b"
            lone.append(request(len(lone), 0, context, letter, ["a list"]))
    write(folder / "last/bpb_0shot", lone, None)
    return folder


def request(document: int, number: int, context: str, continuation: str, label: Any) -> Any:
    asked = {"context": context, "continuation": continuation}
    return {"doc_id": document, "idx": number, "label": label, "request": asked}


def write(folder: Path, rows: list[Any], metric_kwargs: Any) -> None:
    folder.mkdir(parents=True)
    with gzip.open(folder / "requests.jsonl.gz", "wt") as lines:
        lines.write("".join(json.dumps(row) + "\n" for row in rows))
    config = {"task_config": {"metric_kwargs": metric_kwargs}}
    (folder / "config.json").write_text(json.dumps(config))


def score(model: Any, tokenizer: Any, context: str, word: str) -> tuple[float, bool]:
    """Return a continuation's log-likelihood, and whether each of its tokens is the likeliest."""
    prompt = tokenizer(context)["input_ids"]
    added = tokenizer(word)["input_ids"]
    with torch.no_grad():
        logs = model(torch.tensor([prompt + added])).logits[0].log_softmax(-1)
    logs = logs[len(prompt) - 1 : -1]
    return float(logs[range(len(added)), added].sum()), logs.argmax(-1).tolist() == added


def by_definition(package: Path, task: str) -> str:
    model, tokenizer = byte_model(), byte_tokenizer()
    right = []
    for document in run_tasks.requests_of(package, task):
        found = [score(model, tokenizer, document["context"], c) for c in document["choices"]]
        values = [value for value, _ in found]
        lone = len(found) == 1
        right.append(found[0][1] if lone else values.index(max(values)) == document["gold"])
    return "".join(str(int(each)) for each in right)


def test_requests_become_documents(package: Path) -> None:
    documents = run_tasks.requests_of(package, "choice")
    assert len(documents) == DOCUMENTS
    assert documents[1]["context"] == "Question 1: how many?"
    assert all(document["choices"] == WORDS for document in documents)
    assert documents == run_tasks.requests_of(package, "choice/rc_0shot")
    lone = run_tasks.requests_of(package, "last")
    assert [len(document["choices"]) for document in lone] == [1] * DOCUMENTS


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing", "no requests of nothing; it has none of that name"),
        ("choice/mc_5shot", "no requests of choice/mc_5shot; it has choice/rc_0shot"),
        ("contexts", "document 0 of contexts has several contexts"),
        ("labels", "document 0 of labels has no right choice"),
    ],
)
def test_requests_that_are_refused(package: Path, task: str, message: str) -> None:
    two = [request(0, 0, "a", "b", 3), request(0, 1, "a", "c", 3)]
    write(package / "labels/rc_0shot", two, {})
    two[1]["request"]["context"] = "d"
    write(package / "contexts/rc_0shot", two, {})
    with pytest.raises(SqCpuError, match=message):
        run_tasks.requests_of(package, task)


def test_a_difference_has_the_error_of_pairs() -> None:
    int8 = run_tasks.Subject("O3", "fp32", None, None)
    row = run_tasks.row_of("task", int8, "110010", "110101")
    changes = [0, 0, 0, -1, 1, -1]
    assert (row["gained"], row["lost"]) == (1, 2)
    assert row["accuracy"] == 0.5
    assert row["error"] == pytest.approx((0.25 / 5) ** 0.5)
    assert row["difference"] == pytest.approx(-1 / 6)
    assert row["difference_error"] == pytest.approx(statistics.stdev(changes) / 6**0.5)
    assert "difference" not in run_tasks.row_of("task", int8, "110010", None)


@pytest.mark.filterwarnings("default")  # lm_eval's own
def test_it_scores_a_folder(package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lm_eval", reason="lm_eval, an extra of some hundred MB, is not installed")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    out = tmp_path / "tasks.json"
    command = typer.Typer()
    command.command()(run_tasks.main)
    folder = save_float(tmp_path / "model")

    def run(*options: str) -> str:
        arguments = [str(folder), "--package", str(package), "--out", str(out), *options]
        arguments += ["--tasks", "choice,last", "--calibration-windows", "1"]
        found = CliRunner().invoke(command, arguments)
        return found.output + repr(found.exception or "")

    # Three parts: 0 to 2, 2 to 4 and, resumed, 4 to 6.
    assert "fp32" in run("--variants", "O3", "--limit", "4", "--part", "2")
    rows = json.loads(out.read_text())["rows"]
    names = [(row["task"], row["variant"]) for row in rows]
    assert names == [(task, name) for task in ("choice", "last") for name in ("fp32", "O3")]
    assert {row["documents"] for row in rows} == {4}
    assert "fp32" in run("--variants", "O3", "--resume")
    again = json.loads(out.read_text())["rows"]
    assert again[0]["right"] == by_definition(package, "choice") == "101010"
    assert again[2]["right"] == by_definition(package, "last") == "110000"
    assert [(row["task"], row["variant"]) for row in again] == names
    for row, longer in zip(rows, again, strict=True):
        assert longer["right"][:4] == row["right"]
        assert longer["documents"] == DOCUMENTS
    assert again[1]["reference"] == "fp32"
    assert str(tmp_path) not in out.read_text()

    monkeypatch.setattr(run_tasks, "answers", lambda *_: "1" * DOCUMENTS)
    assert "O1+prefix" in run("--variants", "O3,O1+prefix", "--resume")
    more = json.loads(out.read_text())["rows"]
    assert more[:4] == again
    assert [row["variant"] for row in more[4:]] == ["fp32+prefix", "O1+prefix"] * 2
    assert "was measured with" in run("--variants", "O3", "--alpha", "0.5", "--resume")
