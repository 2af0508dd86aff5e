"""What works without the optional dependencies, and what the rest says."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from byte_models import save_float

PROGRAM = """
import json, sys

for module in ("optuna", "matplotlib", "jinja2", "markupsafe", "gguf", "fastapi"):
    sys.modules[module] = None  # its import fails

import sq_cpu
import sq_cpu.analysis.analysis, sq_cpu.analysis.saturation
from typer.testing import CliRunner
from sq_cpu import cli

results = []
for arguments in json.loads(sys.argv[1]):
    result = CliRunner().invoke(cli.app, arguments)
    results.append([result.exit_code, result.stdout, result.stderr])
print(json.dumps(results))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of commands in a process without the optional modules."""
    folder = tmp_path_factory.mktemp("extras")
    model = str(save_float(folder / "float"))
    gguf = folder / "model.gguf"
    gguf.write_bytes(b"GGUF")
    out, page = str(folder / "plan.json"), str(folder / "report.html")
    commands: dict[str, list[str]] = {
        "info": ["info"],
        "help": ["quantize", "--help"],
        "autotune": ["autotune", model, "-o", out],
        "goal": ["tune", model, "-o", out, "--goal", "1%"],
        "report": ["inspect", model, "--report", page],
        "gguf": ["eval", str(gguf)],
        "serve": ["serve", model],
    }
    made = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM, json.dumps(list(commands.values()))],
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr
    assert sorted(path.name for path in Path(folder).iterdir()) == ["float", "model.gguf"]
    found: list[Any] = json.loads(made.stdout.splitlines()[-1])
    return dict(zip(commands, found, strict=True))


@pytest.mark.parametrize("command", ["info", "help"])
def test_what_needs_no_extra_works(results: dict[str, tuple[int, str, str]], command: str) -> None:
    code, shown, _ = results[command]
    assert code == 0
    assert shown


@pytest.mark.parametrize(
    ("command", "module", "extra"),
    [
        ("autotune", "optuna", "tune"),
        ("goal", "optuna", "tune"),
        ("report", "matplotlib", "report"),
        ("gguf", "gguf", "gguf"),
        ("serve", "fastapi", "serve"),
    ],
)
def test_what_needs_one_names_it(
    results: dict[str, tuple[int, str, str]], command: str, module: str, extra: str
) -> None:
    code, shown, said = results[command]
    assert (code, shown) == (1, "")
    line = f"error: {module} is not installed: pip install 'sq_cpu[{extra}]'"
    assert said.splitlines()[-1] == line
    assert "Traceback" not in said
