"""Writing a quantized model as a checkpoint; `sq_cpu.checkpoint` describes the format."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn

from sq_cpu.checkpoint.card import READ_BY_US, Measured, write_card
from sq_cpu.checkpoint.compressed_config import COMPRESSED_TENSORS
from sq_cpu.checkpoint.compressed_save import (
    check_compressible,
    check_recipe,
    compressed_entries,
    compressed_settings,
    compressed_tensors,
)
from sq_cpu.checkpoint.config import (
    CONFIG,
    EXPORTED,
    FORMAT_VERSION,
    INDEX,
    QUANT_METHOD,
    SETTINGS_DIGEST,
    exported_digest,
    settings_digest,
    sha256,
)
from sq_cpu.checkpoint.curves import write_curves
from sq_cpu.checkpoint.entries import float_entries, int8_layers, layer_entries, layer_tensors
from sq_cpu.checkpoint.folder import Staging, staged, writing
from sq_cpu.checkpoint.likeness import check_layers, check_likeness, is_rebuilt
from sq_cpu.checkpoint.prefix import prefix_entries
from sq_cpu.checkpoint.skeleton import skeleton
from sq_cpu.checkpoint.stored import DTYPES, Header
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import json_text
from sq_cpu.inference.prefix import prefix_of
from sq_cpu.kernels.ops import FLOATS
from sq_cpu.models.checks import check_is_module
from sq_cpu.models.hf_private import is_transformers
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.parsing import read_json
from sq_cpu.quantization.dtypes import dtypes_of
from sq_cpu.quantization.recipe import Recipe
from sq_cpu.quantization.record import QuantizationRecord

__all__ = [
    "check_format",
    "save",
    "save_staged",
    "write_companions",
    "write_index",
    "write_settings",
    "write_shard",
]


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    format: str = QUANT_METHOD,  # noqa: A002  as transformers calls it
) -> Path:
    """Write a quantized model, all of it or nothing.

    The folder is built beside ``path`` and moved into place when it is complete. An existing
    folder is replaced if it is empty, or a checkpoint that :func:`save` wrote and holds nothing
    else; files that are replaced keep their modes. An empty folder that is a mount point or the
    current one is filled, config.json last.
    Weights are unpacked one file at a time: peak extra memory is one shard.
    README.md is a model card: what was done, and how to load it. One that somebody wrote or edited,
    in ``path`` or where the model was loaded from, is kept.

    Before anything is written, the model that `load` will build from the config is built on the
    meta device and held against this one: modules, plain attributes, names, shapes and ties.
    Buffers that transformers does not store (rotary frequencies) are computed from the config at
    load, as ``from_pretrained`` does; they are stored where that gives other values.

    A model of another kind, which nothing can be built from, is stored with all of its buffers;
    ``load(path, model=...)`` fills a fresh instance.

    Parameters
    ----------
    model : torch.nn.Module
        A model that :func:`sq_cpu.quantize` or :func:`load` returned.
    path : path-like
        Folder to write; missing parents are made.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved into the same folder.
    max_shard_size : int or str
        Largest safetensors file, in bytes or as "5GB"; a larger single tensor gets its own file.
    format : "sq_cpu" or "compressed-tensors"
        The latter is what vLLM, and transformers with the package compressed-tensors, read. It
        holds O1 and O3, symmetric or not, mixed too. What it cannot say is refused, and the error
        says how to quantize instead: scales of their own for rows that do not fit a static one
        (``dynamic_fallback``), rotations and smoothing at run time, channels in float, a prefix,
        O2, an int8 head, and linears that vLLM joins (q, k, v; gate, up) and that differ.

    Returns
    -------
    pathlib.Path
        ``path``.

    Raises
    ------
    SqCpuError
        The model is not one of ours, `load` could not rebuild it, the format cannot hold it,
        ``path`` holds something else or was changed meanwhile, another process is at work on it, or
        writing failed.
    """
    with staged(path) as staging:
        save_staged(staging, model, tokenizer, max_shard_size=max_shard_size, format=format)
    return Path(path)


def save_staged(
    staging: Staging,
    model: nn.Module,
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
    measured: Measured = (),
    format: str = QUANT_METHOD,  # noqa: A002
) -> None:
    """Do what :func:`save` does, for a target that has been held since before the work began.

    `measured` stands in the model card.
    """
    kind = _format(format)
    record = _record_of(model)
    with writing(staging.target):
        write_card(staging.folder, staging.target, model, record, measured, kind.read_by)
        kind.write(model, record, tokenizer, staging, max_shard_size)
    staging.commit()


def _record_of(model: nn.Module) -> QuantizationRecord:
    check_is_module(model)
    if "_orig_mod" in model._modules:
        raise SqCpuError("the model is compiled; save the model itself, its _orig_mod")
    record = getattr(model, "sq_cpu_config", None)
    if not isinstance(record, QuantizationRecord):
        raise SqCpuError(
            f"{type(model).__name__} is not quantized by sq_cpu; call sq_cpu.quantize before save"
        )
    check_layers(model, record)
    layers = set(record.layers)  # the int8 part of a DecomposedLinear is not one of its own
    smoothed = (
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.smoothing is not None and name in layers
    )
    dtypes = dtypes_of(model, record.layers)
    prefix = prefix_of(model)
    ids = () if prefix is None else prefix.ids
    return replace(record, smoothed=tuple(smoothed), dtypes=dtypes, prefix=ids)


def _write(
    model: nn.Module,
    record: QuantizationRecord,
    tokenizer: Any,
    staging: Staging,
    max_shard_size: int | str,
) -> None:
    folder = staging.folder
    # Small files first: what can be refused is refused before gigabytes are written.
    write_companions(model, tokenizer, folder)
    stored = float_entries(model, model) | prefix_entries(prefix_of(model))
    layer_of: dict[str, tuple[str, QuantLinear]] = {}
    for prefix, layer in int8_layers(model):
        # Only shapes now: each weight is unpacked when its file is written.
        entries = layer_entries(layer, prefix)
        stored |= entries
        layer_of |= dict.fromkeys(entries, (prefix, layer))
    headers = {name: Header.of(tensor) for name, tensor in stored.items()}
    stored |= check_likeness(model, record, headers, folder)
    files = _write_tensors(stored, layer_of, folder, max_shard_size)
    write_settings(staging, record, files)


def _write_compressed(
    model: nn.Module,
    record: QuantizationRecord,
    tokenizer: Any,
    staging: Staging,
    max_shard_size: int | str,
) -> None:
    folder = staging.folder
    if not is_rebuilt(model):
        raise SqCpuError(
            f"{type(model).__name__} is no class of transformers, whose models the format "
            'compressed-tensors holds; save it with format="sq_cpu"'
        )
    write_companions(model, tokenizer, folder)
    layers = dict(int8_layers(model))
    stored = float_entries(model, model)
    stock = dict(skeleton(folder, len(stored) + 3 * len(layers)).named_modules())
    check_compressible(model, record, stock)
    ours = dict(stored)
    for name, layer in layers.items():
        ours |= layer_entries(layer, name)
    headers = {name: Header.of(tensor) for name, tensor in ours.items()}
    if buffers := check_likeness(model, record, headers, folder):
        raise SqCpuError(
            f"{min(buffers)} is a buffer that transformers computes, and this model has other "
            "values or another dtype there, which the format compressed-tensors does not store: "
            "load the float model in that dtype"
        )
    layer_of: dict[str, tuple[str, QuantLinear]] = {}
    for name, layer in layers.items():
        entries = compressed_entries(layer, name)
        stored |= entries
        layer_of |= dict.fromkeys(entries, (name, layer))
    files = _write_tensors(stored, layer_of, folder, max_shard_size, compressed_tensors)
    content = read_json(folder / CONFIG)
    linears = [name for name, module in stock.items() if isinstance(module, nn.Linear)]
    content["quantization_config"] = compressed_settings(model, linears)
    companions = staging.companions(files)
    digest = exported_digest(content)
    content[EXPORTED] = {"files": files, "companions": companions, SETTINGS_DIGEST: digest}
    (folder / CONFIG).write_text(json_text(content) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Format:
    """A format that is written."""

    write: Callable[[nn.Module, QuantizationRecord, Any, Staging, int | str], None]
    check: Callable[[Recipe], None]
    """Raises `SqCpuError` for a recipe whose models it cannot hold."""
    read_by: str
    """What the model card says of who reads it."""


_FORMATS = {
    QUANT_METHOD: _Format(_write, lambda recipe: None, READ_BY_US),
    COMPRESSED_TENSORS: _Format(
        _write_compressed,
        check_recipe,
        "vLLM reads these files, transformers with `pip install compressed-tensors`, and sq_cpu.",
    ),
}


def check_format(format: str, recipe: Recipe) -> None:  # noqa: A002
    """Raise `SqCpuError` for a format that `save` does not write, or not of what a recipe makes."""
    _format(format).check(recipe)


def _format(name: str) -> _Format:
    found = _FORMATS.get(name) if isinstance(name, str) else None
    if found is None:
        raise SqCpuError(f"format is {name!r}; it is {' or '.join(map(repr, _FORMATS))}")
    return found


def write_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what is beside the tensors: the configs and the tokenizer's files."""
    if is_transformers(model):
        config = copy.deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.dtype = str(model.dtype).removeprefix("torch.")
        config.quantization_config = {}
        config.save_pretrained(folder)
        if model.can_generate():
            model.generation_config.save_pretrained(folder)
    else:
        content = {"architectures": [type(model).__name__], "quantization_config": {}}
        (folder / CONFIG).write_text(json_text(content) + "\n", encoding="utf-8")
    if tokenizer is not None:
        try:
            tokenizer.save_pretrained(folder)
        except OSError:
            raise
        except Exception as error:  # the base class itself is what tokenizers raises
            raise SqCpuError(f"the tokenizer cannot be saved: {first_line(error)}") from error


def write_settings(staging: Staging, record: QuantizationRecord, files: Mapping[str, str]) -> None:
    """Complete config.json, when all else is written; ``files`` is name -> SHA-256."""
    folder = staging.folder
    record = write_curves(folder, record)
    settings = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        **record.to_dict(),
        "files": dict(files),
        "companions": staging.companions(files),
    }
    settings[SETTINGS_DIGEST] = settings_digest(settings)
    content = read_json(folder / CONFIG)
    content.pop(EXPORTED, None)  # of what the model was read from
    content["quantization_config"] = settings
    (folder / CONFIG).write_text(json_text(content) + "\n", encoding="utf-8")


def _write_tensors(
    stored: Mapping[str, Tensor],
    layer_of: Mapping[str, tuple[str, QuantLinear]],
    folder: Path,
    max_shard_size: int | str,
    tensors_of: Callable[[QuantLinear, str], Mapping[str, Tensor]] = layer_tensors,
) -> dict[str, str]:
    """Write the safetensors files (and an index if there are several); name -> SHA-256."""
    for name, tensor in stored.items():
        known = FLOATS if tensor.is_floating_point() else tuple(DTYPES.values())
        if tensor.dtype not in known:
            raise SqCpuError(
                f"{name} is {tensor.dtype}, which load does not take: make it another dtype, or a "
                "non-persistent buffer"
            )
    # By their own sizes: what shares memory is not kept together.
    sizes = {name: tensor.to("meta") for name, tensor in stored.items()}
    try:
        split = split_torch_state_dict_into_shards(sizes, max_shard_size=max_shard_size)
    except (TypeError, ValueError) as error:
        raise SqCpuError(
            f'max_shard_size is {max_shard_size!r}; give a number of bytes, or a text as "5GB"'
        ) from error
    digests = {}
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            if name not in layer_of:
                shard[name] = stored[name]
            elif name not in shard:
                prefix, module = layer_of[name]
                entries = tensors_of(module, prefix)
                shard.update({key: entries[key] for key in entries if key in names})
        digests[file] = write_shard(folder / file, shard)
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata)
    return digests


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file beside config.json and give its SHA-256."""
    own: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        own[name] = tensor.contiguous()
        # safetensors refuses tensors that share memory.
        if own[name].untyped_storage().data_ptr() in storages:
            own[name] = own[name].clone()
        storages.add(own[name].untyped_storage().data_ptr())
    save_file(own, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; give them the umask's mode.
    shutil.copymode(path.parent / CONFIG, path)
    return sha256(path)


def write_index(folder: Path, file_of: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Write the index that tells which file holds which tensor."""
    index = {"metadata": dict(metadata), "weight_map": dict(file_of)}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
