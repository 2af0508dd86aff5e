"""The benchmark of whole models: what it measures, what it refuses, and before beside after."""

import json
from pathlib import Path
from typing import Any

import pytest
import run_model
import torch
import typer
import whole_model
from torch import Tensor, nn
from typer.testing import CliRunner
from whole_model import Settings

from sq_cpu import QuantLinear

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
# Random and tiny: int8 errs more than in a real model.
SETTINGS = Settings(
    layers=None, schemes=("O1",), prompt=8, context=6, tokens=3, rows=(1, 2), least_cosine=0.9
)
VARIANTS = ["fp32", "O1 fp32", "bf16", "O1 bf16"]


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(whole_model.SHAPES, "tiny", TINY)
    return "tiny"


def test_all_variants_are_measured(tiny: str) -> None:
    rows = whole_model.measure(tiny, torch.get_num_threads(), SETTINGS, seconds=0)
    assert [(row["work"], row["rows"]) for row in rows] == [
        ("prefill", 1),
        ("decode", 1),
        ("decode", 2),
    ]
    for row in rows:
        assert list(row["variants"]) == VARIANTS
        assert row["refused"] == {}
        tokens = row["rows"] * (row["prompt"] if row["work"] == "prefill" else row["steps"])
        medians = {}
        for name, found in row["variants"].items():
            medians[name] = found["seconds"]["median"]
            assert found["seconds"]["rounds"] >= 3
            assert found["tokens_per_second"]["median"] == tokens / medians[name]
        for name in ("O1 fp32", "O1 bf16"):
            expected = {peer: medians[peer] / medians[name] for peer in ("fp32", "bf16")}
            assert row["ratio"][name] == expected


def test_variants_are_what_a_user_gets(tiny: str) -> None:
    models = whole_model.make_models(tiny, SETTINGS)
    assert list(models) == VARIANTS
    linears = 2 * 7  # q, k, v, o, gate, up, down
    for name, model in models.items():
        quantized = [m for m in model.modules() if isinstance(m, QuantLinear)]
        assert len(quantized) == (linears if name.startswith("O1") else 0)
        dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
        assert model.lm_head.weight.dtype == dtype
        assert model.lm_head.weight is model.model.embed_tokens.weight
    inside = 2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48)
    head = 64 * 32
    sizes = {name: whole_model.weight_bytes(model) for name, model in models.items()}
    assert sizes == {
        "fp32": 4 * (inside + head),
        "O1 fp32": inside + 4 * head,
        "bf16": 2 * (inside + head),
        "O1 bf16": inside + 2 * head,
    }


def test_decoding_with_the_cache_is_the_forward_pass(tiny: str) -> None:
    model = whole_model.random_llama(tiny, None)
    prompt = whole_model.random_ids(model, 2, 6, seed=0)
    following = whole_model.random_ids(model, 2, 4, seed=1)
    decode = whole_model.Decode(model, prompt, following)
    expected = model(torch.cat([prompt, following], 1)).logits[:, -1]
    for _ in range(2):  # each time from the prompt's end
        decode.rotate()
        logits = decode.call(0)
        assert isinstance(logits, Tensor)
        torch.testing.assert_close(logits, expected)


def spoil(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        model.get_parameter("lm_head.weight")[3] = value


@pytest.mark.parametrize(("value", "reason"), [(float("nan"), "not finite"), (1e3, "below 0.9")])
def test_a_wrong_variant_is_not_reported(tiny: str, value: float, reason: str) -> None:
    models = whole_model.make_models(tiny, SETTINGS)
    spoil(models["O1 bf16"], value)
    row = whole_model.measure_work(models, "prefill", 1, SETTINGS, seconds=0)
    assert list(row["variants"]) == ["fp32", "O1 fp32", "bf16"]
    assert list(row["ratio"]) == ["O1 fp32"]
    assert list(row["refused"]) == ["O1 bf16"]
    assert reason in row["refused"]["O1 bf16"]


def test_nothing_is_reported_without_a_reference(tiny: str) -> None:
    models = whole_model.make_models(tiny, SETTINGS)
    spoil(models["fp32"], float("nan"))
    row = whole_model.measure_work(models, "decode", 1, SETTINGS, seconds=0)
    assert row["variants"] == {}
    assert "not finite" in row["refused"]["fp32"]


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(run_model.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_is_written_and_compared_with_itself(tmp_path: Path, tiny: str) -> None:
    folder, out = tmp_path / "tiny", tmp_path / "out.json"
    whole_model.random_llama(tiny, None).save_pretrained(folder)
    options = "--threads 1 --rows 1 --prompt 8 --context 6 --tokens 2 --budget 0 --label now"
    limits = ("--schemes", "O1", "--least-cosine", 0.9)
    result = run("--model", folder, *options.split(), *limits, "--out", out)
    assert result.exit_code == 0, result.output
    content = json.loads(out.read_text())
    assert (content["label"], content["settings"]["schemes"]) == ("now", ["O1"])
    assert content["openmp"]
    assert [row["threads"] for row in content["rows"]] == [1, 1]

    for row in content["rows"]:
        for found in row["variants"].values():
            found["tokens_per_second"]["median"] *= 2
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(content))
    result = run("--compare", out, twice)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "O1 bf16" in line]
    assert len(lines) == 2
    assert all(" 2.00 " in line for line in lines)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "llama-9b"), "no shape of smollm2-135m, llama-1b"),
        (("--threads", "0"), "--threads must be 1 to"),
        (("--rows", "0"), "--rows must be at least 1"),
        (("--schemes", "O9"), "O9"),
        (("--compare", "none.json", "none.json"), "cannot read none.json"),
    ],
)
def test_mistakes_are_told_at_once(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
