"""lm-eval as an evaluation: local tasks against scores from the definition, and every refusal."""

import json
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from byte_models import byte_model, byte_tokenizer

import sq_cpu
from sq_cpu import lm_eval_accuracy
from sq_cpu.errors import SqCpuError

QUESTIONS = [f"Question {number}: what is {number} plus {number}?" for number in range(8)]
CHOICES = ["one of them", "none of these", "all"]


@pytest.fixture
def task(tmp_path: Path) -> dict[str, Any]:
    """Give a multiple-choice task over a local file; the model is right in every other document."""
    pytest.importorskip("lm_eval", reason="lm_eval, an extra of some hundred MB, is not installed")
    model, tokenizer = byte_model(), byte_tokenizer()
    documents = []
    for number, question in enumerate(QUESTIONS):
        best = likeliest(model, tokenizer, question)
        gold = best if number % 2 == 0 else (best + 1) % len(CHOICES)
        documents.append({"question": question, "choices": CHOICES, "gold": gold})
    data = tmp_path / "documents.json"
    data.write_text("\n".join(json.dumps(document) for document in documents))
    return {
        "task": "local_choice",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }


def likeliest(model: Any, tokenizer: Any, question: str) -> int:
    """Return the choice of the largest log-likelihood, from the definition."""
    scores = []
    prompt = tokenizer(question)["input_ids"]
    for choice in CHOICES:
        ids = torch.tensor([prompt + tokenizer(" " + choice)["input_ids"]])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        scores.append(float(sum(logs[k - 1, ids[0, k]] for k in range(len(prompt), ids.shape[1]))))
    return max(range(len(scores)), key=scores.__getitem__)


def write(folder: Path, *tasks: dict[str, Any]) -> Path:
    place = folder / "tasks"
    place.mkdir(exist_ok=True)
    for task in tasks:
        (place / f"{task.get('task', 'group')}.yaml").write_text(yaml.safe_dump(task))
    return place


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.filterwarnings("default")  # lm_eval's own
def test_accuracy_is_that_of_the_definition(
    task: dict[str, Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    folder = write(tmp_path, task, task | {"task": "again"})
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    model.train()
    accuracy = lm_eval_accuracy(model, tokenizer, "local_choice", folder=folder)
    assert accuracy == 0.5
    assert model.training
    assert states[:2] == (random.getstate(), np.random.get_state()[1].tolist())
    assert torch.equal(states[2], torch.get_rng_state())
    assert lm_eval_accuracy(model, tokenizer, ["local_choice"], folder=folder, limit=1) == 1.0
    both = ["local_choice", "again"]
    assert lm_eval_accuracy(model, tokenizer, both, folder=folder, limit=3) == pytest.approx(2 / 3)
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("default")
def test_quantized_models_are_scored(task: dict[str, Any], tmp_path: Path) -> None:
    model = sq_cpu.quantize(byte_model(), smooth=False)
    tokenizer = byte_tokenizer()
    documents = map(json.loads, (tmp_path / "documents.json").read_text().splitlines())
    right = [likeliest(model, tokenizer, d["question"]) == d["gold"] for d in documents]
    folder = write(tmp_path, task)
    accuracy = lm_eval_accuracy(model, tokenizer, "local_choice", folder=folder)
    assert accuracy == pytest.approx(sum(right) / len(right))


@pytest.mark.filterwarnings("default")
def test_groups_count_by_their_aggregate(task: dict[str, Any], tmp_path: Path) -> None:
    group = {
        "group": "pair",
        "task": ["local_choice", "again"],
        "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean"}],
    }
    folder = write(tmp_path, task, task | {"task": "again"})
    (folder / "pair.yaml").write_text(yaml.safe_dump(group))
    assert lm_eval_accuracy(byte_model(), byte_tokenizer(), "pair", folder=folder) == 0.5


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(
    ("names", "changes", "options", "message"),
    [
        ([], {}, {}, "no tasks"),
        ("local_choice", {}, {"limit": 0}, "limit is 0"),
        ("nowhere", {}, {}, "lm-eval knows no task nowhere"),
        ("local_choice", {}, {"metric": "bleu"}, "gives no bleu for local_choice; .*: acc,none"),
        ("local_choice", {"higher_is_better": False}, {}, "of acc of local_choice more is not"),
        ("local_choice", {"data": "missing.json"}, {}, "cannot evaluate local_choice: "),
    ],
)
def test_refusals(
    task: dict[str, Any],
    tmp_path: Path,
    names: Any,
    changes: dict[str, Any],
    options: dict[str, Any],
    message: str,
) -> None:
    if "data" in changes:
        task["dataset_kwargs"]["data_files"]["test"] = str(tmp_path / changes["data"])
    elif changes:
        task["metric_list"][0] |= changes
    folder = write(tmp_path, task)
    with pytest.raises(SqCpuError, match=message) as caught:
        lm_eval_accuracy(byte_model(), byte_tokenizer(), names, folder=folder, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("default")
def test_logits_that_are_no_numbers(task: dict[str, Any], tmp_path: Path) -> None:
    model = byte_model()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = float("nan")
    with pytest.raises(SqCpuError, match="gives NaN or Inf on a text of the tasks"):
        lm_eval_accuracy(model, byte_tokenizer(), "local_choice", folder=write(tmp_path, task))


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SqCpuError, match=r"run: pip install 'sq_cpu\[lm-eval\]'$"):
        lm_eval_accuracy(byte_model(), byte_tokenizer(), "arc_easy")
