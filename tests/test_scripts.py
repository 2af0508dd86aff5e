"""The scripts: sound bash, and one line that names the fix where a tool is missing."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = [
    *("scripts/quickstart", "scripts/test", "scripts/test-oldest", "scripts/ipex", "scripts/docs"),
    "scripts/wheels",
    ".ci/run",
]


@pytest.mark.parametrize("name", SCRIPTS)
def test_is_executable_bash(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def fails_with(folder: Path, **environment: str) -> str:
    """Run quickstart from another folder, in a bare environment; return its one line."""
    result = subprocess.run(
        ["/bin/bash", ROOT / "scripts" / "quickstart"],
        cwd=folder,
        env={"SQ_CPU_VENV": str(folder / "venv"), "HOME": str(folder), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert not (folder / "venv").exists()
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_no_python(tmp_path: Path) -> None:
    line = fails_with(tmp_path, PATH=os.environ["PATH"], PYTHON="python-none")
    assert "python-none not found" in line


def test_old_python(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.1" || exit 1\n')
    old.chmod(0o755)
    line = fails_with(tmp_path, PATH=os.environ["PATH"], PYTHON=str(old))
    assert "Python 3.9.1 is too old" in line


def test_no_compiler(tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "dirname").symlink_to(str(shutil.which("dirname")))
    line = fails_with(tmp_path, PATH=str(tools), PYTHON=sys.executable)
    assert "no C++ compiler" in line
