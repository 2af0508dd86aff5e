"""Whether what `load` will build is the model that is saved: asked before anything is written."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, MethodType, NoneType
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, type_before_parametrizations

from sq_cpu.checkpoint.config import FORMAT_VERSION
from sq_cpu.checkpoint.entries import unsaved_buffers
from sq_cpu.checkpoint.rebuild import fit
from sq_cpu.checkpoint.skeleton import skeleton
from sq_cpu.checkpoint.stored import Header
from sq_cpu.errors import SqCpuError
from sq_cpu.models.hf_private import LOADING_NOTES, compute_buffers
from sq_cpu.models.linears import linearize
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding, is_lookup
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.record import QuantizationRecord

__all__ = ["check_layers", "check_likeness", "check_stored", "is_rebuilt"]


def is_rebuilt(model: nn.Module) -> bool:
    """Say whether `load` builds the model itself: whether its class is one of transformers."""
    return getattr(transformers, type(model).__name__, None) is type(model)


def check_layers(model: nn.Module, record: QuantizationRecord) -> None:
    """Raise `SqCpuError` unless a model's int8 linears are those of its record."""
    modules = dict(model.named_modules())
    inner = {module.regular for module in modules.values() if isinstance(module, DecomposedLinear)}
    for name in record.layers:
        layer = modules.get(name)
        kind = DecomposedLinear if name in record.decomposed else QuantLinear
        regular = layer.regular if isinstance(layer, DecomposedLinear) else layer
        if not isinstance(layer, kind) or not isinstance(regular, QuantLinear):
            raise SqCpuError(
                f"{name} was quantized, but the model has no such {kind.__name__} now; change the "
                "structure of the float model, then quantize that"
            )
        outliers = len(layer.columns) if isinstance(layer, DecomposedLinear) else 0
        same = regular.scheme == record.layer_scheme(name)
        same = same and regular.hadamard == record.hadamard.get(name, 0)
        if not same or outliers != record.decomposed.get(name, 0):
            raise SqCpuError(
                f"{name} is not the layer that the model's record describes; quantize the float "
                "model again"
            )
    _check_embeddings(modules, record)
    for name, module in modules.items():
        is_layer = isinstance(module, QuantLinear | DecomposedLinear) and module not in inner
        if is_layer and name not in record.layers:
            raise SqCpuError(
                f"{name} is int8, but not in the model's record (sq_cpu_config); quantize the "
                "float model as a whole"
            )


def _check_embeddings(modules: Mapping[str, nn.Module], record: QuantizationRecord) -> None:
    for name, head in record.embeddings.items():
        module = modules.get(name)
        if not isinstance(module, QuantEmbedding) or module.head is not modules[head]:
            raise SqCpuError(
                f"{name} was to read the weight of {head}, but does not now; quantize the float "
                "model again"
            )
    for name, module in modules.items():
        if isinstance(module, QuantEmbedding) and name not in record.embeddings:
            raise SqCpuError(
                f"{name} reads the weight of a head, but is not in the model's record "
                "(sq_cpu_config); quantize the float model as a whole"
            )


def check_likeness(
    model: nn.Module, record: QuantizationRecord, headers: Mapping[str, Header], folder: Path
) -> dict[str, Tensor]:
    """Compare a quantized model with the one that `load` will build from a folder's config.

    ``headers`` are of the tensors that will be stored. Returns what has to be stored beside them:
    the buffers that are no part of the state_dict and that load would compute otherwise; of a
    model that it cannot build, all.

    Raises `SqCpuError` where the two differ in another way, naming what does.
    """
    mine = unsaved_buffers(model)
    if not is_rebuilt(model):
        return mine
    built: Any = skeleton(folder, len(headers))
    compute_buffers(built)  # before: it expects the model's own modules
    linearize(built)
    label = f"load could not rebuild this {type(model).__name__}"
    try:
        _compare_modules(model, built, set(record.layers), set(record.embeddings))
        extra = _other_buffers(mine, unsaved_buffers(built))
    except _UnlikeError as difference:
        raise SqCpuError(f"{label}: {difference}; {_FIX}") from difference
    headers = {**headers, **{name: Header.of(tensor) for name, tensor in extra.items()}}
    fit(built, record, headers, FORMAT_VERSION, label, fix=_FIX)
    return extra


def check_stored(
    record: QuantizationRecord, headers: Mapping[str, Header], folder: Path, label: str
) -> None:
    """Raise `SqCpuError` unless tensors fit the model that `load` builds from a folder's config."""
    built: Any = skeleton(folder, len(headers))
    linearize(built)
    fit(built, record, headers, FORMAT_VERSION, label, fix=_FIX)


_FIX = "have its config say so, or quantize a model that its config describes"
_PLAIN = (bool, int, float, str, NoneType, torch.dtype)
_NAMED = (FunctionType, BuiltinFunctionType, MethodType, type)
# What is compared otherwise, what is not of the model's function or says how it was loaded, and
# what stays as it was where an embedding is resized. Nor are those whose names say that they are of
# a cache, or of dropout.
_NOT_COMPARED = {*vars(nn.Module()), *LOADING_NOTES, "forward", "gradient_checkpointing"}
_NOT_COMPARED |= {"name_or_path", "quantization_method", "save_pretrained", "sq_cpu_card"}
_NOT_COMPARED |= {"vocab_size"}


class _UnlikeError(Exception):
    """What two models differ in."""


def _compare_modules(
    model: nn.Module, built: nn.Module, layers: set[str], embeddings: set[str]
) -> None:
    mine = dict(model.named_modules(remove_duplicate=False))
    fresh = dict(built.named_modules(remove_duplicate=False))
    first_mine, first_fresh = _first_names(mine), _first_names(fresh)
    for name, module in fresh.items():
        if name not in mine:
            raise _UnlikeError(f"it has no {name}, a fresh one has")
        if first_mine[name] != first_fresh[name]:
            raise _UnlikeError(f"{name} is the module {first_mine[name]}, in a fresh one it is not")
        if first_mine[name] in embeddings:
            _compare_embedding(name, mine[name], module)
        elif first_mine[name] not in layers:
            _compare(name or "the model", mine[name], module)
    for name in mine:
        if name not in fresh and name.rpartition(".")[0] not in layers:
            raise _UnlikeError(f"it has {name}, a fresh one has not")


def _first_names(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    first: dict[nn.Module, str] = {}
    return {name: first.setdefault(module, name) for name, module in modules.items()}


def _compare(name: str, mine: nn.Module, fresh: nn.Module) -> None:
    # torch gives every parametrized module (weight_norm) a class of its own.
    kind, given_kind = type_before_parametrizations(mine), type_before_parametrizations(fresh)
    if kind is not given_kind or is_parametrized(mine) != is_parametrized(fresh):
        raise _UnlikeError(
            f"{name} is a {type(mine).__name__}, in a fresh one a {type(fresh).__name__}"
        )
    own, given = vars(mine), vars(fresh)
    # accelerate's hooks, which place and move weights, also put a forward on the instance.
    replaced = "forward" in own and "forward" not in given and "_hf_hook" not in own
    if replaced and not getattr(own["forward"], "same_function", False):
        raise _UnlikeError(f"the forward of {name} was replaced, in a fresh one it is not")
    for key in {**given, **own}:
        is_private = key.startswith("_") and not (key in own and key in given)
        if key in _NOT_COMPARED or is_private or "cache" in key or "drop" in key:
            continue
        default = getattr(kind, key, _ABSENT)
        found, wanted = (_described(values.get(key, default)) for values in (own, given))
        if _OPAQUE in (found, wanted) or found == wanted:
            continue
        if wanted not in (None, _ABSENT) or not _sets(kind, key):
            raise _UnlikeError(f"{name}: {key} is {found!r}, in a fresh one {wanted!r}")


def _compare_embedding(name: str, mine: nn.Module, fresh: nn.Module) -> None:
    if not is_lookup(fresh):
        raise _UnlikeError(f"{name} only looks up, in a fresh one it is a {type(fresh).__name__}")
    for key in ("num_embeddings", "embedding_dim", "padding_idx", "embed_scale"):
        found, wanted = (getattr(module, key, None) for module in (mine, fresh))
        if not isinstance(wanted, Tensor) and found is not wanted and found != wanted:
            raise _UnlikeError(f"{name}: {key} is {found!r}, in a fresh one {wanted!r}")


class _Mark:
    def __init__(self, text: str) -> None:
        self.text = text

    def __repr__(self) -> str:
        return self.text


_ABSENT, _OPAQUE = _Mark("absent"), _Mark("no plain data")


def _described(value: Any) -> Any:
    """Return plain data as lists and tables, functions and classes by their names."""
    if isinstance(value, _NAMED):
        name = getattr(value, "__qualname__", None)  # a method of a partial has none
        return _OPAQUE if name is None else f"{value.__module__}.{name}"
    if isinstance(value, list | tuple):  # which JSON does not tell apart
        items = [_described(item) for item in value]
        return _OPAQUE if _OPAQUE in items else items
    if isinstance(value, dict):
        values = _described(list(value.values()))
        return _OPAQUE if values is _OPAQUE else dict(zip(map(str, value), values, strict=True))
    return value if isinstance(value, _PLAIN) or value is _ABSENT else _OPAQUE


def _sets(kind: type, key: str) -> bool:
    """Say whether methods of a class, beside `__init__`, set an attribute.

    So does a forward that notes for itself what was None before, or absent.
    """
    return any(
        step.opname == "STORE_ATTR" and step.argval == key
        for base in kind.__mro__
        for name, method in vars(base).items()
        if name != "__init__" and isinstance(method, FunctionType)
        for step in dis.get_instructions(inspect.unwrap(method))
    )


def _other_buffers(mine: Mapping[str, Tensor], fresh: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if unlike := sorted(mine.keys() ^ fresh.keys()):
        raise _UnlikeError(
            f"the buffer {unlike[0]} is {'not ' if unlike[0] in mine else ''}in a fresh one "
            f"and {'' if unlike[0] in mine else 'not '}in it"
        )
    return {
        name: tensor
        for name, tensor in mine.items()
        if tensor.dtype != fresh[name].dtype or not torch.equal(tensor, fresh[name])
    }
