"""Trials for processes of their own."""

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import Trial

from sq_cpu.autotuning.storage import opened_storage, quiet_optuna
from sq_cpu.autotuning.trials import Trials

SIDE = 6


def key_of(trial: Trial) -> str:
    return f"{trial.suggest_int('x', 0, SIDE - 1)},{trial.suggest_int('y', 0, SIDE - 1)}"


def work(url: str, log: Path, count: int, before: int = -1) -> None:
    """Evaluate until there are `count` trials; after `before` evaluations comes one that hangs.

    Every evaluation is a line in the log, written before it begins.
    """
    done = 0

    def evaluate(_: Trial, key: str) -> Mapping[str, Any]:
        nonlocal done
        line = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(line, f"{key}\n".encode())
        os.close(line)
        while done == before:
            time.sleep(1)
        done += 1
        time.sleep(0.01)
        x, y = map(int, key.split(","))
        return {"value": float(x * y)}

    with quiet_optuna(), opened_storage(url) as storage:
        sampler = optuna.samplers.RandomSampler(seed=os.getpid())
        trials = Trials(storage, "test", sampler)
        while trials.count() < count:
            trials.run(key_of, evaluate)
