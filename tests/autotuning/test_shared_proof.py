"""The evaluations of an autotuning share one proof of the model's folds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import batches
from tuning_cases import QUICK, Divergence, costs, planted

import sq_cpu
from sq_cpu.autotuning import evaluator
from sq_cpu.quantization import quantize as quantization
from sq_cpu.quantization.recipe import Recipe


def test_a_job_proves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted("llama", num_hidden_layers=1)
    measure, proofs = Divergence(model), []
    prove = evaluator.prove_folds

    def counted(*args: Any) -> Any:
        proofs.append(prove(*args))
        return proofs[-1]

    for module in (evaluator, quantization):
        monkeypatch.setattr(module, "prove_folds", counted)
    settings: dict[str, Any] = {"costs": costs(model), "trials": 3, "space": QUICK}
    found = sq_cpu.autotune(model, batches(3), measure, 6e-5, progress=False, **settings)
    assert measure.calls > 3  # the first is that of the float model
    assert len(proofs) == 1
    assert not any(proofs[0].reasons.values())
    # And the folds are those of a quantize that proves for itself.
    calibration = sq_cpu.calibrate(model, batches(3))
    alone = sq_cpu.quantize(planted("llama", num_hidden_layers=1), calibration, found.plan)
    assert len(proofs) == 2
    recipe = Recipe.of(plan=found.plan)
    copied = planted("llama", num_hidden_layers=1)
    proven: Any = quantization.carry_out(copied, calibration, recipe, proofs[0])
    assert len(proofs) == 2
    assert proven.sq_cpu_config == alone.sq_cpu_config
    assert any(group.fold for group in alone.sq_cpu_config.plan.groups)
    ids = batches(1)[0]
    with torch.no_grad():
        assert torch.equal(proven(ids).logits, alone(ids).logits)
