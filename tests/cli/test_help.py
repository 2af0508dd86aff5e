"""The help of `sq-cpu`: the same with torch and without, where it comes at once."""

import json
import subprocess
import sys

import pytest
import sq_cpu_help
from typer.testing import CliRunner

import sq_cpu
from sq_cpu.cli import app
from sq_cpu.cli.described import FILE, described

COMMANDS = list(json.loads(FILE.read_text(encoding="utf-8")))
ASKED = [[], ["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
LOADED = """
import sys
from sq_cpu_command import main
sys.argv[1:] = {arguments}
try:
    main()
except SystemExit:
    print([name for name in ("sq_cpu", "torch", "transformers") if name in sys.modules])
"""


def shown(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[str, object]:
    with pytest.raises(SystemExit) as ended:
        sq_cpu_help.answer(arguments)
    captured = capsys.readouterr()
    return captured.out + captured.err, ended.value.code


def test_the_description_is_that_of_the_commands() -> None:
    assert FILE.read_text(encoding="utf-8") == described(), "run: python -m sq_cpu.cli.described"


@pytest.mark.parametrize("arguments", ASKED, ids=" ".join)
def test_it_is_the_help_of_the_commands(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "130")
    real = CliRunner().invoke(app, arguments, prog_name="sq-cpu")
    assert shown(arguments, capsys) == (real.output, real.exit_code)


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(["--version"], capsys) == (f"sq-cpu {sq_cpu.__version__}\n", 0)


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quantize", "--help"]])
def test_torch_is_not_imported_for_it(arguments: list[str]) -> None:
    program = LOADED.format(arguments=arguments)
    done = subprocess.check_output([sys.executable, "-W", "error", "-c", program], text=True)
    assert done.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "arguments",
    [["info"], ["nothing", "--help"], ["eval", "OUT", "--help"], ["run", "m", "--help"]],
)
def test_what_is_not_help_goes_to_the_commands(arguments: list[str]) -> None:
    sq_cpu_help.answer(arguments)
