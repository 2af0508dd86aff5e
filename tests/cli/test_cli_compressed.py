"""The commands on models in the format compressed-tensors, and `sq-cpu quantize --format`."""

import json
from pathlib import Path
from typing import Any

import pytest
from command_line import error_of, json_of, run, small
from compressed_models import edit_settings, edit_tensors

import sq_cpu
from sq_cpu import Scheme


@pytest.fixture
def compressed(folder: Path, tmp_path: Path) -> Path:
    """Quantize `folder` by the command."""
    out = tmp_path / "compressed"
    arguments = ("quantize", folder, "-o", out, "--scheme", "O3", "--format", "compressed-tensors")
    result = run(*arguments, *small())
    assert "no rotations, no prefix, no rows with static scales of their own" in result.stderr
    return out


def test_what_the_format_has_no_place_for_is_left_out(compressed: Path) -> None:
    content = json.loads((compressed / "config.json").read_text())
    assert content["quantization_config"]["quant_method"] == "compressed-tensors"
    assert (compressed / "tokenizer.json").exists()
    model: Any = sq_cpu.load(compressed)
    assert model.sq_cpu_config.scheme == Scheme.of("O3", symmetric=False, dynamic_fallback=False)


def test_the_result_names_the_format(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", *small())
    made = json_of(*start, "--format", "compressed-tensors")
    assert (made["format"], made["prefix"], made["hadamard"]) == ("compressed-tensors", [], 0)
    assert made["scheme"]["activations"] == "per_token"
    assert json_of(*start)["format"] == "sq_cpu"


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--scheme", "O2"], 'with scheme="O1" or "O3"'),
        (["--scheme", "O3", "--dynamic-fallback"], "--no-dynamic-fallback"),
        (["--hadamard"], "--no-hadamard"),
        (["--head", "int8"], "--head float"),
        (["--reduce-range", "yes"], "7-bit activations"),
        (["--stream"], "is not streamed: leave out --stream"),
    ],
)
def test_what_is_asked_for_is_refused(
    folder: Path, tmp_path: Path, options: list[str], match: str
) -> None:
    out = tmp_path / "out"
    arguments = ("quantize", folder, "-o", out, "--format", "compressed-tensors", *options)
    assert match in error_of(*arguments, *small())
    assert not out.exists()


def test_a_prefix_is_refused(folder: Path, tmp_path: Path) -> None:
    arguments = ("quantize", folder, "-o", tmp_path / "out", "--format", "compressed-tensors")
    assert "drop --prefix bos" in run(*arguments, "--prefix", "bos", code=2).output


def test_a_plan_that_has_no_place_is_refused(folder: Path, plan: Path, tmp_path: Path) -> None:
    arguments = ("quantize", folder, "-o", tmp_path / "out", "--plan", plan)
    error = error_of(*arguments, "--format", "compressed-tensors", *small())
    assert "has no place for" in error


def test_int8_runs_as_it_is(compressed: Path, tmp_path: Path) -> None:
    window = ("--windows", 2, "--window", 64)
    ours = sq_cpu.save(sq_cpu.load(compressed), tmp_path / "ours")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (ours / name).write_bytes((compressed / name).read_bytes())
    value = json_of("eval", compressed, *window)["perplexity"]
    assert value == json_of("eval", ours, *window)["perplexity"]
    assert run("generate", compressed, "abc", "--max-new-tokens", 2).stdout
    assert "14" in run("inspect", compressed).stdout
    assert "quantized already" in error_of("quantize", compressed, "-o", tmp_path / "out")


def test_weights_alone_are_floats_to_quantize(compressed: Path, tmp_path: Path) -> None:
    def bare(config: dict[str, Any]) -> None:
        config["config_groups"]["group_0"]["input_activations"] = None

    edit_settings(compressed, bare)
    edit_tensors(
        compressed, lambda tensors: [tensors.pop(n) for n in list(tensors) if ".input_scale" in n]
    )
    said = run("eval", compressed, "--windows", 2, "--window", 64).stderr
    assert "its weights made floats, its inputs in float" in said
    out = tmp_path / "out"
    run("quantize", compressed, "-o", out, "--scheme", "O1", "--no-smooth", *small())
    model: Any = sq_cpu.load(out)
    weights = sq_cpu.load(compressed, scheme="O1")
    for name in model.sq_cpu_config.layers:
        # Codes of rows without a -128 come back; the others are rounded to 127 steps.
        want = weights.get_submodule(name).weight_float()
        found = model.get_submodule(name).weight_float()
        assert ((want - found).abs() <= want.abs().amax(1, keepdim=True) / 254 * 1.0001).all()
    error = error_of("quantize", compressed, "-o", tmp_path / "more", "--stream")
    assert "leave out --stream, for its integers stand for floats" in error


def test_what_is_not_read_is_said(compressed: Path) -> None:
    edit_settings(compressed, lambda config: config.update(kv_cache_scheme={"num_bits": 8}))
    for command in ("eval", "inspect"):
        assert "kv_cache_scheme" in error_of(command, compressed)
