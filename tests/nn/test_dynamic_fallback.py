"""Rows with their own scale in static layers: against plain torch on every ISA, and counted."""

from __future__ import annotations

import copy
import itertools
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from sq_cpu import QuantLinear, RowCounts, Scheme, row_counts
from sq_cpu.kernels.hadamard import fwht64
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.numerics.rounding import quantize_rows, row_fits

SCHEMES = [
    Scheme.of("O3", symmetric=symmetric, reduce_range=reduce_range)
    for symmetric, reduce_range in itertools.product((True, False), (False, True))
]
each_scheme = pytest.mark.parametrize(
    "scheme", SCHEMES, ids=["sym", "sym-7bit", "asym", "asym-7bit"]
)
RANGE = (-3.0, 4.0)
STEP = 2.0**-5


@pytest.fixture(autouse=True)
def _inference() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def rows_of_all_sizes(m: int, k: int) -> Tensor:
    x = torch.randn(m, k) * torch.logspace(-3, 2, m)[:, None] if m > 1 else torch.randn(m, k)
    for row, value in zip(range(1, m, 2), (0.0, -0.0, 1e-40, 6e4, -3e38), strict=False):
        x[row, row % k] = value
        if value == 0 or value == 1e-40:
            x[row] = value
    return x


def static_layer(scheme: Scheme, k: int, n: int, smoothing: bool, hadamard: int) -> QuantLinear:
    s = torch.logspace(-0.5, 0.5, k) if smoothing else None
    return QuantLinear.from_float(nn.Linear(k, n), scheme, RANGE, smoothing=s, hadamard=hadamard)


@each_scheme
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("smoothing", "hadamard"), [(False, 0), (True, 0), (True, 64)])
def test_a_layer_gives_what_its_reference_gives(
    scheme: Scheme, dtype: torch.dtype, smoothing: bool, hadamard: int, each_isa: str
) -> None:
    for k, m in itertools.product((1, 17, 64, 65, 200), (1, 2, 16, 37)):
        layer = static_layer(scheme, k, 20, smoothing, hadamard)
        x = rows_of_all_sizes(m, k).to(dtype)
        x[-1, 0] = float("nan") if m > 2 else x[-1, 0]
        y = layer(x)
        expected = layer.reference(x)
        torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
        codes = layer.quantize_input(x)
        torch.testing.assert_close(layer(codes), y, rtol=0, atol=0, equal_nan=True)
        traced = make_fx(layer)(x[:2])(x[:2])
        torch.testing.assert_close(traced, y[:2], rtol=0, atol=0, equal_nan=True)


@each_scheme
def test_the_codes_of_own_rows_are_those_per_token_and_the_others_static(scheme: Scheme) -> None:
    layer = static_layer(scheme, 96, 8, False, 0)
    assert layer.static is not None
    x = rows_of_all_sizes(40, 96)
    clips, underflows = row_fits(
        x.amin(1).clamp_max(0), x.amax(1).clamp_min(0), scheme, layer.static
    )
    own = clips | underflows
    assert min(int(some.sum()) for some in (clips, underflows, ~own)) > 3
    by_scale = replace(scheme, dynamic_fallback=False)
    found = layer.quantize_input(x)
    for rows, other, static in (
        (own, replace(scheme, activations="per_token"), None),
        (~own, by_scale, layer.static),
    ):
        codes, scale, zero_point = quantize_rows(x[rows], other, static)
        assert torch.equal(found.rows()[rows], codes)
        assert torch.equal(found.scale[rows], scale)
        assert torch.equal(found.zero_point[rows], zero_point)
    off = QuantLinear.from_float(nn.Linear(96, 8), by_scale, RANGE).quantize_input(x)
    assert off.scale.unique().tolist() == [layer.static[0]]
    assert not torch.equal(off.scale, found.scale)


@pytest.mark.parametrize(
    ("code", "clips", "underflows"),
    [
        (127.0, 0, 0), (127.49, 0, 0), (127.5, 1, 0), (-127.5, 1, 0), (-127.49, 0, 0),
        (15.5, 0, 0), (-15.5, 0, 0), (15.49, 0, 1), (-15.49, 0, 1), (0.2, 0, 1), (0.0, 0, 0),
        (1e30, 1, 0),
    ],
)  # fmt: skip
def test_the_borders_are_those_of_the_rounded_codes(
    code: float, clips: int, underflows: int
) -> None:
    scheme = Scheme.of("O3")
    value = torch.tensor([code * STEP])
    found = row_fits(value.clamp_max(0), value.clamp_min(0), scheme, (STEP, 128))
    assert [int(fits) for fits in found] == [clips, underflows]
    layer = QuantLinear.from_float(nn.Linear(1, 4), scheme, (-127 * STEP, 127 * STEP))
    assert layer.static == (STEP, 128)
    layer(value)
    assert row_counts(layer) == {"": RowCounts(1, clips, underflows, 0)}


def test_the_borders_of_an_asymmetric_grid_are_of_its_two_ends() -> None:
    scheme = Scheme.of("O3", symmetric=False)
    static = STEP, 55  # codes -55 .. 200
    for low, high, clips, underflows in (
        (-55, 200, 0, 0), (-56, 200, 1, 0), (-55, 201, 1, 0), (-1, 31, 0, 0), (-1, 30, 0, 1),
        (0, 32, 0, 0), (-31, 0, 0, 1), (-55.4, 200.4, 0, 0), (0, 0, 0, 0),
    ):  # fmt: skip
        ends = torch.tensor([low * STEP]), torch.tensor([high * STEP])
        found = [int(fits) for fits in row_fits(*ends, scheme, static)]
        assert found == [clips, underflows], (low, high)


def test_with_a_rotation_the_rotated_values_decide() -> None:
    layer = static_layer(Scheme.of("O3"), 64, 8, False, 64)
    x = torch.full((1, 64), 3.0)  # within the range, but rotated one value of 24
    assert fwht64(x).amax() == 24
    layer(x)
    assert row_counts(layer)[""] == RowCounts(1, 1, 0, 0)
    assert torch.equal(layer(x), layer.reference(x))


def test_channels_in_float_do_not_decide() -> None:
    columns = torch.tensor([3, 40])
    linear = nn.Linear(64, 16)
    for hadamard in (0, 64):
        layer = DecomposedLinear.from_float(
            linear, Scheme.of("O3"), columns, (-3.0, 3.0), hadamard=hadamard
        )
        x = torch.randn(9, 64).clamp(-2, 2)
        x[:, columns] = 1000.0
        x[4, 5], x[5] = 90.0, 0.01 * x[5]
        x[5, columns] = 500.0
        y = layer(x)
        counts = row_counts(layer)["regular"]
        assert (counts.clipped, counts.underflowed) == (1, 1)
        # The float product is torch's here and fp64's there: 64 terms of up to 1000.
        torch.testing.assert_close(y, layer.reference(x), rtol=1e-5, atol=1e-3)


def test_counts_of_calls_shared_inputs_chains_and_threads() -> None:
    first, second = (static_layer(Scheme.of("O3"), 64, 64, False, 0) for _ in "12")
    model = nn.ModuleDict({"a": first, "b": second, "c": QuantLinear(64, 8, Scheme(), bias=False)})
    x = torch.randn(7, 64).clamp(-2, 2)
    x[1], x[2], x[3, 3] = 0.0, 0.01 * x[2], 50.0
    first(x)
    second(first.quantize_input(x), activation="relu")
    assert row_counts(model) == {"a": RowCounts(14, 2, 2, 0), "b": RowCounts(0, 0, 0, 0)}
    second(first.forward_int8(x, second))
    assert row_counts(model)["b"] == RowCounts(0, 0, 0, 7)
    assert row_counts(model)["a"].share == pytest.approx(2 / 7)
    assert row_counts(model)["b"].share == 0.0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert row_counts(other)["a"] == RowCounts(0, 0, 0, 0)
        other["a"](x)
        assert row_counts(other)["a"] == RowCounts(7, 1, 1, 0)
    assert row_counts(model, reset=True)["a"] == RowCounts(21, 3, 3, 0)
    assert row_counts(model)["a"].to_dict() == {
        "rows": 0, "clipped": 0, "underflowed": 0, "chained": 0, "share": 0.0
    }  # fmt: skip
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: first(x), range(50)))
    assert row_counts(model)["a"] == RowCounts(350, 50, 50, 0)


def test_static_scales_alone_are_counted_too(threads: object) -> None:
    layer = static_layer(Scheme.of("O3", dynamic_fallback=False), 64, 8, False, 0)
    x = torch.full((3, 64), 100.0)
    x[0] = 0.01
    for count in (1, 2):
        threads(count)  # type: ignore[operator]
        layer(x)
        layer(x[:1])
    assert row_counts(layer)[""] == RowCounts(8, 4, 4, 0)
    assert torch.equal(layer(x), layer.reference(x))
    assert float(layer.quantize_input(x).scale[1]) == layer.input_scale
