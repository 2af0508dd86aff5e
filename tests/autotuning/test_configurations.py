"""What an autotuning can choose."""

import json
import math
from typing import Any

import pytest

from sq_cpu import SearchSpace, SqCpuError
from sq_cpu.autotuning.configurations import Configuration


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activations": ("int4",)}, "one of 'per_token', "),
        ({"activations": "static"}, "is a tuple of one choice or more"),
        ({"weight_clip": ()}, "is a tuple of one choice or more"),
        ({"symmetric": (1,)}, "one of True, False"),
        ({"smoothing": ("awq",)}, "one of 'tuned', 'smoothquant'"),
        ({"static_range": ("percentile",)}, "percentile in"),
        ({"static_range": (50,)}, "percentile in"),
        ({"static_range": (100.1,)}, "percentile in"),
        ({"alpha": (0.5, 1.1)}, "a number in"),
        ({"alpha": (-0.1,)}, "a number in"),
        ({"alpha": (math.nan,)}, "a number in"),
        ({"alpha": ("0.5",)}, "a number in"),
        ({"alpha_ranges": (0.0, 1.0)}, "least <= greatest"),
        ({"alpha_ranges": ((0.6, 0.4),)}, "least <= greatest"),
        ({"alpha_ranges": ((0.5, 1.5),)}, "least <= greatest"),
        ({"alpha_ranges": ((0.5,),)}, "least <= greatest"),
        ({"weight_clip": (0.0,)}, "a number in"),
        ({"weight_clip": (1.1,)}, "a number in"),
        ({"dynamic": (-0.5,)}, "a share of the linears"),
        ({"in_float": (1.5,)}, "a share of the linears"),
        ({"in_float": (True,)}, "a share of the linears"),
    ],
)
def test_a_search_space_of_what_cannot_be_is_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(SqCpuError, match=f"^search space: {next(iter(wrong))} .*{said}"):
        SearchSpace(**wrong)


def test_a_search_space_of_the_limits() -> None:
    SearchSpace(
        static_range=("mse", 50.1, 100),
        alpha=(0, 1.0),
        alpha_ranges=((0, 1), (0.5, 0.5)),
        weight_clip=(0.01, 1),
        dynamic=(0, 1),
        in_float=(0.0, 1.0),
    )


def test_equal_configurations_have_one_key() -> None:
    one = Configuration(layers=(("b", "float"), ("a", "static")), alpha=(0.1 + 0.2, 1.0))
    other = Configuration(alpha=(0.3, 1.0)).changed(["b"], "float").changed(["a"], "per_token")
    assert one == other.changed(["a"], "static")
    assert one.key == other.changed(["a"], "static").key
    assert Configuration.from_key(one.key) == one
    assert Configuration(activations="per_token", static_range="mse") == Configuration(
        activations="per_token"
    )
    assert json.loads(one.key)["layers"] == {"b": "float"}
    with pytest.raises(SqCpuError, match="the configuration is not"):
        Configuration.from_key("{}")
