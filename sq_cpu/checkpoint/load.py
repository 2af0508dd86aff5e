"""Reading a checkpoint; `sq_cpu.checkpoint` describes the format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn

from sq_cpu.checkpoint.card import carry_card
from sq_cpu.checkpoint.compressed_layers import GET_AGAIN
from sq_cpu.checkpoint.config import CONFIG, check_dtype, read_content
from sq_cpu.checkpoint.kinds import kind_of
from sq_cpu.checkpoint.rebuild import restore, restore_float
from sq_cpu.checkpoint.skeleton import check_buffers, skeleton
from sq_cpu.checkpoint.stored import Stored
from sq_cpu.errors import SqCpuError, first_line
from sq_cpu.files import as_path
from sq_cpu.models.hf_private import compute_buffers
from sq_cpu.nn.linear import QuantLinear
from sq_cpu.parsing import read_json
from sq_cpu.scheme import Scheme

__all__ = ["load", "load_floats", "read_generation_config"]


def load(
    path: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    verify: bool = True,
    trust_remote_code: bool = False,
    scheme: str | Scheme | None = None,
) -> nn.Module:
    """Read a checkpoint that :func:`save` wrote; logits equal those before saving, bit for bit.

    It also reads models that llm-compressor and others wrote as compressed-tensors, with int8
    weights and inputs (W8A8): per channel or tensor, inputs per token, or static and symmetric or
    not. Codes and scales are theirs. Static inputs are rounded as there; symmetric ones per token
    span 127 steps, as in vLLM, where compressed-tensors itself has 127.5. Weights of 8, 4 or 2 bits
    beside float inputs take a ``scheme``, if each row has one scale; what has scales for groups of
    input channels no row of int8 can hold exactly: `sq-cpu quantize` makes int8 of its floats.

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
    scheme : str or Scheme, optional
        How to quantize the inputs of linears that have only their weights quantized, without a
        calibration: "O1", or another dynamic one.

    Returns
    -------
    transformers.PreTrainedModel or `model`
        In eval mode, without gradients, with ``sq_cpu_config`` as :func:`sq_cpu.quantize` set it.

    Raises
    ------
    SqCpuError
        Not a checkpoint of ours or a compressed-tensors model of integers, a newer format, a model
        of another class, a scheme where none is to choose, or a missing, damaged or mismatching
        file or tensor, which is named.
    """
    check_dtype(dtype)
    folder = as_path(path)
    content = read_content(folder)
    settings = content["quantization_config"]
    kind = kind_of(settings, folder / CONFIG)
    with kind.opened(folder, settings, verify, scheme) as (record, stored, version, fix):
        if model is not None:
            _check_class(model, content, folder)
            restore(model, record, stored, version, folder, dtype, fix=fix)
        else:
            built, buffers = _built(folder, stored, dtype, trust_remote_code)
            restore(built, record, stored, version, folder, dtype, buffers, fix)
            model = cast(nn.Module, built)
    read_generation_config(model, folder)
    carry_card(model, folder)
    return model


def load_floats(
    folder: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> nn.Module:
    """Read a model of integers as the float model that they stand for.

    Weights are codes times scales, in fp32 and rounded once to ``dtype``. `SqCpuError` for a method
    whose integers stand for none, and as `load` raises it.
    """
    check_dtype(dtype)
    settings = read_content(folder)["quantization_config"]
    kind = kind_of(settings, folder / CONFIG)
    if kind.floats is None:
        raise SqCpuError(f"{folder} is quantized already; give the float model")
    with kind.floats(folder, settings) as stored:
        built, buffers = _built(folder, stored, dtype, trust_remote_code)
        restore_float(built, stored, folder, dtype or built.dtype, buffers, GET_AGAIN)
    read_generation_config(built, folder)
    return cast(nn.Module, built)


def _built(
    folder: Path, stored: Stored, dtype: torch.dtype | None, trust: bool
) -> tuple[Any, Callable[[], None]]:
    """Return a model without weights, and what computes its buffers."""
    built = skeleton(folder, len(stored.headers), dtype=dtype, trust=trust)

    def buffers() -> None:
        check_buffers(built, stored.nbytes, folder / CONFIG)
        compute_buffers(built)

    return built, buffers


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
