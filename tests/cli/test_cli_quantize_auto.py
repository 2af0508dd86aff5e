"""`sq-cpu quantize --scheme auto`: the fastest scheme that holds the goal, or nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_tokenizer
from command_line import TEXT, error_of, interrupted_after_a_block, json_of, run, small
from picking_cases import calibration, massive_model
from sameness import assert_same_model
from torch import nn
from tuning_cases import costs

import sq_cpu
from sq_cpu import Scheme, TextPerplexity
from sq_cpu.autotuning import picking
from sq_cpu.streaming import convert, streaming

PLAIN = Scheme.of("O1", dynamic_fallback=False)


@pytest.fixture(autouse=True)
def _table(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(linears: Any, **_: object) -> Any:
        return costs(nn.ModuleList(linears))

    monkeypatch.setattr(picking, "measured_costs", measured)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    massive_model().save_pretrained(tmp_path / "float")
    byte_tokenizer().save_pretrained(tmp_path / "float")
    return tmp_path / "float"


@pytest.fixture
def auto(folder: Path, text: Path, tmp_path: Path) -> list[object]:
    """Return a quick command, of a goal that O1 holds and O3 only with own scales."""
    texts = ["--calib", text, "--text", text, "--text-windows", 8]
    start = ["quantize", folder, "-o", tmp_path / "out", "--scheme", "auto"]
    return [*start, *texts, "--goal", "20%", *small()]


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def test_what_is_picked_is_written(auto: list[object], tmp_path: Path) -> None:
    made = json_of(*auto, "--no-dynamic-fallback")
    assert made["scheme"] == PLAIN.to_dict()
    picked = made["picked"]
    assert picked["scheme"] == made["scheme"]
    assert [(one["name"], one["holds"]) for one in picked["tried"]] == [("O3", False), ("O1", True)]
    assert picked["goal"] == "20%"

    model = massive_model()
    found = calibration(model)
    windows = TextPerplexity(byte_tokenizer(), TEXT, 64, 8)
    schemes = [Scheme.of(name, dynamic_fallback=False) for name in ("O3", "O1")]
    expected = sq_cpu.pick_scheme(
        model, found, windows, "20%", schemes=schemes, costs=costs(massive_model())
    )
    assert picked == json.loads(json.dumps(expected.to_dict()))
    sq_cpu.quantize(model, found, scheme=PLAIN)
    loaded = sq_cpu.load(tmp_path / "out")
    assert_same_model(loaded, model, logits)
    assert [*windows(loaded)][-1] == picked["metric"]


def test_the_fastest_that_holds(auto: list[object], tmp_path: Path) -> None:
    result = run(*auto)
    assert sq_cpu.load(tmp_path / "out").sq_cpu_config.scheme == Scheme.of("O3")
    assert "trying O3\nO3: " in result.stderr
    assert "goal 20%" in result.stderr
    assert "trying O1" not in result.stderr
    assert "static activations hold the goal of 20%: perplexity " in result.stdout
    assert "linears in int8 (O3)" in result.stdout


def test_the_model_is_loaded_and_calibrated_once(
    auto: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    for name in ("load_any", "calibrate"):
        function = getattr(convert, name)

        def counted(*given: Any, name: str = name, function: Any = function, **more: Any) -> Any:
            calls.append(name)
            return function(*given, **more)

        monkeypatch.setattr(convert, name, counted)
    assert len(json_of(*auto, "--no-dynamic-fallback")["picked"]["tried"]) == 2
    assert calls == ["load_any", "calibrate"]


@pytest.mark.parametrize("before", [False, True])
def test_where_none_holds_nothing_is_written(
    auto: list[object], tmp_path: Path, before: bool
) -> None:
    out = tmp_path / "out"
    if before:
        sq_cpu.save(sq_cpu.quantize(massive_model(), smooth=False), out)
    names = sorted(os.listdir(tmp_path))
    files = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    error = error_of(*auto, "--no-smooth", "--goal", "1%", "--overwrite")
    assert error.startswith("error: no scheme holds the goal of 1%: the best, O3, is at +")
    assert "autotune, or set a wider goal" in error
    assert sorted(os.listdir(tmp_path)) == names
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == files


def test_other_options_are_those_of_every_scheme(auto: list[object], tmp_path: Path) -> None:
    options = ("--asymmetric", "--weights", "per_tensor")
    options += ("--ignore", "lm_head", "--ignore", "down_proj")
    more = ("--alpha", 0.7, "--no-hadamard", "--head", "int8", "--goal", "1000%")
    made = json_of(*auto, *options, *more)
    ignore = ("lm_head", "down_proj")
    expected = Scheme.of("O3", symmetric=False, weights="per_tensor", ignore=ignore)
    (tried,) = made["picked"]["tried"]
    assert made["scheme"] == tried["scheme"] == expected.to_dict()
    assert (made["alpha"], made["head"], made["hadamard"]) == (0.7, "int8", 0)
    record: Any = sq_cpu.load(tmp_path / "out").sq_cpu_config
    assert "lm_head" in record.layers
    assert {group.alpha for group in record.plan.groups if group.fold} == {0.7}


def test_a_prefix(auto: list[object], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    made = json_of(*auto, "--prefix", "bos", "--goal", "1000%")
    assert made["prefix"] == [1]
    tokenizer = byte_tokenizer()
    sq_cpu.lead_with(tokenizer)
    picked = made["picked"]
    exact = sq_cpu.perplexity(massive_model(), tokenizer, TEXT, window=64, windows=8)
    assert picked["float_metric"] == exact
    assert exact != sq_cpu.perplexity(massive_model(), byte_tokenizer(), TEXT, window=64, windows=8)
    scored = json_of("eval", out, "--text", text, "--window", 64, "--windows", 8)
    assert scored["perplexity"] == pytest.approx(picked["metric"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--range", "mse"), "--range is for one scheme alone; drop it, or name the scheme"),
        (("--percentile", 99), "--percentile is for one scheme alone"),
        (("--outlier-threshold", 6), "--outlier-threshold is for one scheme alone"),
        (("--stream",), "tries schemes on a copy in memory; drop it, or --stream"),
        (("--plan", "plan.json"), "--plan says how to quantize; drop it, or --scheme auto"),
        (("--scheme", "O3"), "--goal goes with --scheme auto"),
    ],
)
def test_options_that_do_not_go_with_it(
    auto: list[object], tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    usage = run(*auto, *options, code=2).stderr
    assert message in " ".join(usage.replace("│", " ").split())
    assert "loading" not in usage
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("option", [("--goal", "1%"), ("--text", "x"), ("--text-windows", 2)])
def test_options_of_it_alone(folder: Path, tmp_path: Path, option: tuple[object, ...]) -> None:
    usage = run("quantize", folder, "-o", tmp_path / "out", *option, code=2).stderr
    assert f"{option[0]} goes with --scheme auto; drop it" in " ".join(usage.split())


def test_what_cannot_be_scored_is_refused_before_the_work(
    auto: list[object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "calibrate", None)
    assert "goal is 'much'" in error_of(*auto, "--goal", "much")
    assert "give more text or ask for less" in error_of(*auto, "--text-windows", 2000)
    assert "no such file" in error_of(*auto, "--text", tmp_path / "none")
    start = ("quantize", folder, "-o", tmp_path / "out", "--scheme", "auto")
    assert "the shipped text has 20" in error_of(*start, "--text-windows", 21)
    error = error_of(*start, "--windows", 1, "--window", 4000)
    assert "shipped text are shorter than 4000 tokens" in error
    assert "--text" in error
    assert not (tmp_path / "out").exists()


def test_a_model_that_does_not_fit_twice(
    auto: list[object], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = streaming.float_bytes(folder, torch.float32)
    monkeypatch.setattr(convert, "available_memory", lambda: int(2.29 * size))
    error = error_of(*auto)
    assert "and a copy to try schemes on need" in error
    assert "are available: give a scheme" in error
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(convert, "available_memory", lambda: int(2.31 * size))
    assert json_of(*auto)["streamed"] is False


def test_what_was_begun_block_by_block_is_not_gone_on_with(
    auto: list[object], folder: Path, tmp_path: Path
) -> None:
    with interrupted_after_a_block():
        run("quantize", folder, "-o", tmp_path / "out", "--stream", *small(), code=130)
    assert "holds finished blocks of a streamed model" in error_of(*auto)
    assert (tmp_path / ".out.partial").exists()
    assert json_of(*auto, "--overwrite")["picked"]["name"] == "O3"
    assert sorted(os.listdir(tmp_path)) == ["float", "out", "text.txt"]


def test_without_it_nothing_is_picked(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", *small())
    made = json_of(*start, "--scheme", "O3", "--no-dynamic-fallback")
    assert made["picked"] is None
    assert made["scheme"] == Scheme.of("O3", dynamic_fallback=False).to_dict()
    assert json_of(*start, "--scheme", "O3")["scheme"]["dynamic_fallback"] is True
