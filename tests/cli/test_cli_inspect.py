"""`sq-cpu inspect` of a float model, and its reports."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT, error_of, json_of, run, small
from typer.testing import CliRunner

import sq_cpu
from sq_cpu import LayerPlan, Scheme, SmoothPlan, cli
from sq_cpu.evaluation.perplexity import token_windows
from sq_cpu.smoothing.rules import DEFAULT_ALPHA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_float(tmp_path_factory.mktemp("model") / "float")


@pytest.fixture
def plan(tmp_path: Path) -> tuple[Path, SmoothPlan]:
    """A plan of different alphas, with a linear in float and a scheme of its own."""
    model = byte_model()
    uniform = SmoothPlan.uniform(model, calibration(model), ignore=("lm_head",))
    groups = tuple(replace(g, alpha=0.1 * i) for i, g in enumerate(uniform.groups))
    kept = LayerPlan(name="model.layers.0.mlp.down_proj", in_float=True, note="too rough")
    made = SmoothPlan(groups, (kept,), Scheme.of("O3"))
    return made.save(tmp_path / "plan.json"), made


def calibration(model: Any, prefix: str = "off") -> sq_cpu.Calibration:
    tokenizer = byte_tokenizer()
    if prefix == "bos":
        sq_cpu.lead_with(tokenizer)
    windows = token_windows(tokenizer, TEXT, window=64, windows=4)
    return sq_cpu.calibrate(model, windows, prefix=sq_cpu.leading_ids(tokenizer))


def expected(
    plan: SmoothPlan | None = None,
    alpha: float = DEFAULT_ALPHA,
    scheme: str | None = None,
    prefix: str = "off",
) -> Any:
    """Return what inspecting the float model on the text has to show."""
    model = byte_model()
    of = calibration(model, prefix)
    plan = plan or SmoothPlan.uniform(model, of, alpha, ignore=("lm_head",))
    return json.loads(
        json.dumps(sq_cpu.analyze(model, of, plan, scheme=scheme).to_dict(channels=False))
    )


def test_a_float_model(folder: Path, text: Path) -> None:
    shown = json_of("inspect", folder, "--calib", text, *small())
    assert shown == {"model": str(folder), **expected()}
    assert {group["alpha"] for group in shown["groups"]} == {DEFAULT_ALPHA}
    assert shown["tokens"] == 4 * 64
    arguments = ["--scheme", "O3", "--alpha", 0.7, "--calib", text, *small()]
    shown = json_of("inspect", folder, *arguments)
    assert shown == {"model": str(folder), **expected(alpha=0.7, scheme="O3")}

    table = run("inspect", folder, *arguments).stdout
    for group in shown["groups"]:
        (row,) = [line for line in table.splitlines() if f" {group['name']} " in line]
        for key in ("severity", "severity_smoothed"):
            assert f" {group[key]:.1f} " in row
        for key in ("error_naive", "error"):
            assert f" {100 * group[key]:.2g} %" in row
    assert "1 linear in float: ignored" in table


def test_the_shipped_text_calibrates(folder: Path) -> None:
    shown = json_of("inspect", folder, "--window", 32)
    assert shown["tokens"] == 16 * 32
    assert "has 16 windows, not 99" in error_of("inspect", folder, "--windows", 99)


def test_a_plan(folder: Path, text: Path, plan: tuple[Path, SmoothPlan]) -> None:
    arguments = ["inspect", folder, "--plan", plan[0], "--calib", text, *small()]
    shown = json_of(*arguments)
    assert shown == {"model": str(folder), **expected(plan[1])}
    assert shown["scheme"]["activations"] == "static"  # the plan's own
    assert shown["kept"]["model.layers.0.mlp.down_proj"] == "too rough"
    table = run(*arguments).stdout
    assert "down_proj (in float)" in table
    assert "1 linear in float: too rough" in table
    other = json_of(*arguments, "--scheme", "O2")
    assert other["scheme"]["activations"] == "per_tensor"


def test_a_prefix(folder: Path, text: Path, plan: tuple[Path, SmoothPlan], tmp_path: Path) -> None:
    arguments = ["inspect", folder, "--alpha", 0.8, "--calib", text, *small()]
    without, with_bos = expected(alpha=0.8), expected(alpha=0.8, prefix="bos")
    assert without != with_bos
    for given, wanted in (((), without), (("--prefix", "bos"), with_bos)):
        assert json_of(*arguments, *given) == {"model": str(folder), **wanted}
    of_plan = ["inspect", folder, "--plan", plan[0], "--calib", text, *small(), "--prefix", "bos"]
    assert json_of(*of_plan) == {"model": str(folder), **expected(plan[1], prefix="bos")}

    # By default that which the tokenizer puts in front, as of quantize.
    leading = tmp_path / "leading"
    tokenizer = byte_tokenizer()
    sq_cpu.lead_with(tokenizer)
    shutil.copytree(folder, leading)
    tokenizer.save_pretrained(leading)
    arguments[1] = leading
    assert json_of(*arguments) == {"model": str(leading), **with_bos}
    off = json_of(*arguments, "--prefix", "off")
    assert off["tokens"] == 4 * 64  # BOS counts like any

    int8 = tmp_path / "int8"
    run("quantize", folder, "-o", int8, "--calib", text, *small())
    for choice in ("auto", "bos", "off"):
        refused = run("inspect", int8, "--prefix", choice, code=2)
        assert "--prefix is for a float model" in refused.output


def test_a_report_of_a_float_model(
    folder: Path, text: Path, plan: tuple[Path, SmoothPlan], tmp_path: Path
) -> None:
    out, png = tmp_path / "r.html", tmp_path / "pictures"
    arguments = ["inspect", folder, "--plan", plan[0], "--calib", text, *small()]
    shown = json_of(*arguments, "--report", out, "--png", png)
    assert shown == {"model": str(folder), **expected(plan[1]), "report": str(out)}
    model = byte_model()
    found = sq_cpu.analyze(model, calibration(model), plan[1])
    same = sq_cpu.report(tmp_path / "same.html", found, name="float")
    assert out.read_bytes() == same.read_bytes()
    files = {path.name: path.read_bytes() for path in png.iterdir()}
    assert files == {p.name: p.read_bytes() for p in (tmp_path / "same_files").iterdir()}


@pytest.mark.parametrize("prefix", ["off", "bos"])
def test_a_report_of_an_int8_model(
    prefix: str, folder: Path, text: Path, plan: tuple[Path, SmoothPlan], tmp_path: Path
) -> None:
    int8, out = tmp_path / "int8", tmp_path / "r.html"
    calib = ["--calib", text, *small()]
    run("quantize", folder, "-o", int8, "--plan", plan[0], "--prefix", prefix, *calib)
    arguments = ["inspect", int8, *calib, "--report", out, "--source", folder]
    shown = json_of(*arguments)
    assert len(shown["layers"]) == 13
    assert shown["report"] == str(out)
    page = out.read_text()
    assert "too rough" in page
    assert "<h1>int8</h1>" in page
    done = SmoothPlan.from_dict(shown["plan"])
    model = byte_model()
    found = sq_cpu.analyze(model, calibration(model, prefix), done, scheme="O3")
    values = [float(value) for value in re.findall(r'<data value="([^"]*)"', page)]
    columns = ("error_naive", "error", "clipped", "rows_clipped", "rows_underflowed")
    assert values[-len(found.linears) * len(columns) :] == [
        getattr(one, column) for one in found.linears for column in columns
    ]
    assert f"report: {out}" in run(*arguments).stdout


def test_rows_that_do_not_fit_the_static_scales(folder: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "int8"
    options = ("--scheme", "O3", "--range", "percentile", "--percentile", 90, "--calib", text)
    said = run("quantize", folder, "-o", out, *options, *small()).stdout
    misfits = sq_cpu.load(out).sq_cpu_config.misfits
    most = max(misfits, key=lambda name: misfits[name])
    assert misfits[most] > 0
    for text_of in (said, run("inspect", out).stdout):
        (line,) = [line for line in text_of.splitlines() if "do not fit the static scales" in line]
        mean = sum(misfits.values()) / len(misfits)
        assert line.strip() == (
            f"{100 * mean:.3g} % of the calibration's rows do not fit the static scales, most in "
            f"{most} ({100 * misfits[most]:.3g} %)"
        )
    assert json_of("inspect", out)["misfits"] == misfits


def test_a_report_of_an_int8_model_that_was_not_smoothed(
    folder: Path, text: Path, tmp_path: Path
) -> None:
    int8, out = tmp_path / "int8", tmp_path / "r.html"
    run("quantize", folder, "-o", int8, "--no-smooth")
    run("inspect", int8, "--source", folder, "--report", out, "--calib", text, *small())
    assert "<strong>0 of 8</strong>" in out.read_text()


def usage_error(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    assert result.exit_code == 2
    return " ".join(re.sub(r"[^\x20-\x7e]", " ", result.stderr).split())


def test_options_that_do_not_fit(folder: Path, tmp_path: Path) -> None:
    int8 = sq_cpu.save(
        sq_cpu.quantize(byte_model(), smooth=False), tmp_path / "int8", byte_tokenizer()
    )
    report = ["--report", tmp_path / "r.html"]
    for arguments, words in [
        ([folder, "--png", "x"], "add --report FILE.html"),
        ([folder, "--source", "x"], "add --report FILE.html"),
        ([folder, "--source", "x", *report], "is itself float"),
        ([folder, "--plan", "p", "--alpha", 0.5], "--plan says what alpha is"),
        ([folder, "--text", "x"], "--saturation; add it, or give --calib"),
        ([int8, "--alpha", 0.5], "is for a float model"),
        ([int8, "--plan", "p"], "is for a float model"),
        ([int8, "--scheme", "O3"], "is for a float model"),
        ([int8, *report], "add --source MODEL"),
        ([int8, "--calib", "x"], "add --report FILE.html and --source MODEL"),
        ([int8, "--windows", 3], "--windows needs --saturation or --report"),
        ([int8, "--window", 64], "--window needs --saturation or --report"),
    ]:
        assert words in usage_error("inspect", *arguments), arguments
    assert not (tmp_path / "r.html").exists()


def test_what_cannot_be_written_or_read(folder: Path, tmp_path: Path) -> None:
    error = error_of("inspect", folder, "--report", tmp_path / "no" / "r.html")
    assert "cannot write" in error
    assert "existing folder" in error
    assert "is a folder" in error_of("inspect", folder, "--report", tmp_path)
    assert "cannot read the smoothing plan" in error_of("inspect", folder, "--plan", tmp_path)
    int8 = sq_cpu.save(
        sq_cpu.quantize(byte_model(), smooth=False), tmp_path / "int8", byte_tokenizer()
    )
    report = ["--report", tmp_path / "r.html", "--source"]
    assert "is quantized already" in error_of("inspect", int8, *report, int8)
    other = save_float(tmp_path / "other", num_hidden_layers=1)
    assert "not the model that" in error_of("inspect", int8, *report, other, *small())


def test_help_shows_defaults() -> None:
    shown = " ".join(run("inspect", "--help").stdout.replace("│", " ").split())
    assert "[default: the plan's, or O1]" in shown
