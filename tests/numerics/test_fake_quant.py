"""A linear as if quantized: what it decides, and what it finds only once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import sq_cpu.numerics.fake_quant as fake_quant
from sq_cpu.errors import SqCpuError
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.numerics.fake_quant import FakeQuantizedLinear, LinearSample
from sq_cpu.numerics.ranges import static_range
from sq_cpu.scheme import Scheme

MSE = Scheme.of("O3", static_range="mse")


def sampled(**values: Any) -> LinearSample:
    """Give a linear whose input has outliers in two channels."""
    torch.manual_seed(0)
    x = torch.randn(40, 32)
    x[:, [3, 17]] *= 50
    return LinearSample(0.1 * torch.randn(24, 32), x, x.amin(0), x.amax(0), name="fc", **values)


def scales() -> torch.Tensor:
    return torch.linspace(0.5, 2.0, 32)


def test_range_and_weight_are_found_once_for_every_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = []
    for name in ("quantize_weight", "static_range"):
        original = getattr(fake_quant, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            found.append(name)
            return original(*args)

        monkeypatch.setattr(fake_quant, name, counted)
    scheme = replace(MSE, dynamic_fallback=False)
    linear = FakeQuantizedLinear(sampled(outliers=(3,)), scales(), scheme)
    rows, clips = torch.randn(8, 32), (0.5, 1.0, 1.2)
    outputs = [linear.with_clip(clip)(part) for clip in clips for part in (rows[:4], rows[4:])]
    assert sorted(found) == ["quantize_weight", "static_range"]
    assert linear.with_clip(0.5).weight is linear.weight
    fresh = [replace(linear, clip=clip)(part) for clip in clips for part in (rows[:4], rows[4:])]
    assert all(torch.equal(a, b) for a, b in zip(outputs, fresh, strict=True))
    assert not torch.equal(outputs[0], outputs[4])


@pytest.mark.parametrize(
    ("scheme", "columns"),
    [
        (Scheme(), [3, 5]),
        (Scheme(outlier_threshold=12.0), [3, 5, 17]),
        (Scheme.of("O2", symmetric=False), [3, 5]),
        (Scheme.of("O3"), [3, 5]),
        (MSE, [3, 5]),
    ],
    ids=str,
)
def test_it_computes_what_the_layer_does(scheme: Scheme, columns: list[int]) -> None:
    sample, s = sampled(outliers=(3, 5), weight_clip=0.9), scales()
    linear = FakeQuantizedLinear(sample, s, scheme, 0.8)
    assert linear.outliers.nonzero().flatten().tolist() == columns
    assert sample.rows is not None
    rest = (sample.rows / s).index_fill(1, torch.tensor(columns), 0.0)
    expected = static_range(rest.amin(0), rest.amax(0), rest, scheme)
    assert linear.range == tuple(0.8 * end for end in expected)
    smoothed = torch.nn.Linear(32, 24, bias=False)
    smoothed.weight.data = sample.weight * s
    layer = DecomposedLinear.from_float(
        smoothed, scheme, torch.tensor(columns), linear.range, weight_clip=0.9
    )
    with torch.no_grad():
        y = layer(sample.rows / s)
    # 32 terms in fp32, each rounded to 2^-24, in another order: relative to the largest output.
    torch.testing.assert_close(linear(sample.rows), y, rtol=0, atol=float(2**-18 * y.abs().max()))


def test_what_cannot_be_found_is_an_error() -> None:
    unseen = replace(sampled(outliers=(4,)), low=None, high=None, rows=None)
    linear = FakeQuantizedLinear(unseen, scales(), Scheme(outlier_threshold=1e-6))
    assert linear.outliers.nonzero().tolist() == [[4]]
    with pytest.raises(SqCpuError, match="no input of fc was seen: calibrate on other batches"):
        _ = linear.range
    infinite = replace(sampled(), high=torch.full((32,), torch.inf))
    with pytest.raises(SqCpuError, match="range of fc is not finite: calibrate again, or ignore"):
        _ = FakeQuantizedLinear(infinite, scales(), Scheme.of("O3")).range
    with pytest.raises(SqCpuError, match="needs sampled rows: calibrate with rows=64"):
        _ = FakeQuantizedLinear(replace(sampled(), rows=None), scales(), MSE).range


def test_channels_are_outliers_from_the_threshold_on() -> None:
    high = torch.tensor([5.9, 6.0, 0.0, 100.0])
    for low, expected in (
        (torch.zeros(4), [1, 3]),
        (torch.tensor([0.0, 0.0, -6.0, 0.0]), [1, 2, 3]),
    ):
        sample = replace(sampled(), weight=torch.zeros(1, 4), low=low, high=high, rows=None)
        scheme = Scheme(outlier_threshold=6.0)
        found = FakeQuantizedLinear(sample, torch.ones(4), scheme).outliers
        assert found.nonzero().flatten().tolist() == expected
