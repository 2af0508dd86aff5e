"""Tiny models of transformers' types with inputs that they take: what a judge is given."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_inputs import Inputs, Maker, tensors
from tiny_types import ATTEMPTS, BATCH, model_classes, tiny_config, tiny_model
from torch import Tensor

NO_CLASS = "no model class takes this configuration alone"
LENGTHS = (12, 15, 9)  # tokens of the batches; the first is evaluated, too
NEW_TOKENS = 4
SAID = {
    "placeholders": r"tokens: ?\d+, features:? ?(\d+)",
    "columns": r"shapes cannot be multiplied \(32x\d+ and (\d+)x",
}
"""How errors of transformers say what sizes an input needs."""


class NotBuiltError(Exception):
    """transformers itself does not make, run, save or load the model."""


def run(model: Any, inputs: Inputs) -> list[Tensor]:
    """Return a model's outputs; what it draws at random is the same each time."""
    torch.manual_seed(7)
    with torch.no_grad():
        return [tensor.clone() for tensor in tensors(model(**copy.deepcopy(inputs)))]


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Say whether outputs are equal bit for bit; NaN equals NaN."""
    return len(found) == len(expected) and all(
        a.shape == b.shape
        and a.dtype == b.dtype
        and torch.equal(a.nan_to_num(), b.nan_to_num())
        and torch.equal(a.isnan(), b.isnan())
        for a, b in zip(found, expected, strict=True)
    )


@dataclass
class Subject:
    """A tiny model that transformers makes, runs, saves and loads, with its batches."""

    name: str
    model: Any
    batches: list[Inputs]
    outputs: list[Tensor]
    generated: Tensor | None


def build(model_type: str, folder: Path) -> Subject:
    """Make the model of a type; raise `NotBuiltError` with the reason of the first try."""
    reasons: list[str] = []
    classes = model_classes(model_type)
    if not classes:
        raise NotBuiltError(NO_CLASS)
    for kind in classes[:4]:
        for attempt in range(len(ATTEMPTS)):
            try:
                model = tiny_model(kind, tiny_config(model_type, attempt))
                return _with_batches(model, folder, model_type)
            except Exception as error:
                reasons.append(f"{kind.__name__}: {type(error).__name__}: {short(error)}")
    raise NotBuiltError(*reasons)


def short(error: BaseException) -> str:
    """Return an error's message as one line of bounded length."""
    return " ".join(str(error).split())[:220]


def _with_batches(model: Any, folder: Path, model_type: str, **sizes: int) -> Subject:
    errors: list[str] = []
    makers = [
        list(Maker(model, seed, length, **sizes).candidates())
        for seed, length in enumerate(LENGTHS)
    ]
    for choice, inputs in enumerate(makers[0]):
        try:
            outputs = run(model, inputs)
        except Exception as error:
            for name, pattern in SAID.items():
                if (said := re.search(pattern, str(error))) and name not in sizes:
                    size = int(said[1]) // (BATCH if name == "placeholders" else 1)
                    return _with_batches(model, folder, model_type, **sizes, **{name: size})
            keys = ",".join(inputs)
            errors.append(f"forward({keys}): {type(error).__name__}: {short(error)}")
            continue
        if not any(tensor.is_floating_point() for tensor in outputs):
            errors.append("forward gives no floating-point tensor")
            continue
        if not same(run(model, inputs), outputs):
            raise NotBuiltError("two equal calls give different outputs")
        if not all(not tensor.isnan().any() for tensor in outputs):
            errors.append("forward gives NaN")
            continue
        batches = [inputs, *(maker[choice] for maker in makers[1:])]
        try:
            for batch in batches[1:]:
                run(model, batch)
        except Exception as error:
            errors.append(f"second batch: {type(error).__name__}: {short(error)}")
            continue
        _check_transformers(model, inputs, outputs, folder)
        return Subject(model_type, model, batches, outputs, generate(model, inputs))
    raise NotBuiltError(errors[0] if errors else "no inputs known for its forward")


def _check_transformers(model: Any, inputs: Inputs, outputs: list[Tensor], folder: Path) -> None:
    """Raise `NotBuiltError` unless transformers loads what it saved."""
    try:
        model.save_pretrained(folder / "float")
        loaded = type(model).from_pretrained(folder / "float").eval()
        loaded_outputs = run(loaded, inputs)
    except Exception as error:
        text = f"save_pretrained, from_pretrained: {type(error).__name__}: {short(error)}"
        raise NotBuiltError(text) from error
    if not same(loaded_outputs, outputs):
        raise NotBuiltError("from_pretrained gives another model than was saved")


def generate(model: Any, inputs: Inputs) -> Tensor | None:
    """Return a few greedy tokens; None where the model cannot generate from these inputs."""
    if not model.can_generate():
        return None
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    try:
        return generated(model, given)
    except Exception:  # many need what only their processor makes
        return None


def generated(model: Any, inputs: Inputs) -> Tensor:
    given = {name: value for name, value in inputs.items() if not name.startswith("decoder_")}
    torch.manual_seed(7)
    with torch.no_grad():
        found = model.generate(
            **copy.deepcopy(given), max_new_tokens=NEW_TOKENS, do_sample=False, num_beams=1
        )
    (first, *_) = tensors(found)
    return first
