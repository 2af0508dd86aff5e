"""A model whose linears compute as if quantized."""

from collections import Counter
from typing import Any

import pytest
import torch
from tiny import batches
from tuning_cases import planted

import sq_cpu
import sq_cpu.numerics.fake_quant as fake_quant
from sq_cpu import Scheme
from sq_cpu.models.calls import evaluating
from sq_cpu.models.groups import smoothing_groups
from sq_cpu.smoothing.plan import uniform_plan
from sq_cpu.smoothing.scales import group_statistics
from sq_cpu.tuning.simulation import simulating


@pytest.mark.parametrize("hold", [True, False])
def test_held_ranges_and_weights_are_found_once(
    hold: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data = planted("llama"), batches(3)
    scheme = Scheme.of("O3", static_range="mse").resolve(True)
    calibration = sq_cpu.calibrate(model, data)
    groups = smoothing_groups(model)
    plan = uniform_plan(model, groups, calibration, ignore=scheme.ignore, hadamard=0)
    statistics = {
        group.name: group_statistics(model, group, calibration, scheme) for group in groups[:-1]
    }
    found: Counter[str] = Counter()
    for name in ("static_range", "quantize_weight"):
        original = getattr(fake_quant, name)

        def counted(*args: Any, name: str = name, original: Any = original) -> Any:
            found[name] += 1
            return original(*args)

        monkeypatch.setattr(fake_quant, name, counted)
    with evaluating(model):
        before = model(data[0]).logits
        with simulating(model, statistics, plan.groups, hold=hold):
            first, second = (model(data[0]).logits for _ in range(2))
        assert torch.equal(model(data[0]).logits, before)
    linears = len(calibration.channel_min)
    times = 1 if hold else 2
    assert found == {"static_range": times * linears, "quantize_weight": times * linears}
    assert torch.equal(first, second)
    quantized = sq_cpu.quantize(planted("llama"), calibration, plan, scheme=scheme)
    with torch.no_grad():
        expected = quantized(data[0]).logits
    assert (first - expected).norm() < 0.02 * (expected - before).norm() + 1e-3 * before.norm()
