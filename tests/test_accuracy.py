"""Real models: smoothed int8 is not worse than what the kept results say, by 1 % of perplexity.

SQ_CPU_ACCURACY names the models, with commas, or is "all"; SQ_CPU_CACHE is the benchmarks' cache
folder and SQ_CPU_TRAINED that of the trained models.
"""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import run_accuracy
import zoo

import sq_cpu
from sq_cpu import Scheme

RESULTS = Path(__file__).parent.parent / "bench/results"
# An encoder, and experts; test_smollm2.py has the decoder.
CHOSEN = os.environ.get("SQ_CPU_ACCURACY", "minilm,smollm2-mixtral")
# Trained on the machine that measures them, so not the same everywhere.
MADE_HERE = ("vit-digits", "dit-digits")


def kept_rows() -> dict[str, list[dict[str, Any]]]:
    by_model: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(RESULTS.glob("*/accuracy.json")):
        for row in json.loads(path.read_text())["rows"]:
            if row["alpha"] is not None and row["model"] not in MADE_HERE:
                by_model.setdefault(row["model"], []).append(row)
    return by_model


def chosen() -> list[str]:
    return list(kept_rows()) if CHOSEN == "all" else CHOSEN.split(",")


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", chosen())
def test_smoothed_models_have_not_become_worse(name: str) -> None:
    trained = os.environ.get("SQ_CPU_TRAINED")
    cache = Path(os.environ.get("SQ_CPU_CACHE", zoo.CACHE))
    subject = zoo.load(name, zoo.Places(cache, Path(trained) if trained else None))
    calibration = sq_cpu.calibrate(subject.model, subject.batches, ignore=subject.ignore)
    worse = {}
    for row in kept_rows()[name]:
        scheme = Scheme.from_dict(row["scheme"])
        variant = run_accuracy.Variant(row["variant"], scheme, row["alpha"])
        now = run_accuracy.measure(subject, variant, calibration)
        metric, was = next(iter(row["metrics"].items()))
        value = now["metrics"][metric]
        if value < was - 0.01 if metric in zoo.HIGHER else value > 1.01 * was:
            worse[variant.name] = f"{metric} {was} -> {value}"
    assert not worse
