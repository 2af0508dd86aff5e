"""The accuracy of a model on tasks of lm-eval (EleutherAI's Language Model Evaluation Harness)."""

from __future__ import annotations

import contextlib
import functools
import io
import math
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.models.calls import evaluating
from sq_cpu.models.hooks import hooked
from sq_cpu.models.tokenizers import leading_ids

__all__ = ["lm_eval_accuracy", "lm_eval_results"]


def lm_eval_accuracy(
    model: nn.Module,
    tokenizer: Any,
    tasks: str | Sequence[str],
    *,
    metric: str = "acc",
    limit: int | None = None,
    few_shots: int | None = None,
    batch_size: int = 1,
    folder: Path | str | None = None,
    progress: bool | None = None,
) -> float:
    """Return the mean over tasks of a metric of lm-eval; higher is better.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model, quantized or not.
    tokenizer : transformers.PreTrainedTokenizerBase
    tasks : str or sequence of str
        Names of lm-eval's tasks and groups, such as ``"arc_easy"``. A group counts once, by its own
        aggregate.
    metric : str
        As lm-eval names it: ``"acc"``, ``"acc_norm"``, ``"exact_match"``; with the filter where a
        task has several, ``"exact_match,strict-match"``.
    limit : int, optional
        Score the first `limit` documents of each task alone.
    few_shots : int, optional
        Examples before each question. None: as the task says.
    batch_size : int
        Per-tensor activation scales tie together the texts of a batch.
    folder : Path or str, optional
        Of YAML files with tasks of your own; a process reads it once.
    progress : bool, optional
        lm-eval's progress bars and notes. None: where stderr is a terminal.

    Raises
    ------
    SqCpuError
        When lm-eval is not installed, a task is unknown or its data cannot be had, a task lacks the
        metric, a lower one is better, or the model gives NaN or Inf.

    Notes
    -----
    Texts begin with what the tokenizer puts in front of them by itself, as those of `perplexity`.
    The tasks' data come from the Hugging Face hub, unless a task says otherwise. The global random
    states are left as they were.
    """
    names = [tasks] if isinstance(tasks, str) else list(tasks)
    results = lm_eval_results(
        model,
        tokenizer,
        names,
        limit=limit,
        few_shots=few_shots,
        batch_size=batch_size,
        folder=folder,
        progress=progress,
    )
    return math.fsum(_metric(results, name, metric) for name in names) / len(names)


def lm_eval_results(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    *,
    limit: int | None = None,
    few_shots: int | None = None,
    batch_size: int = 1,
    folder: Path | str | None = None,
    progress: bool | None = None,
    samples: bool = False,
) -> dict[str, Any]:
    """Return what lm-eval's `simple_evaluate` does, with every document's scores if `samples`.

    Arguments and errors are those of `lm_eval_accuracy`.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise SqCpuError(
            f"lm-eval cannot be imported ({first_line(error)}); run: pip install 'sq_cpu[lm-eval]'"
        ) from error

    if not names:
        raise SqCpuError("no tasks: give the name of at least one")
    if limit is not None and limit < 1:
        raise SqCpuError(f"limit is {limit}; give at least 1, or None for all documents")
    visible = sys.stderr.isatty() if progress is None else progress
    with (
        contextlib.nullcontext() if visible else contextlib.redirect_stderr(io.StringIO()),
        evaluating(model),
        _finite(model),
        _random_states_kept(),
    ):
        try:
            manager = _task_manager(None if folder is None else str(folder))
            unknown = [name for name in names if name not in manager.task_index]
            if unknown:
                raise SqCpuError(f"lm-eval knows no task {unknown[0]}; see: lm-eval ls tasks")
            results: dict[str, Any] = simple_evaluate(
                HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,
                    batch_size=batch_size,
                    # HFLM adds it by itself for few model types.
                    add_bos_token=bool(leading_ids(tokenizer)),
                ),
                tasks=list(names),
                task_manager=manager,
                limit=limit,
                num_fewshot=few_shots,
                bootstrap_iters=0,  # no standard errors
                log_samples=samples,
            )
        except SqCpuError:
            raise
        # What tasks that are wrong, or data that cannot be had, raise.
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise SqCpuError(
                f"lm-eval cannot evaluate {', '.join(names)}: {first_line(error)}; check the "
                "tasks, and the connection to the hub"
            ) from error
    return results


@functools.cache  # it reads thousands of files, for seconds
def _task_manager(folder: str | None) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder)


@contextlib.contextmanager
def _finite(model: nn.Module) -> Iterator[None]:
    """Refuse logits of NaN or Inf: lm-eval would make some number of them."""

    def check(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
        if not output.logits.isfinite().all():
            raise SqCpuError("the model gives NaN or Inf on a text of the tasks")

    with hooked(after=[(model, check)]):
        yield


@contextlib.contextmanager
def _random_states_kept() -> Iterator[None]:
    """Restore the global random states, which lm-eval seeds."""
    python, legacy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)


def _metric(results: dict[str, Any], name: str, metric: str) -> float:
    """Return one task's or group's value of a metric, given with its filter or without."""
    table = (results["results"] | results.get("groups", {})).get(name, {})
    values = {
        key: value
        for key, value in table.items()
        if "," in key and "_stderr," not in key and isinstance(value, (int, float))
    }
    found = [key for key in values if metric in (key, key.partition(",")[0])]
    if len(found) != 1:
        raise SqCpuError(
            f"lm-eval gives {'several' if found else 'no'} {metric} for {name}; choose one of: "
            f"{', '.join(found or values) or 'none, name the tasks in it'}"
        )
    plain = found[0].partition(",")[0]
    if results["higher_is_better"].get(name, {}).get(plain) is not True:
        raise SqCpuError(f"of {metric} of {name} more is not better; choose another metric")
    return float(values[found[0]])
