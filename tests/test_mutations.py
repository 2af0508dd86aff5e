"""The C++ tests notice a broken kernel: each deliberate break makes them fail.

A break is an exact piece of source text and what replaces it. When the source changes, so does the
row: a text that does not occur exactly once is an error.
"""

import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# What a build of the C++ tests needs; pyproject.toml holds the version.
SOURCES = ["CMakeLists.txt", "pyproject.toml", "cmake", "cpp", "tests/cpp"]


@dataclass(frozen=True)
class Break:
    name: str
    file: str
    text: str
    replacement: str


BREAKS = [
    Break(
        "zero-point sign",
        "cpp/rows.h",
        "load_bits<U32>(c + index * kLanes) - at.correction",
        "load_bits<U32>(c + index * kLanes) + at.correction",
    ),
    Break(
        "tail mask",
        "cpp/rows.h",
        "std::memcpy(y, &value, count * (sizeof value / kLanes));",
        "std::memcpy(y, &value, (count + 1) * (sizeof value / kLanes));",
    ),
    Break(
        "K padding",
        "cpp/pack.cc",
        "std::memset(strip, 0, strip_bytes(k));",
        "",
    ),
]


def run(*command: str | Path) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


class Tree:
    """A copy of the C++ sources, with a build folder that is reused."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.build = folder / "build"
        for name in SOURCES:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name)
            else:
                shutil.copy(ROOT / name, folder / name)
        run("cmake", "-S", folder, "-B", self.build, "-G", "Ninja", "-DSQ_CPU_BUILD_TESTS=ON")

    def passes(self) -> bool:
        """Build and run; a source that no longer compiles is an error, not a noticed break."""
        run("cmake", "--build", self.build, "--target", "test_kernels")
        program = self.build / "tests" / "cpp" / "test_kernels"
        result = subprocess.run([program], capture_output=True, timeout=300, check=False)
        return result.returncode == 0


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = Tree(tmp_path_factory.mktemp("tree"))
    assert tree.passes()
    return tree


@pytest.mark.slow
@pytest.mark.parametrize("broken", BREAKS, ids=lambda b: b.name)
def test_break_is_noticed(tree: Tree, broken: Break) -> None:
    file = tree.folder / broken.file
    source = file.read_text()
    assert source.count(broken.text) == 1, f"adapt the row to {broken.file}"
    file.write_text(source.replace(broken.text, broken.replacement))
    try:
        assert not tree.passes()
    finally:
        file.write_text(source)
