"""A model that torch compiled ahead of time runs in a C++ program without Python."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sq_cpu import QuantLinear, Scheme
from sq_cpu.kernels import _core

TORCH = Path(torch.__file__).parent
COMPILER = os.environ.get("CXX") or shutil.which("c++")


class Block(nn.Module):
    """Two int8 linears, one smoothed and one rotated, with a step between."""

    def __init__(self) -> None:
        super().__init__()
        scales = torch.rand(128) + 0.5
        self.up = QuantLinear.from_float(nn.Linear(128, 96), Scheme(), smoothing=scales)
        self.down = QuantLinear.from_float(nn.Linear(96, 40), Scheme(), hadamard=64)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(torch.relu(self.up(x)))
        return y


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_package_gives_the_same_from_python_and_from_a_cpp_program(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Block()
    rows = torch.export.Dim("rows", min=1, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(4, 128),), dynamic_shapes=({0: rows},))
        package = torch._inductor.aoti_compile_and_package(
            program,
            package_path=str(tmp_path / "model.pt2"),
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
        loaded = torch._inductor.aoti_load_package(package)
        for m in (1, 4, 33):
            x = torch.randn(m, 128)
            assert torch.equal(loaded(x), model(x))
        model(x).numpy().tofile(tmp_path / "y")
    x.numpy().tofile(tmp_path / "x")

    main = tmp_path / "main"
    includes = [f"-isystem{TORCH / 'include' / part}" for part in ("", "torch/csrc/api/include")]
    libraries = [f"-L{TORCH / 'lib'}", f"-Wl,-rpath,{TORCH / 'lib'}", "-Wl,--no-as-needed"]
    source = Path(__file__).parent / "aoti/main.cc"
    command = [COMPILER, "-std=c++20", "-O0", *includes, source, "-o", main, *libraries]
    subprocess.run([*command, "-ltorch", "-ltorch_cpu", "-lc10", "-ldl"], check=True)
    library = Path(_core.__file__).parent / "lib/libsq_cpu_torch.so"
    run = subprocess.run(
        [main, package, library, str(m), tmp_path / "x", tmp_path / "y"],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout == "bit for bit what Python gave, without Python\n"
