"""Layers whose input and weight are rotated, against plain torch on every ISA."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from sq_cpu import QuantLinear, Scheme, SqCpuError
from sq_cpu.kernels import ops
from sq_cpu.kernels.hadamard import fwht64, whole_blocks
from sq_cpu.numerics.rounding import quantize_rows, static_code


@pytest.fixture(autouse=True)
def _inference() -> object:
    torch.manual_seed(0)
    with torch.no_grad():
        yield


EXTREMES = (0.0, -0.0, 1e-40, 1e-30, 6e4, 3e38, float("inf"), float("nan"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scheme", [Scheme(), Scheme(symmetric=False), Scheme.of("O2")])
@pytest.mark.parametrize("smoothed", [False, True])
def test_codes_are_those_of_the_reference_on_every_isa(
    scheme: Scheme, dtype: torch.dtype, smoothed: bool, each_isa: str
) -> None:
    for k, rows in itertools.product((1, 17, 63, 64, 65, 130, 192), (1, 3, 16, 37)):
        x = (torch.randn(rows, k) * torch.logspace(-3, 3, rows)[:, None]).to(dtype)
        for row, value in zip(range(1, rows, 3), EXTREMES, strict=False):
            x[row, row % k] = value
        s = torch.logspace(-1, 1, k) if smoothed else None
        quantizer = ops.make_quantizer(scheme.activations, scheme.symmetric, False, 0.0, 0, s, 64)
        found = ops.quantize_activations(x, quantizer)
        smooth = x.float() if s is None else x.float() * (1 / s)
        codes, scale, zero_point = quantize_rows(fwht64(smooth), scheme, None)
        finite = scale.isfinite()
        assert torch.equal(found.scale[finite], scale[finite])
        assert found.scale[~finite].isnan().all()
        assert torch.equal(found.rows()[finite], codes[finite])
        assert torch.equal(found.zero_point[finite], zero_point[finite])


@pytest.mark.parametrize("activations", ["per_token", "per_token_x2", "static"])
def test_a_rotated_layer_gives_what_its_reference_gives(activations: str, each_isa: str) -> None:
    scheme = Scheme(activations=activations, symmetric=activations != "static")
    input_range = (-3.0, 4.0) if activations == "static" else None
    for k, n in itertools.product((5, 64, 100, 257), (3, 70)):
        s = torch.logspace(-0.5, 0.5, k)
        layer = QuantLinear.from_float(
            nn.Linear(k, n), scheme, input_range, smoothing=s, hadamard=64
        )
        x = torch.randn(9, k)
        assert torch.equal(layer(x), layer.reference(x))
        assert torch.equal(layer(layer.quantize_input(x)), layer(x))
        other = QuantLinear(k, n, scheme, bias=True, smoothed=True, hadamard=64)
        other.load_state_dict(layer.state_dict())
        assert torch.equal(other(x), layer(x))
        assert layer.weight.shape == (n, k)
        assert layer.weight_int8().shape == (n, whole_blocks(k))


def test_an_outlier_costs_the_other_channels_less() -> None:
    linear = nn.Linear(256, 32, bias=False)
    x = torch.randn(64, 256)
    x[:, 77] *= 100
    wanted = linear(x)
    plain, rotated = (
        (QuantLinear.from_float(linear, Scheme(), hadamard=size)(x) - wanted).norm()
        for size in (0, 64)
    )
    assert rotated < plain / 3


def test_dequantized_rows_are_those_that_were_rotated() -> None:
    layer = QuantLinear.from_float(nn.Linear(100, 8), Scheme(), hadamard=64)
    x = torch.randn(3, 5, 100)
    step = fwht64(x).abs().amax(-1, keepdim=True) / 127
    found = layer.quantize_input(x).dequantize()
    assert found.shape == x.shape
    # Half a step of each of 64 columns, at worst added up, times 1 / 8.
    assert ((found - x).abs() <= 4 * step).all()
    # The float weight comes back within half a step a column, likewise.
    linear = nn.Linear(100, 8)
    layer = QuantLinear.from_float(linear, Scheme(), smoothing=torch.ones(100), hadamard=64)
    assert ((layer.weight_float() - linear.weight).abs() <= 4 * layer.weight_scale[:, None]).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(SqCpuError, match="hadamard is 32; blocks are of 64 columns"):
        QuantLinear.from_float(nn.Linear(64, 8), Scheme(), hadamard=32)
    static = Scheme.of("O3")
    first = QuantLinear.from_float(nn.Linear(64, 64), static, (-3.0, 3.0))
    rotated = QuantLinear.from_float(nn.Linear(64, 64), static, (-3.0, 3.0), hadamard=64)
    with pytest.raises(SqCpuError, match="no Hadamard matrix; call this layer, then that one"):
        first.forward_int8(torch.randn(2, 64), rotated)
    with pytest.raises(SqCpuError, match="another scheme, static scale, smoothing or Hadamard"):
        first(rotated.quantize_input(torch.randn(2, 64)))
    assert static_code(static, -3.0, 3.0)[0] == rotated.input_scale


@pytest.mark.parametrize("k", [64, 100])
def test_a_state_says_whether_its_weight_is_rotated(k: int) -> None:
    plain, rotated = (
        QuantLinear.from_float(nn.Linear(k, 8), Scheme(), hadamard=size) for size in (0, 64)
    )
    state = rotated.state_dict()
    assert state["hadamard"].dtype == torch.int32
    assert state["hadamard"].item() == 64
    assert "hadamard" not in plain.state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"hadamard"'):
        plain.load_state_dict(state)
    before = rotated.weight_int8()
    with pytest.raises(RuntimeError, match=r'Missing key.*"hadamard"'):
        rotated.load_state_dict(plain.state_dict())
    with pytest.raises(RuntimeError, match="hadamard is not 64"):
        rotated.load_state_dict(state | {"hadamard": torch.tensor(0, dtype=torch.int32)})
    assert torch.equal(rotated.weight_int8(), before)


def test_a_traced_layer_is_rotated_too() -> None:
    layer = QuantLinear.from_float(nn.Linear(70, 20), Scheme(), hadamard=64)
    x = torch.randn(5, 70)
    program = torch.export.export(nn.Sequential(layer), (x,)).module()
    assert torch.equal(program(x), layer(x))
