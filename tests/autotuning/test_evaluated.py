"""What an evaluated configuration keeps of itself."""

import json
import math

import pytest

from sq_cpu.autotuning.configurations import Configuration
from sq_cpu.autotuning.evaluated import EvaluatedConfiguration

FAILED = EvaluatedConfiguration(
    configuration=Configuration(), in_float=0, dynamic=7, value=2.0, error="NaN", phase="search"
)
SCORED = EvaluatedConfiguration(
    configuration=Configuration().changed(["a"], "float"),
    metric=30.5,
    loss=0.25,
    loss_percent=0.8,
    milliseconds=1.5,
    in_float=1,
    dynamic=0,
    value=0.1,
    phase="refine",
    number=3,
)


@pytest.mark.parametrize("one", [FAILED, SCORED])
def test_round_trip_through_json(one: EvaluatedConfiguration) -> None:
    values = json.loads(json.dumps(one.to_dict(), allow_nan=False))
    again = EvaluatedConfiguration.from_dict(
        values, Configuration.from_key(one.configuration.key), phase=one.phase, number=one.number
    )
    assert repr(again) == repr(one)  # a NaN equals none


def test_what_a_study_kept_before_losses_had_percentages() -> None:
    values = {"metric": 1.0, "loss": 0.1, "milliseconds": 2.0, "in_float": 0, "dynamic": 0}
    again = EvaluatedConfiguration.from_dict(
        values | {"value": 0.1}, Configuration(), phase="search", number=0
    )
    assert math.isnan(again.loss_percent)
    assert again.scored


def test_what_could_not_be_scored() -> None:
    assert SCORED.scored
    assert not FAILED.scored
    assert FAILED.loss == FAILED.milliseconds == math.inf
    assert math.isnan(FAILED.metric)
