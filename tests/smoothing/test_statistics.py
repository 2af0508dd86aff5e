"""The output error of a group for a scale, and what is said of its channels."""

from __future__ import annotations

import pytest
import torch
from smoothing_cases import SCHEMES, sampled

from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.numerics.ranges import static_range
from sq_cpu.scheme import Scheme
from sq_cpu.smoothing.rules import smoothing_scale
from sq_cpu.smoothing.statistics import live_median, output_errors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_the_output_error_is_that_of_the_layer(scheme: Scheme, dtype: torch.dtype) -> None:
    found = sampled(scheme, dtype=dtype)
    s = smoothing_scale("smoothquant", found, 0.6)
    errors, outputs = output_errors(found, s)
    for sample, error, output in zip(found.samples, errors, outputs, strict=True):
        linear = torch.nn.Linear(32, 24, bias=False)
        linear.weight.data = sample.weight.float() * s
        ranges = static_range(sample.low / s, sample.high / s, sample.rows / s, scheme)
        layer = QuantLinear.from_float(linear, scheme, ranges)
        y = sample.rows.double() @ sample.weight.double().T
        expected = (layer(sample.rows.float() / s).double() - y).square().sum()
        # The sums are in fp32 here, in integers there: 32 terms, each rounded to 2^-24, against
        # codes of 2^-7, so the errors agree to 32 * 2^-17; their squares to twice that.
        torch.testing.assert_close(error, expected, rtol=2**-11, atol=0)
        torch.testing.assert_close(output, y.square().sum(), rtol=2**-18, atol=0)


@pytest.mark.parametrize("threshold", [1e-3, 2.0, 6.0, 1e3])
def test_the_output_error_knows_of_channels_in_float(threshold: float) -> None:
    scheme = Scheme(outlier_threshold=threshold)
    found = sampled(scheme)
    s = smoothing_scale("smoothquant", found, 0.2)
    errors, _ = output_errors(found, s)
    for sample, error in zip(found.samples, errors, strict=True):
        linear = torch.nn.Linear(32, 24, bias=False)
        linear.weight.data = sample.weight * s
        x = sample.rows / s
        columns = (x.abs().amax(0) >= threshold).nonzero().flatten()
        layer = DecomposedLinear.from_float(linear, scheme, columns)
        expected = (layer(x) - x.double() @ linear.weight.T.double()).square().sum()
        # As above; with every channel in float both are sums of squared fp32 roundings.
        torch.testing.assert_close(error, expected, rtol=2**-11, atol=1e-6)


def test_the_median_of_live_channels() -> None:
    assert live_median(torch.tensor([0.0, 3.0, 0.0, 1.0, 2.0, 0.0])) == 2
    assert live_median(torch.zeros(3)) is None
