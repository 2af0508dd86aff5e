"""A small model with outliers, a metric for it, and costs that no clock has a part in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from tiny import batches, tiny_model
from torch import nn

import sq_cpu
from sq_cpu import SearchSpace
from sq_cpu.autotuning.latency import PRECISIONS, Costs
from sq_cpu.models.groups import smoothing_groups

# Quick: without `tune`.
QUICK = SearchSpace(smoothing=("smoothquant",), static_range=("auto",))

# Every linear per token at first, nothing else to choose: what remains is which stay in float.
PER_TOKEN = SearchSpace(
    activations=("per_token",),
    symmetric=(True,),
    smoothing=("smoothquant",),
    alpha=(0.5,),
    weight_clip=(1.0,),
    in_float=(0.0,),
)

GOAL = 6e-5
"""That needs some linears in float, whatever the settings."""

_PER_WEIGHT = {"static": 1.0, "per_token": 1.125, "per_tensor": 1.25, "per_token_x2": 2.0}
_PER_WEIGHT["float"] = 4.0


class Divergence:
    """Mean divergence of a model's next tokens from the float model's; each call is counted.

    With a log, every call writes a line there first; the call of number `hang` then never ends.
    """

    def __init__(self, model: nn.Module, log: Path | None = None, hang: int = -1) -> None:
        self.ids = batches(6)[3:]
        self.log, self.hang, self.calls = log, hang, 0
        self.expected = list(self._logits(model))

    def _logits(self, model: nn.Module) -> Iterator[Any]:
        with torch.no_grad():
            for ids in self.ids:
                yield model(ids).logits.log_softmax(-1)

    def __call__(self, model: nn.Module) -> float:
        if self.log is not None:
            with self.log.open("a") as lines:
                lines.write("evaluation\n")
        while self.calls == self.hang:
            time.sleep(1)
        self.calls += 1
        pairs = zip(self.expected, self._logits(model), strict=True)
        terms = [float((p.exp() * (p - q)).sum(-1).mean()) for p, q in pairs]
        return sum(terms) / len(terms)


def logit_error(
    model_type: str,
    plan: sq_cpu.SmoothPlan | None,
    calibration: sq_cpu.Calibration,
    scheme: str | sq_cpu.Scheme | None,
) -> float:
    """Return the squared error of the logits of `planted`, quantized, on unseen batches."""
    float_model, model = planted(model_type), planted(model_type)
    sq_cpu.quantize(model, calibration, plan, scheme=scheme, smooth=plan is not None)
    with torch.no_grad():
        return sum(
            float((model(ids).logits - float_model(ids).logits).square().mean())
            for ids in batches(6)[3:]
        )


def costs(model: nn.Module) -> Costs:
    """Return costs in proportion to the size of each linear of a model."""
    entries = {}
    for linear in model.modules():
        if isinstance(linear, nn.Linear):
            size = linear.out_features * linear.in_features / 1024
            row = {precision: size * _PER_WEIGHT[precision] for precision in PRECISIONS}
            for extra in ("+smoothing", "+hadamard"):
                row |= {f"{c}{extra}": ms + 0.01 * size for c, ms in row.items() if c != "float"}
            entries[f"{linear.out_features}x{linear.in_features}"] = row
    return Costs(tokens=32, dtype="float32", entries=entries)


def planted(model_type: str, **config: Any) -> torch.nn.Module:
    """Make a tiny model whose norm outputs have outliers: exact, so its function is unchanged."""
    model = tiny_model(model_type, **config)
    scale = torch.ones(32)
    scale[[3, 17]] = 1 / 64
    with torch.no_grad():
        for group in smoothing_groups(model):
            if "norm" not in group.name:
                continue
            producer = model.get_submodule(group.name)
            for parameter in producer.parameters():
                parameter.div_(scale)
            for consumer in group.consumers:
                model.get_submodule(consumer).weight.mul_(scale)
    return model


def llama(**config: Any) -> nn.Module:
    """Return a model of seven linears, with outliers."""
    return planted("llama", num_hidden_layers=1, **config)


def tuned(model: nn.Module, goal: str | float, **options: Any) -> sq_cpu.Autotuned:
    settings = {"costs": costs(model), "trials": 6, "space": QUICK, "progress": False}
    evaluate = options.pop("evaluate", None) or Divergence(model)
    return sq_cpu.autotune(model, batches(3), evaluate, goal, **(settings | options))
