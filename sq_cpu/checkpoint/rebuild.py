"""A float model and a record become the quantized model, held against the tensors that are stored.

What is stored is known by its headers. So `load` allocates nothing before they agree with what
config.json says, and `save` proves that they will before it writes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sq_cpu.checkpoint.config import FORMAT_VERSION
from sq_cpu.checkpoint.entries import own_entries, put_tensor, tie, ties_of, unsaved_buffers
from sq_cpu.checkpoint.prefix import check_prefix, read_prefix, without_prefix
from sq_cpu.checkpoint.stored import Header, Stored
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.inference.prefix import use_prefix
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.models.hf_private import is_transformers, set_ties
from sq_cpu.models.linears import linearize, linearized
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.embedding import QuantEmbedding
from sq_cpu.nn.entries import linear_entries
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.dtypes import set_dtypes
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.quantization.replace import mark_quantized, replace_linears
from sq_cpu.scheme import Scheme

__all__ = ["Fit", "fit", "restore", "restore_float"]

_AGAIN = "save the model again"


@dataclass(frozen=True)
class Fit:
    """How stored tensors fit a linearized float model, whose layers of a record become int8."""

    layers: Mapping[str, Mapping[str, str]]
    """Int8 layer -> entry of its state_dict -> name of the stored tensor."""
    others: Collection[str]
    """Names of the stored tensors that are the model's own, of its other modules."""
    tied: Mapping[str, str]
    """Parameter that is not stored -> the one that it is tied to."""
    new: Collection[str] = ()
    """The model's own that need not be stored, and are not."""


def fit(
    model: nn.Module,
    record: QuantizationRecord,
    headers: Mapping[str, Header],
    version: int,
    where: object,
    path: Callable[[str], object] | None = None,
    fix: str = _AGAIN,
    is_new: Callable[[str], bool] = lambda _: False,
) -> Fit:
    """Find the place of every stored tensor in a float model; nothing is changed or allocated.

    Parameters
    ----------
    model : linearized, on the meta device or in memory
    headers : name -> shape and dtype of every stored tensor
    version : of the format
    where, path, fix : the checkpoint, the file that holds a tensor, and what to do, for errors
    is_new : says which of the model's own need not be stored

    Raises
    ------
    SqCpuError
        For a layer that is no linear of the model, and a tensor that is missing, not expected, or
        of another shape or dtype.
    """
    check_prefix(model, record, headers, where, fix)
    headers = without_prefix(headers)
    modules = dict(model.named_modules())
    expected: dict[str, Header] = {}
    layers: dict[str, dict[str, str]] = {}
    for name in record.layers:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise SqCpuError(
                f"{where}: layer {name} is not a linear of {type(model).__name__}; {fix}"
            )
        entries = _layer_headers(linear, name, record)
        layers[name] = {key: _stored_name(name, key, version) for key in entries}
        for key, header in entries.items():
            is_weight = key.rpartition(".")[2] == "weight" and version >= 5
            expected[layers[name][key]] = (
                header._replace(shape=(*header.shape, 1)) if is_weight else header
            )
    int8 = set(expected)
    _check_embeddings(modules, record, f"{where}: ", fix)
    read_elsewhere = {f"{name}.weight" for name in record.embeddings}
    for prefix, module in modules.items():
        if prefix not in layers:
            for name, tensor in own_entries(module, prefix).items():
                if name not in read_elsewhere:
                    expected[name] = _header(tensor)
    tied = _tied(model, expected.keys() - int8 - headers.keys(), headers.keys() - int8)
    lacking = expected.keys() - headers.keys() - tied.keys()
    new = {name for name in lacking - int8 if is_new(name)}
    if missing := sorted(lacking - new):
        raise SqCpuError(f"{where}: {_listed(missing)} missing; {fix}")
    computed = {name: _header(b) for name, b in unsaved_buffers(model).items()}
    known = computed | expected
    if unexpected := sorted(headers.keys() - known.keys()):
        raise SqCpuError(
            f"{where}: {_listed(unexpected)} not expected by {type(model).__name__}; {fix}"
        )
    for name, header in headers.items():
        wanted = known[name]
        same = header.dtype in FLOATS if wanted.dtype is None else header.dtype == wanted.dtype
        if header.shape != wanted.shape or not same:
            raise SqCpuError(
                f"{where if path is None else path(name)}: tensor {name} is {header}, expected "
                f"{wanted}; {fix}"
            )
    return Fit(layers, headers.keys() - int8, tied, new)


def _layer_headers(linear: nn.Linear, name: str, record: QuantizationRecord) -> dict[str, Header]:
    scheme, bias = record.layer_scheme(name), linear.bias is not None
    arguments = linear.in_features, linear.out_features, scheme
    block = record.hadamard.get(name, 0)
    if name not in record.decomposed:
        smoothed = name in record.smoothed
        entries = linear_entries(*arguments, bias=bias, smoothed=smoothed, hadamard=block)
        return {key: Header(*entry) for key, entry in entries.items()}
    entries = linear_entries(*arguments, bias=bias, smoothed=True, hadamard=block)
    outliers = record.decomposed[name]
    return {
        **{f"regular.{key}": Header(*entry) for key, entry in entries.items()},
        "columns": Header((outliers,), torch.int64),
        "outlier_weight": Header((linear.out_features, outliers), None),
    }


def _check_embeddings(
    modules: Mapping[str, nn.Module], record: QuantizationRecord, where: str, fix: str
) -> None:
    for name, head in record.embeddings.items():
        module = modules.get(name)
        if not isinstance(module, nn.Embedding):
            raise SqCpuError(
                f"{where}{name}, which is to read the weight of {head}, is no embedding; {fix}"
            )
        if module.weight.shape != modules[head].get_parameter("weight").shape:
            raise SqCpuError(
                f"{where}{name} is {list(module.weight.shape)}, unlike the weight of {head}; {fix}"
            )


def _stored_name(layer: str, key: str, version: int) -> str:
    return f"{layer}.{key.removeprefix('regular.') if version >= 5 else key}"


def _header(tensor: Tensor) -> Header:
    header = Header.of(tensor)
    # Models mix float dtypes, and may be loaded in another one.
    return header._replace(dtype=None) if tensor.is_floating_point() else header


def _tied(model: nn.Module, missing: Collection[str], stored: Collection[str]) -> dict[str, str]:
    """Return, for parameters that are not stored, one that is stored and tied to them."""
    ties = ties_of(model)
    tied = {}
    for target in missing:
        source = ties.get(target, target)
        group = [source, *(name for name, other in ties.items() if other == source)]
        if held := [name for name in group if name in stored and name != target]:
            tied[target] = held[0]
    return tied


def restore(
    model: nn.Module,
    record: QuantizationRecord,
    stored: Stored,
    version: int,
    folder: Path,
    dtype: torch.dtype | None,
    prepare: Callable[[], object] = lambda: None,
    fix: str = _AGAIN,
    is_new: Callable[[str], bool] = lambda _: False,
) -> None:
    """Make a float model, whose values do not count, the one that was saved.

    ``prepare`` is called when all is known to fit; ``fix`` is what to do where it does not. Each
    tensor is read, converted to ``dtype`` (None: as stored) or packed, and released before the
    next. What need not be stored, as ``is_new`` says, stays as it is. ``SqCpuError`` names a layer
    or tensor that is missing, unexpected, misshapen or of impossible values.
    """
    with linearized(model):
        found = fit(model, record, stored.headers, version, folder, stored.path, fix, is_new=is_new)
    prepare()  # what it calls of transformers expects the model's own modules
    linearize(model)
    modules: dict[str, Any] = dict(model.named_modules())
    replace_linears(
        model, {name: _empty_layer(modules[name], name, record, folder) for name in record.layers}
    )
    heads: Any = {name: model.get_submodule(head) for name, head in record.embeddings.items()}
    replace_linears(
        model, {name: QuantEmbedding(head, modules[name]) for name, head in heads.items()}
    )
    for name, keys in found.layers.items():
        _fill_layer(model.get_submodule(name), keys, stored, dtype, f"{folder}: layer {name}")
    _fill_others(model, found, stored, dtype, folder)
    int8 = (*record.layers, *record.embeddings)
    set_dtypes(model, int8, record.dtypes if dtype is None else {})
    mark_quantized(model, record)
    use_prefix(model, read_prefix(record, stored, dtype))


def restore_float(
    model: nn.Module,
    stored: Stored,
    folder: Path,
    dtype: torch.dtype | None,
    prepare: Callable[[], object],
    fix: str,
) -> None:
    """Do what :func:`restore` does for a model of floats, its linears and all."""
    record = QuantizationRecord(scheme=Scheme(), plan=None, layers=())
    found = fit(model, record, stored.headers, FORMAT_VERSION, folder, stored.path, fix)
    prepare()
    _fill_others(model, found, stored, dtype, folder)
    model.eval()


def _fill_others(
    model: nn.Module, found: Fit, stored: Stored, dtype: torch.dtype | None, folder: Path
) -> None:
    """Put what is not of int8 layers in place."""
    computed = unsaved_buffers(model)
    for name in found.others:
        # A copy: the model must not change when the file does.
        cast = dtype if name not in computed else None
        put_tensor(model, name, _own(stored.read(name), cast))
    tie(model, found.tied)
    if is_transformers(model):
        set_ties(model, found.tied)
    for name, buffer in unsaved_buffers(model).items():
        if buffer.is_meta:
            raise SqCpuError(
                f"{folder} does not store the buffer {name}, which is on the meta device; give "
                "the model with its buffers in memory"
            )


def _own(value: Tensor, dtype: torch.dtype | None) -> Tensor:
    return value.to(dtype if value.is_floating_point() else None, copy=True)


def _empty_layer(
    linear: nn.Module, name: str, record: QuantizationRecord, folder: Path
) -> nn.Module:
    assert isinstance(linear, nn.Linear)  # `fit` raised otherwise
    arguments = linear.in_features, linear.out_features, record.layer_scheme(name)
    bias, block = linear.bias is not None, record.hadamard.get(name, 0)
    try:
        if name in record.decomposed:
            return DecomposedLinear.empty(
                *arguments, record.decomposed[name], bias=bias, hadamard=block
            )
        smoothed = name in record.smoothed
        return QuantLinear(*arguments, bias=bias, smoothed=smoothed, hadamard=block)
    except Exception as error:  # also a size that no memory holds
        raise SqCpuError(
            f"{folder}: layer {name} cannot be made ({first_line(error)}); save the model again"
        ) from error


def _fill_layer(
    layer: Any,
    keys: Mapping[str, str],
    stored: Stored,
    dtype: torch.dtype | None,
    where: str,
) -> None:
    values = {key: stored.read(name) for key, name in keys.items()}
    inner = layer
    if isinstance(layer, DecomposedLinear):
        inner = layer.regular
        for key in ("columns", "outlier_weight"):
            put_tensor(layer, key, _own(values.pop(key), dtype))
        values = {key.removeprefix("regular."): value for key, value in values.items()}
    packed = inner.packed_weight
    values["weight"] = values["weight"].view(packed.out_features, packed.in_features)
    try:
        inner.load_state_dict(values)
        if inner is not layer:
            layer.check()
    except SqCpuError as error:
        raise SqCpuError(f"{where}: {error}") from error


def _listed(names: list[str]) -> str:
    """Give "tensor a" or "3 tensors (a, b, c)", at most three by name."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors ({', '.join(names[:3])}{more})"
