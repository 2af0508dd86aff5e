"""A checkpoint of one class of a model read into another: its base alone, or with another head.

As `from_pretrained` does it for float models: what both have is read, what the file alone has is
left out, and what the model alone has, its head, is new.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from sq_cpu.checkpoint.entries import own_entries, unsaved_buffers
from sq_cpu.checkpoint.prefix import without_prefix
from sq_cpu.checkpoint.stored import Header
from sq_cpu.errors import SqCpuError
from sq_cpu.models.linears import linearized
from sq_cpu.quantization.record import QuantizationRecord

__all__ = ["Translation", "translation"]

_Named = TypeVar("_Named", bound=Any)


@dataclass(frozen=True)
class Translation:
    """How a checkpoint's names become those of a model of another class."""

    names: Mapping[str, str]
    """Tensor of the model -> of the checkpoint; those of the checkpoint alone are left out."""
    dropped: frozenset[str]
    """Tensors of the checkpoint that the model has not."""
    rename: Callable[[str], str | None]
    """A name in the checkpoint -> in the model; None for what the model's head has not."""
    is_new: Callable[[str], bool]
    """Whether a tensor of the model is of its head, which the checkpoint need not have."""

    def record(self, record: QuantizationRecord) -> QuantizationRecord:
        """Return the record of the model; `SqCpuError` where it needs a layer that is dropped."""
        layers = _listed(self.rename, record.layers)
        embeddings = {}
        for embedding, head in record.embeddings.items():
            if (name := self.rename(embedding)) is None:
                continue
            if (renamed := self.rename(head)) is None:
                raise SqCpuError(
                    f"{name} reads the int8 weight of {head}, which this class has not: load the "
                    "class that was saved"
                )
            embeddings[name] = renamed
        plan = record.plan
        if plan is not None:
            plan = replace(
                plan,
                groups=_renamed(self.rename, plan.groups),
                layers=_renamed(self.rename, plan.layers),
            )
        return replace(
            record,
            plan=plan,
            layers=layers,
            smoothed=_listed(self.rename, record.smoothed),
            decomposed=_table(self.rename, record.decomposed),
            hadamard=_table(self.rename, record.hadamard),
            kept=_table(self.rename, record.kept),
            dtypes=_table(self.rename, record.dtypes),
            embeddings=embeddings,
            misfits=_table(self.rename, record.misfits),
        )


def translation(model: Any, record: QuantizationRecord, headers: Iterable[str]) -> Translation:
    """Return how a checkpoint is read into a float model of another class.

    Parameters
    ----------
    model : transformers.PreTrainedModel, on the meta device or in memory; it stays as it is
    headers : names of the checkpoint's tensors
    """
    with linearized(model):
        modules = dict(model.named_modules())
        tensors = {
            name for path, module in modules.items() for name in own_entries(module, path)
        } | unsaved_buffers(model).keys()
    base = f"{model.base_model_prefix}."
    stored = dict.fromkeys(without_prefix(dict.fromkeys(headers, Header((), None))))
    saved_whole = any(name.startswith(base) for name in stored)
    has_base = model.base_model is not model

    def moved(name: str) -> str:
        if saved_whole and not has_base:
            return name.removeprefix(base)
        return name if saved_whole or not has_base else base + name

    def rename(name: str) -> str | None:
        found = moved(name)
        of_base = found.startswith(base) if has_base else not saved_whole or name.startswith(base)
        is_part = of_base and found.partition(".")[0] in modules
        return found if is_part or found in modules else None

    layers = {layer: rename(layer) for layer in record.layers}
    names = {}
    for name in stored:
        # Int8 layers have entries that a float linear has not: theirs go by the layer's name.
        layer = next((each for each in _parents(name) if each in layers), None)
        known = moved(name) in tensors if layer is None else layers[layer] is not None
        if known:
            names[moved(name)] = name
    names |= {name: name for name in headers if name not in stored}
    dropped = frozenset(stored) - frozenset(names.values())
    held = base if has_base else ""
    parts = {_part(name, held) for name in names}

    def is_new(name: str) -> bool:
        return not name.startswith(held) or _part(name, held) not in parts

    return Translation(names, dropped, rename, is_new)


def _part(name: str, base: str) -> str:
    """Return the child of the base that a tensor is of; one, as a pooler, may be new as a whole."""
    return name.removeprefix(base).partition(".")[0]


def _parents(name: str) -> list[str]:
    return [name[: dot.start()] for dot in re.finditer(r"\.", name)]


def _listed(rename: Callable[[str], str | None], names: Iterable[str]) -> tuple[str, ...]:
    return tuple(new for name in names if (new := rename(name)) is not None)


def _table(rename: Callable[[str], str | None], table: Mapping[str, Any]) -> dict[str, Any]:
    return {new: value for name, value in table.items() if (new := rename(name)) is not None}


def _renamed(rename: Callable[[str], str | None], plans: Iterable[_Named]) -> tuple[_Named, ...]:
    pairs = ((rename(each.name), each) for each in plans)
    return tuple(replace(each, name=name) for name, each in pairs if name is not None)
