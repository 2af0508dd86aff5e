"""`sq-cpu tune` and `autotune`: plans for `sq-cpu quantize --plan`."""

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
from byte_models import byte_model, byte_tokenizer, save_float
from command_line import TEXT, error_of, json_of, run
from optuna.trial import TrialState
from torch import nn

import sq_cpu
from sq_cpu import SmoothPlan, texts
from sq_cpu.autotuning import latency
from sq_cpu.autotuning.storage import opened_storage
from sq_cpu.cli import autotune as autotune_cli
from sq_cpu.cli import tuning
from sq_cpu.errors import Terminated
from sq_cpu.evaluation.perplexity import TextPerplexity

OTHER = "Pack my box with five dozen liquor jugs, and then some more. " * 20


@pytest.fixture(autouse=True)
def quick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "_ROUNDS", 1)
    monkeypatch.setattr(latency, "_FLUSHED_BYTES", 1 << 10)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_float(tmp_path / "float")


@pytest.fixture
def small(tmp_path: Path) -> list[object]:
    """Options for a quick job on texts of a test."""
    calib, text = tmp_path / "calib.txt", tmp_path / "text.txt"
    calib.write_text(TEXT)
    text.write_text(OTHER)
    windows = ["--window", 64, "--windows", 4, "--text-windows", 4, "--tokens", 8]
    return ["--calib", calib, "--text", text, *windows, "--trials", 2]


def test_tune_writes_a_plan_that_quantize_carries_out(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "plan.json"
    options = ["--window", 64, "--windows", 4]
    made = json_of("tune", folder, "-o", out, "--scheme", "O3", "--hadamard", *options)
    plan = SmoothPlan.load(out)
    assert sum(group.hadamard == 64 for group in plan.groups) == 2  # down_proj
    assert made["groups"] == len(plan.groups) > 0
    assert made["rotated"] == 2
    alphas = [group.alpha for group in plan.groups]
    assert made["alpha"] == {"least": min(alphas), "greatest": max(alphas)}
    quantized = json_of("quantize", folder, "-o", tmp_path / "int8", "--plan", out, *options)
    assert quantized["layers"] == 14


def test_tune_block_by_block(folder: Path, tmp_path: Path) -> None:
    options = ["--window", 64, "--windows", 4]
    plans = []
    for flag in (["--outliers", 0], ["--sequential", "--outliers", 0]):
        run("tune", folder, "-o", tmp_path / "plan.json", *options, *flag)
        plans.append(SmoothPlan.load(tmp_path / "plan.json"))
    assert [group.name for group in plans[0].groups] == [group.name for group in plans[1].groups]
    assert plans[0] != plans[1]
    learned = json_of("tune", folder, "-o", tmp_path / "plan.json", *options, "--learn", 4)
    losses = learned["learned"]
    assert 0 < losses["divergence_after"] <= losses["divergence_before"]
    text = run("tune", folder, "-o", tmp_path / "plan.json", *options, "--learn", 4).stdout
    assert re.search(r"divergence [\d.]+, learned [\d.]+ nats", text)
    options = ["--goal", "1%", "--sequential"]
    both = run("tune", folder, "-o", tmp_path / "other.json", *options, code=2)
    assert "--goal leaves all of the plan to autotune" in both.stderr


def test_autotune_writes_the_plan_the_trials_and_the_report(
    folder: Path, tmp_path: Path, small: list[object]
) -> None:
    out, page = tmp_path / "plan.json", tmp_path / "report.html"
    made = json_of("autotune", folder, "-o", out, "--goal", "1%", "--report", page, *small)
    assert made["goal_met"]
    assert made["loss"] <= 0.01
    assert made["metric"] == pytest.approx(made["float_metric"], rel=0.01)
    assert made["storage"] == str(tmp_path / "plan.db")
    assert (tmp_path / "plan.db").exists()
    plan = SmoothPlan.load(out)
    assert plan.scheme is not None
    assert list(plan.in_float) == made["in_float"]
    assert "<html" in page.read_text()

    # What the plan is worth is what was said: the same windows of the same text.
    int8 = tmp_path / "int8"
    calib = small[1]
    options = ["--calib", calib, "--window", 64, "--windows", 4]
    run("quantize", folder, "-o", int8, "--plan", out, *options)
    scored = json_of("eval", int8, "--text", small[3], "--window", 64, "--windows", 4)
    assert scored["perplexity"] == made["metric"]


def test_the_plain_output_says_what_was_found(
    folder: Path, tmp_path: Path, small: list[object]
) -> None:
    out = tmp_path / "plan.json"
    result = run("autotune", folder, "-o", out, "--goal", "1%", *small)
    assert f"{out}: " in result.stdout
    assert "(goal 1%)" in result.stdout
    assert "ms against" in result.stdout
    assert "search 0: metric" in result.stderr  # no progress bar: a line for every trial


def test_an_earlier_run_is_resumed_only_when_told(
    folder: Path, tmp_path: Path, small: list[object]
) -> None:
    out = tmp_path / "plan.json"
    arguments = ["autotune", folder, "-o", out, "--goal", "1%", *small]
    assert "does not exist; drop --resume" in error_of(*arguments, "--resume")
    first = json_of(*arguments)
    assert "holds the trials of an earlier run: go on with --resume" in error_of(*arguments)
    again = json_of(*arguments, "--resume")
    assert again["trials"] == first["trials"]
    assert again["metric"] == first["metric"]
    other = error_of("autotune", folder, "-o", out, "--goal", "2%", *small, "--resume")
    assert "belongs to another job (goal is" in other
    changed = Path(str(small[1]))
    changed.write_text(TEXT + "!")
    assert "belongs to another job" in error_of(*arguments, "--resume")


def test_a_storage_keeps_several_jobs_by_name(
    folder: Path, tmp_path: Path, small: list[object]
) -> None:
    storage = tmp_path / "all.db"
    storage.touch()  # a file without a study is as good as none
    more = ["--storage", storage, "--goal", "50%", "--refine-trials", 0, *small]
    first = json_of("autotune", folder, "-o", tmp_path / "a.json", *more)
    arguments = ["autotune", folder, "-o", tmp_path / "b.json", *more, "--tokens", 4]
    assert "another name than autotune with --study" in error_of(*arguments)
    assert "has no study other; drop --resume" in error_of(
        *arguments, "--study", "other", "--resume"
    )
    other = json_of(*arguments, "--study", "other")
    assert other["storage"] == first["storage"] == str(storage)
    again = json_of(*arguments, "--study", "other", "--resume")
    assert again["trials"] == other["trials"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["-o", "plan.db"],
        ["-o", "plan.json", "--storage", "./plan.json"],
        ["-o", "plan.json", "--storage", "sqlite:///plan.json"],
        ["-o", "plan.json", "--report", "folder/../plan.json"],
        ["-o", "plan.json", "--report", "plan.db"],
    ],
)
def test_one_name_for_two_files_is_refused(
    arguments: list[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    before = sorted(tmp_path.iterdir())
    error = error_of("autotune", folder, *arguments)
    assert "give one of them another name" in error
    assert "loading" not in error
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_int8_already_is_not_tuned(folder: Path, tmp_path: Path) -> None:
    int8 = tmp_path / "int8"
    run("quantize", folder, "-o", int8, "--no-smooth")
    for command in ("tune", "autotune"):
        error = error_of(command, int8, "-o", tmp_path / "plan.json")
        assert error == f"error: {int8} is quantized already; give the float model"


def test_tune_with_a_goal_is_autotune(folder: Path, tmp_path: Path, small: list[object]) -> None:
    out = tmp_path / "plan.json"
    made = json_of("tune", folder, "-o", out, "--goal", "50%", *small[:2], *small[4:8])
    assert made["goal"] == "50%"
    assert made["goal_met"]
    both = run("tune", folder, "-o", out, "--goal", "50%", "--scheme", "O3", code=2)
    assert "--goal leaves all of the plan to autotune" in both.stderr


def test_a_missed_goal_is_a_failure_that_leaves_the_best_plan(
    folder: Path, tmp_path: Path, small: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[nn.Module] = []

    def worse(self: TextPerplexity, model: nn.Module) -> float:
        calls.append(model)
        return float(len(calls))

    monkeypatch.setattr(TextPerplexity, "__call__", worse)
    out = tmp_path / "plan.json"
    arguments = ["autotune", folder, "-o", out, "--goal", "1%", *small, "--refine-trials", 1]
    result = run(*arguments, "--json", code=1)
    assert json.loads(result.stdout)["goal_met"] is False
    assert "the goal is not met" in result.stderr.splitlines()[-1]
    assert SmoothPlan.load(out).groups


@pytest.mark.parametrize(
    ("signalled", "code", "said"),
    [(KeyboardInterrupt, 130, "interrupted"), (Terminated, 143, "terminated")],
)
def test_ctrl_c_and_sigterm_write_the_best_so_far(
    folder: Path,
    tmp_path: Path,
    small: list[object],
    monkeypatch: pytest.MonkeyPatch,
    signalled: type[BaseException],
    code: int,
    said: str,
) -> None:
    calls: list[nn.Module] = []

    def interrupted(self: TextPerplexity, model: nn.Module) -> float:
        calls.append(model)
        if len(calls) == 3:
            raise signalled
        return float(len(calls))

    monkeypatch.setattr(TextPerplexity, "__call__", interrupted)
    out = tmp_path / "plan.json"
    result = run("autotune", folder, "-o", out, "--goal", "1%", *small, "--json", code=code)
    made = json.loads(result.stdout)
    assert made["stopped"] == said
    assert made["trials"] == 1
    assert result.stderr.splitlines()[-1].startswith(f"{said}: {out} is the best so far")
    assert "--resume goes on" in result.stderr.splitlines()[-1]
    assert SmoothPlan.load(out).groups


def test_sigterm_ends_the_workers_and_keeps_their_trials(
    folder: Path, tmp_path: Path, small: list[object]
) -> None:
    out, errors = tmp_path / "plan.json", tmp_path / "stderr"
    goal = ["--goal", "0.0000001%", "--trials", 300, "--workers", 2]  # there is always more to do
    arguments = ["autotune", folder, "-o", out, *small[:-2], *goal]
    program = (
        "from sq_cpu import cli\n"
        "from sq_cpu.autotuning import latency\n"
        "latency._ROUNDS, latency._FLUSHED_BYTES = 1, 1 << 10\n"
        "if __name__ == '__main__': cli.main()"
    )
    with errors.open("w") as stderr:
        job = subprocess.Popen(
            [sys.executable, "-c", program, *map(str, arguments)],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
        )
    try:
        while errors.read_text().count("search ") < 3:
            assert job.poll() is None, errors.read_text()
            time.sleep(0.1)
        children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
        job.terminate()
        assert job.wait(timeout=60) == 143
    finally:
        job.kill()
    said = errors.read_text().splitlines()
    assert said[-1].startswith(f"terminated: {out} is the best so far")
    assert not any("Traceback" in line for line in said)
    assert SmoothPlan.load(out).groups
    assert len(children) >= 2
    deadline = time.monotonic() + 10  # multiprocessing's own helper ends after its parent
    while any(Path(f"/proc/{pid}").exists() for pid in children):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    with opened_storage(tmp_path / "plan.db") as storage:
        trials = optuna.load_study(storage=storage, study_name="autotune").trials
    finished = {trial.number for trial in trials if trial.state == TrialState.COMPLETE}
    numbers = (re.match(r"search (\d+): metric", line) for line in said)
    assert {int(number[1]) for number in numbers if number} <= finished
    assert len(finished) >= 3


def test_tasks_are_an_accuracy(
    folder: Path, tmp_path: Path, small: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def accuracy(model: nn.Module, **options: Any) -> float:
        asked.append((options["tasks"], options["limit"]))
        return 0.5 if len(asked) == 1 else 0.496

    monkeypatch.setattr(autotune_cli, "lm_eval_accuracy", accuracy)
    options = [*small[:2], *small[4:], "--tasks", "a", "--tasks", "b", "--task-limit", 7]
    made = json_of("autotune", folder, "-o", tmp_path / "plan.json", "--goal", "1%", *options)
    assert set(map(str, asked)) == {"(['a', 'b'], 7)"}
    assert made["goal_met"]
    assert made["loss"] == pytest.approx(0.008)


def test_wrong_usage_is_said_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "calibrate", None)
    out = tmp_path / "plan.json"
    assert "goal is 'much'" in error_of("autotune", folder, "-o", out, "--goal", "much")
    both = run("autotune", folder, "-o", out, "--text", out, "--tasks", "a", code=2)
    assert "two metrics" in both.stderr
    assert "--tasks" in run("autotune", folder, "-o", out, "--task-limit", 3, code=2).stderr
    assert "30m" in run("autotune", folder, "-o", out, "--time-limit", "soon", code=2).stderr
    assert "is a folder" in error_of("autotune", folder, "-o", tmp_path)
    assert "the shipped text has 20" in error_of(
        "autotune", folder, "-o", out, "--text-windows", 21
    )
    error = error_of("autotune", folder, "-o", out, "--storage", "postgresql://me@127.0.0.1:1/x")
    assert "cannot open the storage" in error
    text = tmp_path / "text.txt"
    text.write_text(OTHER)
    arguments = ["autotune", folder, "-o", out, "--window", 64, "--text", text]
    assert "give more text or ask for less" in error_of(*arguments, "--text-windows", 2000)
    error = error_of("autotune", folder, "-o", out, "--window", 4000, "--windows", 1)
    assert "shipped text are shorter than 4000 tokens" in error
    assert "--text" in error
    error = error_of("tune", folder, "-o", out, "--window", 50000)
    assert "shipped text are shorter than 50000 tokens" in error
    assert "--calib" in error
    assert sorted(tmp_path.iterdir()) == [folder, text]


@pytest.mark.parametrize(
    ("text", "seconds"), [("90", 90), ("90s", 90), ("30m", 1800), ("1.5h", 5400)]
)
def test_time_limits(text: str, seconds: float) -> None:
    assert autotune_cli._seconds(text) == seconds


def test_a_search_scores_other_text_than_the_evaluation() -> None:
    halves = texts.selection()
    assert len(halves) == len(texts.evaluation())
    for half, document in zip(halves, texts.evaluation(), strict=True):
        assert document.endswith(half)
        # 512 tokens of a document's beginning, at 6 characters each, do not reach it.
        assert len(document) - len(half) > 6 * 512


def test_perplexities_of_more_and_more_windows() -> None:
    model, tokenizer = byte_model(), byte_tokenizer()
    running: Iterator[float] = TextPerplexity(tokenizer, TEXT, 64, 4)(model)
    values = list(running)
    assert len(values) == 4
    assert values[-1] == sq_cpu.perplexity(model, tokenizer, TEXT, window=64, windows=4)
