"""Reading a checkpoint; `sq_cpu.checkpoint` describes the format."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from sq_cpu.checkpoint.card import carry_card
from sq_cpu.checkpoint.config import (
    CONFIG,
    check_dtype,
    check_files,
    read_config,
    record_of_settings,
)
from sq_cpu.checkpoint.curves import with_stored_curves
from sq_cpu.checkpoint.rebuild import restore
from sq_cpu.checkpoint.skeleton import check_buffers, skeleton
from sq_cpu.checkpoint.stored import StoredTensors
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import as_path
from sq_cpu.models.hf_private import compute_buffers
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.parsing import read_json

__all__ = ["load", "read_generation_config"]


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Read a checkpoint that :func:`save` wrote; logits equal those before saving, bit for bit.

    Parameters are never allocated twice or initialised: each int8 weight is packed as it is read,
    so peak memory is the model's own size plus one layer (and file pages, which the kernel may
    drop at will). Nothing is allocated before the files' headers agree with config.json.

    Parameters
    ----------
    path : path-like
        The checkpoint's folder.
    model : torch.nn.Module, optional
        What to fill, for a model that transformers cannot build: a fresh instance of the class that
        was saved, float or on the meta device. Its linears are replaced in place, its values do
        not count.
    dtype : torch.dtype, optional
        fp32, bf16 or fp16 for everything that is not quantized; default: as stored.
    verify : bool
        Compare the safetensors files and ``quantization_config`` with their SHA-256 first. All
        else may be edited in any case.
    trust_remote_code : bool
        Build the model with code from the folder, where its config asks for that (``auto_map``).

    Returns
    -------
    transformers.PreTrainedModel or `model`
        In eval mode, without gradients, with ``sq_cpu_config`` as :func:`sq_cpu.quantize` set it.

    Raises
    ------
    SqCpuError
        Not a checkpoint of ours, a newer format, a model of another class, or a missing, damaged or
        mismatching file or tensor, which is named.
    """
    check_dtype(dtype)
    folder = as_path(path)
    content = read_config(folder)
    settings = content["quantization_config"]
    files = check_files(folder, settings, verify=verify)
    record = record_of_settings(settings, folder / CONFIG)
    record = with_stored_curves(record, folder, settings)
    version = settings["format_version"]
    with StoredTensors(folder, files) as stored:
        if model is not None:
            _check_class(model, content, folder)
            restore(model, record, stored, version, folder, dtype)
        else:
            built: Any = skeleton(folder, len(stored.headers), dtype=dtype, trust=trust_remote_code)

            def buffers() -> None:
                check_buffers(built, stored.nbytes, folder / CONFIG)
                compute_buffers(built)

            restore(built, record, stored, version, folder, dtype, buffers)
            model = cast(nn.Module, built)
    read_generation_config(model, folder)
    carry_card(model, folder)
    return model


def _check_class(model: nn.Module, content: dict[str, Any], folder: Path) -> None:
    saved = content.get("architectures")
    if saved != [type(model).__name__]:
        raise SqCpuError(
            f"{folder} holds a {saved[0] if isinstance(saved, list) and saved else saved}, but "
            f"model is a {type(model).__name__}: give an instance of the class that was saved"
        )
    if any(isinstance(module, QuantLinear) for module in model.modules()):
        raise SqCpuError("model is quantized already: give a fresh float one")


def read_generation_config(model: Any, folder: Path) -> None:
    """Give a model what ``folder`` says about generating, if anything."""
    path = folder / "generation_config.json"
    if hasattr(model, "generation_config") and path.exists():
        read_json(path)
        try:
            model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
        except Exception as error:
            raise SqCpuError(f"cannot load {path}: {first_line(error)}; repair it") from error
