"""The curves of a search: beside config.json, or within it as earlier versions wrote them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tiny import batches, change_config, tiny_model
from tiny_checkpoints import fails
from transformers import AutoModelForCausalLM

from sq_cpu.calibration.calibrate import calibrate
from sq_cpu.checkpoint.load import load
from sq_cpu.checkpoint.save import save
from sq_cpu.quantization.quantize import quantize
from sq_cpu.smoothing.plan import SmoothPlan

CURVE = ((0.0, 2.0), (0.7, 1 / 3))
STORED = [[0.0, 2.0], [0.7, 0.333333]]


@pytest.fixture(scope="module")
def tuned() -> Any:
    """Give a model whose first group has a curve."""
    model = tiny_model("llama")
    calibration = calibrate(model, batches())
    first, *others = SmoothPlan.uniform(model, calibration, ignore=("lm_head",)).groups
    return quantize(model, calibration, SmoothPlan((replace(first, curve=CURVE), *others)))


@pytest.fixture
def out(tuned: Any, tmp_path: Path) -> Path:
    return save(tuned, tmp_path / "out")


def settings(folder: Path) -> dict[str, Any]:
    content = json.loads((folder / "config.json").read_text())
    return content["quantization_config"]  # type: ignore[no-any-return]


def test_curves_stand_beside_the_recipe(tuned: Any, out: Path, tmp_path: Path) -> None:
    first = tuned.sq_cpu_config.plan.groups[0]
    assert first.curve
    assert json.loads((out / "search_curves.json").read_text()) == {first.name: STORED}
    assert "search_curves.json" in settings(out)["companions"]
    assert not any("curve" in group for group in settings(out)["plan"]["groups"])
    for loaded in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert loaded.sq_cpu_config == tuned.sq_cpu_config
    again = save(load(out), tmp_path / "again")
    for path in out.iterdir():
        assert (again / path.name).read_bytes() == path.read_bytes()
    save(load(out), out)  # replaced: the file is one of ours


def test_curves_that_an_earlier_version_wrote_are_read(tuned: Any, out: Path) -> None:
    def as_before(content: dict[str, Any]) -> None:
        config = content["quantization_config"]
        config["plan"]["groups"][0]["curve"] = STORED
        config["companions"].remove("search_curves.json")

    change_config(out, as_before)
    (out / "search_curves.json").unlink()
    for loaded in (load(out), AutoModelForCausalLM.from_pretrained(out)):
        assert loaded.sq_cpu_config == tuned.sq_cpu_config
    (out / "search_curves.json").write_text("not of this checkpoint")
    assert load(out).sq_cpu_config == tuned.sq_cpu_config


def test_without_curves_there_is_no_file(tuned: Any, out: Path, tmp_path: Path) -> None:
    (out / "search_curves.json").unlink()  # as where the hub's client has not fetched it
    model: Any = load(out)
    assert not any(group.curve for group in model.sq_cpu_config.plan.groups)
    again = save(model, tmp_path / "again")
    assert not (again / "search_curves.json").exists()
    assert "search_curves.json" not in settings(again)["companions"]


@pytest.mark.parametrize(
    "content",
    [b"\xff", b"{", b"[]", b"[" * 100_000, b'{"nowhere": []}', b'{"name": 1}', b'{"name": [[0]]}'],
    ids=range(7),
)
def test_bad_curves_are_named(tuned: Any, out: Path, content: bytes) -> None:
    name = tuned.sq_cpu_config.plan.groups[0].name
    path = out / "search_curves.json"
    path.write_bytes(content.replace(b"name", name.encode()))
    for verify in (True, False):
        fails("search_curves.json (cannot be read|does not hold)", load, out, verify=verify)
