"""The command of the benchmark of models: what it writes, draws, compares and refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import model_files
import model_tables
import pytest
import run_model
import typer
from run_model_cases import TINY
from typer.testing import CliRunner

from sq_cpu import SqCpuError


def run(*arguments: object) -> Any:
    app = typer.Typer()
    app.command()(run_model.main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_is_written_drawn_and_compared_with_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(model_files.SHAPES, "tiny", TINY)
    folder, out, picture = (tmp_path / name for name in ("tiny", "out.json", "out.svg"))
    model_files.random_llama("tiny", None).save_pretrained(folder)
    options = "--threads 1 --rows 2 --prompts 8 --contexts 6 --tokens 2 --budget 0 --label now"
    limits = "--schemes O1 --variants generate,bf16 --least-cosine 0.9"
    files = ("--out", out, "--plot", picture)
    result = run("--model", folder, *options.split(), *limits.split(), *files)
    assert result.exit_code == 0, result.output
    assert "vllm-cpu: not measured" in result.output
    assert "<svg" in picture.read_text()
    content = json.loads(out.read_text())
    assert (content["label"], content["settings"]["schemes"]) == ("now", ["O1"])
    prefill, decode = content["rows"]
    assert (prefill["work"], decode["work"], decode["rows"]) == ("prefill", "decode", 2)
    for row in (prefill, decode):
        assert list(row["variants"]) == ["O1 bf16 generate", "bf16"]
        medians = {name: each["seconds"]["median"] for name, each in row["variants"].items()}
        ratio = medians["bf16"] / medians["O1 bf16 generate"]
        assert row["ratio"] == {"O1 bf16 generate": {"bf16": ratio}}
    read = decode["floor"]["seconds"]["median"]
    assert decode["floor"]["bytes"] == 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96) + 320 * 64
    for name, each in decode["variants"].items():
        assert each["share_of_floor"] == read / medians[name]
    [processes] = content["processes"]
    assert list(processes["variants"]) == ["O1 bf16 generate", "bf16", "fp32"]
    for each in processes["variants"].values():
        assert 0 < each["start_seconds"] < 120
        assert each["peak_bytes"] > 100e6

    for row in content["rows"]:
        for found in row["variants"].values():
            found["tokens_per_second"]["median"] *= 2
    twice = tmp_path / "twice.json"
    twice.write_text(json.dumps(content))
    result = run("--compare", out, twice)
    assert result.exit_code == 0, result.output
    lines = [line for line in result.output.splitlines() if "O1 bf16 generate" in line]
    assert len(lines) == 2
    assert all(" 2.00 " in line for line in lines)


def test_older_files_are_compared() -> None:
    folder = Path(run_model.__file__).parent / "results/xeon-amx-16-cores"
    result = run("--compare", folder / "model-before.json", folder / "model-after.json")
    assert result.exit_code == 0, result.output
    assert "O3 bf16" in result.output


def test_a_plot_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SqCpuError, match="nothing to draw"):
        model_tables.plot([{"variants": {}}], tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--shapes", "llama-9b"), "no shape of smollm2-135m, llama-1b"),
        (("--threads", "0"), "--threads must be 1 to"),
        (("--rows", "0"), "--rows must be at least 1"),
        (("--contexts", "128,0"), "--contexts must be at least 1"),
        (("--variants", "ours,fp32"), "--variants has ours; they are int8, fused, generate"),
        (("--schemes", "O9"), "O9"),
        (("--plot", "plot.pdf"), "ends in .png or .svg"),
        (("--compare", "none.json", "none.json"), "cannot read none.json"),
    ],
)
def test_mistakes_are_told_at_once(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 1
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert message in line
