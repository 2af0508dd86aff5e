"""`sq-cpu quantize --recipe`: what IPEX and Neural Compressor found, carried out."""

from pathlib import Path

import pytest
from byte_models import byte_model
from command_line import error_of, json_of, run, small
from recipes import SCALE, ZERO_POINT, write_recipe

import sq_cpu
from sq_cpu import SmoothPlan
from sq_cpu.nn.linear import QuantLinear


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path / "best_configure.json", byte_model())


def test_a_recipe_is_carried_out(folder: Path, recipe: Path, tmp_path: Path) -> None:
    made = json_of("quantize", folder, "-o", tmp_path / "out", "--recipe", recipe, *small())
    assert made["recipe"] == str(recipe)
    assert made["plan"] is None
    assert made["layers"] == 14
    assert made["kept"] == {"lm_head": "the recipe leaves it in float"}
    assert made["scheme"]["symmetric"] is False
    model = sq_cpu.load(tmp_path / "out")
    layers = [layer for layer in model.modules() if isinstance(layer, QuantLinear)]
    assert {(layer.input_scale, layer.input_zero_point) for layer in layers} == {
        (SCALE, ZERO_POINT)
    }
    record = model.sq_cpu_config
    assert {group.rule for group in record.plan.groups} == {"given"}
    # The plan goes on alone.
    plan = record.plan.save(tmp_path / "plan.json")
    assert SmoothPlan.load(plan) == record.plan
    again = tmp_path / "again"
    assert json_of("quantize", folder, "-o", again, "--plan", plan, *small())["layers"] == 14


@pytest.mark.parametrize(
    "option",
    [
        *(("--scheme", "O3"), ("--scheme", "auto"), ("--alpha", 0.5), ("--no-smooth",)),
        *(("--ignore", "lm_head"), ("--head", "int8"), ("--range", "mse"), ("--stream",)),
        ("--symmetric",),
    ],
)
def test_what_a_recipe_says_itself(
    folder: Path, recipe: Path, tmp_path: Path, option: tuple[object, ...]
) -> None:
    command = ("quantize", folder, "-o", tmp_path / "out", "--recipe", recipe)
    usage = " ".join(run(*command, *option, code=2).stderr.split())
    assert f"{option[0]} does not go with --recipe" in usage


def test_a_recipe_of_another_model(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.json"
    other.write_text("{}")
    command = ("quantize", folder, "-o", tmp_path / "out", "--recipe", other)
    assert "quantizes no linear" in error_of(*command)
    other.write_text(
        write_recipe(other, byte_model()).read_text().replace("gate_proj", "gone_proj")
    )
    assert "gone_proj, which is no linear of the model" in error_of(*command, *small())
    assert not (tmp_path / "out").exists()
