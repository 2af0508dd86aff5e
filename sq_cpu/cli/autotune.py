"""`sq-cpu autotune`: a plan that keeps an accuracy goal, for `sq-cpu quantize --plan`."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sq_cpu.analysis.analysis import analyze
from sq_cpu.analysis.report import report, require_report
from sq_cpu.cli.common import (
    GOAL,
    TEXT_WINDOWS,
    Dtype,
    Json,
    Model,
    Prefix,
    PrefixName,
    Text,
    TextWindows,
    TrustRemoteCode,
    Window,
    emit,
    hold,
    model_name,
    say,
    scored_text,
    text_perplexity,
)
from sq_cpu.cli.tuning import Calib, DtypeOption, Ignore, Out, Windows, tuning_input
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.lm_eval import lm_eval_accuracy
from sq_cpu.extras import require
from sq_cpu.files import check_file

if TYPE_CHECKING:
    from sq_cpu.autotuning.autotune import Autotuned
    from sq_cpu.autotuning.refine import Rank


class _Rank(str, Enum):
    estimated, measured = "estimated", "measured"


def autotune_command(
    ctx: typer.Context,
    model: Model,
    out: Out,
    goal: Annotated[str, typer.Option(help=GOAL)] = "1%",
    calib: Calib = None,
    windows: Windows = 16,
    window: Window = 512,
    text: Text = None,
    text_windows: TextWindows = TEXT_WINDOWS,
    tasks: Annotated[
        list[str] | None,
        typer.Option(help="Task of lm-eval, repeatable, whose mean accuracy is the metric."),
    ] = None,
    task_limit: Annotated[
        int | None, typer.Option(min=1, help="Documents of each task. [default: all]")
    ] = None,
    trials: Annotated[int, typer.Option(min=1, help="Evaluations of the search.")] = 30,
    refine_trials: Annotated[
        int, typer.Option(min=0, help="Evaluations of the refinement after it.")
    ] = 100,
    rank: Annotated[
        _Rank,
        typer.Option(help="measured: evaluate each linear's change alone before refining."),
    ] = _Rank.estimated,
    tokens: Annotated[
        int, typer.Option(min=1, help="Rows that latency is for: 512 a prefill, 1 decoding.")
    ] = 512,
    time_limit: Annotated[
        str | None, typer.Option(metavar="30m", help="Stop after so many s, m or h.")
    ] = None,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes, which share the threads; each has a model.")
    ] = 1,
    storage: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|URL",
            help="Where trials are kept: a file, or a database that machines share, as in "
            "postgresql://user@host/name. [default: PLAN.db]",
        ),
    ] = None,
    study: Annotated[
        str, typer.Option(metavar="NAME", help="The job's name there; it can keep several.")
    ] = "autotune",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with what FILE holds.")] = False,
    report_file: Annotated[
        Path | None,
        typer.Option("--report", metavar="FILE.html", help="Write a report with all trials."),
    ] = None,
    ignore: Ignore = None,
    prefix: Prefix = PrefixName.auto,
    dtype: DtypeOption = Dtype.fp32,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
) -> None:
    """Find the fastest mix of int8 and float for MODEL that keeps an accuracy goal.

    PLAN.json is for `sq-cpu quantize --plan`. When the search is stopped, also by Ctrl-C or
    SIGTERM, it holds the best plan so far. The exit code is 1 when that misses the goal.
    """
    require("optuna", "tune")
    # Optional, so imported where it is used: the other commands do without it.
    from sq_cpu.autotuning.autotune import autotune
    from sq_cpu.autotuning.evaluator import Goal

    if tasks and text is not None:
        raise typer.BadParameter("--text and --tasks are two metrics; drop one of them")
    if task_limit is not None and not tasks:
        raise typer.BadParameter("--task-limit needs --tasks")
    Goal.of(goal)
    seconds = None if time_limit is None else _seconds(time_limit)
    where = out.with_suffix(".db") if storage is None else _place(storage)
    _check_distinct(out, where, report_file)
    if report_file is not None:
        require_report()
        hold(ctx, report_file)
    killed = hold(ctx, out)
    given = tuning_input(model, calib, windows, window, dtype, ignore, trust_remote_code, prefix)
    given.check_language_model("autotune")
    _check_storage(where, study, resume, killed)
    scored = scored_text(text, text_windows) if not tasks else ()
    start = time.perf_counter()
    loaded, tokenizer, batches = given.load()
    evaluate: Any
    if tasks:
        evaluate = partial(
            lm_eval_accuracy, tokenizer=tokenizer, tasks=tasks, limit=task_limit, progress=False
        )
    else:
        evaluate = text_perplexity(tokenizer, scored, window, text_windows)
    calibration = given.calibration(loaded, tokenizer, batches)
    identity = {
        "calib": _digest(given.data.texts),
        "windows": [windows, window],
        **({"prefix": list(calibration.prefix)} if calibration.prefix else {}),
        "dtype": dtype.value,
        "tasks": [tasks, task_limit],
        "text": [_digest(scored), text_windows],
    }
    rank_: Rank = rank.value
    found = autotune(
        loaded,
        calibration,
        evaluate,
        goal if goal.strip().endswith("%") else float(goal),
        higher_is_better=bool(tasks),
        ignore=given.ignore,
        storage=where,
        study=study,
        job=json.dumps(identity, sort_keys=True),
        trials=trials,
        refine_trials=refine_trials,
        time_limit=seconds,
        rank=rank_,
        seed=seed,
        workers=workers,
        tokens=tokens,
        say=say,
    )
    found.plan.save(out)
    if report_file is not None:
        analysis = analyze(loaded, calibration, found.plan)
        report(report_file, analysis, name=model_name(model), trials=found.trials)
    result = _result(found, goal) | {
        "output": str(out),
        "storage": str(where),
        "report": None if report_file is None else str(report_file),
        "seconds": round(time.perf_counter() - start, 1),
    }
    emit(result, as_json, "\n".join(_lines(found, goal, out, report_file)))
    _finish(found, out, where)


def _finish(found: Autotuned, out: Path, where: Path | str) -> None:
    again = f"{where} has the trials: the same command with --resume goes on"
    if found.stopped in ("interrupted", "terminated"):
        say(f"{found.stopped}: {out} is the best so far; {again}")
        raise typer.Exit(130 if found.stopped == "interrupted" else 143)
    if not found.goal_met:
        raise SqCpuError(
            f"the goal is not met: {out} is the best so far; {again}, with more --refine-trials or "
            "--time-limit"
        )


def _digest(text: str | Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]


def _seconds(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None:
        raise typer.BadParameter(f"--time-limit {text!r}; give seconds, minutes or hours: 30m")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _place(storage: str) -> Path | str:
    """Return the file of a storage, or the URL of a database."""
    return storage if "://" in storage else Path(os.path.expanduser(storage))


def _check_distinct(out: Path, where: Path | str, page: Path | None) -> None:
    """Refuse the same name for two of the files: the later would replace the earlier."""
    if isinstance(where, str):
        kind, _, rest = where.partition("://")
        file = Path(rest.removeprefix("/").partition("?")[0]) if kind[:6] == "sqlite" else None
    else:
        file = where
    files = {"the plan (-o)": out, "the trials (--storage)": file, "the report (--report)": page}
    taken: dict[Path, str] = {}
    for what, path in files.items():
        if path is None:
            continue
        other = taken.setdefault(path.resolve(), what)
        if other != what:
            raise SqCpuError(f"{other} and {what} are both {path}; give one of them another name")


def _check_storage(where: Path | str, study: str, resume: bool, killed: bool) -> None:
    """Refuse trials of an earlier run without --resume, and --resume without such trials.

    After a run that was killed, the same command goes on.
    """
    if isinstance(where, Path):
        if check_file(where) is None:
            raise SqCpuError(f"{where} is no regular file; give --storage another name")
        if resume and not where.exists():
            raise SqCpuError(f"nothing to resume: {where} does not exist; drop --resume")
        if not where.exists():
            return
    from sq_cpu.autotuning.storage import has_study, opened_storage, quiet_optuna

    with quiet_optuna(), opened_storage(where) as opened:
        there = has_study(opened, study)
    if resume and not there:
        raise SqCpuError(f"nothing to resume: {where} has no study {study}; drop --resume")
    # In a database, which others share, a study of this very job is continued without --resume.
    if there and not (resume or killed) and isinstance(where, Path):
        raise SqCpuError(
            f"{where} holds the trials of an earlier run: go on with --resume, remove it, or give "
            f"this job another name than {study} with --study"
        )


def _result(found: Autotuned, goal: str) -> dict[str, Any]:
    return {
        "goal": goal,
        "goal_met": found.goal_met,
        "metric": found.metric,
        "float_metric": found.float_metric,
        "loss": found.loss,
        "milliseconds": found.milliseconds,
        "float_milliseconds": found.float_milliseconds,
        "in_float": list(found.plan.in_float),
        "configuration": json.loads(found.configuration.key),
        "trials": len(found.trials),
        "stopped": found.stopped,
    }


def _lines(found: Autotuned, goal: str, out: Path, page: Path | None) -> list[str]:
    from sq_cpu.autotuning.evaluator import Goal

    loss = Goal.of(goal).text(found.loss)
    best = found.configuration
    lines = [
        f"{out}: {loss} (goal {goal}{'' if found.goal_met else ', missed'}), metric "
        f"{found.metric:.5g} against {found.float_metric:.5g} in float",
        f"linears: {found.milliseconds:.2f} ms against {found.float_milliseconds:.2f} in float; "
        f"{best.activations} activations, {len(best.overrides('per_token'))} linears per token, "
        f"{len(best.overrides('float'))} in float",
        f"{len(found.trials)} configurations evaluated",
    ]
    lines += [f"  {name}: {why}" for name, why in found.plan.in_float.items()]
    return lines if page is None else [*lines, f"report: {page}"]
