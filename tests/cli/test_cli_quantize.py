"""`sq-cpu quantize`: every option arrives, plans are carried out, what does not fit is streamed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT, error_of, interrupted_after_a_block, json_of, run, small
from other_models import other_model
from sameness import assert_same_model
from typer.testing import CliRunner

import sq_cpu
from sq_cpu import Scheme, SmoothPlan, cli
from sq_cpu.streaming import convert
from sq_cpu.streaming.prefix import StreamedPrefix


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(3, 40)[None]).logits  # type: ignore[no-any-return]


def test_command_line_equals_python(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    run("quantize", folder, "-o", out, "--scheme", "O2", "--calib", text, *small())
    model, tokenizer = byte_model(), byte_tokenizer()
    windows = sq_cpu.token_windows(tokenizer, TEXT, window=64, windows=4)
    calibration = sq_cpu.calibrate(model, windows)
    sq_cpu.quantize(model, calibration, scheme="O2")
    assert_same_model(sq_cpu.load(out), model, logits)


def test_several_texts_share_the_windows(folder: Path, text: Path, tmp_path: Path) -> None:
    arguments = ["quantize", folder, "-o", tmp_path / "out", "--calib", text, "--calib", text]
    assert json_of(*arguments, "--windows", 5, "--window", 32)["calibration_tokens"] == 5 * 32
    error = error_of(*arguments, "--overwrite", "--windows", 1)
    assert "2 calibration texts need at least as many --windows" in error


def test_every_scheme_option_arrives(folder: Path, tmp_path: Path) -> None:
    made = json_of(
        *("quantize", folder, "-o", tmp_path / "out", "--scheme", "O2", "--asymmetric"),
        *("--weights", "per_tensor", "--reduce-range", "yes", "--dtype", "bf16"),
        *("--ignore", "lm_head", "--ignore", "down_proj", "--unreached", "quantize", *small()),
    )
    assert made["scheme"] == {
        "activations": "per_tensor",
        "weights": "per_tensor",
        "rows_per_scale": 64,
        "symmetric": False,
        "reduce_range": True,
        "static_range": "auto",
        "percentile": 99.99,
        "dynamic_fallback": True,
        "outlier_threshold": None,
        "ignore": ["lm_head", "down_proj"],
        "unreached": "quantize",
    }
    assert made["layers"] == 12
    loaded = sq_cpu.load(tmp_path / "out")
    assert loaded.get_parameter("model.norm.weight").dtype == torch.bfloat16


def test_groups_and_ranges_arrive(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", "--scheme", "O3")
    made = json_of(
        *(*start, "--weights", "per_rows", "--rows-per-scale", 8),
        *("--range", "percentile", "--percentile", 99.5, *small()),
    )["scheme"]
    assert (made["weights"], made["rows_per_scale"]) == ("per_rows", 8)
    assert (made["static_range"], made["percentile"]) == ("percentile", 99.5)
    assert json_of(*start, "--range", "mse", *small())["scheme"]["static_range"] == "mse"


def test_rules_and_thresholds_arrive(folder: Path, tmp_path: Path) -> None:
    start = ("quantize", folder, "-o", tmp_path / "out", "--overwrite", *small())
    made = json_of(*start, "--rule", "spiq")
    assert (made["rule"], made["alpha"]) == ("spiq", None)
    assert made["groups"] == {"folded": 8, "at_run_time": 0}
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
    assert json_of(*start, "--no-hadamard")["hadamard"] == 0
    assert json_of(*start, "--hadamard")["hadamard"] == 2  # down_proj
    shown = CliRunner().invoke(cli.app, ["inspect", str(tmp_path / "out")]).stdout
    assert "2 linears rotated by Hadamard matrices of 64 columns" in shown
    usage = run(*start, "--hadamard", "--no-smooth", code=2).stderr
    assert "--hadamard goes with smoothing" in " ".join(usage.split())
    usage = run(*start, "--rule", "aqas", "--alpha", 0.5, code=2).stderr
    assert "no effect with --rule aqas" in " ".join(usage.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--scheme", "O1", "--range", "mse"), "static_range='mse' has no effect on per_token"),
        (("--scheme", "O3", "--percentile", 99), "percentile=99.0 has no effect on static_range"),
        (("--scheme", "O3", "--range", "percentile", "--percentile", 50), r"50.0 is not a number"),
        (("--rows-per-scale", 8), "rows_per_scale=8 has no effect on per_channel weights"),
        (("--weights", "per_rows", "--rows-per-scale", 0), "_scale=0 is not a positive integer"),
    ],
)
def test_schemes_that_make_no_sense_are_refused(
    folder: Path, tmp_path: Path, options: tuple[object, ...], message: str
) -> None:
    assert message in error_of("quantize", folder, "-o", tmp_path / "out", *options)


def test_reduce_range_auto_is_decided(folder: Path, tmp_path: Path) -> None:
    made = json_of("quantize", folder, "-o", tmp_path / "out", "--reduce-range", "auto", *small())
    assert made["scheme"]["reduce_range"] is (not sq_cpu.isa()["vnni"])


@pytest.mark.parametrize(
    ("name", "stream"),
    [("mamba", "--no-stream"), ("mamba", "--stream"), ("jamba", "--no-stream")],
)
def test_what_needs_no_ranges_is_not_quantized_blind(
    tmp_path: Path, name: str, stream: str
) -> None:
    source, out = tmp_path / "float", tmp_path / "out"
    other_model(name, vocab_size=259).save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    made = json_of("quantize", source, "-o", out, "--no-smooth", stream, *small())
    assert (made["calibration_tokens"], made["alpha"]) == (4 * 64, None)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert settings["plan"] is None
    of_dt_proj = {why for linear, why in settings["kept"].items() if "dt_proj" in linear}
    assert len(of_dt_proj) == 1
    assert "the model's own code uses its weight" in of_dt_proj.pop()
    assert logits(sq_cpu.load(out)).isfinite().all()


def test_streaming_equals_quantizing_in_memory(folder: Path, tmp_path: Path) -> None:
    options = ("--scheme", "O3", *small())
    whole = json_of("quantize", folder, "-o", tmp_path / "whole", "--no-stream", *options)
    made = json_of("quantize", folder, "-o", tmp_path / "streamed", "--stream", *options)
    assert (whole["streamed"], made["streamed"]) == (False, True)
    for key in ("scheme", "layers", "calibration_tokens", "linear_bytes"):
        assert made[key] == whole[key]
    models = (sq_cpu.load(tmp_path / name) for name in ("streamed", "whole"))
    assert_same_model(*models, logits)


def test_a_target_length_calibrates_on_windows_of_it(folder: Path, tmp_path: Path) -> None:
    options = ("--scheme", "O3", "--windows", 4)
    made = json_of(
        "quantize", folder, "-o", tmp_path / "0", *options, "--window", 48, "--no-stream"
    )
    assert made["target_length"] is None
    expected = sq_cpu.load(tmp_path / "0")
    for stream in ("--stream", "--no-stream"):
        out = tmp_path / stream
        made = json_of("quantize", folder, "-o", out, *options, "--target-length", 48, stream)
        assert (made["target_length"], made["calibration_tokens"]) == (48, 4 * 48)
        assert_same_model(sq_cpu.load(out), expected, logits)
    both = ("--target-length", 48, "--window", 48)
    refused = run("quantize", folder, "-o", tmp_path / "both", *both, code=2)
    assert "--target-length says how long the windows are" in refused.stderr


def test_a_plan_is_carried_out(folder: Path, plan: Path, text: Path, tmp_path: Path) -> None:
    model = byte_model()
    windows = sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=4)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, windows), SmoothPlan.load(plan))
    for stream in ("--stream", "--no-stream"):
        out = tmp_path / stream
        arguments = ("quantize", folder, "-o", out, "--plan", plan, "--calib", text)
        made = json_of(*arguments, stream, *small())
        assert (made["plan"], made["rule"], made["alpha"]) == (str(plan), None, None)
        assert made["scheme"] == Scheme.of("O3", symmetric=False).to_dict()
        assert made["layers"] == len(model.sq_cpu_config.layers) == 11
        loaded = sq_cpu.load(out)
        assert loaded.sq_cpu_config == model.sq_cpu_config
        assert_same_model(loaded, model, logits)


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


def test_interrupted_streaming_says_how_it_is_resumed(folder: Path, tmp_path: Path) -> None:
    arguments = ("quantize", folder, "-o", tmp_path / "out", *small())
    with interrupted_after_a_block():
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


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_the_head_in_int8(stream: str, tmp_path: Path, text: Path) -> None:
    folder = save_float(tmp_path / "float", tie_word_embeddings=True)
    arguments = ["quantize", folder, "-o", tmp_path / "out", "--calib", text, stream, *small()]
    made = json_of(*arguments, "--head", "int8")
    assert made["head"] == "int8"
    assert "lm_head" not in made["kept"]
    model = byte_model(tie_word_embeddings=True)
    windows = sq_cpu.token_windows(byte_tokenizer(), TEXT, window=64, windows=4)
    sq_cpu.quantize(model, sq_cpu.calibrate(model, windows), head="int8")
    loaded = sq_cpu.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(model))
    assert made["layers"] == len(model.sq_cpu_config.layers)
    linears = [m for m in byte_model().modules() if isinstance(m, torch.nn.Linear)]
    parameters = [parameter for linear in linears for parameter in linear.parameters()]
    assert made["linear_bytes"]["float"] == sum(parameter.nbytes for parameter in parameters)


def test_a_prefix(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    made = json_of("quantize", folder, "-o", out, "--prefix", "bos", "--calib", text, *small())
    assert made["prefix"] == [1]
    model, tokenizer = byte_model(), byte_tokenizer()
    sq_cpu.lead_with(tokenizer)
    windows = sq_cpu.token_windows(tokenizer, TEXT, window=64, windows=4)
    calibration = sq_cpu.calibrate(model, windows, prefix=[1])
    sq_cpu.quantize(model, calibration)
    assert_same_model(sq_cpu.load(out), model, lambda each: logits_after(each, 1))
    # The checkpoint's tokenizer begins texts so; the float model's is told to.
    scored = json_of("eval", out, "--text", text, *small())["perplexity"]
    expected = sq_cpu.perplexity(model, tokenizer, TEXT, window=64, windows=4)
    assert scored == pytest.approx(expected, rel=1e-6)
    exact = json_of("eval", folder, "--lead-with-bos", "--text", text, *small())["perplexity"]
    expected = sq_cpu.perplexity(byte_model(), tokenizer, TEXT, window=64, windows=4)
    assert exact == pytest.approx(expected, rel=1e-6)
    told = "prefix: keys and values of texts that begin with 1 in float"
    assert told in run("inspect", out).stdout
    assert json_of("inspect", out)["prefix"] == [1]
    # What texts begin with is taken by itself, and may be left.
    tokenizer.save_pretrained(folder)
    start = ("quantize", folder, "-o", out, "--overwrite", *small())
    assert json_of(*start)["prefix"] == [1]
    assert json_of(*start, "--prefix", "off")["prefix"] == []
    run(*start)
    whole = sq_cpu.load(out)
    for choice in ("auto", "bos"):
        assert json_of(*start, "--stream", "--prefix", choice)["prefix"] == [1]
        assert_same_model(sq_cpu.load(out), whole, lambda each: logits_after(each, 1))
    assert json_of(*start, "--stream", "--prefix", "off")["prefix"] == []


def logits_after(model: Any, *prefix: int) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.tensor([[*prefix, *range(3, 40)]])).logits  # type: ignore[no-any-return]


def test_a_model_without_a_prefix_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise sq_cpu.SqCpuError("the model can have no prefix in float: a reason")

    monkeypatch.setattr(convert, "make_prefix", refused)
    folder = save_float(tmp_path / "float")
    tokenizer = byte_tokenizer()
    sq_cpu.lead_with(tokenizer)
    tokenizer.save_pretrained(folder)
    start = ("quantize", folder, "-o", tmp_path / "out", *small())
    assert "no prefix in float: a reason" in run(*start).stderr
    assert sq_cpu.load(tmp_path / "out").sq_cpu_config.prefix == ()
    assert "a reason" in error_of(*start, "--overwrite", "--prefix", "bos")
    # Streaming asks the first block.
    monkeypatch.setattr(StreamedPrefix, "check_first", refused)
    stream = (*start, "--overwrite", "--stream")
    assert "no prefix in float: a reason" in run(*stream).stderr
    assert sq_cpu.load(tmp_path / "out").sq_cpu_config.prefix == ()
    assert "a reason" in error_of(*stream, "--prefix", "bos")
