"""Reading a checkpoint; `sq_cpu.checkpoint` describes the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sq_cpu.checkpoint.config import (
    CONFIG,
    FLOATS,
    check_dtype,
    check_files,
    read_settings,
    record_of_settings,
)
from sq_cpu.checkpoint.curves import with_stored_curves
from sq_cpu.checkpoint.entries import layer_entries, own_entries, put_tensor, tie
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.models.hf_private import (
    bare_model,
    check_version,
    from_config,
    set_ties,
    tied_weights,
)
from sq_cpu.models.linears import linearize
from sq_cpu.nn.decomposed import DecomposedLinear
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.quantization.record import QuantizationRecord
from sq_cpu.quantization.replace import mark_quantized, replace_linears

__all__ = ["load", "read_generation_config", "restore", "skeleton"]


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
    record = with_stored_curves(record, folder, settings)
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


def _skeleton(folder: Path, dtype: torch.dtype | None) -> Any:
    def make(config: Any) -> Any:
        del config.quantization_config
        return from_config(config.architectures[0], config, dtype or config.dtype)

    return skeleton(folder, make)


def skeleton(folder: Path, make: Callable[[Any], Any]) -> Any:
    """Build a model from its config, with parameters on the meta device and buffers in memory."""
    check_version()
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        return bare_model(lambda: make(config))
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
        kind: dict[str, Any] = {"bias": linear.bias is not None, "dtype": linear.weight.dtype}
        try:
            if name in record.decomposed:
                layers[name] = DecomposedLinear.empty(*arguments, record.decomposed[name], **kind)
            else:
                layers[name] = QuantLinear(*arguments, smoothed=name in record.smoothed, **kind)
        except Exception as error:  # also a size that no memory holds
            raise SqCpuError(
                f"{folder / CONFIG}: layer {name} cannot be made ({first_line(error)}); "
                "save the model again"
            ) from error
    return layers


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
            prefix: layer_entries(module, prefix)
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
            for target, source in tied_weights(model).items()
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
                put_tensor(module, key, own)

    tie(model, tied)
    set_ties(model, tied)


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
