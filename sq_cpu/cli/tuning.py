"""`sq-cpu tune` and `autotune`: find a plan for `sq-cpu quantize --plan`."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer
from torch import Tensor, nn

from sq_cpu import texts
from sq_cpu.analysis.analysis import analyze
from sq_cpu.analysis.report import Trial, report
from sq_cpu.autotuning.autotune import Autotuned, Candidate, autotune
from sq_cpu.autotuning.evaluator import Goal
from sq_cpu.autotuning.refine import Rank
from sq_cpu.autotuning.storage import has_study, opened_storage, quiet_optuna
from sq_cpu.calibration.calibrate import TUNING_ROWS, calibrate
from sq_cpu.calibration.calibration import Calibration
from sq_cpu.cli.common import (
    Dtype,
    Json,
    Model,
    SchemeName,
    Window,
    calibration_batches,
    check_file,
    check_float,
    check_shipped,
    emit,
    load_model,
    model_name,
    read,
    read_all,
    say,
    shipped_windows,
)
from sq_cpu.errors import SqCpuError
from sq_cpu.evaluation.lm_eval import lm_eval_accuracy
from sq_cpu.evaluation.perplexity import TextPerplexity, token_windows
from sq_cpu.scheme import Scheme
from sq_cpu.tuning.tune import OUTLIERS, tune

_Out = Annotated[Path, typer.Option("-o", "--out", metavar="PLAN.json", help="File to write.")]
_Calib = Annotated[
    list[Path] | None,
    typer.Option(help="Calibration text, repeatable. [default: the shipped text]"),
]
_Windows = Annotated[int, typer.Option(min=1, help="Calibration windows in all.")]
_Ignore = Annotated[
    list[str] | None,
    typer.Option(help="Linear to leave in float, repeatable. [default: lm_head]"),
]
_DtypeOption = Annotated[Dtype, typer.Option(help="What is not int8 is kept in this.")]
_GOAL = "Greatest loss against the float model: 1% of its metric, or a number."


class _Rank(str, Enum):
    estimated, measured = "estimated", "measured"


@dataclass(frozen=True, kw_only=True)
class _Data:
    """The model and what it is calibrated on."""

    model: str
    own: Sequence[str]
    """The user's texts; none: the shipped one."""
    windows: int
    window: int
    dtype: Dtype
    ignore: tuple[str, ...]

    def load(self) -> tuple[nn.Module, Any, list[Tensor]]:
        """Return the model, its tokenizer and the windows to calibrate on."""
        loaded, tokenizer = load_model(self.model, self.dtype)
        batches = calibration_batches(tokenizer, self.own, self.window, self.windows)
        return loaded, tokenizer, batches

    def calibration(self, loaded: nn.Module, batches: list[Tensor]) -> Calibration:
        say(f"calibrating on {len(batches)} windows of {self.window} tokens")
        return calibrate(loaded, batches, ignore=self.ignore, gradient_rows=TUNING_ROWS)


def tune_command(
    model: Model,
    out: _Out,
    scheme: Annotated[
        SchemeName | None,
        typer.Option(
            help="Activation scales: O1 per token, O2 per tensor, O3 static. [default: O3]"
        ),
    ] = None,
    goal: Annotated[
        str | None,
        typer.Option(help=f"{_GOAL} Then it is autotune, with its other options' defaults."),
    ] = None,
    calib: _Calib = None,
    windows: _Windows = 16,
    window: Window = 512,
    ignore: _Ignore = None,
    dtype: _DtypeOption = Dtype.fp32,
    sequential: Annotated[
        bool,
        typer.Option(
            "--sequential", help="Tune each block on what the quantized ones before it give."
        ),
    ] = False,
    outliers: Annotated[
        int | None,
        typer.Option(
            min=0,
            help=f"Massive channels that a linear may keep in float. [default: {OUTLIERS}]",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Choose the smoothing of every layer of MODEL and write it to PLAN.json."""
    if goal is not None:
        if scheme is not None or sequential or outliers is not None:
            raise typer.BadParameter(
                "--goal leaves all of the plan to autotune; drop it, or --scheme, --sequential and "
                "--outliers"
            )
        autotune_command(
            model,
            out,
            goal=goal,
            calib=calib,
            windows=windows,
            window=window,
            ignore=ignore,
            dtype=dtype,
            as_json=as_json,
        )
        return
    check_file(out)
    data = _data(model, calib, windows, window, dtype, ignore)
    start = time.perf_counter()
    loaded, _, batches = data.load()
    calibration = data.calibration(loaded, batches)
    settings = Scheme.of((scheme or SchemeName.o3).value, ignore=data.ignore)
    plan = tune(
        loaded,
        calibration,
        scheme=settings,
        sequential=sequential,
        outliers=OUTLIERS if outliers is None else outliers,
        batches=batches,
    )
    plan.save(out)
    seconds = round(time.perf_counter() - start, 1)
    alphas = [group.alpha for group in plan.groups]
    result = {
        "output": str(out),
        "scheme": settings.to_dict(),
        "groups": len(alphas),
        "channels_in_float": sum(len(layer.outliers) for layer in plan.layers),
        "alpha": {"least": min(alphas, default=None), "greatest": max(alphas, default=None)},
        "seconds": seconds,
    }
    emit(
        result,
        as_json,
        f"{out}: {len(alphas)} groups ({settings.name}), alpha {min(alphas, default=0):.2f} to "
        f"{max(alphas, default=0):.2f}, in {seconds:.0f} s",
    )


def autotune_command(
    model: Model,
    out: _Out,
    goal: Annotated[str, typer.Option(help=_GOAL)] = "1%",
    calib: _Calib = None,
    windows: _Windows = 16,
    window: Window = 512,
    text: Annotated[
        Path | None,
        typer.Option(
            help="Text to score, other than the one you report. [default: the shipped text, but "
            "not the windows that `sq-cpu eval` scores]"
        ),
    ] = None,
    text_windows: Annotated[int, typer.Option(min=1, help="Windows of --text.")] = 20,
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
    ignore: _Ignore = None,
    dtype: _DtypeOption = Dtype.fp32,
    seed: Annotated[int, typer.Option(min=0, help="Of the search.")] = 0,
    as_json: Json = False,
) -> None:
    """Find the fastest mix of int8 and float for MODEL that keeps an accuracy goal.

    Written to PLAN.json for `sq-cpu quantize --plan`; where it was stopped, by Ctrl-C or SIGTERM
    too, the best so far. The exit code is 1 when that misses the goal.
    """
    if tasks and text is not None:
        raise typer.BadParameter("--text and --tasks are two metrics; drop one of them")
    if task_limit is not None and not tasks:
        raise typer.BadParameter("--task-limit needs --tasks")
    Goal.of(goal)
    seconds = None if time_limit is None else _seconds(time_limit)
    check_file(out)
    if report_file is not None:
        check_file(report_file)
    data = _data(model, calib, windows, window, dtype, ignore)
    where = out.with_suffix(".db") if storage is None else _place(storage)
    _check_distinct(out, where, report_file)
    _check_storage(where, study, resume)
    scored = _scored(text, text_windows) if not tasks else ()
    start = time.perf_counter()
    loaded, tokenizer, batches = data.load()
    evaluate: Any
    if tasks:
        evaluate = partial(
            lm_eval_accuracy, tokenizer=tokenizer, tasks=tasks, limit=task_limit, progress=False
        )
    else:
        evaluate = TextPerplexity(tokenizer, scored, window, text_windows)
        # A text that is too short is refused before the calibration.
        if text is None:
            shipped_windows(tokenizer, scored, window, text_windows, "--text")
        else:
            token_windows(tokenizer, scored, window=window, windows=text_windows)
    calibration = data.calibration(loaded, batches)
    identity = {
        "calib": _digest(data.own),
        "windows": [windows, window],
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
        ignore=data.ignore,
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
        report(report_file, analysis, name=model_name(model), trials=_report_trials(found))
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


def _data(
    model: str,
    calib: Sequence[Path] | None,
    windows: int,
    window: int,
    dtype: Dtype,
    ignore: Sequence[str] | None,
) -> _Data:
    check_float(model)
    return _Data(
        model=model,
        own=read_all(calib or []),
        windows=windows,
        window=window,
        dtype=dtype,
        ignore=tuple(ignore or ("lm_head",)),
    )


def _scored(text: Path | None, windows: int) -> str | tuple[str, ...]:
    if text is not None:
        return read(text)
    shipped = texts.selection()
    check_shipped(windows, len(shipped), "--text")
    return shipped


def _digest(text: str | Sequence[str]) -> str:
    return hashlib.sha256(json.dumps(text).encode()).hexdigest()[:16]


def _seconds(text: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smh]?)\s*", text)
    if found is None:
        raise typer.BadParameter(f"--time-limit {text!r}; give seconds, minutes or hours: 30m")
    return float(found[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[found[2]]


def _place(storage: str) -> Path | str:
    """Return the file of a storage, or the URL of a database."""
    return storage if "://" in storage else Path(storage).expanduser()


def _check_distinct(out: Path, where: Path | str, page: Path | None) -> None:
    """Refuse one name for two of the files: the later would replace the earlier."""
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


def _check_storage(where: Path | str, study: str, resume: bool) -> None:
    """Refuse trials of an earlier run, unless it is to go on, and then a file without them."""
    if isinstance(where, Path):
        check_file(where)
        if resume and not where.exists():
            raise SqCpuError(f"nothing to resume: {where} does not exist; drop --resume")
        if not where.exists():
            return
    with quiet_optuna(), opened_storage(where) as opened:
        there = has_study(opened, study)
    if resume and not there:
        raise SqCpuError(f"nothing to resume: {where} has no study {study}; drop --resume")
    # In a database that others work on, a study of this very job goes on by itself.
    if there and not resume and isinstance(where, Path):
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
    loss = Goal.of(goal).text(found.loss)
    best = found.configuration
    lines = [
        f"{out}: {loss} (goal {goal}{'' if found.goal_met else ', missed'}), metric "
        f"{found.metric:.5g} against {found.float_metric:.5g} in float",
        f"linears: {found.milliseconds:.2f} ms against {found.float_milliseconds:.2f} in float; "
        f"{best.activations} activations, {len(best.chosen('per_token'))} linears per token, "
        f"{len(best.chosen('float'))} in float",
        f"{len(found.trials)} configurations evaluated",
    ]
    lines += [f"  {name}: {why}" for name, why in found.plan.in_float.items()]
    return lines if page is None else [*lines, f"report: {page}"]


def _report_trials(found: Autotuned) -> list[Trial]:
    scale = abs(found.float_metric)
    return [_report_trial(number, one, found, scale) for number, one in enumerate(found.trials)]


def _report_trial(number: int, one: Candidate, found: Autotuned, scale: float) -> Trial:
    lost = abs(one.metric - found.float_metric) * (1 if one.loss >= 0 else -1)
    settings = json.loads(one.configuration.settings().key)
    del settings["layers"]
    finite = math.isfinite(one.loss)
    return Trial(
        number=number,
        metric=one.metric if finite else None,
        loss_percent=100 * lost / scale if finite and scale else None,
        milliseconds=one.milliseconds if finite else None,
        float_layers=one.in_float,
        settings={"phase": one.phase, **settings, "per_token": one.dynamic},
        state="complete" if finite else "failed",
    )
