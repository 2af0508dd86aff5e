"""`sq-cpu run`: programs that never import sq_cpu load our folders, by real ones."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from byte_models import save_float
from command_line import error_of, run
from transformers import AutoModelForCausalLM, AutoTokenizer

import sq_cpu
from sq_cpu.cli.module import _is_runnable

COMMAND = [sys.executable, "-c", "from sq_cpu_command import main; main()"]
OFFLINE = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
OFFLINE.pop("PYTHONSAFEPATH", None)  # with it, the current folder is not looked in

# As somebody wrote it who knows transformers alone.
SCRIPT = """
import sys

import transformers

model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
print("int8" if hasattr(model, "sq_cpu_config") else "float", *sys.argv[2:])
sys.exit(int(sys.argv[-1]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("run")
    save_float(path / "float")
    model = AutoModelForCausalLM.from_pretrained(path / "float")
    sq_cpu.quantize(model, scheme="O1", smooth=False, progress=False)
    tokenizer = AutoTokenizer.from_pretrained(path / "float")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    return sq_cpu.save(model, path / "out", tokenizer)


def command(*arguments: object, cwd: Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "run", *map(str, arguments)],
        cwd=cwd,
        env=OFFLINE,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def test_a_module_of_the_current_folder(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(SCRIPT)
    done = command("theirs", folder, "--help", "-x", "3", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (3, "int8 --help -x 3\n"), done.stderr


def test_what_can_be_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sq_cpu_with_main").mkdir()
    (tmp_path / "sq_cpu_with_main" / "__main__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("json.tool", "pytest", "sq_cpu_with_main"):
        assert _is_runnable(name)
    for name in ("json", "json.", ".", "no_such_thing.part"):
        assert not _is_runnable(name)


def test_an_error_of_ours_is_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.py").write_text(SCRIPT)
    sq_cpu.save(sq_cpu.load(folder), tmp_path / "bad")
    content = json.loads((tmp_path / "bad/config.json").read_text())
    content["quantization_config"]["format_version"] = 99
    (tmp_path / "bad/config.json").write_text(json.dumps(content))
    done = command("theirs", tmp_path / "bad", "0", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "upgrade sq_cpu" in done.stderr


@pytest.mark.parametrize("name", ["no_such_thing", "json.", "..", "a.b"])
def test_what_is_not_there(name: str) -> None:
    assert f"no module {name} that can be run" in error_of("run", name)


def test_help_says_how() -> None:
    assert "lm_eval" in run("run", "--help").stdout


def test_lm_eval(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("lm_eval")
    (tmp_path / "task.yaml").write_text(
        f"""task: tiny
dataset_path: json
dataset_kwargs:
  data_files: {tmp_path / "data.json"}
test_split: train
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["yes", "no"]
doc_to_target: 0
metric_list:
  - metric: acc
"""
    )
    (tmp_path / "data.json").write_text('[{"question": "is it?"}, {"question": "or not?"}]')
    arguments = ("--model", "hf", "--model_args", f"pretrained={folder}", "--tasks", "tiny")
    arguments += ("--include_path", str(tmp_path), "--output_path", str(tmp_path / "results"))
    done = command("lm_eval", *arguments, "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (path,) = (tmp_path / "results").rglob("*.json")
    assert 0 <= json.loads(path.read_text())["results"]["tiny"]["acc,none"] <= 1
    stock = [sys.executable, "-m", "lm_eval", *arguments, "--device", "cpu"]
    refused = subprocess.run(
        stock, cwd=tmp_path, env=OFFLINE, capture_output=True, text=True, check=False
    )
    assert refused.returncode != 0


def test_transformers_serve(folder: Path, tmp_path: Path) -> None:
    # A command: the package has no __main__.
    pytest.importorskip("fastapi")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [*COMMAND, "run", "transformers", "serve", "--port", str(port), "--device", "cpu"],
        cwd=tmp_path,
        env=OFFLINE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    body = {
        "model": str(folder),
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 4,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    try:
        for _ in range(120):
            try:
                with urllib.request.urlopen(request, timeout=60) as answer:
                    content = json.loads(answer.read())
                break
            except urllib.error.HTTPError as error:
                pytest.fail(error.read().decode())
            except OSError:
                assert server.poll() is None, server.stdout and server.stdout.read()
                time.sleep(0.5)
        else:
            pytest.fail("it did not answer")
        assert content["choices"][0]["message"]["content"] is not None
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        assert server.stdout is not None
        server.stdout.close()
