"""An autotuning for processes of their own."""

from pathlib import Path
from typing import Any

from tiny import batches
from tuning_cases import QUICK, Divergence, costs, planted

import sq_cpu

GOAL = 6e-5
TRIALS = 6


def job(storage: Any, log: Path | None, hang: int = -1, **options: Any) -> sq_cpu.Autotuned:
    model = planted("llama", num_hidden_layers=1)
    return sq_cpu.autotune(
        model,
        batches(3),
        Divergence(model, log, hang),
        GOAL,
        storage=storage,
        trials=TRIALS,
        space=QUICK,
        costs=costs(model),
        progress=False,
        **options,
    )
