"""`from_pretrained(float, quantization_config=SqCpuConfig(...))` is calibrate and quantize."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sameness import assert_same_model
from tiny import batches, logits, tiny_model
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import Calibration, Scheme, SmoothPlan, SqCpuConfig, SqCpuError

UNSMOOTHED = "SqCpuConfig has no calibration: the weights are quantized without smoothing"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("float")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def calibration(folder: Path) -> Calibration:
    return sq_cpu.calibrate(AutoModelForCausalLM.from_pretrained(folder), batches(), progress=False)


def loaded(folder: Path, settings: Any, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=settings, **options)


def expected(folder: Path, *arguments: Any, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder)
    return sq_cpu.quantize(model, *arguments, progress=False, **options)


@pytest.mark.parametrize("scheme", ["O1", "O3", Scheme(activations="static", symmetric=False)])
@pytest.mark.parametrize("how", ["batches", "generator", "calibration", "file"])
def test_is_calibrate_and_quantize(
    how: str, scheme: Any, folder: Path, calibration: Calibration, tmp_path: Path
) -> None:
    given: Any = {
        "batches": batches,
        "generator": lambda: (ids for ids in batches()),
        "calibration": lambda: calibration,
        "file": lambda: calibration.save(tmp_path / "c.safetensors"),
    }[how]()
    model = loaded(folder, SqCpuConfig(scheme=scheme, calibration=given))
    assert_same_model(model, expected(folder, calibration, scheme=scheme), logits)
    assert not any(module.training for module in model.modules())
    assert_same_model(sq_cpu.load(sq_cpu.save(model, tmp_path / "out")), model, logits)
    model.save_pretrained(tmp_path / "again")
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), model, logits)


def test_alpha(folder: Path, calibration: Calibration) -> None:
    model = loaded(folder, SqCpuConfig(alpha=0.5, calibration=calibration))
    plan = SmoothPlan.uniform(
        AutoModelForCausalLM.from_pretrained(folder), calibration, 0.5, ignore=("lm_head",)
    )
    assert_same_model(model, expected(folder, calibration, plan), logits)
    assert {group.alpha for group in model.sq_cpu_config.plan.groups} == {0.5}


@pytest.mark.parametrize("as_file", [False, True])
def test_plan(as_file: bool, folder: Path, calibration: Calibration, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder)
    plan: Any = SmoothPlan.uniform(model, calibration, 0.3, ignore=("lm_head",))
    given = plan.save(tmp_path / "plan.json") if as_file else plan
    model = loaded(folder, SqCpuConfig(scheme="O3", plan=given, calibration=calibration))
    assert_same_model(model, expected(folder, calibration, plan, scheme="O3"), logits)


def test_ignore(folder: Path, calibration: Calibration) -> None:
    settings = SqCpuConfig(calibration=calibration, ignore=("lm_head", "down_proj"))
    layers = loaded(folder, settings).sq_cpu_config.layers
    assert layers
    assert not any("down_proj" in name for name in layers)


@pytest.mark.parametrize("scheme", [None, "O1", "O2"])
def test_without_calibration(scheme: str | None, folder: Path) -> None:
    with pytest.warns(UserWarning, match=UNSMOOTHED) as said:
        model = loaded(folder, SqCpuConfig(scheme=scheme))
    assert len(said) == 1
    assert "\n" not in str(said[0].message)
    assert_same_model(model, expected(folder, scheme=scheme, smooth=False), logits)


def test_as_a_table(folder: Path) -> None:
    with pytest.warns(UserWarning, match=UNSMOOTHED):
        model = loaded(folder, {"quant_method": "sq_cpu", "scheme": "O2"})
    assert model.sq_cpu_config.scheme.name == "O2"


@pytest.mark.parametrize("options", [{"device_map": "auto"}, {"dtype": torch.bfloat16}], ids=str)
def test_options_of_the_caller(options: Any, folder: Path) -> None:
    with pytest.warns(UserWarning, match=UNSMOOTHED):
        model = loaded(folder, SqCpuConfig(), **options)
    assert model.dtype == options.get("dtype", torch.float32)
    with torch.no_grad():
        assert model(batches(1)[0]).logits.isfinite().all()


def test_is_json(calibration: Calibration, tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = [
        {"scheme": "O3", "calibration": batches()},
        {"scheme": Scheme.of("O2"), "plan": tmp_path, "calibration": tmp_path, "ignore": ("a",)},
        {"plan": SmoothPlan(()), "calibration": calibration},
    ]
    for each in asked:
        table = json.loads(json.dumps(SqCpuConfig(**each).to_dict()))
        assert table["quant_method"] == "sq_cpu"
        is_path = isinstance(each["calibration"], Path)
        assert table["calibration"] == (str(tmp_path) if is_path else None)
        again = SqCpuConfig.from_dict(table)
        assert again.to_dict() == table
        assert repr(again)


def test_config_of_the_model_is_its_record(folder: Path, calibration: Calibration) -> None:
    model = loaded(folder, SqCpuConfig(scheme="O3", calibration=calibration))
    table = json.loads(model.config.to_json_string())["quantization_config"]
    assert table["layers"] == list(model.sq_cpu_config.layers)
    assert model.hf_quantizer.quantization_config is model.config.quantization_config


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: SqCpuConfig(schem="O1"), "SqCpuConfig has no schem: it takes scheme, alpha"),
        (lambda: {"quant_method": "sq_cpu", "bits": 8}, "SqCpuConfig has no bits"),
        (lambda: {"quant_method": "sq_cpu", "to_dict": 3}, "has 'to_dict', which is no setting"),
        (lambda: SqCpuConfig(scheme="O3"), "no calibration, which O3 needs here"),
        (lambda: SqCpuConfig(scheme="O4"), "O4"),
        (lambda: SqCpuConfig(alpha=2, calibration=batches()), "alpha is 2"),
        (lambda: SqCpuConfig(calibration="no.safetensors"), "cannot read the calibration"),
        (lambda: SqCpuConfig(calibration=7), "calibration is a int"),
        (lambda: SqCpuConfig(plan="no.json"), "cannot read the smoothing plan"),
        (lambda: SqCpuConfig(plan=SmoothPlan(()), alpha=0.5), "an alpha and a plan"),
        (lambda: SqCpuConfig(ignore="lm_head"), "not a tuple of names"),
        (lambda: SqCpuConfig(ignore=("nothing",), calibration=batches()), "matches no linear"),
    ],
)
def test_what_is_refused(make: Callable[[], Any], match: str, folder: Path) -> None:
    with pytest.raises(SqCpuError, match=match) as caught:
        loaded(folder, make())
    assert "\n" not in str(caught.value)


def test_a_checkpoint_of_ours_is_what_it_is(folder: Path, tmp_path: Path) -> None:
    model = expected(folder, scheme="O1", smooth=False)
    sq_cpu.save(model, tmp_path / "out")
    with pytest.warns(UserWarning, match="already has a `quantization_config`"):
        found = loaded(tmp_path / "out", SqCpuConfig(scheme="O2"))
    assert_same_model(found, model, logits)


HOSTILE: list[Any] = [None, "x", b"\xff", "\0", [], ["x", None], {"x": 1}, object(), -1, 0.3]
HOSTILE += [10**30, True, float("nan"), float("inf")]


@pytest.mark.filterwarnings("ignore:SqCpuConfig has no calibration")
@pytest.mark.parametrize("value", HOSTILE, ids=range(len(HOSTILE)))
@pytest.mark.parametrize("name", ["scheme", "alpha", "plan", "calibration", "ignore"])
def test_hostile_values(
    name: str, value: Any, folder: Path, calibration: Calibration, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)  # a text is a path, too
    message = ""
    given = {"calibration": calibration} if name != "plan" else {}
    try:
        loaded(folder, SqCpuConfig(**given | {name: value}))
    except SqCpuError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 400
