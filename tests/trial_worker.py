"""Trials for processes of their own."""

import os
import time
from pathlib import Path

import optuna
from optuna.trial import Trial

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration
from sq_cpu.autotuning.storage import opened_storage, quiet_optuna
from sq_cpu.autotuning.trials import Trials

SIDE = 6


def choose(trial: Trial) -> Configuration:
    return Configuration(
        alpha=(trial.suggest_int("x", 0, SIDE - 1), trial.suggest_int("y", 0, SIDE - 1))
    )


def worth(configuration: Configuration, value: float = 0.0) -> EvaluatedConfiguration:
    return EvaluatedConfiguration(configuration=configuration, in_float=0, dynamic=0, value=value)


def work(url: str, log: Path, count: int, before: int = -1) -> None:
    """Evaluate until there are `count` trials; after `before` evaluations comes one that hangs.

    Every evaluation is a line in the log, the configuration's key, written before it begins.
    """
    done = 0

    def evaluate(_: Trial, configuration: Configuration) -> EvaluatedConfiguration:
        nonlocal done
        line = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.write(line, f"{configuration.key}\n".encode())
        os.close(line)
        while done == before:
            time.sleep(1)
        done += 1
        time.sleep(0.01)
        x, y = configuration.alpha
        return worth(configuration, x * y)

    with quiet_optuna(), opened_storage(url) as storage:
        sampler = optuna.samplers.RandomSampler(seed=os.getpid())
        trials = Trials(storage, "test", sampler)
        while trials.count() < count:
            trials.run(choose, evaluate)
