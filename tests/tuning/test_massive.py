"""Channels of massive activations, which stay in float where that pays."""

from typing import Any

import pytest
import torch
from tiny import batches, tiny_model

import sq_cpu
import sq_cpu.tuning.massive as massive_module
from sq_cpu import Scheme, SqCpuError

# With their own scale, rows with a massive activation lose less.
STATIC = Scheme.of("O3", dynamic_fallback=False)


def massive(model_type: str = "llama") -> torch.nn.Module:
    """Make a tiny model with one channel before down_proj that is thousands of the others."""
    model = tiny_model(model_type)
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[7] *= 4000
    return model


@pytest.mark.parametrize("options", [{}, {"block_wise": True}, {"sequential": True}], ids=str)
@pytest.mark.parametrize("gradient_rows", [0, 64])
def test_massive_activations_stay_in_float(gradient_rows: int, options: dict[str, Any]) -> None:
    model, data = massive(), batches(4)
    options = options | {"scheme": STATIC}
    calibration = sq_cpu.calibrate(model, data, gradient_rows=gradient_rows)
    settings = options | {"batches": data, "hadamard": 0}
    plan = sq_cpu.tune(model, calibration, **settings)
    down = plan.layer("model.layers.1.mlp.down_proj")
    assert down.outliers == (7,)
    assert down.note.startswith("massive activations; ")
    without = sq_cpu.tune(model, calibration, outliers=0, **settings)
    assert without.layers == ()
    loss, before = (sum(float(g.note.split()[-1]) for g in p.groups) for p in (plan, without))
    assert loss < before
    quantized = sq_cpu.quantize(massive(), calibration, plan)
    assert quantized.sq_cpu_config.decomposed == {down.name: 1}


def test_channels_are_kept_where_that_halves_the_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "model.layers.1.mlp.down_proj"
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_submodule("model.layers.1.mlp.up_proj").weight[[7, 9, 20]] *= 4000
    calibration = sq_cpu.calibrate(model, batches(4), gradient_rows=64)

    def kept(outliers: int = 4) -> tuple[int, ...]:
        plan = sq_cpu.tune(model, calibration, scheme=STATIC, outliers=outliers, hadamard=0)
        return plan.layer(name).outliers

    assert kept() == (7, 9, 20)
    # Rotated, they are not massive any more.
    rotated = sq_cpu.tune(model, calibration, scheme=STATIC)
    assert rotated.layer(name).outliers == ()
    assert any(group.hadamard for group in rotated.groups)
    greatest = calibration.absmax(name).topk(2).indices.sort().values.tolist()
    assert kept(2) in ((), tuple(greatest))
    monkeypatch.setattr(massive_module, "_MASSIVE", 1e6)
    assert kept() == ()
    monkeypatch.undo()
    monkeypatch.setattr(massive_module, "NEGLIGIBLE", {"kl": 1.0})
    assert kept() == ()
    monkeypatch.undo()
    # What is no outlier gains nothing by being in float.
    monkeypatch.setattr(massive_module, "_MASSIVE", 1.5)
    plain = tiny_model("llama")
    assert sq_cpu.tune(plain, sq_cpu.calibrate(plain, batches(4)), hadamard=0).layers == ()


def test_bad_numbers_of_outliers() -> None:
    model = tiny_model("llama")
    calibration = sq_cpu.calibrate(model, batches(4))
    with pytest.raises(SqCpuError, match="outliers is -1, not a whole number >= 0"):
        sq_cpu.tune(model, calibration, outliers=-1)
