"""The C++ tests notice a broken library: each deliberate break makes one of them fail.

A break is an exact piece of source text and what replaces it (breaks.py). When the source changes,
so does the row: a text that does not occur exactly once is an error.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from breaks import BREAKS, MISFITS, Break, Misfit

from sq_cpu.kernels import _core

ROOT = Path(__file__).resolve().parent.parent
# What a build of the C++ tests needs; pyproject.toml holds the version.
SOURCES = ["CMakeLists.txt", "pyproject.toml", "cmake", "cpp", "tests/cpp"]

# Arguments that keep a program short: a part of its fuzz.
ARGUMENTS = {
    "test_hostile": ["0", "300"],
    "test_kernels": ["1", "150"],
    "test_linear": ["1", "300"],
    "test_program": ["reference"],
}


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


class Tree:
    """A copy of the C++ sources, and its build: a break rebuilds what includes its file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.build = folder / "build"
        self.sound: set[str] = set()
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name)
            else:
                shutil.copy(ROOT / name, folder / name)
        options = ["-DSQ_CPU_BUILD_TESTS=ON", "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
        # Building is most of the time; unoptimized programs would be slow in turn.
        options += ["-DCMAKE_BUILD_TYPE=None", "-DCMAKE_CXX_FLAGS=-O1"]
        run("cmake", "-S", folder, "-B", self.build, "-G", "Ninja", *options)

    def passes(self, test: str) -> bool:
        """Build and run; a source that no longer compiles is an error, not a noticed break."""
        run("cmake", "--build", self.build, "--target", test)
        program = self.build / "tests" / "cpp" / test
        result = subprocess.run(
            [program, *ARGUMENTS.get(test, [])],
            capture_output=True,
            timeout=300,
            check=False,
            env=os.environ | {"OMP_WAIT_POLICY": "passive", "SQ_CPU_FAIL_FAST": "1"},
        )
        return result.returncode == 0

    @contextmanager
    def broken(self, row: Break | Misfit) -> Iterator[None]:
        """Break a file; afterwards it is as before, to its times, and so is what was built."""
        file, saved = self.folder / row.file, self.folder / "saved"
        source, times = file.read_text(), file.stat()
        assert source.count(row.text) == 1, f"adapt the row to {file.name}"
        shutil.copytree(self.build, saved, symlinks=True)
        file.write_text(source.replace(row.text, row.replacement))
        try:
            yield
        finally:
            file.write_text(source)
            os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))
            shutil.rmtree(self.build)
            saved.rename(self.build)

    def check_sound(self, name: str) -> None:
        """Assert once that a test passes, or that a source compiles, when nothing is broken."""
        if name in self.sound:
            return
        assert self.diagnose(name) == "" if name.endswith(".cc") else self.passes(name)
        self.sound.add(name)

    def diagnose(self, file: str) -> str:
        """Compile a file for its errors alone."""
        commands = json.loads((self.build / "compile_commands.json").read_text())
        [entry] = [each for each in commands if each["file"] == str(self.folder / file)]
        result = subprocess.run(
            entry["command"] + " -fsyntax-only",
            shell=True,  # as the build would run it
            cwd=entry["directory"],
            capture_output=True,
            text=True,
            check=False,
        )
        return result.stderr if result.returncode else ""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    return Tree(tmp_path_factory.mktemp("tree"))


def runs_here(isa: str) -> bool:
    """Say whether the C++ tests run an ISA's kernels; AMX they emulate."""
    status = _core.isa()["isas"][isa]
    return bool(status["usable"] or (isa == "amx_int8" and status["built"]))


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.name)
def test_break_is_noticed(tree: Tree, broken: Break) -> None:
    if broken.isa is not None and not runs_here(broken.isa):
        pytest.skip(f"{broken.isa}: {_core.isa()['isas'][broken.isa]['reason']}")
    tree.check_sound(broken.noticed_by)
    with tree.broken(broken):
        assert not tree.passes(broken.noticed_by)


@pytest.mark.slow
@pytest.mark.parametrize("misfit", MISFITS, ids=lambda m: m.name)
def test_misfit_does_not_compile(tree: Tree, misfit: Misfit) -> None:
    tree.check_sound(misfit.compiled)
    with tree.broken(misfit):
        errors = tree.diagnose(misfit.compiled)
    assert "static assertion failed" in errors
    assert misfit.error in errors
