"""An autotuning to be killed: python autotune_worker.py STORAGE LOG HANG."""

import sys
from pathlib import Path
from typing import Any

from test_tune import planted
from tiny import batches
from tuning_cases import QUICK, Divergence, costs

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


if __name__ == "__main__":
    job(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
