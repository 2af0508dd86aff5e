"""What is installed loads where torch's own wheels do: nothing newer, nothing else linked."""

import platform
import subprocess
from pathlib import Path

import pytest
from binaries import OURS, faults

from sq_cpu.kernels import _core

EXTENSION = Path(_core.__file__)
BINARIES = (EXTENSION, EXTENSION.parent / "lib" / OURS)
GLIBC = tuple(map(int, platform.libc_ver()[1].split(".")))
NEWER = pytest.mark.skipif(GLIBC < (2, 34), reason="glibc has nothing that is newer")


@pytest.mark.parametrize("binary", BINARIES, ids=lambda path: path.name.partition(".")[0])
def test_it_asks_no_more_than_manylinux_2_28(binary: Path) -> None:
    assert faults(binary) == []


def test_there_is_no_other_binary() -> None:
    package = EXTENSION.parent.parent
    assert sorted(package.rglob("*.so*")) == sorted(BINARIES)


@pytest.mark.parametrize(
    ("options", "found"),
    [
        ([], []),
        (["-Wl,-rpath,$ORIGIN/lib:/opt/lib"], ["looks for libraries in /opt/lib"]),
        (["-Wl,-z,execstack"], ["has an executable stack"]),
        (["-Wl,--no-as-needed", "-fopenmp"], ["is linked with libgomp.so.1"]),
        pytest.param(["-DNEWER"], ["needs GLIBC_2.34"], marks=NEWER),
    ],
    ids=["sound", "rpath", "stack", "openmp", "glibc"],
)
def test_faults_are_found(options: list[str], found: list[str], tmp_path: Path) -> None:
    source, binary = tmp_path / "source.c", tmp_path / "library.so"
    source.write_text(
        "#ifdef NEWER\n"
        '__asm__(".symver begin, __libc_start_main@GLIBC_2.34");\n'
        "void begin(void);\nvoid use(void) { begin(); }\n"
        "#endif\n"
    )
    subprocess.run(["cc", "-shared", "-fPIC", "-o", binary, source, *options], check=True)
    assert faults(binary) == found
