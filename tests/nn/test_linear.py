"""QuantLinear: the kernels against the plain-torch reference, and an nn.Module's ordinary life."""

import copy
import ctypes
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from quant_linears import DTYPES, SCHEMES, describe, make
from torch import nn

import sq_cpu
from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels import _core
from sq_cpu.nn.packed_weight import PackedWeight
from sq_cpu.nn.reference import linear_reference
from sq_cpu.numerics.rounding import quantize_weight, static_code


@pytest.fixture(autouse=True)
def _inference() -> Any:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_quantize_weight_gives_the_published_codes() -> None:
    weight = torch.tensor([[0.0806, 0.7589, 0.6038], [0.3815, 0.5040, 0.7174]])
    codes, scale = quantize_weight(weight, "per_tensor")
    assert codes.tolist() == [[13, 127, 101], [64, 84, 120]]
    assert torch.allclose(scale, torch.tensor(0.7589 / 127))


def test_the_published_integer_product(each_isa: str) -> None:
    weight = torch.tensor([[13, 127, 101], [64, 84, 120]], dtype=torch.int8)
    x = torch.tensor(
        [
            [0.5444, 0.5826, 0.7772, 0.5555],
            [0.3740, 0.3253, 0.0698, 0.1381],
            [0.5972, 0.0086, 0.0737, 0.8298],
        ]
    ).T.contiguous()
    quantizer = _core.ActivationQuantizer(_core.Granularity.per_tensor, True, False)
    codes = torch.zeros(4, 64, dtype=torch.uint8)
    scale, zero_point = torch.zeros(4), torch.zeros(4, dtype=torch.int32)
    _core.quantize_activations(x, 3, quantizer, codes, scale, zero_point)
    assert (codes[:, :3].int() - zero_point[:, None]).T.tolist() == [
        [83, 89, 119, 85],
        [57, 50, 11, 21],
        [91, 1, 11, 127],
    ]
    packed = PackedWeight.zeros(2, 3)
    packed.pack(weight, torch.ones(2), None)
    y = torch.zeros(4, 2, dtype=torch.int32)
    _core.gemm(codes, zero_point, 255, packed.buffer, 2, 3, y)
    assert y.T.tolist() == [[17509, 7608, 4055, 16599], [21020, 10016, 9860, 22444]]


def test_quantize_weight_is_within_half_a_step_and_never_minus_128() -> None:
    weight = torch.randn(33, 65) * torch.logspace(-20, 20, 33)[:, None]
    codes, scale = quantize_weight(weight)
    assert codes.abs().max() == 127
    assert codes.min() >= -127
    assert ((codes * scale[:, None] - weight).abs() <= scale[:, None] * 0.5001).all()


def test_quantize_weight_by_groups_of_rows() -> None:
    weight = torch.tensor([[127.0, 1.5], [-254.0, 2.5], [1.0, -0.5], [0.0, 0.0], [-6.35, 0.1]])
    codes, scale = quantize_weight(weight, "per_rows", 2)
    assert codes.tolist() == [[64, 1], [-127, 1], [127, -64], [0, 0], [-127, 2]]
    assert torch.allclose(scale, torch.tensor([2.0, 2.0, 1 / 127, 1 / 127, 0.05]))
    for granularity, rows in (("per_channel", 1), ("per_tensor", 5), ("per_tensor", 64)):
        found = quantize_weight(weight, "per_rows", rows)
        for value, expected in zip(found, quantize_weight(weight, granularity), strict=True):
            assert torch.equal(value, expected)
    assert quantize_weight(torch.empty(0, 3), "per_rows", 2)[0].shape == (0, 3)
    with pytest.raises(SqCpuError, match="per_channel, per_tensor, per_rows; not 'per_row'"):
        quantize_weight(weight, "per_row")


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_quantize_weight_clips_what_lies_beyond(granularity: str) -> None:
    weight = torch.tensor([[1.0, -0.75, 0.5, 0.26], [1.0, -1.0, 0.0, 0.1]])
    codes, scale = quantize_weight(weight, granularity, clip=0.5)
    assert torch.equal(scale, torch.full((2,), 0.5 / 127))
    assert codes.tolist() == [[127, -127, 127, 66], [127, -127, 0, 25]]
    for clip in (0.0, 1.01, float("nan")):
        with pytest.raises(SqCpuError, match=r"the weight clip is .*; it lies in \(0, 1\]"):
            quantize_weight(weight, granularity, clip=clip)


def test_quantize_weight_of_zeros_and_of_nan() -> None:
    codes, scale = quantize_weight(torch.zeros(2, 3))
    assert not codes.any()
    assert (scale > 0).all()
    for granularity in ("per_channel", "per_tensor", "per_rows"):
        with pytest.raises(SqCpuError, match="NaN or Inf"):
            quantize_weight(torch.tensor([[1.0, 2.0], [1.0, float("nan")]]), granularity, 2)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 3.0), (0.5, 2.0), (-3.0, -1.0), (0.0, 0.0)])
def test_static_code_covers_the_range_and_zero(low: float, high: float) -> None:
    for scheme in (Scheme(symmetric=False), Scheme(symmetric=False, reduce_range=True)):
        scale, zero_point = static_code(scheme, low, high)
        assert 0 <= zero_point <= scheme.levels
        half = scale * 0.5001
        assert -zero_point * scale - half <= min(low, 0.0)
        assert (scheme.levels - zero_point) * scale + half >= max(high, 0.0)


@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_kernels_equal_the_reference(each_isa: str, scheme: Scheme) -> None:
    for k, n in ((1, 1), (63, 17), (64, 16), (65, 33), (200, 70)):
        layer = make(k, n, scheme)
        for m, dtype in itertools.product((1, 2, 5, 7, 17, 33), DTYPES):
            x = torch.randn(m, k).to(dtype)
            assert torch.equal(layer(x), layer.reference(x)), (k, n, m, dtype)


@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_weights_of_minus_128_are_exact(each_isa: str, scheme: Scheme) -> None:
    for k, n in ((1, 1), (64, 16), (65, 33), (_core.MAX_DEPTH, 3)):
        layer = make(k, n, scheme)
        state = layer.state_dict()
        for weight in (
            torch.full((n, k), -128, dtype=torch.int8),
            torch.randint(-128, -126, (n, k), dtype=torch.int8),
            torch.tensor([-128, 127], dtype=torch.int8)[torch.randint(2, (n, k))],
        ):
            layer.load_state_dict(state | {"weight": weight})
            assert torch.equal(layer.weight_int8(), weight)
            for m in (1, 5, 33) if k < 1000 else (3,):
                for x in (torch.randn(m, k), torch.full((m, k), 3.0), torch.full((m, k), -2.5)):
                    assert torch.equal(layer(x), layer.reference(x)), (k, n, m)


@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
def test_int8_is_close_to_float(scheme: Scheme) -> None:
    linear = nn.Linear(256, 64)
    x = torch.randn(40, 256).clamp(-2.5, 3.0)
    y = linear(x)
    error = QuantLinear.from_float(linear, scheme, (-2.5, 3.0))(x) - y
    # Each operand errs by a uniform half step: sqrt(1/12) * step, over a signal of unit rms.
    step = 2 * 3.0 / (127 if scheme.reduce_range else 255)
    assert error.norm() / y.norm() < 1.5 * step


@pytest.mark.parametrize("scheme", SCHEMES, ids=describe)
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_nan_and_inf(each_isa: str, scheme: Scheme, dtype: torch.dtype) -> None:
    layer = make(70, 20, scheme)
    x = torch.randn(8, 70).to(dtype)
    x[1] = 0
    x[3, 69] = float("nan")
    x[4, 0] = float("inf")
    x[6, 35] = -float("inf")
    y = layer(x)
    bad = torch.tensor([False, False, False, True, True, False, True, False])
    assert y[bad].isnan().all()
    assert y[~bad].isfinite().all()
    bias = layer.bias
    assert bias is not None
    assert torch.equal(y[1], bias.to(dtype))
    assert torch.equal(y[~bad], layer.reference(x)[~bad])
    if scheme.activations != "per_tensor":
        assert torch.equal(y[~bad], layer(x[~bad]))


def test_shapes_without_elements() -> None:
    layer = make(8, 4, Scheme())
    assert layer(torch.zeros(0, 8)).shape == (0, 4)
    assert layer(torch.zeros(3, 0, 8)).shape == (3, 0, 4)
    assert layer(torch.ones(8)).shape == (4,)
    wide = QuantLinear(0, 4, Scheme(), bias=False)
    assert torch.equal(wide(torch.zeros(3, 0)), torch.zeros(3, 4))


def test_strided_input_gives_the_same() -> None:
    layer = make(32, 8, Scheme())
    x = torch.randn(6, 64)[:, ::2]
    assert torch.equal(layer(x), layer(x.contiguous()))
    y = torch.randn(32, 6).T
    assert torch.equal(layer(y), layer(y.contiguous()))


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_same_bits_for_any_thread_count(
    each_isa: str, threads: Callable[[int], None], count: int
) -> None:
    for m, scheme in itertools.product((1, 5, 70), (Scheme(), Scheme.of("O2"))):
        layer = make(640, 304, scheme)
        x = torch.randn(m, 640)
        threads(1)
        alone = layer(x)
        threads(count)
        assert torch.equal(layer(x), alone)


def test_packed_weight_is_the_only_copy_and_small() -> None:
    linear = nn.Linear(576, 1536, bias=False)
    layer = QuantLinear.from_float(linear, Scheme())
    assert [name for name, _ in layer.named_parameters()] == []
    assert [name for name, _ in layer.named_buffers()] == ["packed"]
    assert layer.nbytes <= 0.27 * linear.weight.nbytes


def _kilobytes(field: str) -> int:
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(line.split()[1]) for line in text.splitlines() if line.startswith(field + ":"))


def test_a_new_layer_touches_no_page_and_packs_into_huge_ones() -> None:
    before = _kilobytes("Rss")
    layer = QuantLinear(4096, 16384, Scheme(), bias=False)
    assert layer.nbytes > 64 << 20
    assert _kilobytes("Rss") - before < 8 << 10
    state = {
        "weight": torch.ones(16384, 4096, dtype=torch.int8),
        "weight_scale": torch.ones(16384),
    }
    huge = _kilobytes("AnonHugePages")
    layer.load_state_dict(state)
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    if "[never]" not in enabled:
        assert _kilobytes("AnonHugePages") - huge > 48 << 10
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.packed, layer.packed)


@pytest.mark.parametrize("flush", [False, True])
def test_denormals_count_whatever_the_callers_float_mode(
    threads: Callable[[int], None], flush: bool
) -> None:
    linear = nn.Linear(640, 304, bias=False)
    linear.weight.mul_(1e-20)
    layer = QuantLinear.from_float(linear, Scheme())
    x = torch.randn(40, 640) * 1e-19
    expected = layer.reference(x)
    assert 0 < expected.abs().max() < 2**-126
    threads(3)
    torch.set_flush_denormal(flush)
    try:
        y = layer(x)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(y, expected)


def test_bad_input_is_one_clear_line() -> None:
    layer = make(8, 4, Scheme())
    with pytest.raises(SqCpuError, match=r"input is torch.float64; use float32"):
        layer(torch.zeros(2, 8, dtype=torch.float64))
    with pytest.raises(SqCpuError, match=r"input is \[2, 7\], the layer needs \[..., 8\]"):
        layer(torch.zeros(2, 7))
    with pytest.raises(SqCpuError, match="the CPU only"):
        layer(torch.zeros(2, 8, device="meta"))
    with torch.enable_grad(), pytest.raises(SqCpuError, match=r"torch.no_grad"):
        layer.quantize_input(torch.zeros(2, 8, requires_grad=True))
    with pytest.raises(SqCpuError, match="needs the input's range"):
        QuantLinear.from_float(nn.Linear(8, 4), Scheme.of("O3"))
    with pytest.raises(SqCpuError, match="in_features 65794 exceeds 65793"):
        QuantLinear(65794, 1, Scheme(), bias=False)


def test_the_kernel_that_runs_is_the_one_asked_for(
    each_isa: str, request: pytest.FixtureRequest
) -> None:
    assert _core.isa()["in_use"] == each_isa
    assert _core.microkernel_name(255, 33).endswith(each_isa)
    emulated = each_isa == "amx_int8" and not _core.isa()["isas"][each_isa]["usable"]
    if not emulated:
        return
    emulator = request.getfixturevalue("amx_emulator")
    counters = (ctypes.c_uint64 * 6)()
    emulator.sq_amx_reset()
    make(64, 32, Scheme())(torch.randn(33, 64))
    emulator.sq_amx_counters(counters)
    assert counters[5] > 0, "no TDPBUSD was executed"


def test_reference_rounds_half_to_even() -> None:
    weight = torch.ones(1, 2, dtype=torch.int8)
    x = torch.tensor([[127.0, 0.5], [127.0, 1.5], [127.0, 2.5]])
    y = linear_reference(x, weight, torch.ones(1), None, Scheme())
    assert y.flatten().tolist() == [127.0, 129.0, 129.0]


ONE_POOL = """
import os, torch, sq_cpu
from torch import nn
torch.set_num_threads(4)
def team():
    return len(os.listdir("/proc/self/task"))
with torch.no_grad():
    layer = sq_cpu.QuantLinear.from_float(nn.Linear(1024, 1024), sq_cpu.Scheme())
    x = torch.randn(256, 1024)
    torch.relu(torch.randn(4_000_000))
    before = team()
    layer(x)
    after = team()
runtimes = {line.split()[-1] for line in open("/proc/self/maps")
            if any(name in line for name in ("libgomp", "libiomp", "libomp"))}
print(before, after, len(runtimes))
"""


def test_one_openmp_pool_with_torch(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-c", ONE_POOL], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    before, after, runtimes = map(int, result.stdout.split())
    assert runtimes == 1
    assert before == after, "the linear started threads beside torch's"


def test_other_threads_follow_torch_too(threads: Callable[[int], None]) -> None:
    threads(1)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: sq_cpu.isa()["threads"]).result() == 1


def _run_isa(isa: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "import sq_cpu; print(sq_cpu.isa()['in_use'])"],
        env=os.environ | {"SQ_CPU_ISA": isa},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )


def test_the_environment_forces_an_isa() -> None:
    for name, status in _core.isa()["isas"].items():
        result = _run_isa(name)
        if status["usable"]:
            assert result.stdout.strip() == name
        else:
            assert f"SQ_CPU_ISA={name} cannot be used: {status['reason']}" in result.stderr


def test_an_unknown_isa_is_an_error() -> None:
    assert "SQ_CPU_ISA=avx9 is not an ISA of sq_cpu" in _run_isa("avx9").stderr
