"""Channels that carry nothing do no harm, whatever the others' scale; extremes stay finite."""

from __future__ import annotations

import itertools
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sq_cpu
from sq_cpu import Scheme
from sq_cpu.errors import SqCpuError
from sq_cpu.numerics.fake_quant import LinearSample
from sq_cpu.smoothing.rules import RULES, smoothing_scale, smoothing_scales
from sq_cpu.smoothing.statistics import GroupStatistics, output_errors
from sq_cpu.tuning.alpha_search import ScoredGroup
from sq_cpu.tuning.losses import LOCAL_LOSSES

# Where a row may have its own scale, it is dynamic.
STATIC = Scheme.of("O3", dynamic_fallback=False)
SCHEMES = [Scheme.of("O1"), Scheme.of("O2", symmetric=False), STATIC]
SCHEMES += [Scheme.of(STATIC, weights="per_tensor"), Scheme.of(STATIC, static_range="mse")]


def group_of(x: Tensor, weight: Tensor, gamma: Tensor, scheme: Scheme) -> GroupStatistics:
    sample = LinearSample(weight, x, x.float().amin(0), x.float().amax(0))
    return GroupStatistics(
        x.float().abs().amax(0),
        weight.float().abs().amax(0),
        norm_weight=gamma,
        samples=(sample,),
        scheme=scheme,
    )


def error(rule: str, group: GroupStatistics) -> float:
    return float(output_errors(group, smoothing_scale(rule, group))[0].sum())


DEAD = {
    "a quiet channel's weights": ([5], []),
    "an outlier's weights": ([3], []),
    "all outliers' weights": ([3, 5, 9, 17], []),
    "an activation": ([], [5]),
    "most activations": ([], list(range(20, 64))),
    "both": ([5, 9], [9, 11]),
}


@pytest.mark.parametrize(
    ("dead", "rule", "scheme"),
    [
        (dead, rule, scheme)
        for dead, rule, scheme in itertools.product(DEAD, RULES, SCHEMES)
        # An outlier takes some of a dynamic range, whether or not a weight reads it.
        if not ("outlier" in dead and scheme.activations != "static")
        if not (rule == "aqas" and scheme.static_range == "mse")  # slow
    ],
    ids=str,
)
def test_dead_channels_cost_no_more_than_if_they_were_not_there(
    dead: str, rule: str, scheme: Scheme
) -> None:
    weights, activations = DEAD[dead]
    alive = [j for j in range(64) if j not in weights + activations]
    for size_x, size_w in ((1.0, 1.0), (1e-4, 1e-4), (1e4, 1e-2)):
        torch.manual_seed(0)
        x, weight = torch.randn(64, 64) * size_x, torch.randn(32, 64) * 0.1 * size_w
        gamma = (torch.rand(64) + 0.5) * size_x
        x[:, [3, 17]] *= 50
        x[:, activations] = 0
        gamma[activations] = 0
        weight[:, weights] = 0
        found = error(rule, group_of(x, weight, gamma, scheme))
        without = group_of(x[:, alive], weight[:, alive], gamma[alive], scheme)
        assert found <= 1.5 * error(rule, without), (size_x, size_w)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_their_scales_lie_within_those_of_the_others(alpha: float) -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1e-30, 1e-6, 1.0, 1e6, 1e30):
        act = torch.rand(16, generator=generator) * size
        weight = torch.rand(16, generator=generator) / size
        act[[0, 1]], weight[[1, 2]] = 0.0, 0.0
        s = smoothing_scales(act, weight, alpha)
        low, high = s[3:].aminmax()
        assert ((s >= low) & (s <= high)).all()
        assert s[1] == s[2] == high
    nothing = torch.zeros(4)
    assert smoothing_scales(nothing, nothing, alpha).tolist() == [1.0] * 4
    assert smoothing_scales(torch.ones(4), nothing, alpha).tolist() == [1.0] * 4


EXTREMES = [0.0, 1e-45, 1e-38, 1e-20, 65504.0, 1e20, 1e38, 3.4e38]


@pytest.mark.parametrize("rule", RULES)
def test_extremes_give_a_finite_scale_and_error_or_one_line(rule: str) -> None:
    for x_size, w_size in itertools.product(EXTREMES, repeat=2):
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(6, 8, generator=generator) - 0.5
        weight = torch.rand(4, 8, generator=generator) - 0.5
        x[:, 2], weight[:, 3] = x_size, w_size  # a constant channel each
        for scheme in (SCHEMES[0], SCHEMES[2]):
            group = group_of(x, weight, x.abs().amax(0), scheme)
            s = smoothing_scale("smoothquant" if rule == "aqas" else rule, group)
            assert (s.isfinite() & (s > 0)).all()
            if max(x_size, w_size) < 1e18:  # whose squares fp32 can hold
                assert error(rule, group) >= 0
                continue
            with suppress(SqCpuError):
                smoothing_scale(rule, group)


@pytest.mark.parametrize("loss", LOCAL_LOSSES)
@pytest.mark.parametrize("size", [1e-15, 1.0, 1e15])
def test_a_search_prefers_the_same_at_any_scale(loss: str, size: float) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(40, 16), torch.randn(8, 16)
    x[:, 3] *= 60

    def losses(size: float) -> list[float]:
        group = group_of(x * size, weight * size, torch.ones(16), Scheme.of("O3"))
        scored = ScoredGroup(sq_cpu.GroupPlan(name="group"), [group])
        found = [sum(scored.losses(loss, 40, step / 10, 1.0).values()) for step in range(11)]
        assert all(0 < value < float("inf") for value in found)
        return found

    found, expected = losses(size), losses(1.0)
    assert found.index(min(found)) == expected.index(min(expected))


@pytest.mark.parametrize("rule", RULES)
def test_a_single_row_and_single_channel(rule: str) -> None:
    for rows, channels in ((1, 8), (5, 1), (1, 1)):
        x, weight = torch.ones(rows, channels), torch.ones(3, channels)
        for scheme in SCHEMES:
            group = group_of(x, weight, torch.ones(channels), scheme)
            assert error(rule, group) < 1e-3


class Silent(nn.Module):
    """Two linears, of which the second gets zeros, or nearly."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.first(x) + self.second(x * self.factor)
        return y


@pytest.mark.parametrize("factor", [0.0, 1e-35])
@pytest.mark.parametrize("smooth", [True, False])
@pytest.mark.parametrize("scheme", ["O1", "O2", "O3"])
def test_a_static_range_of_nothing_keeps_the_linear_in_float(
    scheme: str, smooth: bool, factor: float
) -> None:
    torch.manual_seed(0)
    model, x = Silent(factor).eval(), torch.randn(2, 5, 8)
    calibration = sq_cpu.calibrate(model, [x])
    record: Any = sq_cpu.quantize(model, calibration, scheme=scheme, smooth=smooth).sq_cpu_config
    reason = "its input was 0 in every calibration batch, which gives no static range"
    assert record.kept == ({"second": reason} if scheme == "O3" else {})
    model.factor = 1.0  # what was silent speaks
    torch.manual_seed(0)
    reference = Silent(1.0)
    with torch.no_grad():
        expected = reference(x)
        if scheme == "O3":
            assert (model(x) - expected).abs().max() < 0.05 * expected.abs().max()
        else:
            assert model(x).isfinite().all()


def test_nothing_but_zeros_is_refused_by_a_static_scheme() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    calibration = sq_cpu.calibrate(model, [torch.zeros(2, 8)])
    with pytest.raises(SqCpuError, match=r"nothing to quantize.*: 0, its input was 0 in every"):
        sq_cpu.quantize(model, calibration, scheme="O3")
    sq_cpu.quantize(model, calibration, scheme="O1")
