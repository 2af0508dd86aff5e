"""The pool of threads stays as it is: no op of ours starts a thread or ends one, nor torch's after.

libgomp ends the threads that a region leaves over and creates them again for the next one; a model
that alternates between layers of different sizes would pay for that at every layer.
"""

import ctypes.util
import importlib.metadata
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import sq_cpu
from sq_cpu.kernels import _core
from sq_cpu.kernels.attention import matmul_qk

POOL_STAYS = """
import os
import torch
from torch import nn
import sq_cpu
from sq_cpu.kernels.attention import matmul_qk

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


# Every op in a forked child and in one that multiprocessing forks, after the parent's pool is up.
# Of torch's own ops, only those that stay on one thread: the others hang there.
FORK = """
import multiprocessing
import os
import signal
import threading
import torch
from torch import nn
import sq_cpu
from sq_cpu.kernels.attention import matmul_pv, matmul_qk

torch.manual_seed(0)
torch.set_num_threads(4)
torch.set_grad_enabled(False)
layers = [
    sq_cpu.QuantLinear.from_float(nn.Linear(k, n), sq_cpu.Scheme(activations=each), (-1.0, 1.0))
    for k, n in ((64, 64), (700, 900)) for each in ("per_token", "per_tensor", "static")
]
inputs = {(m, k): torch.randn(m, k) for m in (1, 33, 130) for k in (64, 700)}
queries, keys = (torch.randint(-128, 128, (1, 4, 200, 64), dtype=torch.int8) for _ in range(2))
values = keys.mT.contiguous()

def results():
    found = []
    for layer in layers:
        for rows in (1, 33, 130):
            x = inputs[rows, layer.in_features]
            q = layer.quantize_input(x)
            found += [layer(x), layer(x, activation="silu"), layer(q), q.scale]
            found += [torch.tensor(layer.count_saturation(q))]
        twin = sq_cpu.QuantLinear(layer.in_features, layer.out_features, layer.scheme, bias=True)
        twin.load_state_dict(layer.state_dict())
        found += list(twin.state_dict().values())
    found.append(layers[2](layers[2].forward_int8(inputs[130, 64], layers[2])))
    found += [matmul_qk(queries, keys), matmul_pv(queries, values)]
    return [each.numpy().tobytes() for each in found]

expected = results()

def work():
    return results() == expected and sq_cpu.isa()["threads"] == 1

def forked():
    child = os.fork()
    if child == 0:
        signal.alarm(100)  # ends one that waits
        os._exit(0 if work() else 1)
    return os.waitpid(child, 0)[1]

assert forked() == 0
busy = [threading.Thread(target=results) for _ in range(2)]  # and while others run theirs
for thread in busy:
    thread.start()
for _ in range(3):
    assert forked() == 0
for thread in busy:
    thread.join()
with multiprocessing.get_context("fork").Pool(2) as pool:
    assert pool.starmap_async(work, [()] * 4).get(timeout=100) == [True] * 4
assert sq_cpu.isa()["threads"] == 4 and results() == expected
print("equal")
"""


def _max_threads() -> int:
    """Return the calling thread's count, from the runtime that the extension's calls reach.

    Other packages may have loaded runtimes of their own beside torch's.
    """
    return int(ctypes.CDLL(None).omp_get_max_threads())


def _ops() -> dict[str, Callable[[], object]]:
    linear = sq_cpu.QuantLinear.from_float(nn.Linear(64, 32), sq_cpu.Scheme())
    static = sq_cpu.Scheme(activations="static")
    after = sq_cpu.QuantLinear.from_float(nn.Linear(32, 8), static, (-1.0, 1.0))
    x = torch.randn(3, 64)
    quantized = linear.quantize_input(x)
    q = torch.randint(-128, 128, (1, 2, 3, 64), dtype=torch.int8)
    weight, scale, packed = linear.weight_int8(), torch.ones(32), torch.empty_like(linear.packed)
    return {
        "linear_tensor": lambda: linear(x),
        "linear": lambda: linear(x, activation="relu"),
        "quantize_activations": lambda: linear.quantize_input(x),
        "linear_quantized": lambda: linear(quantized),
        "linear_requantized": lambda: linear.forward_int8(quantized, after),
        "pack_weight": lambda: _core.pack_weight(weight, scale, None, packed),
        "unpack_weight": linear.weight_int8,
        "count_saturation": lambda: linear.count_saturation(x),
        "batched_matmul": lambda: matmul_qk(q, q),
        "isa": _core.isa,
    }


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


def test_a_forked_child_runs_alone_and_gives_the_same_bits(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", FORK],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        timeout=300,
    )
    assert (result.returncode, result.stdout) == (0, "equal\n"), result.stderr


@pytest.mark.parametrize("op", list(_ops()))
def test_every_op_runs_on_torchs_thread_count(threads: Callable[[int], None], op: str) -> None:
    """torch sets OpenMP's count for a thread only when it is asked: a new thread has another."""
    threads(1)
    run = _ops()[op]
    threads(5)
    counts: list[int] = []

    def work() -> None:
        with torch.no_grad():
            run()
        counts.append(_max_threads())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert counts == [5]
