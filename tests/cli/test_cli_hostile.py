"""What is hostile, broken or sudden: one line, and exit codes that say which."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from byte_models import save_float
from command_line import error_of, run

_MAIN = "from sq_cpu_command import main; main()"


def _unwrapped(shown: str) -> str:
    return " ".join(shown.replace("│", " ").split())


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("generate", "--seed"),
        ("generate", "--max-new-tokens"),
        ("eval", "--windows"),
        ("eval", "--window"),
        ("quantize", "--rows-per-scale"),
        ("tune", "--outliers"),
        ("autotune", "--seed"),
        ("autotune", "--tokens"),
        ("inspect", "--window"),
    ],
)
@pytest.mark.parametrize("number", [10**20, 2**63, 10**400])
def test_numbers_beyond_64_bits(command: str, option: str, number: int, tmp_path: Path) -> None:
    more = {"generate": ["Hello"], "inspect": [], "eval": []}.get(command, ["-o", tmp_path / "x"])
    result = run(command, "model", *more, option, number, code=2)
    assert "which is beyond 64 bits" in _unwrapped(result.stderr)
    assert not list(tmp_path.iterdir())


def test_floats_that_are_no_numbers() -> None:
    run("generate", "model", "Hello", "--temperature", "nan", code=2)
    result = run("generate", "model", "Hello", "--temperature", "inf", code=2)
    assert "not a finite number" in _unwrapped(result.stderr)


def test_a_prompt_that_is_not_text() -> None:
    assert "not UTF-8" in run("generate", "model", "\udcff\udcfe", code=2).stderr


def test_escape_sequences_are_shown_not_sent(folder: Path, tmp_path: Path) -> None:
    name = "a\x1b]0;title\x07\x1b[31m"
    assert r"a\x1b]0;title\x07\x1b[31m" in error_of("eval", tmp_path / name)
    (tmp_path / name).symlink_to(folder)
    result = run("quantize", tmp_path / name, "-o", tmp_path / f"{name}8", "--no-smooth")
    assert "\x1b" not in result.stdout + result.stderr
    assert "\x1b" not in run("inspect", tmp_path / f"{name}8").stdout
    plan = tmp_path / "plan.json"
    plan.write_text('{"groups": [{"name": "\\u001b[31m\\ud800"}]}')
    error = error_of("quantize", folder, "-o", tmp_path / "x", "--plan", plan, "--windows", 1)
    assert r"\x1b[31m\ud800" in error


@pytest.mark.parametrize(
    ("signum", "code", "word"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
@pytest.mark.parametrize("when", ["imports", "parsing"])
def test_a_signal_before_the_command(signum: int, code: int, word: str, when: str) -> None:
    """It arrives while a module is imported, or while the arguments are parsed."""
    at = {
        "imports": "sys.addaudithook(lambda name, values: name == 'import' and values[0] == 'torch'"
        " and hit())",
        "parsing": "from sq_cpu.cli import entry\n"
        "parse = entry.Command.parse_args\n"
        "entry.Command.parse_args = lambda *values: (hit(), parse(*values))[1]",
    }[when]
    program = (
        "import os, sys\n"
        f"hit = lambda: os.kill(os.getpid(), {int(signum)})\n"
        f"signal = __import__('signal'); signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"{at}\n{_MAIN}"
    )
    ended = subprocess.run(
        [sys.executable, "-c", program, "info"], capture_output=True, text=True, check=False
    )
    assert ended.returncode == code, ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stderr.splitlines()[-1] == f"error: {word}"


def test_outputs_that_are_no_files(folder: Path, tmp_path: Path) -> None:
    before = os.stat("/dev/null")
    small = ["--window", 32, "--windows", 2]
    run("tune", folder, "-o", "/dev/null", *small)
    assert os.path.samestat(before, os.stat("/dev/null"))
    assert "is a file" in error_of("quantize", folder, "-o", "/dev/null", "--no-smooth")
    assert "cannot write /dev/full" in error_of("tune", folder, "-o", "/dev/full", *small)
    assert "no regular file" in error_of(
        "autotune", folder, "-o", tmp_path / "plan.json", "--storage", "/dev/null"
    )


def test_the_second_run_is_refused_at_its_start(tmp_path: Path) -> None:
    folder = save_float(tmp_path / "float")
    fifo = tmp_path / "text"
    os.mkfifo(fifo)  # the first run waits for its text
    arguments = ["tune", str(folder), "-o", str(tmp_path / "plan.json"), "--calib", str(fifo)]
    first = subprocess.Popen([sys.executable, "-c", _MAIN, *arguments], stderr=subprocess.PIPE)
    try:
        while not (tmp_path / ".plan.json.sq_cpu.lock").exists():
            assert first.poll() is None
            time.sleep(0.1)
        assert "another process is to write" in error_of(*arguments)
    finally:
        first.terminate()
        first.communicate()
    assert first.returncode == 143
    assert sorted(os.listdir(tmp_path)) == ["float", "text"]
