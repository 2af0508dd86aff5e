"""The pool of threads stays as it is: no op of ours starts a thread or ends one, nor torch's after.

libgomp ends the threads that a region leaves over and creates them again for the next one; a model
that alternates between layers of different sizes would pay for that at every layer.
"""

import ctypes.util
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

import pytest

POOL_STAYS = """
import os
import torch
from torch import nn
import sq_cpu
from sq_cpu.attention import matmul_qk

torch.set_num_threads(4)

def threads():
    return set(os.listdir("/proc/self/task"))

def layer(inputs, outputs, activations="per_token"):
    scheme = sq_cpu.Scheme(activations=activations)
    return sq_cpu.QuantLinear.from_float(nn.Linear(inputs, outputs), scheme)

def runs(linear, rows):
    x = torch.randn(rows, linear.in_features)
    return lambda: linear(x)

def attention(queries):
    q = torch.randint(-128, 128, (1, 4, queries, 64), dtype=torch.int8)
    k = torch.randint(-128, 128, (1, 4, 200, 64), dtype=torch.int8)
    return lambda: matmul_qk(q, k)

with torch.no_grad():
    large, some, tiny = layer(1024, 1024), layer(576, 576), layer(64, 8)
    per_tensor = layer(1024, 64, "per_tensor")
    ours = [
        runs(large, 64), runs(tiny, 1), runs(large, 1), runs(some, 1), runs(some, 64),
        runs(per_tensor, 600), attention(1), attention(64),
        lambda: large.quantize_input(torch.randn(600, 1024)),
        lambda: layer(512, 512),  # packs
    ]
    a = torch.randn(256, 256)
    b = torch.randn(200_000)
    for op in ours:  # torch's own pools as well
        op(), a @ a, torch.relu(b)
    before = threads()
    changes = 0
    for first in ours:
        for second in ours:
            first(), second(), a @ a, torch.relu(b)
            changes += threads() != before
runtimes = {line.split()[-1] for line in open("/proc/self/maps")
            if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
print(len(before), changes, " ".join(sorted(os.path.basename(r) for r in runtimes)))
"""


def _libiomp5() -> str | None:
    """Find Intel's runtime: in the package intel-openmp, else where the loader looks."""
    try:
        files = importlib.metadata.files("intel-openmp") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name == "libiomp5.so":
            return str(Path(str(file.locate())).resolve())
    return ctypes.util.find_library("iomp5")


@pytest.mark.parametrize("runtime", ["torch's", "libiomp5"])
def test_no_op_starts_or_ends_a_thread(runtime: str, tmp_path: Path) -> None:
    environment = dict(os.environ)
    if runtime == "libiomp5":
        library = _libiomp5()
        if library is None:
            pytest.skip("no libiomp5: pip install intel-openmp")
        environment["LD_PRELOAD"] = library
    result = subprocess.run(
        [sys.executable, "-c", POOL_STAYS],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
        env=environment,
    )
    threads, changes, loaded = result.stdout.split(maxsplit=2)
    assert int(threads) >= 4, result.stdout
    assert runtime != "libiomp5" or "libiomp5" in loaded, result.stdout
    assert int(changes) == 0, "calls after which the process had other threads"
