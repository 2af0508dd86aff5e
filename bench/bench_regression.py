"""A saved model against the stored baseline of this machine class: accuracy, prefill, decode.

    python -m pytest bench/bench_regression.py --sq-cpu-baseline-update  # once a machine class
    python -m pytest bench/bench_regression.py                           # fails where it got worse

`--sq-cpu-model FOLDER` takes a model of yours. Else it is SmolLM2-135M, quantized anew each time:
a change of the quantization shows as one of the kernels does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from sq_cpu import texts
from sq_cpu.cli import demo
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.streaming.convert import Job, convert


@pytest.fixture(scope="session")
def saved_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    given: Path | None = request.config.getoption("--sq-cpu-model")
    if given:
        return given
    out = tmp_path_factory.mktemp("saved") / "smollm2-135m-int8"
    job = Job(source=str(demo.find_model()), out=out, recipe=Recipe.of("O3"))
    calibration = texts.calibration()
    convert(
        job,
        lambda tokenizer: token_windows(
            tokenizer, calibration, window=demo.WINDOW, windows=len(calibration)
        ),
        stream=False,
    )
    return out


def test_saved_model(sq_cpu_regression: Callable[..., None], saved_model: Path) -> None:
    sq_cpu_regression(saved_model)
