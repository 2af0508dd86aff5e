"""Checkpoints: safetensors files beside a config.json that describes them. No pickle anywhere.

A checkpoint is a folder as transformers writes it, with int8 weights where a linear was quantized:

    config.json                  the model's config plus ``quantization_config`` (below)
    model.safetensors            or model-0000x-of-0000y.safetensors and an index of them
    generation_config.json, ...  what the model and the tokenizer add

A quantized linear ``L`` of shape [N, K] is stored unpacked, so that a file serves every machine:
``L.weight`` int8 [N, K], ``L.weight_scale`` fp32 [N], ``L.bias`` fp32 [N] if it has one, and for
static schemes ``L.input_scale`` fp32 [] and ``L.input_zero_point`` int32 []; where the smoothing
scale was not folded into another layer, ``L.smoothing`` fp32 [K]. A linear that keeps O outlier
channels in float has these entries as ``L.regular.weight`` and so on, with a ``smoothing`` of 2^126
in those channels, and beside them ``L.columns`` int64 [O] and ``L.outlier_weight`` [N, O] in the
model's dtype. Everything else is stored under its own name in its own dtype; tied weights are
stored once.

The scheme of a layer is ``scheme``, but for the activations that ``plan`` gives it in ``layers``.

``quantization_config`` holds ``quant_method`` ("sq_cpu"), ``format_version``, the record of
:func:`sq_cpu.quantize` (``scheme``, ``plan``, ``layers``, and if any ``smoothed``, the layers with
a ``smoothing``, ``decomposed``, layer -> O, and ``kept``, linear -> why it is in float), ``files``
(name -> SHA-256 of every safetensors file), ``companions`` (the same of the other files that
:func:`save` wrote) and ``config_sha256`` (of config.json itself, see ``checkpoint_settings``).
Version 1 had no ``smoothed``, ``decomposed`` and ``kept``, and fewer fields in ``scheme``; versions
1 and 2 had ``groups`` alone in ``plan``.
"""

from __future__ import annotations

import copy
import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from sq_cpu.checkpoint.config import (
    CONFIG,
    CONFIG_DIGEST,
    FLOATS,
    FORMAT_VERSION,
    QUANT_METHOD,
    check_dtype,
    check_files,
    config_digest,
    read_settings,
    record_of_settings,
    sha256,
)
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import json_text
from sq_cpu.models.linears import linearize
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.quantization.replace import mark_quantized, replace_linears

__all__ = ["load", "save"]

_INDEX = "model.safetensors.index.json"


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    tokenizer: Any = None,
    *,
    max_shard_size: int | str = "5GB",
) -> Path:
    """Write a quantized model, all of it or nothing.

    The folder is built beside ``path`` and moved into place when it is complete. An existing
    folder is filled if it is empty, config.json last, and replaced only if it is a checkpoint that
    :func:`save` wrote and holds nothing else.
    Weights are unpacked one file at a time: peak extra memory is one shard.

    Buffers that transformers does not store (rotary frequencies) are rebuilt from the config at
    load, as ``from_pretrained`` does.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A model that :func:`sq_cpu.quantize` or :func:`load` returned.
    path : path-like
        Folder to write; missing parents are made.
    tokenizer : transformers.PreTrainedTokenizerBase, optional
        Saved into the same folder.
    max_shard_size : int or str
        Largest safetensors file, in bytes or as "5GB"; a larger single tensor gets its own file.

    Returns
    -------
    pathlib.Path
        ``path``.

    Raises
    ------
    SqCpuError
        The model is not one of ours, ``path`` holds something else, or writing failed.
    """
    record = _record_of(model)
    check_architecture(model)
    target = Path(os.path.realpath(path))
    check_replaceable(target)
    new_parents = [parent for parent in target.parents if not parent.exists()]
    # An empty folder may be a mount point or the current one: it stays, and is filled.
    staging = _hidden(target, inside=target.exists() and _is_empty(target))
    try:
        staging.mkdir(parents=True)
        _write(cast(Any, model), record, tokenizer, staging, max_shard_size)
        move_into_place(staging, target)
    except BaseException as error:
        shutil.rmtree(staging, ignore_errors=True)
        with suppress(OSError):
            for parent in new_parents:  # nearest first; stops at one that is in use
                parent.rmdir()
        if isinstance(error, OSError | SafetensorError):
            raise SqCpuError(
                f"cannot write checkpoint {target}: {first_line(error)}; "
                "choose a writable folder with enough free space"
            ) from error
        raise
    return Path(path)


def load(
    path: str | os.PathLike[str], *, dtype: torch.dtype | None = None, verify: bool = True
) -> nn.Module:
    """Read a checkpoint that :func:`save` wrote; logits equal those before saving, bit for bit.

    Parameters are never allocated twice or initialised: each int8 weight is packed as it is read,
    so peak memory is the model's own size plus one layer (and file pages, which the kernel may
    drop at will).

    Parameters
    ----------
    path : path-like
        The checkpoint's folder.
    dtype : torch.dtype, optional
        fp32, bf16 or fp16 for everything that is not quantized; default: as stored.
    verify : bool
        Compare config.json and every file that it names with its SHA-256 first. False loads
        what was edited on purpose.

    Returns
    -------
    transformers.PreTrainedModel
        In eval mode, without gradients, with ``sq_cpu_config`` as :func:`sq_cpu.quantize` set it.

    Raises
    ------
    SqCpuError
        Not a checkpoint of ours, a newer format, or a missing, damaged or mismatching file or
        tensor, which is named.
    """
    check_dtype(dtype)
    folder = Path(path)
    settings = read_settings(folder)
    files = check_files(folder, settings, verify=verify)
    record = record_of_settings(settings, folder / CONFIG)
    model = _skeleton(folder, dtype)
    restore(model, folder, record, files, dtype)
    read_generation_config(model, folder)
    return cast(nn.Module, model)


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model what ``folder`` says about generating, if anything."""
    if (path := folder / "generation_config.json").exists():
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise SqCpuError(f"cannot load {path}: {first_line(error)}; repair it") from error


# --- writing ------------------------------------------------------------------------------------


def _record_of(model: nn.Module) -> QuantizationRecord:
    record = getattr(model, "sq_cpu_config", None)
    if not isinstance(record, QuantizationRecord):
        raise SqCpuError(
            f"{type(model).__name__} is not quantized by sq_cpu; call sq_cpu.quantize before save"
        )
    layers = set(record.layers)  # the int8 part of a DecomposedLinear is not one of its own
    smoothed = (
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantLinear) and module.smoothing is not None and name in layers
    )
    return replace(record, smoothed=tuple(smoothed))


def check_architecture(model: nn.Module) -> None:
    """Raise ``SqCpuError`` for a model that ``load`` could not rebuild."""
    architecture = type(model).__name__
    if getattr(transformers, architecture, None) is not type(model):
        raise SqCpuError(
            f"{architecture} is not a class of transformers, so load could not rebuild it; "
            "keep its state_dict() with safetensors instead"
        )


def check_replaceable(target: Path) -> None:
    """Refuse to replace anything that ``save`` did not write."""
    if not target.exists():
        return
    if not target.is_dir():
        raise SqCpuError(f"{target} is a file; choose another folder to save to")
    if _is_empty(target):
        return
    try:
        settings = read_settings(target)
        ours = {CONFIG, *settings.get("files", ()), *settings.get("companions", ())}
    except (SqCpuError, TypeError) as error:
        raise SqCpuError(
            f"{target} is not empty and is not an sq_cpu checkpoint; choose another folder"
        ) from error
    if foreign := sorted(_contents(target) - ours):
        raise SqCpuError(
            f"{target} holds {foreign[0]}, which save did not write and will not delete; "
            "move it away or choose another folder"
        )
    if os.path.ismount(target) or os.path.samefile(target, os.curdir):
        raise SqCpuError(
            f"{target} is a mount point or the current folder, which cannot be replaced; "
            "empty it or choose another folder"
        )


def _is_empty(folder: Path) -> bool:
    return not any(folder.iterdir())


def _contents(folder: Path) -> set[str]:
    """Give the paths within a folder of all files, at any depth, and of empty folders."""
    return {
        entry.relative_to(folder).as_posix()
        for entry in folder.rglob("*")
        if entry.is_symlink() or not entry.is_dir() or _is_empty(entry)
    }


def _write(
    model: Any, record: QuantizationRecord, tokenizer: Any, folder: Path, max_shard_size: int | str
) -> None:
    # Small files first: what can be refused is refused before gigabytes are written.
    write_companions(model, tokenizer, folder)
    files = _write_tensors(model, folder, max_shard_size)
    write_settings(folder, record, files)


def write_companions(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write what is beside the tensors: the configs and the tokenizer's files."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = {}
    config.save_pretrained(folder)
    if model.can_generate():
        model.generation_config.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def write_settings(folder: Path, record: QuantizationRecord, files: Mapping[str, str]) -> None:
    """Complete config.json, when all else is written; ``files`` is name -> SHA-256."""
    settings = {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        **record.to_dict(),
        "files": dict(files),
        "companions": {
            name: sha256(folder / name) for name in sorted(_contents(folder) - {CONFIG, *files})
        },
    }
    content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    content["quantization_config"] = settings
    settings[CONFIG_DIGEST] = config_digest(content)
    (folder / CONFIG).write_text(json_text(content) + "\n", encoding="utf-8")


def _write_tensors(model: Any, folder: Path, max_shard_size: int | str) -> dict[str, str]:
    """Write the safetensors files (and an index if there are several); name -> SHA-256."""
    stored: dict[str, Tensor] = float_entries(model, model)
    layer_of: dict[str, tuple[str, QuantLinear]] = {}
    for prefix, module in model.named_modules():
        if isinstance(module, QuantLinear):
            # Only shapes now: each weight is unpacked when its file is written.
            entries = _layer_entries(module, prefix)
            stored |= entries
            layer_of |= dict.fromkeys(entries, (prefix, module))
    split = split_torch_state_dict_into_shards(stored, max_shard_size=max_shard_size)
    digests = {}
    for file, names in split.filename_to_tensors.items():
        shard: dict[str, Tensor] = {}
        for name in names:
            if name not in layer_of:
                shard[name] = stored[name]
            elif name not in shard:
                prefix, module = layer_of[name]
                entries = own_entries(module, prefix)
                shard.update({key: entries[key] for key in entries if key in names})
        digests[file] = write_shard(folder / file, shard)
    if split.is_sharded:
        write_index(folder, split.tensor_to_filename, split.metadata)
    return digests


def float_entries(model: Any, part: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """Give what ``part``, called ``prefix`` in ``model``, stores beside its quantized linears.

    Tied weights are under one name only; no two of the tensors share memory.
    """
    stored: dict[str, Tensor] = {}
    storages: set[int] = set()
    for path, module in part.named_modules(prefix=prefix):
        if isinstance(module, QuantLinear):
            continue
        for name, tensor in own_entries(module, path).items():
            if not _is_tied(model, name, model.all_tied_weights_keys):
                storage = tensor.untyped_storage().data_ptr()
                stored[name] = tensor.clone() if storage in storages else tensor
                storages.add(storage)
    return stored


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a safetensors file beside config.json and give its SHA-256."""
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={"format": "pt"})
    # safetensors makes files that only their owner can read; give them the umask's mode.
    shutil.copymode(path.parent / CONFIG, path)
    return sha256(path)


def write_index(folder: Path, file_of: Mapping[str, str], metadata: Mapping[str, Any]) -> None:
    """Write the index that tells which file holds which tensor."""
    index = {"metadata": dict(metadata), "weight_map": dict(file_of)}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def own_entries(module: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Give the state_dict entries of this module alone, children left out."""
    entries: dict[str, Tensor] = {}
    module._save_to_state_dict(entries, f"{prefix}." if prefix else "", keep_vars=False)
    return entries


def _is_tied(model: Any, name: str, ties: dict[str, str]) -> bool:
    source = ties.get(name)
    return source is not None and model.get_parameter(source) is model.get_parameter(name)


def _hidden(target: Path, *, inside: bool = False) -> Path:
    """Give a new name for a folder beside ``target``, or in it."""
    return (target if inside else target.parent) / f".{target.name}.{secrets.token_hex(6)}"


def move_into_place(staging: Path, target: Path) -> None:
    """Make ``staging`` the folder ``target``, which ``check_replaceable`` let through."""
    if staging.parent == target:
        _move_out(staging, target)
        return
    if not target.exists():
        staging.rename(target)
        return
    old = _hidden(target)
    target.rename(old)
    try:
        staging.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _move_out(staging: Path, target: Path) -> None:
    """Move what ``staging`` holds to ``target``, or nothing."""
    # config.json last: without it the folder is no checkpoint.
    entries = sorted(staging.iterdir(), key=lambda entry: entry.name == CONFIG)
    try:
        for entry in entries:
            entry.rename(target / entry.name)
        staging.rmdir()
    except BaseException:
        for entry in entries:
            with suppress(OSError):  # not moved yet
                (target / entry.name).rename(entry)
        raise


# --- reading ------------------------------------------------------------------------------------


def _skeleton(folder: Path, dtype: torch.dtype | None) -> Any:
    def make(config: Any) -> Any:
        del config.quantization_config
        model_class = getattr(transformers, config.architectures[0])
        return model_class._from_config(config, dtype=dtype or config.dtype)

    return skeleton(folder, make)


def skeleton(folder: Path, make: Callable[[Any], Any]) -> Any:
    """Build a model from its config, with parameters on the meta device and buffers in memory."""
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        with no_init_weights(), init_empty_weights(include_buffers=False):
            model = make(config)
        # Buffers were made of what the model's dtype rounds (GPT-J's frequencies). Once more in
        # fp32, as from_pretrained does; what is marked stays.
        for parameter in model.parameters():
            parameter._is_hf_initialized = True
        model.initialize_weights()
        return model
    except Exception as error:  # a config may be wrong in any way, and raise anything
        raise SqCpuError(
            f"{folder / CONFIG}: transformers {transformers.__version__} cannot build this model "
            f"({first_line(error)}); check architectures and upgrade transformers"
        ) from error


def restore(
    model: Any,
    folder: Path,
    record: QuantizationRecord,
    files: list[str],
    dtype: torch.dtype | None,
) -> None:
    """Make a float model whose parameters are on the meta device the one that was saved.

    Each tensor is read, converted to ``dtype`` (None: as stored) or packed, and released before
    the next. ``SqCpuError`` names a layer or tensor that is missing, unexpected or misshapen.
    """
    linearize(model)
    replace_linears(model, _empty_layers(folder, model, record))
    _fill(model, folder, files, dtype)
    for name in record.decomposed:
        try:
            model.get_submodule(name).check()
        except SqCpuError as error:
            raise SqCpuError(f"{folder}: layer {name}: {error}") from error
    mark_quantized(model, record)


def _empty_layers(folder: Path, model: Any, record: QuantizationRecord) -> dict[str, nn.Module]:
    layers: dict[str, nn.Module] = {}
    modules = dict(model.named_modules())
    for name in record.layers:
        linear = modules.get(name)
        if not isinstance(linear, nn.Linear):
            raise SqCpuError(
                f"{folder / CONFIG}: layer {name} is not a linear of {type(model).__name__}; "
                "save the model again"
            )
        arguments = linear.in_features, linear.out_features, record.layer_scheme(name)
        bias = linear.bias is not None
        try:
            if name in record.decomposed:
                layers[name] = DecomposedLinear.empty(
                    *arguments, record.decomposed[name], bias=bias
                )
            else:
                layers[name] = QuantLinear(*arguments, bias=bias, smoothed=name in record.smoothed)
        except Exception as error:  # also a size that no memory holds
            raise SqCpuError(
                f"{folder / CONFIG}: layer {name} cannot be made ({first_line(error)}); "
                "save the model again"
            ) from error
    return layers


def _layer_entries(layer: QuantLinear, prefix: str) -> dict[str, Tensor]:
    """Give name -> meta tensor of what a quantized linear stores."""
    return {
        f"{prefix}.{key}": torch.empty(shape, dtype=dtype, device="meta")
        for key, (shape, dtype) in layer.entries().items()
    }


def _fill(model: Any, folder: Path, files: list[str], dtype: torch.dtype | None) -> None:
    """Read every tensor into the skeleton and tie what is tied."""
    with ExitStack() as stack:
        found: dict[str, tuple[Path, Any]] = {}
        for file in files:
            try:
                handle = stack.enter_context(safe_open(folder / file, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise SqCpuError(
                    f"{folder / file} is damaged ({first_line(error)}); copy the checkpoint again"
                ) from error
            stored = handle.keys()  # a method of safe_open, which is no mapping
            for name in stored:
                if name in found:
                    raise SqCpuError(
                        f"tensor {name} is in both {found[name][0].name} and {file}; save again"
                    )
                found[name] = (folder / file, handle)

        modules = dict(model.named_modules())
        expected = {
            prefix: _layer_entries(module, prefix)
            if isinstance(module, QuantLinear)
            else own_entries(module, prefix)
            for prefix, module in modules.items()
        }
        quantized = {
            n for p, m in modules.items() if isinstance(m, QuantLinear) for n in expected[p]
        }
        names = {name for entries in expected.values() for name in entries}
        tied = {
            target: source
            for target, source in model.all_tied_weights_keys.items()
            if target in names - quantized - found.keys() and source in found
        }
        if missing := sorted(names - found.keys() - tied.keys()):
            raise SqCpuError(f"{folder}: {_listed(missing)} missing; save the model again")
        if unexpected := sorted(found.keys() - names):
            raise SqCpuError(
                f"{folder}: {_listed(unexpected)} not expected by {type(model).__name__}; "
                "save the model again"
            )

        for prefix, entries in expected.items():
            module = modules[prefix]
            values = {
                name.removeprefix(f"{prefix}."): _read_tensor(*found[name], name, entry, quantized)
                for name, entry in entries.items()
                if name not in tied
            }
            if isinstance(module, QuantLinear):
                try:
                    module.load_state_dict(values)
                except SqCpuError as error:
                    raise SqCpuError(f"{folder}: layer {prefix}: {error}") from error
                continue
            for key, value in values.items():
                # A copy: the model must not change when the file does.
                own = value.to(dtype if value.is_floating_point() else None, copy=True)
                is_parameter = key in module._parameters
                setattr(
                    module, key, nn.Parameter(own, requires_grad=False) if is_parameter else own
                )

    for target, source in tied.items():
        parent, _, key = target.rpartition(".")
        setattr(model.get_submodule(parent), key, model.get_parameter(source))
    model.all_tied_weights_keys = tied


def _read_tensor(
    path: Path, handle: Any, name: str, expected: Tensor, quantized: set[str]
) -> Tensor:
    value = cast(Tensor, handle.get_tensor(name))
    # What is not quantized may be stored in any float dtype: models mix them.
    any_float = name not in quantized and expected.is_floating_point()
    same_kind = value.dtype in FLOATS if any_float else value.dtype == expected.dtype
    if value.shape != expected.shape or not same_kind:
        wanted = "a float dtype" if any_float else str(expected.dtype).removeprefix("torch.")
        raise SqCpuError(
            f"{path}: tensor {name} is {str(value.dtype).removeprefix('torch.')} "
            f"{list(value.shape)}, expected {wanted} {list(expected.shape)}; save the model again"
        )
    return value


def _listed(names: list[str]) -> str:
    """Give "tensor a" or "3 tensors (a, b, c)", at most three by name."""
    if len(names) == 1:
        return f"tensor {names[0]}"
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} tensors ({', '.join(names[:3])}{more})"
