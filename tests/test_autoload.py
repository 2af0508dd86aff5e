"""autoload/: an entry point of torch that brings sq_cpu to programs that do not import it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import tiny_model

import sq_cpu

ROOT = Path(__file__).resolve().parent.parent
LOAD = """
import sys, torch
assert not {"sq_cpu", "transformers"} & set(sys.modules)
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(type(model.model.layers[0].mlp.up_proj).__name__)
"""


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """What installing autoload/ puts into site-packages."""
    site = tmp_path / "site"
    info = site / "sq_cpu_autoload-0.1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: sq_cpu_autoload\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(
        "[torch.backends]\nsq_cpu_autoload = sq_cpu_autoload:watch\n"
    )
    (site / "sq_cpu_autoload.py").write_text((ROOT / "autoload/sq_cpu_autoload.py").read_text())
    return site


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = sq_cpu.quantize(tiny_model("llama"), smooth=False, progress=False)
    return sq_cpu.save(model, tmp_path_factory.mktemp("autoload") / "out")


def run(program: str, *arguments: object, site: Path, **more: str) -> subprocess.CompletedProcess:
    paths = [str(site), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"} | more
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", program, *map(str, arguments)],
        cwd=site,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_what_its_pyproject_says() -> None:
    text = (ROOT / "autoload" / "pyproject.toml").read_text()
    assert '[project.entry-points."torch.backends"]\nsq_cpu_autoload = "sq_cpu_autoload:w' in text


def test_a_program_that_does_not_import_sq_cpu(site: Path, folder: Path) -> None:
    done = run(LOAD, folder, site=site)
    assert (done.returncode, done.stdout) == (0, "QuantLinear\n"), done.stderr


def test_turned_off(site: Path, folder: Path) -> None:
    done = run(LOAD, folder, site=site, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0
    assert "ismatch" in done.stderr


def test_a_broken_sq_cpu_harms_nothing(site: Path) -> None:
    (site / "sq_cpu").mkdir()
    (site / "sq_cpu" / "__init__.py").write_text("raise OSError('no such processor')\n")
    program = "import torch; from transformers import LlamaConfig, LlamaForCausalLM as L; print(1)"
    done = run(program, site=site)
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr
    assert "int8 models of sq_cpu cannot be loaded: no such processor" in done.stderr
