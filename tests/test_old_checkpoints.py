"""Files of an earlier version load, and give what they gave; data/checkpoints/make.py wrote them.

Bit for bit: the model's tensors, and what each int8 linear makes of an input. The logits pass
through torch's float products, which differ from processor to processor.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sameness import assert_to_rounding, digests
from transformers import AutoModelForCausalLM

import sq_cpu
from sq_cpu import Calibration, QuantLinear, SmoothPlan

FOLDER = Path(__file__).resolve().parent / "data" / "checkpoints"
CHECKPOINTS = ["o1", "o2-asymmetric", "smoothing", "streamed", "tuned", "weight-groups"]
CHECKPOINTS[5:5] = ["version-4-head", "version-4-mixed", "version-5-mixed", "version-6-head"]


def test_all_are_tested() -> None:
    assert sorted(path.stem for path in FOLDER.glob("*.safetensors")) == CHECKPOINTS


@pytest.mark.parametrize("load", [sq_cpu.load, AutoModelForCausalLM.from_pretrained])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoint(name: str, load: Any) -> None:
    model = load(FOLDER / name)
    assert digests(model) == json.loads((FOLDER / f"{name}.json").read_text())
    stored = load_file(FOLDER / f"{name}.safetensors")
    with torch.no_grad():
        assert_to_rounding(model(stored["ids"]).logits, stored["logits"], model.dtype)

    record = model.sq_cpu_config
    written = json.loads((FOLDER / name / "config.json").read_text())["quantization_config"]
    assert list(record.layers) == written["layers"]
    assert list(record.smoothed) == written.get("smoothed", [])
    assert record.decomposed == written.get("decomposed", {})
    assert record.kept == written.get("kept", {})
    assert_same_plan(record.plan, written["plan"])
    assert record.scheme.activations == written["scheme"]["activations"]
    layers = {n: m for n, m in model.named_modules() if isinstance(m, QuantLinear)}
    for path, layer in layers.items():
        assert layer.scheme == record.layer_scheme(path.removesuffix(".regular"))


def assert_same_plan(plan: SmoothPlan, written: dict[str, Any]) -> None:
    """Compare all but the search's curves, which no model depends on."""
    entries = [*written["groups"], *written.get("layers", ())]
    for entry, values in zip((*plan.groups, *plan.layers), entries, strict=True):
        found = json.loads(json.dumps(asdict(entry)))
        expected = {name: value for name, value in values.items() if name != "curve"}
        assert found | expected == found


@pytest.mark.parametrize("name", ["tuned", "tuned-mixed"])
def test_plan(name: str) -> None:
    file = FOLDER / f"{name}.plan.json"
    assert '"curve": [[' in file.read_text()
    plan = SmoothPlan.load(file)
    assert_same_plan(plan, json.loads(file.read_text()))
    # Written before there was a choice: then such linears were quantized, by static scales alone.
    before = {"unreached": "quantize", "static_range": "minmax", "dynamic_fallback": False}
    assert plan.scheme == sq_cpu.Scheme.of("O3", **before)


def test_calibration_and_plan_give_the_checkpoint_again() -> None:
    calibration = Calibration.load(FOLDER / "tuned.calibration")
    assert (calibration.tokens, calibration.batches) == (128, 4)
    assert set(calibration.gradients) == set(calibration.rows) == set(calibration.channel_min)
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "tuned-float", dtype=torch.float32)
    plan = SmoothPlan.load(FOLDER / "tuned-mixed.plan.json")
    sq_cpu.quantize(model, calibration, plan)
    found, expected = model.state_dict(), sq_cpu.load(FOLDER / "tuned").state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        # A power's last bit depends on the processor: s by 2^-23, and a code by one step.
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-7)
        else:
            assert (tensor.int() - expected[name].int()).abs().max() <= 1, name
