"""The evaluations of an autotuning share a proof of the model's folds, and its weights' absmax."""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
from sameness import assert_same_model
from tiny import batches, logits
from torch import Tensor, nn
from tuning_cases import QUICK, Divergence, costs, planted, tuned

import sq_cpu
from sq_cpu.autotuning import evaluator
from sq_cpu.autotuning.ranking import Errors
from sq_cpu.models.groups import SmoothingGroup, smoothing_groups
from sq_cpu.quantization import quantize as quantization
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.smoothing import scales


def test_a_job_proves_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted("llama", num_hidden_layers=1)
    measure, proofs = Divergence(model), []
    prove = evaluator.prove_with

    def counted(*args: Any, **options: Any) -> Any:
        proofs.append(prove(*args, **options))
        return proofs[-1]

    for module in (evaluator, quantization):
        monkeypatch.setattr(module, "prove_with", counted)
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
    assert_same_model(proven, alone, logits)


def test_a_job_looks_at_the_weights_of_a_group_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted("llama", num_hidden_layers=1)
    names = {g.name for g in smoothing_groups(model) if g.consumers != ("lm_head",)}
    measure, looked = Divergence(model), Counter[str]()
    ranked: list[Errors] = []
    look, rank = scales.weight_absmax, evaluator.estimated_errors

    def counted(of: nn.Module, group: SmoothingGroup) -> Tensor:
        looked[group.name] += 1
        return look(of, group)

    def noted(*arguments: Any, **options: Any) -> Errors:
        ranked.append(rank(*arguments, **options))
        return ranked[-1]

    monkeypatch.setattr(scales, "weight_absmax", counted)
    monkeypatch.setattr(evaluator, "estimated_errors", noted)
    found = tuned(model, 1e-6, evaluate=measure, trials=4, refine_trials=1)
    assert measure.calls > 3  # the first is that of the float model
    assert ranked
    assert looked == dict.fromkeys(names, 1)
    # And they are what a quantize finds that looks for itself.
    calibration = sq_cpu.calibrate(model, batches(3))
    alone = sq_cpu.quantize(copy.deepcopy(model), calibration, found.plan)
    shared, copied = scales.WeightStatistics(), copy.deepcopy(model)
    recipe = Recipe.of(plan=found.plan)
    for group in smoothing_groups(model):
        shared.absmax(model, group)
    looked.clear()
    given = quantization.carry_out(copied, calibration, recipe, weights=shared)
    assert not looked
    assert_same_model(given, alone, logits)
