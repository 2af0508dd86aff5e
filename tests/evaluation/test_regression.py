"""The fixture `sq_cpu_regression`: passes, failures, refusals; times are far apart."""

import ctypes
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer
from rehost import norm_consumers, plant_outliers

import sq_cpu
from sq_cpu.evaluation.regression import ATTEMPTS
from sq_cpu.kernels.runtime import Machine
from sq_cpu.nn.linear import QuantLinear

pytest_plugins = ["pytester"]

ROOT = Path(__file__).resolve().parents[2]
PLUGIN = ROOT / "sq_cpu" / "plugin"
# Options of pytest within this process. Its faulthandler plugin, when such a run ends, would take
# away the SIGILL handler that was installed after it: the AMX emulator's.
INNER = ("-p", "pytest_sq_cpu", "-p", "no:faulthandler", "-W", "error")
LOOSE = ("--sq-cpu-slower=2000%",)  # for what must not fail, whatever else the machine does


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_int8(tmp_path / "model-int8")


@pytest.fixture
def suite(
    model: Path, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., pytest.RunResult]:
    """Run a suite of one call of the fixture, or of the given source.

    Once `pytester` is there, what is imported for the first time is forgotten after the test; so
    the model comes first.
    """
    # pytest-benchmark times nothing in a worker of pytest-xdist, which this suite is not.
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    pytester.syspathinsert(PLUGIN)
    pytester.makeini("[pytest]")

    def run(*options: str, source: str = "", folder: Path = model) -> pytest.RunResult:
        call = f"sq_cpu_regression({str(folder)!r}, prompt=8, tokens=2)"
        pytester.makepyfile(test_it=source or f"def test_it(sq_cpu_regression):\n    {call}")
        return pytester.runpytest_inprocess(
            *INNER, "-p", "no:cacheprovider", "--benchmark-max-time=0.01", *options
        )

    return run


def save_int8(folder: Path, ignore: tuple[str, ...] = ()) -> Path:
    scheme = sq_cpu.Scheme(ignore=("lm_head", *ignore))
    quantized = sq_cpu.quantize(byte_model(), scheme=scheme, smooth=False)
    return sq_cpu.save(quantized, folder, byte_tokenizer())


def the_baseline(folder: Path) -> Path:
    (path,) = (folder / "sq-cpu-baselines").iterdir()
    return path


def edit(path: Path, test: str, **entries: Any) -> None:
    content = json.loads(path.read_text())
    content["baselines"][f"test_it.py::test_it[{test}]"] |= entries
    path.write_text(json.dumps(content))


def failures(result: pytest.RunResult, count: int) -> list[str]:
    """Return the one line that each of so many failed tests says."""
    result.assert_outcomes(passed=3 - count, failed=count)
    lines = result.outlines
    titles = [k for k, line in enumerate(lines) if line.startswith("____")]
    assert len(titles) == count
    assert all(lines[k + 2].startswith(("____", "=", "-")) or not lines[k + 2] for k in titles)
    return [lines[k + 1] for k in titles]


def test_a_model_passes_against_its_own_baseline(
    suite: Callable[..., pytest.RunResult], pytester: pytest.Pytester, model: Path
) -> None:
    written = suite("--sq-cpu-baseline-update")
    written.assert_outcomes(passed=3)
    written.stdout.fnmatch_lines(["test_it.py::test_it?decode?: wrote the baseline, * to *.json"])
    path = the_baseline(pytester.path)
    before = path.read_text()
    again = suite(*LOOSE, "--benchmark-json=out.json")
    again.assert_outcomes(passed=3)
    again.stdout.fnmatch_lines(
        ["test_it.py::test_it?prefill?: * x the reference *: slower by *, at most 2000.0%"]
    )
    assert path.read_text() == before

    content = json.loads(before)
    assert content["machine"] == asdict(Machine.here())
    rows = json.loads((pytester.path / "out.json").read_text())["benchmarks"]
    assert [row["name"] for row in rows] == [
        f"test_it[{measured}]" for measured in ("accuracy", "prefill", "decode")
    ]
    for row in rows:
        info = row["extra_info"]
        assert info["machine"] == content["machine"]
        assert info["baseline"] == content["baselines"][row["fullname"]]
        assert info["found"]["work"] == info["baseline"]["work"]
        assert row["stats"]["median"] > 0
    tokenizer = byte_tokenizer()
    expected = sq_cpu.perplexity(sq_cpu.load(model), tokenizer, sq_cpu.texts.evaluation())
    assert rows[0]["extra_info"]["found"]["value"] == expected
    for row in rows[1:]:
        assert row["extra_info"]["found"]["seconds"] > 0


def test_a_missing_baseline_fails(
    suite: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    for line in failures(suite(), 3):
        assert line.startswith("no baseline of test_it.py::test_it[")
        assert str(Machine.here()) in line
        assert line.endswith("write it with --sq-cpu-baseline-update")
    assert not (pytester.path / "sq-cpu-baselines").exists()


def test_create_writes_what_is_missing_and_compares_the_rest(
    suite: Callable[..., pytest.RunResult], pytester: pytest.Pytester
) -> None:
    create = ("--sq-cpu-baseline-create", *LOOSE)
    suite(*create, "-k", "accuracy").assert_outcomes(passed=1, deselected=2)
    edit(the_baseline(pytester.path), "accuracy", value=1.0)
    (line,) = failures(suite(*create), 1)
    assert line.startswith("perplexity of the shipped text: ")
    assert len(json.loads(the_baseline(pytester.path).read_text())["baselines"]) == 3


@pytest.mark.parametrize(("share", "fails"), [(0.995, False), (0.985, True), (1.2, False)])
def test_less_accurate(
    suite: Callable[..., pytest.RunResult], pytester: pytest.Pytester, share: float, fails: bool
) -> None:
    suite("--sq-cpu-baseline-update", "-k", "accuracy")
    path = the_baseline(pytester.path)
    (baseline,) = json.loads(path.read_text())["baselines"].values()
    value = baseline["value"]
    versions = {**baseline["versions"], "torch": "0.4"}
    edit(path, "accuracy", value=value * share, date="2001-02-03", versions=versions)
    result = suite("-k", "accuracy")
    result.assert_outcomes(passed=not fails, failed=fails, deselected=2)
    if fails:
        result.stdout.fnmatch_lines(
            [
                "perplexity of the shipped text: 1.5% less accurate than the baseline, more than "
                f"1.0%: {value:.5g}, baseline {value * share:.5g}; now: *(config *; baseline: "
                f"2001-02-03, sq_cpu *torch 0.4*, in {path}; machine: {Machine.here()}"
            ]
        )
        suite("-k", "accuracy", "--sq-cpu-less-accurate=2%").assert_outcomes(passed=1, deselected=2)


def test_quantization_without_smoothing_is_less_accurate(
    suite: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    def planted() -> Any:
        made = byte_model()
        plant_outliers(made, norm_consumers(made))
        return made

    planted().save_pretrained(tmp_path / "float")
    folders = []
    for smooth in (True, False):
        batches = [
            byte_tokenizer()(text, return_tensors="pt")["input_ids"][:, :64]
            for text in sq_cpu.texts.calibration()[:4]
        ]
        calibration = sq_cpu.calibrate(planted(), batches)
        made = sq_cpu.quantize(planted(), calibration, scheme="O3", smooth=smooth)
        folders.append(sq_cpu.save(made, tmp_path / f"smooth-{smooth}", byte_tokenizer()))
    source = f"""
import torch
from transformers import AutoModelForCausalLM

def agreement(model, tokenizer):
    exact = AutoModelForCausalLM.from_pretrained({str(tmp_path / "float")!r})
    ids = torch.arange(3, 259)[None]
    with torch.no_grad():
        return torch.cosine_similarity(model(ids).logits, exact(ids).logits, dim=-1).mean().item()

def test_it(sq_cpu_regression):
    sq_cpu_regression(FOLDER, evaluate=agreement, better="higher")
"""
    smoothed, naive = (source.replace("FOLDER", repr(str(folder))) for folder in folders)
    options = ("-k", "accuracy")
    suite(*options, "--sq-cpu-baseline-update", source=smoothed).assert_outcomes(
        passed=1, deselected=2
    )
    suite(*options, source=smoothed).assert_outcomes(passed=1, deselected=2)
    result = suite(*options, source=naive)
    result.assert_outcomes(failed=1, deselected=2)
    result.stdout.fnmatch_lines(
        [
            f"own evaluation, higher is better: *% less accurate than the baseline, more than 1.0%*"
            f"now: *{folders[1]} *baseline: *{folders[0]} *"
        ]
    )


def test_slower(suite: Callable[..., pytest.RunResult], monkeypatch: pytest.MonkeyPatch) -> None:
    suite("--sq-cpu-baseline-update").assert_outcomes(passed=3)
    forward = QuantLinear.forward

    def slow(self: QuantLinear, x: Any) -> Any:
        time.sleep(0.01)  # 14 of them, in a model of 2 ms
        return forward(self, x)

    monkeypatch.setattr(QuantLinear, "forward", slow)
    result = suite("-k", "prefill or decode", "--sq-cpu-slower=300%", "--benchmark-min-rounds=2")
    result.assert_outcomes(failed=2, deselected=1)
    for work in ("prefill of 8 tokens", "decode of 2 tokens after 8"):
        result.stdout.fnmatch_lines(
            [
                f"{work}: *% slower than the baseline, more than 300.0%: * ms beside * ms), "
                f"baseline * ms beside * ms); the best of {ATTEMPTS} measurements; now: *"
            ]
        )


def test_another_machine_class_has_baselines_of_its_own(
    suite: Callable[..., pytest.RunResult], threads: Callable[[int], None]
) -> None:
    threads(1)
    suite("--sq-cpu-baseline-update", "-k", "accuracy").assert_outcomes(passed=1, deselected=2)
    threads(2)
    result = suite("-k", "accuracy")
    result.assert_outcomes(failed=1, deselected=2)
    result.stdout.fnmatch_lines(["no baseline of test_it.py::* 2 threads in *2-threads.json; *"])
    threads(1)
    suite("-k", "accuracy").assert_outcomes(passed=1, deselected=2)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda text: text[: len(text) // 2], "*"),
        (lambda _: "[]", "*"),
        (lambda _: "[" * 100_000, "*recursion*"),
        (lambda _: '{"format_version": 1}', "it lacks machine"),
        (lambda text: text.replace('"format_version": 1', '"format_version": 2'), "*is 2, not 1"),
        (lambda text: text.replace('"threads": ', '"threads": 1'), "it is of another machine *"),
        (lambda text: text.replace('"value": ', '"value": -Infinity, "was": '), "*unknown field*"),
        (lambda text: re.sub('"value": [^,]*', '"value": 1e999', text), "*not a finite number"),
        (lambda text: text.replace('"work": "', '"work": 1, "model": "'), "*work is 1, not a text"),
    ],
)
def test_corrupt_baselines(
    suite: Callable[..., pytest.RunResult],
    pytester: pytest.Pytester,
    damage: Callable[[str], str],
    reason: str,
) -> None:
    options = ("-k", "accuracy")
    suite(*options, "--sq-cpu-baseline-update")
    path = the_baseline(pytester.path)
    damaged = damage(path.read_text())
    path.write_text(damaged)
    for more in ((), ("--sq-cpu-baseline-update",)):
        result = suite(*options, *more)
        result.assert_outcomes(failed=1, deselected=2)
        result.stdout.fnmatch_lines(
            [f"{path} is no baseline of this machine class ({reason}); restore it, or delete *"]
        )
        assert path.read_text() == damaged


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("FOLDER, evaluate=len", "*give better=*"),
        ("FOLDER, evaluate=len, better='more'", "*give better=*"),
        ("FOLDER, better='lower'", "*give better=*"),
        ("FOLDER, evaluate=lambda *_: float('nan'), better='lower'", "*gave nan, not a finite*"),
        ("FOLDER, evaluate=lambda *_: None, better='lower'", "*gave None, not a finite*"),
        ("FOLDER, less_accurate=-1", "a tolerance is -1; *"),
        ("'none/there'", "cannot read */none/there/config.json (No such file *"),
        ("FOLDER); sq_cpu_regression(FOLDER", "sq_cpu_regression was called before in this test*"),
    ],
)
def test_refused_calls(
    suite: Callable[..., pytest.RunResult], model: Path, call: str, message: str
) -> None:
    call = call.replace("FOLDER", repr(str(model)))
    source = f"def test_it(sq_cpu_regression):\n    sq_cpu_regression({call})"
    result = suite("-k", "accuracy", "--sq-cpu-baseline-update", source=source)
    result.assert_outcomes(failed=1, deselected=2)
    result.stdout.fnmatch_lines([message])


def test_a_model_that_is_saved_again_is_loaded_again(
    suite: Callable[..., pytest.RunResult], tmp_path: Path
) -> None:
    folder = tmp_path / "again"
    source = f"""
import pytest
from test_regression import save_int8

@pytest.mark.parametrize("ignore", [(), ("down_proj",)])
def test_it(sq_cpu_regression, ignore):
    from pathlib import Path
    save_int8(Path({str(folder)!r}), ignore=ignore)
    count = lambda model, tokenizer: len(model.sq_cpu_config.layers)
    sq_cpu_regression({str(folder)!r}, evaluate=count, better="higher")
"""
    result = suite("--sq-cpu-baseline-update", "-k", "accuracy", source=source)
    result.assert_outcomes(passed=2, deselected=4)
    result.stdout.fnmatch_lines(["*: wrote the baseline, 14, *", "*: wrote the baseline, 12, *"])


@pytest.mark.parametrize("text", ["10", "-1%", "x%", "inf%", "1%0"])
def test_tolerances_are_percentages(suite: Callable[..., pytest.RunResult], text: str) -> None:
    result = suite(f"--sq-cpu-slower={text}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*'{text}' is not a percentage, such as 10%"])


def test_disabled_benchmarks_time_nothing(suite: Callable[..., pytest.RunResult]) -> None:
    suite("--sq-cpu-baseline-update").assert_outcomes(passed=3)
    result = suite("--benchmark-disable", "-rs")
    result.assert_outcomes(passed=1, skipped=2)
    result.stdout.fnmatch_lines(["*pytest-benchmark is disabled: nothing is timed"])


def test_without_pytest_benchmark(pytester: pytest.Pytester) -> None:
    pytester.syspathinsert(PLUGIN)
    pytester.makepyfile("def test_it(sq_cpu_regression):\n    pass\ndef test_else():\n    pass")
    result = pytester.runpytest_inprocess(*INNER, "-p", "no:benchmark")
    result.assert_outcomes(errors=1, passed=1)
    result.stdout.fnmatch_lines(
        ["sq_cpu_regression needs pytest-benchmark; run: pip install pytest-benchmark"]
    )


@pytest.mark.usefixtures("amx_emulator")
def test_runs_within_this_process_leave_its_signal_handlers(
    suite: Callable[..., pytest.RunResult],
) -> None:
    def handler() -> int | None:
        action = (ctypes.c_void_p * 32)()  # a struct sigaction, and more; the handler comes first
        assert ctypes.CDLL(None).sigaction(signal.SIGILL, None, action) == 0
        return action[0]

    before = handler()
    suite("--collect-only")
    assert handler() == before


def test_a_run_without_the_fixture_imports_nothing(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import sys\n"
        "def test_it(request):\n"
        "    assert request.config.pluginmanager.hasplugin('pytest_sq_cpu')\n"
        "    assert not {'torch', 'sq_cpu', 'numpy'} & sys.modules.keys()\n"
    )
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "pytest_sq_cpu", "-W", "error", tmp_path],
        cwd=tmp_path,
        env={"PYTHONPATH": str(PLUGIN), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    assert "sq_cpu" not in result.stdout.replace("pytest_sq_cpu", "").replace("sq_cpu-0", "")


def test_installation_declares_the_plugin() -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no TOML reader")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"pytest_sq_cpu": "pytest_sq_cpu"}
