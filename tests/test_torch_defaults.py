"""Ranges, scales and losses are the same whatever torch's defaults are where they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from tiny import batches, tiny_model
from torch import Tensor

import sq_cpu
from sq_cpu import Scheme
from sq_cpu.calibration.calibration import TENSORS
from sq_cpu.smoothing.rules import RULES


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


SCHEMES = [
    Scheme.of("O1", outlier_threshold=2.0),
    Scheme.of("O3", static_range="mse", symmetric=False),
]
RECIPES = [(rule, SCHEMES[0]) for rule in RULES] + [("smoothquant", SCHEMES[1])]


def made(around: Callable[[], AbstractContextManager[Any]]) -> dict[str, Any]:
    """Calibrate, tune, plan and quantize a tiny model within a context; give all that is found."""
    models = [tiny_model("llama", num_hidden_layers=1) for _ in RECIPES]
    model, data = models[0], batches(4)
    found: dict[str, Any] = {}
    calibration = sq_cpu.calibrate(model, data, rows=24)
    graded = sq_cpu.calibrate(model, data, rows=9, gradient_rows=9)
    with around():
        # Under autocast a model's own products are those that the user asks for.
        if not torch.is_autocast_enabled("cpu"):
            calibration = sq_cpu.calibrate(model, data, rows=24)
            if not torch.is_inference_mode_enabled():
                graded = sq_cpu.calibrate(model, data, rows=9, gradient_rows=9)
            tuned = sq_cpu.tune(
                model, calibration, method="inc", alphas=(0.2, 0.8, 0.3), batches=data
            )
            found["inc"] = tuned.to_dict()
        for name, each in (("plain", calibration), ("graded", graded)):
            found |= {f"{name} {kind}": getattr(each, kind) for kind in TENSORS}
            found[f"{name} fingerprints"] = each.fingerprints
        for loss in ("kl", "nmse"):
            tuned = sq_cpu.tune(model, graded, loss=loss, alphas=(0.2, 0.8, 0.3), clip=False)
            found[f"tuned by {loss}"] = tuned.to_dict()
        for (rule, scheme), copied in zip(RECIPES, models, strict=True):
            plan = sq_cpu.SmoothPlan.uniform(copied, calibration, rule=rule)
            sq_cpu.quantize(copied, calibration, plan, scheme=scheme)
            found[f"{rule} {scheme}"] = dict(copied.state_dict())
            found[f"{rule} {scheme} record"] = copied.sq_cpu_config.to_dict()
    return found


def assert_same(found: Any, expected: Any, where: str) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_same(found[key], value, f"{where} {key}")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    else:
        assert found == expected, where


CONTEXTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "denormals": flushed_denormals,
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return made(nullcontext)


@pytest.mark.parametrize("context", CONTEXTS)
def test_what_is_found_is_the_same(context: str, expected: dict[str, Any]) -> None:
    found = made(CONTEXTS[context])
    assert found.keys() == expected.keys() - ({"inc"} if context == "autocast" else set())
    for key, value in found.items():
        assert_same(value, expected[key], key)
