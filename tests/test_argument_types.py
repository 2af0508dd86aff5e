"""Arguments of wrong types: each gives an `SqCpuError` of one line, or works."""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer
from command_line import TEXT
from recipes import write_recipe
from tiny import batches, tiny_model
from torch import nn
from tuning_cases import PER_TOKEN, costs, llama

import sq_cpu
from sq_cpu import SqCpuError

HOSTILE: dict[str, Any] = {
    "None": None,
    "text": "nonsense",
    "bytes": b"\xff",
    "null byte": "\0",
    "list": [],
    "strings": ["x", None],
    "table": {"x": 1},
    "object": object(),
    "function": lambda *_, **__: None,
    "nan": math.nan,
    "infinite": math.inf,
    "negative": -1,
    "fraction": 0.3,
    "huge": 10**30,
    "boolean": True,
}


@pytest.fixture(scope="module")
def float_model() -> nn.Module:
    return llama()


@pytest.fixture(scope="module")
def calibration(float_model: nn.Module) -> sq_cpu.Calibration:
    return sq_cpu.calibrate(float_model, batches(2), progress=False)


@pytest.fixture(scope="module")
def fused_model() -> nn.Module:
    model = tiny_model("llama")
    sq_cpu.quantize(model, smooth=False, progress=False)
    sq_cpu.fuse(model)
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tiny_model("llama")
    sq_cpu.quantize(model, smooth=False, progress=False)
    return sq_cpu.save(model, tmp_path_factory.mktemp("saved") / "out")


@pytest.fixture
def good(
    float_model: nn.Module,
    calibration: sq_cpu.Calibration,
    fused_model: nn.Module,
    saved: Path,
    tmp_path: Path,
) -> Callable[[str], dict[str, Any]]:
    """Return what makes arguments of a function that work."""

    def of_a_model(name: str) -> dict[str, Any]:
        model = copy.deepcopy(float_model)
        seen = {"model": model, "calibration": calibration}
        if name in ("make_prefix", "use_prefix", "prefix_of"):
            given = {"model": model, "ids": [1], "prefix": sq_cpu.make_prefix(model, [1])}
            given["prove"] = True
            return {each: given[each] for each in inspect.signature(_function(name)).parameters}
        if name == "outlier_tokens":
            return {"model": model, "windows": [batches(1)[0][:1]]}
        if name == "calibrate":
            return {"model": model, "batches": batches(2)}
        if name == "learn":
            plan = sq_cpu.SmoothPlan.uniform(model, calibration)
            return seen | {"plan": plan, "batches": batches(2), "scheme": "O3", "steps": 1}
        if name == "tune":
            return seen | {"alphas": (0.5, 0.5, 0.5), "scheme": "O1"}
        if name in ("quantize", "analyze", "SmoothPlan.uniform"):
            return seen
        if name == "pick_scheme":
            return seen | {"evaluate": lambda _: 1.0, "schemes": ("O1",), "costs": costs(model)}
        if name == "perplexity":
            return {
                "model": byte_model(),
                "tokenizer": byte_tokenizer(),
                "text": TEXT,
                "windows": 1,
            }
        assert name == "autotune"
        return {
            "model": model,
            "batches": calibration,
            "evaluate": lambda _: 1.0,
            "space": PER_TOKEN,
            "trials": 1,
            "refine_trials": 0,
            "costs": costs(model),
        }

    def make(name: str) -> dict[str, Any]:
        if name == "load":
            return {"path": saved}
        if name == "save":
            return {"model": sq_cpu.load(saved), "path": tmp_path / "out"}
        if name in ("fuse", "use_int8_attention", "drift"):
            return {"model": sq_cpu.load(saved)}
        if name == "measure_kv":
            return {"model": float_model, "batches": batches(2), "progress": False}
        if name == "Int8Cache":
            return {"model_or_config": fused_model}
        if name == "generate":
            return {"model": fused_model, "prompts": [[3, 4]], "max_new_tokens": 1}
        if name == "count_saturation":
            return {"model": sq_cpu.load(saved), "batches": batches(2)}
        if name in ("lead_with", "leading_ids"):
            return {"tokenizer": byte_tokenizer()}
        if name == "with_int8_layers":
            return {"config": pytest.importorskip("peft").LoraConfig()}
        if name == "token_windows":
            return {"tokenizer": byte_tokenizer(), "text": TEXT, "window": 8, "windows": 1}
        if name == "SmoothPlan.load":
            plan = sq_cpu.SmoothPlan.uniform(float_model, calibration)
            return {"path": plan.save(tmp_path / "plan.json")}
        if name == "plan_from_qconf":
            return {"path": write_recipe(tmp_path / "q.json", float_model), "model": float_model}
        if name == "Calibration.load":
            return {"path": calibration.save(tmp_path / "calibration")}
        if name == "quantize_checkpoint":
            float_model.save_pretrained(tmp_path / "float")
            source = {"source": tmp_path / "float", "out": tmp_path / "out"}
            return source | {"batches": batches(2), "progress": False}
        return of_a_model(name)

    return make


FUNCTIONS = (
    *("calibrate", "tune", "learn", "quantize", "save", "load", "autotune", "fuse", "generate"),
    *("analyze", "count_saturation", "perplexity", "token_windows", "quantize_checkpoint"),
    *("use_int8_attention", "measure_kv", "Int8Cache", "SmoothPlan.uniform", "SmoothPlan.load"),
    *("Calibration.load", "make_prefix", "use_prefix", "prefix_of", "outlier_tokens"),
    *("lead_with", "leading_ids", "pick_scheme", "drift", "plan_from_qconf"),
    "with_int8_layers",
)


def _function(name: str) -> Callable[..., Any]:
    found: Callable[..., Any] = attrgetter(name)(sq_cpu)
    return found


def _arguments() -> Iterator[tuple[str, str]]:
    for name in FUNCTIONS:
        yield from ((name, each) for each in inspect.signature(_function(name)).parameters)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_the_good_arguments_work(good: Callable[[str], dict[str, Any]], name: str) -> None:
    _function(name)(**good(name))


@pytest.mark.parametrize(("name", "argument"), list(_arguments()))
@pytest.mark.parametrize("value", HOSTILE)
def test_a_hostile_value_is_refused_or_works(
    good: Callable[[str], dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    argument: str,
    value: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # a text is a path, too
    message = ""
    try:
        _function(name)(**good(name) | {argument: HOSTILE[value]})
    except SqCpuError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 400


NAMED = "space storage study job time_limit costs evaluate say rank sampler pruner ignore"


@pytest.mark.parametrize("argument", [*NAMED.split(), "goal", "trials", "workers", "seed"])
def test_autotune_names_the_argument(good: Callable[[str], dict[str, Any]], argument: str) -> None:
    with pytest.raises(SqCpuError, match=f"^{argument} (is|has) "):
        sq_cpu.autotune(**good("autotune") | {argument: object()})


NAMED_BY_PICK = "calibration evaluate goal schemes smooth hadamard head tokens costs say"


@pytest.mark.parametrize("argument", NAMED_BY_PICK.split())
def test_pick_scheme_names_the_argument(
    good: Callable[[str], dict[str, Any]], argument: str
) -> None:
    with pytest.raises(SqCpuError, match=f"^{argument} (is|has) "):
        sq_cpu.pick_scheme(**good("pick_scheme") | {argument: object()})


@pytest.mark.parametrize("metric", [None, "much", [1.0], object()])
def test_a_metric_that_is_no_number(good: Callable[[str], dict[str, Any]], metric: object) -> None:
    for given in (metric, iter([metric])):
        with pytest.raises(SqCpuError, match=r"^evaluate gives a .* that is no number"):
            sq_cpu.autotune(**good("autotune") | {"evaluate": lambda _, given=given: given})
